"""Reading pickles of tensors without running anything that is in them.

The predefined G of the original PLDR-LLM code is pickled as nested lists of tensors, their storages inside as bytes of
`torch.save`. `torch.load` does not read such files, and `pickle.load` would run whatever they say. Here every opcode
and every name is on a short list, each name stands for a function of ours that checks its arguments, and the result
is checked to be lists of tensors.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.errors import DataError

_OPCODES = frozenset(
    "PROTO FRAME STOP MARK POP POP_MARK MEMOIZE PUT BINPUT LONG_BINPUT GET BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    "INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE "
    "SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8 LIST EMPTY_LIST APPEND APPENDS TUPLE EMPTY_TUPLE "
    "TUPLE1 TUPLE2 TUPLE3 EMPTY_DICT DICT SETITEM SETITEMS DUP GLOBAL STACK_GLOBAL REDUCE".split()
)


def load_tensors(path: Path) -> list[Any]:
    """Nested lists (tuples become lists) of tensors out of a pickle file.

    Raises:
        DataError: the file holds anything else, or is no pickle. Nothing in it has been executed.
    """
    data = path.read_bytes()
    try:
        _check_opcodes(data)
        loaded = _TensorUnpickler(io.BytesIO(data)).load()
        return _as_lists(loaded)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is refused: {error}. Nothing in it was executed; give a pickle of nested lists of tensors, such "
            "as the original code writes for a predefined G"
        ) from error
    except Exception as error:
        # A damaged pickle fails in any way: bytes missing, a stack too short, an index that is not there.
        raise DataError(f"{path} is no whole pickle: {type(error).__name__}: {error}") from error


def _check_opcodes(data: bytes) -> None:
    """Refuse opcodes that build other objects, before anything is built."""
    for opcode, _, place in pickletools.genops(data):
        if opcode.name not in _OPCODES:
            raise pickle.UnpicklingError(f"opcode {opcode.name} at byte {place} is not one that tensors need")


class _TensorUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """The function that stands for a name, if it is one that pickled tensors use."""
        allowed: dict[tuple[str, str], Callable[..., Any]] = {
            ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
            ("torch.storage", "_load_from_bytes"): _load_storage,
            ("collections", "OrderedDict"): _empty_dict,
        }
        if (module, name) not in allowed:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return allowed[module, name]

    def persistent_load(self, pid: Any) -> Any:
        """Refused: tensors pickled by themselves have none."""
        raise pickle.UnpicklingError(f"it refers to an object outside the file, {pid!r}")


def _load_storage(data: Any) -> torch.TypedStorage:
    if not isinstance(data, bytes):
        raise pickle.UnpicklingError("a storage is not given as bytes")
    try:
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        raise pickle.UnpicklingError(f"a storage holds more than numbers ({str(error).splitlines()[0]})") from error
    if not isinstance(storage, torch.TypedStorage):
        raise pickle.UnpicklingError(f"a storage is a {type(storage).__name__}")
    return storage


def _rebuild_tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor over a storage; hooks and the gradient's flag, which follow, are dropped."""
    numbers = [
        offset,
        *(size if isinstance(size, tuple) else [None]),
        *(stride if isinstance(stride, tuple) else [None]),
    ]
    if not isinstance(storage, torch.TypedStorage) or not all(type(each) is int and each >= 0 for each in numbers):
        raise pickle.UnpicklingError("a tensor is described by something else than a storage and integers")
    available = len(storage)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=False))
    if len(size) != len(stride) or (0 not in size and last >= available):
        raise pickle.UnpicklingError(f"a tensor of shape {size} lies outside its storage of {available} numbers")
    view = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage, offset, size, stride)
    return view.clone()


def _empty_dict(*arguments: Any) -> OrderedDict[Any, Any]:
    if arguments:
        raise pickle.UnpicklingError("a tensor's hooks are not empty")
    return OrderedDict()


def _as_lists(loaded: Any) -> list[Any]:
    def convert(value: Any, depth: int) -> Any:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, Sequence) and not isinstance(value, str | bytes) and depth < 8:
            return [convert(each, depth + 1) for each in value]
        raise pickle.UnpicklingError(f"it holds a {type(value).__name__}")

    if isinstance(loaded, Tensor) or not isinstance(loaded, Sequence) or isinstance(loaded, str | bytes):
        raise pickle.UnpicklingError(f"it is a {type(loaded).__name__}, not a list of tensors")
    converted: list[Any] = convert(loaded, 0)
    return converted
