"""The mean of several checkpoints' weights, as a model of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from pldr_train.building import model_config
from pldr_train.checkpoint.listing import find_place
from pldr_train.checkpoint.manifest import find_defect, step_of
from pldr_train.checkpoint.shards import WEIGHTS, ShardReader
from pldr_train.errors import CheckpointError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.models.exporting import check_target, tokenizer_of, write_model_folder
from pldr_train.models.loading import RunCheckpoint, run_checkpoint

DEFAULT_LAST = 3
"""Checkpoints that are averaged where none are named, if there are so many."""


def choose_checkpoints(source: Path, last: int | None = None, steps: Sequence[int] | None = None) -> list[Path]:
    """Return the checkpoints of a run to average, the oldest first; whether they are whole is not checked.

    Args:
        source: the run's folder, or its folder of checkpoints.
        last: the newest so many.
        steps: those of these steps. Without both the newest three, or two if there are no more.

    Raises:
        CheckpointError: there is no run, it lacks one of them, or fewer than two are named.
    """
    place = find_place(source)
    if place.root is None:
        raise CheckpointError(f"{source} is one checkpoint, and a mean needs two at least; name the run's folder")
    there = {step_of(folder): folder for folder in place.folders}
    listing = ", ".join(f"{step:,}" for step in sorted(there)) or "none"
    if steps is not None:
        shown, wanted = f"--steps {','.join(map(str, steps))}", sorted(set(steps))
    else:
        number = min(DEFAULT_LAST, len(there)) if last is None else last
        shown, wanted = f"--last {number}", sorted(there)[-number:] if number else []
        if len(wanted) < number:
            raise CheckpointError(f"{shown}: {source} has {len(wanted)} checkpoints, of the steps {listing}; lower it")
    absent = [step for step in wanted if step not in there]
    if absent:
        raise CheckpointError(f"{shown}: {source} has no checkpoint of step {absent[0]:,}; there are {listing}")
    if len(wanted) < 2:
        raise CheckpointError(
            f"{shown}: a mean needs two checkpoints at least; {source} has those of the steps {listing}"
        )
    return [there[step] for step in wanted]


def average_checkpoints(
    folders: Sequence[Path],
    target: Path,
    tokenizer_file: Path | None = None,
    overwrite: bool = False,
    advance: Callable[[int], None] = lambda _: None,
) -> RunCheckpoint:
    """Write the mean of checkpoints as a folder that `export` could have written.

    Memory holds the model once, and of each weight the mean in fp64 while it is formed.

    Args:
        folders: of the checkpoints, as `choose_checkpoints` returns them.
        target: the folder to write; made whole or not at all.
        tokenizer_file: SentencePiece model; None: the run's.
        overwrite: replace the model at `target`; never a folder that holds other things.
        advance: is called with the number of bytes read.

    Returns:
        The newest of the checkpoints, whose recipe the model has.

    Raises:
        CheckpointError: one of them is damaged, or their weights have other names or shapes.
        DataError: as `export_run`.
    """
    check_target(target, overwrite)
    for folder in folders:
        defect = find_defect(folder)
        if defect is not None:
            raise CheckpointError(f"{folder} is damaged: {defect.reason}; leave it out with --steps")
    newest = run_checkpoint(folders[-1])
    tokenizer_file = tokenizer_of(newest, tokenizer_file)
    model = PldrllmForCausalLM(model_config(newest.recipe))
    _fill_with_mean(model, folders, advance)
    model.eval()
    write_model_folder(model, target, tokenizer_file, newest, overwrite, [step_of(folder) for folder in folders])
    return newest


@torch.no_grad()
def _fill_with_mean(model: PldrllmForCausalLM, folders: Sequence[Path], advance: Callable[[int], None]) -> None:
    state = model.state_dict()
    readers = [ShardReader(folder, WEIGHTS) for folder in folders]
    for folder, reader in zip(folders, readers, strict=True):
        _check_same(folder, {name: reader.shape(name) for name in reader.names}, folders[-1], {
            name: tuple(tensor.shape) for name, tensor in state.items()
        })  # fmt: skip
    for name, tensor in state.items():
        total = torch.zeros(tensor.shape, dtype=torch.float64)
        for reader in readers:
            total += reader.whole(name)
            advance(4 * tensor.numel())
        tensor.copy_(total / len(readers))


def _check_same(
    folder: Path, shapes: dict[str, tuple[int, ...]], newest: Path, expected: dict[str, tuple[int, ...]]
) -> None:
    differing = sorted(name for name in shapes.keys() | expected.keys() if shapes.get(name) != expected.get(name))
    if not differing:
        return
    theirs, ours = (found.get(differing[0], "none") for found in (shapes, expected))
    raise CheckpointError(
        f"{folder}: {differing[0]} has the shape {theirs}, and by the recipe of {newest.name} {ours}; checkpoints of "
        "different models have no mean. Leave it out with --steps"
    )
