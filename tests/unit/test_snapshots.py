"""Snapshots of the deductive outputs: what is kept, written whole, thinned out, and cut back for a resume."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pldr_train.curvature.files import read_curvature
from pldr_train.errors import DataError
from pldr_train.runs.layout import SNAPSHOTS_FOLDER
from pldr_train.runs.snapshots import cut_snapshots, write_snapshot
from pldr_train.training.monitor import snapshot_tensors
from tests.unit.model_cases import small_model, token_ids


def steps(run: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (run / SNAPSHOTS_FOLDER).glob("step-*.safetensors"))


@pytest.mark.parametrize("gram_chunk_size", [None, 4])
def test_a_snapshot_has_the_first_samples_tensors(tmp_path: Path, gram_chunk_size: int | None) -> None:
    model = small_model(gram_chunk_size=gram_chunk_size)
    layers = model(input_ids=token_ids(3, 12), use_cache=False, output_deductive_outputs=True).deductive_outputs
    write_snapshot(tmp_path, 400, snapshot_tensors(layers), keep=3)
    with safe_open(tmp_path / SNAPSHOTS_FOLDER / "step-00000400.safetensors", "pt") as file:
        assert file.metadata() == {"format": "1", "step": "400"}
        assert set(file.keys()) == {
            f"layer_{layer}/{name}" for layer in range(len(layers)) for name in ("A", "A_LM", "A_P", "G_LM")
        }
        expected = layers[1].curvature[0] if gram_chunk_size is None else layers[1].curvature[0, -1]
        assert torch.equal(file.get_tensor("layer_1/G_LM"), expected)
        assert file.get_tensor("layer_0/A").dtype == torch.float32


def test_g_of_a_runs_last_snapshot_can_be_predefined(tmp_path: Path) -> None:
    model, run = small_model(), tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    with pytest.raises(DataError, match=r"no snapshot of its G .* pldr-train extract-g"):
        read_curvature(run)
    for step, length in ((10, 12), (20, 9)):
        layers = model(token_ids(1, length), use_cache=False, output_deductive_outputs=True).deductive_outputs
        write_snapshot(run, step, snapshot_tensors(layers), keep=3)
    expected = torch.stack([layer.curvature[0] for layer in layers])
    assert torch.equal(read_curvature(run)["G"], expected)
    first = read_curvature(run / SNAPSHOTS_FOLDER / "step-00000010.safetensors")["G"]
    assert first.shape == expected.shape
    assert not torch.equal(first, expected)


def test_a_predefined_g_has_nothing_but_g() -> None:
    model = small_model(custom_G_type="random")
    layers = model(input_ids=token_ids(3, 12), use_cache=False, output_deductive_outputs=True).deductive_outputs
    assert set(snapshot_tensors(layers)) == {f"layer_{layer}/G_LM" for layer in range(len(layers))}


def test_old_snapshots_are_thinned_out_evenly_and_the_ends_stay(tmp_path: Path) -> None:
    for step in range(0, 1001, 10):
        write_snapshot(tmp_path, step, {"layer_0/A": torch.zeros(1, 2, 2)}, keep=8)
        assert len(steps(tmp_path)) == min(8, step // 10 + 1)
    kept = steps(tmp_path)
    assert (kept[0], kept[-1]) == (0, 1000)
    gaps = [after - before for before, after in itertools.pairwise(kept)]
    assert max(gaps[:-1]) <= 300
    assert sum(gap >= 70 for gap in gaps) >= 5


def test_one_kept_snapshot_is_the_last(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        write_snapshot(tmp_path, step, {"layer_0/A": torch.zeros(1, 2, 2)}, keep=1)
        assert steps(tmp_path) == [step]


def test_a_step_written_again_replaces_the_earlier_file_and_a_resume_drops_later_ones(tmp_path: Path) -> None:
    for step in (0, 5, 10):
        write_snapshot(tmp_path, step, {"layer_0/A": torch.full((1, 2, 2), float(step))}, keep=9)
    write_snapshot(tmp_path, 5, {"layer_0/A": torch.full((1, 2, 2), 7.0)}, keep=9)
    cut_snapshots(tmp_path, 5)
    assert steps(tmp_path) == [0, 5]
    with safe_open(tmp_path / SNAPSHOTS_FOLDER / "step-00000005.safetensors", "pt") as file:
        assert file.get_tensor("layer_0/A").max() == 7.0
    cut_snapshots(tmp_path, -1)
    assert steps(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    (tmp_path / SNAPSHOTS_FOLDER).write_text("in the way")
    with pytest.raises(DataError, match="snapshots"):
        write_snapshot(tmp_path, 0, {"layer_0/A": torch.zeros(1, 2, 2)}, keep=2)
