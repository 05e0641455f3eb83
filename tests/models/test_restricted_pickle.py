"""Pickles of tensors: read as the original code writes them, and nothing else is ever built, run or allocated."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import pickletools
import struct
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pldr_train.curvature import restricted_pickle
from pldr_train.curvature.restricted_pickle import load_tensors
from pldr_train.errors import DataError

# The storage of one number as torch pickles it: a legacy torch.save.
ONE_NUMBER: bytes = torch.zeros(1)._typed_storage().__reduce__()[1][0]


class Calls:
    """Pickled, this is a call of a function with arguments."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def tensor_like(size: Any, stride: Any, offset: Any = 0, storage: Any = None, hooks: Any = None) -> Calls:
    storage = torch.zeros(1)._typed_storage() if storage is None else storage
    hooks = OrderedDict() if hooks is None else hooks
    return Calls(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, hooks)


def storage_of(data: Any) -> Calls:
    return Calls(torch.storage._load_from_bytes, data)


def saved(value: Any, new_format: bool = False) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=new_format)
    return stream.getvalue()


def read(folder: Path, content: bytes) -> list[Any]:
    path = folder / "G.pkl"
    path.write_bytes(content)
    return load_tensors(path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool], ids=str
)
def test_tensors_come_back_bit_for_bit(tmp_path: Path, protocol: int, dtype: torch.dtype) -> None:
    layers = [[torch.randn(1, 2, 4, 4).to(dtype) for _ in range(3)] for _ in range(2)]
    found = read(tmp_path, pickle.dumps(layers, protocol=protocol))
    assert [len(layer) for layer in found] == [3, 3]
    for mine, theirs in zip(chain(*found), chain(*layers), strict=True):
        assert mine.dtype == dtype
        assert torch.equal(mine, theirs)


def test_views_shared_storages_and_parameters_are_read_as_what_they_show(tmp_path: Path) -> None:
    whole = torch.randn(3, 2, 4, 4)
    views = [
        whole[1:2],
        whole.transpose(2, 3)[:1],
        torch.eye(4).expand(1, 2, 4, 4),
        whole[2, 1, 3],
        torch.tensor(1.5),
        torch.ones(0, 4),
    ]
    layer = [torch.nn.Parameter(whole[:1]), whole[:1].clone().requires_grad_()]
    found = read(tmp_path, pickle.dumps((views, layer, layer)))
    for mine, theirs in zip(chain(*found), [*views, *layer, *layer], strict=True):
        assert type(mine) is Tensor
        assert not mine.requires_grad
        assert mine.is_contiguous()
        assert torch.equal(mine, theirs)


def hostile_pickles(canary: str) -> dict[str, bytes]:
    """Pickles that would create the file `canary`, by all ways that are known."""
    code = f"open({canary!r}, 'w').close()"
    touch = Calls(os.system, f"touch {canary}")
    good = torch.ones(1)._typed_storage()
    by_instance = f"(S'touch {canary}'\nios\nsystem\n."
    by_object = f"(cos\nsystem\nS'touch {canary}'\no."
    by_getattr = f"cbuiltins\ngetattr\n(cbuiltins\n__import__\n(S'os'\ntRS'system'\ntR(S'touch {canary}'\ntR."
    argument = f"touch {canary}".encode()
    pushed = b"\x8c" + bytes([len(argument)]) + argument
    dotted = b"\x80\x04\x8c\x05torch\x8c\x09os.system\x93" + pushed + b"\x85R."
    keys = ONE_NUMBER.rindex(b"\x80\x02]")
    in_keys = ONE_NUMBER[:keys] + b"\x80\x04cos\nsystem\n" + pushed + b"\x85R."
    set_state = pickle.dumps([1], protocol=2)[:-1] + b"}X\x01\x00\x00\x00aK\x01sb."
    return {
        "a call": pickle.dumps([[touch]]),
        "a call by name in the old way": pickle.dumps([[touch]], protocol=0),
        "eval": pickle.dumps([[Calls(eval, code)]]),
        "exec": pickle.dumps([[Calls(exec, code)]]),
        "getattr": by_getattr.encode(),
        "INST": by_instance.encode(),
        "OBJ": by_object.encode(),
        "a dotted name": dotted,
        "BUILD": set_state,
        "NEWOBJ": b"\x80\x02cbuiltins\nobject\n)\x81.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02X\x01\x00\x00\x00aQ.",
        "numpy's loader": pickle.dumps([[Calls(__import__("numpy").load, canary)]]),
        "torch's own loader": pickle.dumps([[Calls(torch.load, canary)]]),
        "beside good tensors": pickle.dumps([[torch.ones(1, 1, 2, 2)] * 2, [touch]]),
        "in a storage": pickle.dumps([[storage_of(saved(touch))]]),
        "in a storage, deep": pickle.dumps([[tensor_like((1,), (1,), storage=storage_of(saved([good, touch])))]]),
        "in a storage of the new format": pickle.dumps([[storage_of(saved(touch, new_format=True))]]),
        "in a tensor's size": pickle.dumps([[tensor_like(touch, (1,))]]),
        "in a tensor's hooks": pickle.dumps([[tensor_like((1,), (1,), hooks=touch)]]),
        "after a storage": pickle.dumps([[storage_of(ONE_NUMBER + pickle.dumps(touch))]]),
        "in a storage's keys": pickle.dumps([[storage_of(in_keys)]]),
    }


@pytest.mark.parametrize("kind", hostile_pickles(""))
def test_a_hostile_pickle_is_refused_and_nothing_in_it_happens(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    content = hostile_pickles(str(canary))[kind]
    with pytest.raises(DataError, match=r"G\.pkl is (refused|no whole pickle)") as refusal:
        read(tmp_path, content)
    assert str(refusal.value).count("\n") == 0
    assert not canary.exists()


EFFECTIVE = (
    "a call", "a call by name in the old way", "eval", "exec", "getattr", "INST", "OBJ", "a dotted name",
    "beside good tensors", "in a storage", "in a storage, deep", "in a storage of the new format",
    "in a storage's keys", "in a tensor's size", "in a tensor's hooks",
)  # fmt: skip


@pytest.mark.parametrize("kind", EFFECTIVE)
def test_the_standard_library_would_have_run_them(tmp_path: Path, kind: str) -> None:
    canary = tmp_path / "canary"
    with contextlib.suppress(Exception):
        pickle.loads(hostile_pickles(str(canary))[kind])
    assert canary.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "it is a NoneType, not a list of tensors"),
        (torch.ones(2), "it is a Tensor, not a list of tensors"),
        ([1.5], "it holds a float"),
        ([{"G": torch.ones(2)}], "it holds a dict"),
        ([OrderedDict(a=1)], "it holds a dict"),
        ([torch.ones(2, dtype=torch.complex64)], "something else than a type of numbers and a length"),
        ([storage_of(ONE_NUMBER)], "it holds a _Storage"),
        ([tensor_like((2,), (1,))], r"shape \(2,\) lies outside its storage of 1 numbers"),
        ([tensor_like((1,), (1,), offset=1)], "lies outside its storage"),
        ([tensor_like((1,), (1, 1))], "lies outside its storage"),
        ([tensor_like((1,), (1,), offset=-1)], "not all numbers from 0 up"),
        ([tensor_like((True,), (1,))], "not all numbers from 0 up"),
        ([tensor_like((1 << 70,), (0,))], "not all numbers from 0 up"),
        ([tensor_like([1], [1])], "something else than a storage, a size and a stride"),
        ([tensor_like((1,), (1,), storage=3)], "something else than a storage"),
        ([Calls(OrderedDict, [])], "hooks are not empty"),
        ([storage_of("text")], "a storage is not given as bytes"),
        ([storage_of(ONE_NUMBER[:-1])], "a storage of 1 numbers has 3 bytes"),
        ([storage_of(ONE_NUMBER + b"\0")], "a storage of 1 numbers has 5 bytes"),
        ([storage_of(saved(torch.ones(1), new_format=True))], "is no whole pickle|in no format"),
        ([Calls(complex, 1, 2)], "it asks for builtins.complex"),
    ],
    ids=str,
)
def test_what_is_no_list_of_tensors_is_refused_with_the_reason(tmp_path: Path, value: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(tmp_path, pickle.dumps(value))


@pytest.mark.parametrize("kept", [0, 1, 2, 50, 300, -30, -1])
def test_a_cut_file_is_no_whole_pickle(tmp_path: Path, kept: int) -> None:
    with pytest.raises(DataError, match=r"G\.pkl is (no whole pickle|refused)"):
        read(tmp_path, pickle.dumps([[torch.randn(1, 2, 4, 4)] * 2])[:kept])


def test_any_damage_is_an_error_of_the_file_or_harmless(tmp_path: Path) -> None:
    content = pickle.dumps([[torch.ones(1, 1, 2, 2)] * 2])
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= int(torch.randint(1, 256, (), generator=generator))
        try:
            read(tmp_path, bytes(damaged))
        except DataError:
            refused += 1
    assert refused > len(content) / 2


def payload_claiming(count: int) -> bytes:
    """The storage of one number, said to hold `count`."""
    place = ONE_NUMBER.index(b"K\x01N", ONE_NUMBER.index(b"cpu"))
    return ONE_NUMBER[:place] + b"\x8a\x08" + struct.pack("<q", count) + ONE_NUMBER[place + 2 :]


def itself(times: int) -> list[Any]:
    holder: list[Any] = []
    holder.extend([holder] * times)
    return holder


BOMBS = {
    "a tensor of one number repeated": pickle.dumps([[tensor_like((1, 1 << 15, 1 << 15), (0, 0, 0))]]),
    "a storage that claims a terabyte": pickle.dumps([[storage_of(payload_claiming(1 << 40))]]),
    "many tensors, each allowed": pickle.dumps([tensor_like((1, 1 << 12, 1 << 12), (0, 0, 0)) for _ in range(20)]),
    "lists within lists": b"\x80\x04" + b"]" * 5000 + b"a" * 4999 + b".",
    "a list that holds itself": pickle.dumps(itself(1000)),
}


@pytest.mark.parametrize("kind", BOMBS)
def test_a_short_file_cannot_take_much_memory(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "MAX_BYTES", 1 << 26)
    with pytest.raises(DataError, match="refused"):
        read(tmp_path, BOMBS[kind])


@pytest.mark.parametrize("opcode", [b"r\xff\xff\xff\x7f", b"p99999999999999\n"])
def test_a_high_place_in_the_memo_takes_no_memory(tmp_path: Path, opcode: bytes) -> None:
    """The standard library's unpickler allocates a table up to that place."""
    tracemalloc.start()
    assert read(tmp_path, b"\x80\x04]" + opcode + b".") == []
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_a_huge_file_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restricted_pickle, "MAX_BYTES", 100)
    with pytest.raises(DataError, match=r"it has 2\d\d bytes, more than 100|it has \d+ bytes, more than 100"):
        read(tmp_path, pickle.dumps([[torch.ones(1, 1, 2, 2)]]))


def test_every_opcode_that_is_known_is_one_of_pickles() -> None:
    handled = restricted_pickle._LITERALS | restricted_pickle._CONSTANTS.keys() | restricted_pickle._ACTIONS.keys()
    assert handled <= {opcode.name for opcode in pickletools.opcodes}
    assert not handled & {"BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}
