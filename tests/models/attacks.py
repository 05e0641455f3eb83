"""Hostile and damaged pickles and torch files, all in one process whose memory is limited; see test_attacks.py.

Prints one JSON object: by the name of each attack how it ended, "refused" or "read", and anything else in words.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from pldr_train.checkpoint.state import load_state
from pldr_train.curvature.restricted_pickle import _MAX_STACK, load_inert, load_tensors
from pldr_train.errors import UserError
from pldr_train.models.importing import _check_numbers, _read_weights

LIMIT_BYTES = 4 * 2**30
START, STOP = b"\x80\x04", b"."
MANY = 3 * _MAX_STACK
DEEP = b")" + b"\x85" * 300_000
"""A tuple in a tuple in a tuple."""
DAG = b")" + b"\x94\x68\x00\x86" + b"".join(b"\x94\x68%c\x86" % place for place in range(1, 60))
"""Pairs of one and the same, sixty times: 2**60 values."""
LIST_DAG = b"]\x94" + b"".join(b"]\x94(h%ch%ce" % (place, place) for place in range(60))
PICKLES = {
    "a deep key": START + b"}" + DEEP + b"K\x01s" + STOP,
    "a key of many values": START + b"}" + DAG + b"K\x01s" + STOP,
    "a DAG of lists": START + LIST_DAG + STOP,
    "a name that is a DAG": START + LIST_DAG + b"\x8c\x01a\x93" + STOP,
    "a storage that is a DAG": START + LIST_DAG + b"Q" + STOP,
    "many lists": START + b"]" * MANY + STOP,
    "many lists in a list": START + b"](" + b"]" * MANY + b"e" + STOP,
    "a deep list": START + b"](" * 100_000 + b"e" * 100_000 + STOP,
    "a list in itself": START + b"]\x94h\x00a" + STOP,
    "a huge text": START + b"\x8d" + b"\xff" * 8 + b"a" + STOP,
}


def torch_files() -> dict[str, bytes]:
    def saved(value: Any, **options: Any) -> bytes:
        stream = io.BytesIO()
        torch.save(value, stream, **options)
        return stream.getvalue()

    whole = {"decoder.embedding.weight": torch.arange(12.0).view(3, 4)}
    found = {
        "a stride of 0": saved({"decoder.embedding.weight": torch.zeros(1, 1).expand(2**33, 64)}),
        "a legacy stride of 0": saved({"a": torch.zeros(1, 1).expand(2**33, 64)}, _use_new_zipfile_serialization=False),
    }
    for name, kind in (("bool", torch.bool), ("complex", torch.complex64), ("whole", torch.int64)):
        found[f"{name} weights"] = saved({key: each.to(kind) for key, each in whole.items()})
    for name, value in (("NaN", float("nan")), ("infinite", float("inf"))):
        found[f"{name} weights"] = saved({key: each * value for key, each in whole.items()})
    for name, content in PICKLES.items():
        found[f"legacy, {name}"] = content
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3\n")
        found[f"zip, {name}"] = stream.getvalue()
    return found


def mutations(content: bytes, count: int) -> Iterator[bytes]:
    rng = random.Random(1)
    for _ in range(count):
        changed = bytearray(content)
        for _ in range(rng.choice((1, 1, 3))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        yield bytes(changed)
        yield content[: rng.randrange(len(content))]


def outcome(read: Callable[[Path], Any], path: Path, content: bytes) -> str:
    path.write_bytes(content)
    try:
        read(path)
    except UserError as error:
        return "refused" if len(str(error)) < 2000 else "a message without end"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "read"


def read_weights(path: Path) -> None:
    _check_numbers(path, _read_weights(path))


def main(folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT_BYTES, LIMIT_BYTES))
    found: dict[str, Any] = {}
    for name, content in PICKLES.items():
        found[f"tensors: {name}"] = outcome(load_tensors, folder / "G.pkl", content)
        found[f"inert: {name}"] = outcome(load_inert, folder / ".metadata", content)
    for name, content in torch_files().items():
        found[f"weights: {name}"] = outcome(read_weights, folder / "model.pth", content)
        found[f"state: {name}"] = outcome(load_state, folder / "state.pt", content)
    stream = io.BytesIO()
    torch.save({"pldr_train": 1, "a": [torch.arange(4.0), (1, 2)], "decoder": {"b": torch.ones(2, 2)}}, stream)
    legacy = io.BytesIO()
    torch.save({"pldr_train": torch.ones(3)}, legacy, _use_new_zipfile_serialization=False)
    pickled = pickle.dumps([[torch.ones(1, 2, 4, 4)]])
    for name, read, content in (
        ("state", load_state, stream.getvalue()),
        ("legacy state", load_state, legacy.getvalue()),
        ("tensors", load_tensors, pickled),
        ("inert", load_inert, pickled),
    ):
        ends = [outcome(read, folder / "mutated", each) for each in mutations(content, 60)]
        found[f"mutated {name}"] = sorted(set(ends) - {"refused", "read"})
        found[f"whole {name}"] = outcome(read, folder / "whole", content)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
