"""Reading pickles of tensors without running anything that is in them.

The predefined G of the original PLDR-LLM code is pickled as nested lists of tensors, their storages inside as bytes of
`torch.save` in its legacy format, which are pickles again, followed by the numbers. `torch.load` does not read such
files, and `pickle.load` would run whatever they say. So they are interpreted here: a small stack machine knows the
opcodes that tensors need and no others. A name in the file is never imported; it stays a name, and the few calls that
pickled tensors make are carried out by functions of this module, which check every argument. Nothing can be built but
lists, tuples, dicts, numbers, strings and tensors, and no more memory is taken than a limit allows.

What is built may be nested without end, or hold itself: no value of a file is hashed, compared as a whole or put into a
message before it is known to be a plain one.
"""

from __future__ import annotations

import io
import math
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.errors import DataError

MAX_BYTES = 2**30
"""Of a file, and of all that is built of it: far above any G, far below what hurts."""

_DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}
# What a legacy torch.save writes before the object: a magic number, a version, and a description of the machine.
_MAGIC_NUMBER, _FORMAT_VERSION = 0x1950A86A20F9469CFC6C, 1001
_COUNT_BYTES = 8
_MAX_DEPTH = 8
_MAX_AXES = 64
_MAX_OPCODES = 4_000_000
"""A DCP checkpoint of a hundred thousand chunks has two million; each builds at most some hundred bytes."""
_MAX_STACK = 50_000
"""What stands on the stack at once; picklers put a thousand items there before they hand them to a list or dict."""
_ENTRY_BYTES = 1024  # more than an entry takes: G has a few hundred of them


class _RefusedError(Exception):
    """The file holds something that is no tensor."""


@dataclass(frozen=True)
class Name:
    """`module.name` in a file: compared, never looked up."""

    path: str


@dataclass(frozen=True)
class _Storage:
    numbers: Tensor
    """1D, over the file's bytes."""


@dataclass(eq=False)
class Inert:
    """An object or a call in a pickle that was read without building anything: what it names, and what it is given."""

    name: str
    """`module.name`, never looked up."""
    arguments: tuple[Any, ...] = ()
    state: Any = None


_MARK = object()
_KEYS = (str, int, bytes, type(None), Name, Inert)


def load_inert(path: Path) -> Any:
    """Read a pickle of any objects: `Inert` ones in their place, and plain values. Nothing of them is built or called.

    Raises:
        DataError: the file is damaged, needs opcodes that are not known here, or is beyond `MAX_BYTES`.
    """
    return _interpret(path, lambda stream, budget: _InertMachine(stream, budget).run(), "copy it anew")


def load_tensors(path: Path) -> list[Any]:
    """Nested lists (tuples become lists) of tensors out of a pickle file.

    Raises:
        DataError: the file holds anything else, is damaged, or is beyond `MAX_BYTES`. Nothing in it has been executed.
    """
    fix = "give a pickle of nested lists of tensors, such as the original code writes for a predefined G"
    found: list[Any] = _interpret(path, lambda stream, budget: _as_lists(_Machine(stream, budget).run(), budget), fix)
    return found


def _interpret(path: Path, read: Callable[[io.BytesIO, _Budget], Any], fix: str) -> Any:
    if path.stat().st_size > MAX_BYTES:
        raise DataError(f"{path} is refused: it has {path.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
    try:
        return read(io.BytesIO(path.read_bytes()), _Budget())
    except _RefusedError as error:
        raise DataError(f"{path} is refused: {error}. Nothing in it was executed; {fix}") from error
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AssertionError, RuntimeError) as error:
        # A damaged pickle fails in many ways: bytes missing, a stack too short, an index that is not there; and
        # pickletools asserts, and torch overflows, on numbers that make no sense.
        raise DataError(f"{path} is no whole pickle ({type(error).__name__}: {error}); copy it anew") from error


class _Budget:
    """Bytes that may still be taken: a short file can otherwise ask for the same large thing again and again."""

    def __init__(self) -> None:
        self._left, self._opcodes_left = MAX_BYTES, _MAX_OPCODES

    def count_opcode(self) -> None:
        self._opcodes_left -= 1
        if self._opcodes_left < 0:
            raise _RefusedError(f"it has more than {_MAX_OPCODES:,} opcodes")

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise _RefusedError(f"its tensors take more than {MAX_BYTES:,} bytes")


class _Machine:
    """Interprets one pickle of a stream, up to its STOP; what follows stays in the stream."""

    _actions: Mapping[str, Callable[[Any, Any], None]]
    """By opcode; set below, where they are listed."""

    def __init__(self, stream: io.BytesIO, budget: _Budget, external: Callable[[Any], Any] | None = None) -> None:
        self._stream, self._budget, self._external = stream, budget, external
        self._stack: list[Any] = []
        # A dict: the index of an entry can be any number, and a list as long as that may not fit into memory.
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        for opcode, argument, place in pickletools.genops(self._stream):
            self._budget.count_opcode()
            if len(self._stack) > _MAX_STACK:
                raise _RefusedError(f"it has more than {_MAX_STACK:,} values on its stack")
            if opcode.name in _CONSTANTS:
                self._stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _LITERALS:
                self._stack.append(argument)
            elif opcode.name in self._actions:
                self._actions[opcode.name](self, argument)
            else:
                raise _RefusedError(f"opcode {opcode.name} at byte {place} is not one that tensors need")
        return self._stack.pop()

    def _ignore(self, _: Any) -> None:
        pass

    def _memoize(self, argument: int | None) -> None:
        self._memo[len(self._memo) if argument is None else argument] = self._stack[-1]

    def _recall(self, argument: int) -> None:
        self._stack.append(self._memo[argument])

    def _new_list(self, _: Any) -> None:
        self._stack.append([])

    def _new_dict(self, _: Any) -> None:
        self._stack.append({})

    def _mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def _above_mark(self) -> list[Any]:
        place = len(self._stack) - 1
        while self._stack[place] is not _MARK:
            place -= 1
            if place < 0:
                raise IndexError("no mark on the stack")
        values = self._stack[place + 1 :]
        del self._stack[place:]
        return values

    def _make_list(self, _: Any) -> None:
        self._stack.append(self._above_mark())

    def _make_tuple(self, _: Any) -> None:
        self._stack.append(tuple(self._above_mark()))

    def _tuple_of_last(self, count: int) -> None:
        values = tuple(self._stack[-count:])
        if len(values) < count:
            raise IndexError("stack too short")
        del self._stack[-count:]
        self._stack.append(values)

    def _append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def _appends(self, _: Any) -> None:
        self._extend(self._above_mark())

    def _extend(self, values: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _RefusedError(f"it appends to a {type(self._stack[-1]).__name__}")
        self._stack[-1].extend(values)

    def _set_items(self, _: Any) -> None:
        values = self._above_mark()
        if not isinstance(self._stack[-1], dict) or len(values) % 2:
            raise _RefusedError("it sets items of something that is no dict")
        for key in values[::2]:
            # Hashing a tuple walks through all that it holds, as deep as that goes.
            if not isinstance(key, _KEYS):
                raise _RefusedError(f"a key of a dict is a {type(key).__name__}")
        self._stack[-1].update(zip(values[::2], values[1::2], strict=True))

    def _set_item(self, _: Any) -> None:
        self._stack[-2:-2] = [_MARK]
        self._set_items(None)

    def _name(self, argument: str) -> None:
        self._stack.append(Name(argument.replace(" ", ".")))

    def _name_from_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise _RefusedError("it names something by other values than texts")
        self._stack.append(Name(f"{module}.{name}"))

    def _external_object(self, _: Any) -> None:
        if self._external is None:
            raise _RefusedError("it refers to an object outside the file")
        self._stack.append(self._external(self._stack.pop()))

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        known = _CALLS.get(function.path) if isinstance(function, Name) else None
        if known is None:
            asked = function.path[:200] if isinstance(function, Name) else f"a {type(function).__name__} as a function"
            raise _RefusedError(f"it asks for {asked}")
        if not isinstance(arguments, tuple):
            raise _RefusedError("it calls a function without a tuple of arguments")
        self._stack.append(known(self._budget, *arguments))


_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = frozenset(
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8".split()
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _Machine._ignore),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"), _Machine._memoize),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), _Machine._recall),
    "MARK": _Machine._mark,
    "EMPTY_LIST": _Machine._new_list,
    "LIST": _Machine._make_list,
    "APPEND": _Machine._append,
    "APPENDS": _Machine._appends,
    "TUPLE": _Machine._make_tuple,
    "TUPLE1": lambda machine, _: machine._tuple_of_last(1),
    "TUPLE2": lambda machine, _: machine._tuple_of_last(2),
    "TUPLE3": lambda machine, _: machine._tuple_of_last(3),
    "EMPTY_DICT": _Machine._new_dict,
    "SETITEM": _Machine._set_item,
    "SETITEMS": _Machine._set_items,
    "GLOBAL": _Machine._name,
    "STACK_GLOBAL": _Machine._name_from_stack,
    "BINPERSID": _Machine._external_object,
    "REDUCE": _Machine._call,
}
_Machine._actions = _ACTIONS


class _InertMachine(_Machine):
    """Interprets a pickle of any objects, which stay inert."""

    def _call(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise _RefusedError(f"it calls a {type(function).__name__}")
        self._stack.append(Inert(function.path, arguments))

    def _set_state(self, _: Any) -> None:
        state = self._stack.pop()
        if not isinstance(self._stack[-1], Inert):
            raise _RefusedError(f"it sets the state of a {type(self._stack[-1]).__name__}")
        self._stack[-1].state = state


_InertMachine._actions = _ACTIONS | {
    "REDUCE": _InertMachine._call,
    "NEWOBJ": _InertMachine._call,
    "BUILD": _InertMachine._set_state,
}


def _empty_dict(_: _Budget, *arguments: Any) -> dict[Any, Any]:
    if arguments:
        raise _RefusedError("a tensor's hooks are not empty")
    return {}


def _encode(budget: _Budget, text: Any, encoding: Any) -> bytes:
    """Return the bytes, as pickle protocols 0 to 2 write them: as text of the characters 0 to 255."""
    if not isinstance(text, str) or encoding != "latin1":
        raise _RefusedError("it encodes something else than bytes")
    budget.take(len(text))
    return text.encode("latin1")


def _load_storage(budget: _Budget, data: Any) -> _Storage:
    """Return the numbers in a legacy `torch.save` of one storage."""
    if not isinstance(data, bytes):
        raise _RefusedError("a storage is not given as bytes")
    budget.take(len(data))
    stream = io.BytesIO(data)
    if [_Machine(stream, budget).run() for _ in range(2)] != [_MAGIC_NUMBER, _FORMAT_VERSION]:
        raise _RefusedError("a storage is in no format that is known here")
    machine = _Machine(stream, budget).run()
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise _RefusedError("a storage was written on a big-endian machine")
    described = _Machine(stream, budget, external=_describe).run()
    keys = _Machine(stream, budget).run()
    if not isinstance(described, _Described) or keys != [described.key]:
        raise _RefusedError("a storage holds more than numbers")
    count, dtype = described.count, described.dtype
    written = int.from_bytes(stream.read(_COUNT_BYTES), "little")
    if written != count or len(data) - stream.tell() != count * dtype.itemsize:
        raise _RefusedError(f"a storage of {count} numbers has {len(data) - stream.tell()} bytes")
    numbers = bytearray(data[stream.tell() :])
    return _Storage(torch.frombuffer(numbers, dtype=dtype) if count else torch.empty(0, dtype=dtype))


@dataclass(frozen=True)
class _Described:
    """A storage whose numbers follow."""

    dtype: torch.dtype
    key: str
    count: int


def _describe(identifier: Any) -> _Described:
    """Of ("storage", type, key, device, count, None), as torch.save refers to a storage."""
    if not isinstance(identifier, tuple) or len(identifier) != 6 or identifier[0] != "storage":
        raise _RefusedError("a storage refers to something else than numbers")
    _, kind, key, _, count, view = identifier
    name = kind.path.removeprefix("torch.") if isinstance(kind, Name) else None
    if name not in _DTYPES or not isinstance(key, str) or type(count) is not int or count < 0 or view is not None:
        raise _RefusedError("a storage is described by something else than a type of numbers and a length")
    return _Described(_DTYPES[name], key, count)


def _rebuild_tensor(
    budget: _Budget, storage: Any, offset: Any, size: Any, stride: Any, _gradient: Any = None, *_hooks: Any
) -> Tensor:
    """Return a tensor over a storage; the gradient's flag and the hooks are dropped."""
    if not isinstance(storage, _Storage) or not isinstance(size, tuple) or not isinstance(stride, tuple):
        raise _RefusedError("a tensor is described by something else than a storage, a size and a stride")
    if len(size) > _MAX_AXES or len(stride) > _MAX_AXES:
        raise _RefusedError(f"a tensor has more than {_MAX_AXES} axes")
    if not all(type(each) is int and 0 <= each <= MAX_BYTES for each in (offset, *size, *stride)):
        raise _RefusedError("a tensor's offset, size and stride are not all numbers from 0 up")
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=False))
    if len(size) != len(stride) or (0 not in size and last >= len(storage.numbers)):
        raise _RefusedError(f"a tensor of shape {size} lies outside its storage of {len(storage.numbers)} numbers")
    # A stride of 0 makes a large tensor of one number.
    budget.take(math.prod(size) * storage.numbers.element_size())
    if 0 in size:
        return torch.empty(size, dtype=storage.numbers.dtype)
    return storage.numbers.as_strided(size, stride, offset).clone(memory_format=torch.contiguous_format)


def _rebuild_parameter(_: _Budget, data: Any, _gradient: Any = None, *_hooks: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise _RefusedError("a parameter holds no tensor")
    return data


_CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _empty_dict,
    "_codecs.encode": _encode,
    "torch.storage._load_from_bytes": _load_storage,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}
"""The names that a pickled tensor may call, and what happens instead."""


def _as_lists(loaded: Any, budget: _Budget) -> list[Any]:
    def convert(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return value
        if not isinstance(value, list | tuple) or depth >= _MAX_DEPTH:
            raise _RefusedError(f"it holds a {type(value).__name__}" + " within too many lists" * (depth >= _MAX_DEPTH))
        # A list that holds itself several times would otherwise be walked through for ever.
        budget.take(len(value) * _ENTRY_BYTES)
        return [convert(each, depth + 1) for each in value]

    if not isinstance(loaded, list | tuple):
        raise _RefusedError(f"it is a {type(loaded).__name__}, not a list of tensors")
    converted: list[Any] = convert(loaded, 0)
    return converted
