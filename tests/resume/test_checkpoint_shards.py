"""Weights and moments on disk: tensors, whole or cut into runs of elements, in the files of several processes."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pldr_train.checkpoint.manifest import describe_file, find_defect
from pldr_train.checkpoint.shards import (
    OPTIMIZER,
    WEIGHTS,
    Piece,
    ShardReader,
    check_same_tensors,
    even_shares,
    file_name,
    read_weights,
    write_pieces,
)
from pldr_train.errors import CheckpointError
from tests.resume.test_checkpoint_files import a_disk_with, part, write

TENSORS = {
    "matrix": torch.arange(35.0).reshape(5, 7),
    "vector": torch.linspace(-1, 1, 11).bfloat16(),
    "number": torch.tensor(3.5, dtype=torch.float64),
    "flags": torch.tensor([True, False, True]),
    "counts": torch.arange(4),
}
"""Elements of 1, 2, 4 and 8 bytes."""


def write_shares(folder: Path, shares: Sequence[Sequence[Piece]], kind: str = WEIGHTS) -> Path:
    folder.mkdir(exist_ok=True)
    for rank, share in enumerate(shares):
        write_pieces(folder / file_name(kind, rank, len(shares)), share)
    return folder


def cut_at_random(generator: random.Random) -> list[list[Piece]]:
    """All of TENSORS, each cut anywhere and its pieces dealt to some processes in any order."""
    shares: list[list[Piece]] = [[] for _ in range(generator.randint(1, 4))]
    for name, tensor in TENSORS.items():
        inner = range(1, tensor.numel())
        cuts = sorted(generator.sample(inner, generator.randint(0, min(3, len(inner)))))
        for start, stop in zip([0, *cuts], [*cuts, tensor.numel()], strict=True):
            generator.choice(shares).append(part(name, tensor, start, stop))
    for share in shares:
        generator.shuffle(share)
    return shares


def test_tensors_cut_anywhere_are_read_at_any_range(tmp_path: Path) -> None:
    generator = random.Random(5)
    for number in range(30):
        folder = write_shares(tmp_path / str(number), cut_at_random(generator))
        reader = ShardReader(folder, WEIGHTS)
        assert reader.names == tuple(sorted(TENSORS))
        for name, tensor in TENSORS.items():
            assert reader.shape(name) == tuple(tensor.shape)
            assert reader.whole(name).dtype == tensor.dtype
            assert torch.equal(reader.whole(name), tensor)
            start = generator.randint(0, tensor.numel())
            stop = generator.randint(start, tensor.numel())
            assert torch.equal(reader.read(name, start, stop), tensor.reshape(-1)[start:stop])
        assert all(torch.equal(tensor, TENSORS[name]) for name, tensor in read_weights(folder).items())


@pytest.mark.parametrize("num_shares", [1, 2, 3, 7, 60])
def test_even_shares_are_even_and_hold_every_element_once_in_order(tmp_path: Path, num_shares: int) -> None:
    # The last one is itself a run of a larger tensor's elements.
    tensors = {"a": torch.arange(35.0).reshape(5, 7), "b": torch.tensor(100.0), "c": torch.arange(200.0, 216.0)}
    pieces = [part("a", tensors["a"]), part("b", tensors["b"]), part("c", tensors["c"], 4, 16)]
    shares = even_shares(pieces, num_shares)
    assert len(shares) == num_shares
    sizes = [sum(piece.num_elements for piece in share) for share in shares]
    assert sum(sizes) == 48
    assert max(sizes) - min(sizes) <= 1
    ours = torch.cat([piece.read().reshape(-1) for share in shares for piece in share])
    assert torch.equal(ours, torch.cat([piece.read().reshape(-1) for piece in pieces]))
    for share in shares:
        for piece in share:
            flat = tensors[piece.name].reshape(-1)
            assert torch.equal(piece.read().reshape(-1), flat[piece.start : piece.start + piece.num_elements])
    reader = ShardReader(write_shares(tmp_path / "shares", shares), WEIGHTS)
    assert torch.equal(reader.whole("a"), tensors["a"])
    assert torch.equal(reader.read("c", 4), tensors["c"][4:])


def test_elements_that_no_file_holds_are_named(tmp_path: Path) -> None:
    weight = torch.arange(60.0).reshape(6, 10)
    pieces = [part("weight", weight, 0, 20), part("weight", weight, 30, 60)]
    reader = ShardReader(write_shares(tmp_path / "gap", [[piece] for piece in pieces]), WEIGHTS)
    assert torch.equal(reader.read("weight", 5, 20), weight.reshape(-1)[5:20])
    assert torch.equal(reader.read("weight", 30), weight.reshape(-1)[30:])
    for start, stop in ((0, 60), (15, 25), (19, 31)):
        with pytest.raises(CheckpointError, match=rf"gap: elements \[20, {stop}\) of weight are missing in"):
            reader.read("weight", start, stop)
    with pytest.raises(CheckpointError, match=r"elements \[25, 40\) of weight are missing"):
        reader.read("weight", 25, 40)
    for missing in (lambda: reader.read("bias"), lambda: reader.whole("bias")):
        with pytest.raises(CheckpointError, match="gap: bias is missing in its weights files"):
            missing()
    (tmp_path / "gap" / file_name(WEIGHTS, 1, 2)).unlink()
    with pytest.raises(CheckpointError, match=r"elements \[20, 60\) of weight are missing"):
        read_weights(tmp_path / "gap")
    with pytest.raises(CheckpointError, match=r"gap has no optimizer-\*\.safetensors; it is no checkpoint"):
        ShardReader(tmp_path / "gap", OPTIMIZER)


def test_a_checkpoint_of_another_model_is_refused_by_its_first_tensor(tmp_path: Path) -> None:
    folder = write_shares(tmp_path / "model", [[part(name, tensor) for name, tensor in TENSORS.items()]])
    reader = ShardReader(folder, WEIGHTS)
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    check_same_tensors(shapes, reader, folder)
    other = shapes | {"matrix": (7, 5), "more": (2,)}
    with pytest.raises(CheckpointError, match=r"2 tensors differ, the first is matrix \(\[5, 7\] there, \[7, 5\] in"):
        check_same_tensors(other, reader, folder)
    with pytest.raises(CheckpointError, match=r"1 tensors differ, the first is more \(none there, \[2\] in"):
        check_same_tensors(shapes | {"more": (2,)}, reader, folder)
    with pytest.raises(CheckpointError, match=r"the first is flags \(\[3\] there, none in"):
        check_same_tensors({name: shape for name, shape in shapes.items() if name != "flags"}, reader, folder)


def with_header(entries: Any, data: bytes = bytes(40)) -> bytes:
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [10], "data_offsets": [0, 40]} | changes


DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "a few bytes": b"abc",
    "no JSON": struct.pack("<Q", 10) + b"no json at all",
    "a header longer than the file": struct.pack("<Q", 1 << 40) + b"{}",
    "a place before the data": with_header({"weight": entry(data_offsets=[-40, 0])}),
    "no table": with_header([1, 2]),
    "cut": with_header({"weight": entry()}, bytes(39)),
    "of another size than its shape": with_header({"weight": entry(shape=[9])}),
    "an unknown type": with_header({"weight": entry(dtype="F8")}),
    "no offsets": with_header({"weight": {"dtype": "F32", "shape": [10]}}),
    "a piece without its tensor's shape": with_header({"weight@10": entry()}),
    "a piece at no number": with_header({"__metadata__": {"shapes": '{"weight": [20]}'}, "weight@x": entry()}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, case: str) -> None:
    file = tmp_path / file_name(WEIGHTS, 0, 1)
    file.write_bytes(DAMAGED[case])
    with pytest.raises(CheckpointError, match=rf"{file.name} cannot be read as a part of a checkpoint \(.+\); use"):
        ShardReader(tmp_path, WEIGHTS)


def test_files_that_disagree_on_a_shape_are_refused(tmp_path: Path) -> None:
    shares = [[part("weight", torch.zeros(6), 0, 3)], [part("weight", torch.zeros(3, 2), 3, 6)]]
    with pytest.raises(CheckpointError, match="weight has two shapes"):
        ShardReader(write_shares(tmp_path / "two", shares), WEIGHTS)


def test_the_files_are_plain_safetensors(tmp_path: Path) -> None:
    pieces = [part(name, tensor) for name, tensor in TENSORS.items()]
    pieces.append(part("spread", torch.arange(20.0).reshape(4, 5), 6, 13))
    file = tmp_path / file_name(WEIGHTS, 0, 2)
    described = write_pieces(file, pieces)
    assert described == describe_file(file)
    expected = TENSORS | {"spread@6": torch.arange(6.0, 13.0)}
    loaded = load_file(file)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, expected[name])
    with safe_open(file, framework="pt") as opened:
        assert json.loads(opened.metadata()["shapes"]) == {"spread": [4, 5]}
    # And the other way round: whole tensors that safetensors wrote.
    save_file(TENSORS, tmp_path / file_name(OPTIMIZER, 0, 1))
    reader = ShardReader(tmp_path, OPTIMIZER)
    assert all(torch.equal(reader.whole(name), tensor) for name, tensor in TENSORS.items())


def test_tensors_are_written_as_they_are_when_their_turn_comes(tmp_path: Path) -> None:
    """One at a time: not all of them stand in the host's memory, and strided ones are laid out."""
    asked: list[str] = []

    def read(name: str, tensor: Tensor) -> Callable[[], Tensor]:
        def give() -> Tensor:
            asked.append(name)
            return tensor

        return give

    grid = torch.arange(12.0).reshape(3, 4).t()
    weight = torch.nn.Parameter(grid.clone())
    sources = {"strided": grid, "parameter": weight}
    pieces = [
        Piece(name, tuple(tensor.shape), 0, prod(tensor.shape), torch.float32, read(name, tensor))
        for name, tensor in sources.items()
    ]
    pieces.append(Piece("wider", (12,), 0, 12, torch.float64, read("wider", grid)))
    write_pieces(tmp_path / file_name(WEIGHTS, 0, 1), pieces)
    assert sorted(asked) == ["parameter", "strided", "wider"]
    weights = read_weights(tmp_path)
    assert torch.equal(weights["strided"], grid)
    assert torch.equal(weights["parameter"], weight.detach())
    assert torch.equal(weights["wider"], grid.reshape(-1).double())


def test_a_disk_that_fills_up_within_a_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    whole = write(tmp_path, 4)
    pieces = [part(str(number), torch.full((1000,), float(number))) for number in range(8)]
    for limit in (1, 500, 9_000, 31_999):
        with a_disk_with(limit), pytest.raises(OSError, match="File too large"):
            write_pieces(tmp_path / "weights-00000-of-00001.safetensors", pieces)
    assert find_defect(whole) is None
