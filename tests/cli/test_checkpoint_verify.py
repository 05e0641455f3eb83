"""`pldr-train checkpoint verify`: every kind of damage is found, and nothing in a file is executed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_train.checkpoint.converting import whole_pieces
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, file_name, write_pieces
from pldr_train.checkpoint.state import load_state, save_state
from pldr_train.checkpoint.verifying import open_checkpoint
from tests.cli.checkpoint_case import Call, rewrite, seal, spread


def test_whole_checkpoints_are_ok(run_folder: Path, one: Path, call: Call) -> None:
    spread(one)
    result = call("verify", run_folder)
    assert (result.code, result.out, result.err) == (
        0,
        "step-00000006  ok\nstep-00000004  ok\nstep-00000002  ok\n",
        "",
    )
    assert json.loads(call("verify", one, "--json").out) == [{"folder": str(one), "ok": True, "problems": []}]


def flip_a_byte(one: Path) -> None:
    path = one / file_name(WEIGHTS, 0, 1)
    content = bytearray(path.read_bytes())
    content[-9] ^= 1
    path.write_bytes(content)


def set_nan(one: Path) -> None:
    def change(pieces: list[Piece]) -> list[Piece]:
        pieces[0].read().view(-1)[7] = math.nan
        pieces[3].read().view(-1)[0] = math.inf
        return pieces

    rewrite(one, change)


def hold_twice(one: Path) -> None:
    first = whole_pieces(open_checkpoint(one), OPTIMIZER, lambda _: None)[0]
    part = Piece(first.name, first.shape, 0, 5, first.dtype, lambda: torch.zeros(5))
    write_pieces(one / "optimizer-00001-of-00002.safetensors", [part])
    seal(one)


def lose_a_part(one: Path) -> None:
    (spread(one) / file_name(OPTIMIZER, 1, 3)).unlink()
    seal(one)


def reshape(one: Path) -> None:
    def change(pieces: list[Piece]) -> list[Piece]:
        p = pieces[0]
        return [Piece(p.name, (p.num_elements,), 0, p.num_elements, p.dtype, p.read), *pieces[1:]]

    rewrite(one, change)


def write_bf16(one: Path) -> None:
    rewrite(one, lambda ps: [Piece(p.name, p.shape, 0, p.num_elements, torch.bfloat16, p.read) for p in ps], OPTIMIZER)


def change_the_recipe(one: Path) -> None:
    info = json.loads((one / "manifest.json").read_text())["info"]
    info["recipe"]["model"]["num_hidden_layers"] = 3
    seal(one, info=info)


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("never",)


def hide_code(one: Path) -> None:
    torch.save({"pldr_train": Evil()}, one / "state.pt")
    seal(one)


def take_another_state(one: Path) -> None:
    shutil.copy(one.parent / "step-00000006" / "state.pt", one / "state.pt")
    seal(one)


def lose_random_states(one: Path) -> None:
    state = load_state(one / "state.pt")
    state["pldr_train"]["random"] = []
    save_state(one / "state.pt", state)
    seal(one)


DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "a flipped byte": (flip_a_byte, ["weights-00000-of-00001.safetensors does not match its checksum"]),
    "a file cut short": (lambda one: os.truncate(one / "state.pt", 99), ["state.pt has 99 bytes instead of"]),
    "a missing file": (
        lambda one: (one / file_name(OPTIMIZER, 0, 1)).unlink(),
        ["optimizer-00000-of-00001.safetensors is missing", "has no optimizer-*.safetensors"],
    ),
    "no manifest": (lambda one: (one / "manifest.json").unlink(), ["manifest.json cannot be read"]),
    "a broken manifest": (lambda one: (one / "manifest.json").write_text("{"), ["manifest.json is damaged"]),
    "a manifest with other types": (lambda one: seal(one, files=["state.pt"]), ["manifest.json is damaged"]),
    "a file from elsewhere": (
        lambda one: seal(one, files={"state.pt": {"bytes": 1, "sha256": "0"}, "../x": {"bytes": 1, "sha256": "0"}}),
        ["manifest.json is damaged"],
    ),
    "another name": (lambda one: seal(one, step=5), ["folder's name says step 4, its manifest.json 5"]),
    "a file too many": (
        lambda one: shutil.copy(one / file_name(WEIGHTS, 0, 1), one / file_name(WEIGHTS, 1, 2)),
        ["weights-00001-of-00002.safetensors is there, but manifest.json does not list it"],
    ),
    "values that are no numbers": (set_nan, ["2 values in 2 tensors of the weights files are not finite", "element 7"]),
    "elements held twice": (hold_twice, ["hold elements [0, 5) of exp_avg/decoder.embed_tokens.weight twice"]),
    "a part lost": (lose_a_part, ["the optimizer files lack elements [", "the optimizer files lack 41"]),
    "a tensor lost": (lambda one: rewrite(one, lambda pieces: pieces[1:]), ["the weights files lack 1 tensors of"]),
    "a shape": (reshape, ["has shape [5120] in the weights files, [320, 16] in the recipe's model"]),
    "a type": (write_bf16, ["is bfloat16 in the optimizer files, not float32"]),
    "another model": (change_the_recipe, ["the weights files lack", "hold different recipes"]),
    "code in the state": (hide_code, ["state.pt is refused", "Nothing in it was executed"]),
    "another step's state": (take_another_state, ["state.pt is of step 6, manifest.json of step 4"]),
    "lost random states": (lose_random_states, ["state.pt holds random of 0 processes, the run had 1"]),
}
VALUES_ASIDE = {"values that are no numbers", "code in the state", "another step's state", "lost random states"}
"""What reading, converting and consolidating take as it is; nothing of it is looked at or executed."""


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_found_and_said(name: str, one: Path, tmp_path: Path, call: Call) -> None:
    damage, parts = DAMAGE[name]
    damage(one)
    result = call("verify", one.parents[1])
    assert result.code == 1
    assert result.err == ""
    lines = result.out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "step-00000006  ok",
        "step-00000004  DAMAGED",
        "step-00000002  ok",
    ]
    for part in parts:
        assert part in result.out, result.out
    (found,) = json.loads(call("verify", one, "--json").out)
    assert not found["ok"]
    assert not Path("never").exists()
    if name not in VALUES_ASIDE:
        refused = call("consolidate", one, tmp_path / "out")
        assert refused.code == 2
        assert "the checkpoint is damaged" in refused.err
        assert not (tmp_path / "out").exists()
