"""A checkpoint in other forms: of one process, weights alone, torch's, DeepSpeed's universal layout.

One tensor at a time is in memory, whatever the checkpoint's size.

The universal layout is what `ds_to_universal` of deepspeed 0.19.8 writes and its engine reads:

    DEST/latest_universal                              the name of the folder beside it
    DEST/global_step400_universal/
        mp_rank_00_model_states.pt                     counters, schedule, buffers; read by stages 1 and 2
        zero_pp_rank_0_mp_rank_00_model_states.pt      the same, read by stage 3
        zero/optimizer_state.pt                        what concerns all parameters
        zero/NAME/fp32.pt  exp_avg.pt  exp_avg_sq.pt   {"param": whole tensor, "cat_dim": 0}
        zero/NAME/step.pt                              AdamW's count

NAME is a parameter's in PldrllmForCausalLM. Nothing is imported from DeepSpeed; its readers (engine.load_checkpoint,
load_hp_checkpoint_state, stage3.load_hp_checkpoint_state) take plain types. Left out is what they do not need and this
program does not have: the loss scaler of fp16 and a second copy of the weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pldr_train import __version__
from pldr_train.checkpoint.manifest import STATE_FILE, describe_file, manifest_text
from pldr_train.checkpoint.places import FILE_NAMES
from pldr_train.checkpoint.shards import OPTIMIZER, WEIGHTS, Piece, ShardReader, file_name, write_pieces
from pldr_train.checkpoint.state import STATE_KEY, save_state
from pldr_train.checkpoint.verifying import Advance, Checkpoint
from pldr_train.checkpoint.whole_target import check_target, whole_target
from pldr_train.errors import CheckpointError
from pldr_train.outputs import begins_with, is_safetensors
from pldr_train.recipe import dump_recipe, recipe_to_dict
from pldr_train.runs.folder import write_atomically
from pldr_train.runs.layout import MANIFEST_FILE

_ALIGNMENT = 64
_ZIP = b"PK\x03\x04"
"""What torch.save writes."""
_SLACK_BYTES = 1 << 20
"""For headers and small files."""


def check_consolidated_target(target: Path, source: Path, replace: bool) -> None:
    """See `check_target`; what may be replaced is a checkpoint."""
    names = [path.name for path in target.iterdir()] if target.is_dir() else [""]
    is_ours = all(FILE_NAMES.fullmatch(name) for name in names) and (MANIFEST_FILE in names or not names)
    check_target(target, source, replace, is_ours and not target.is_symlink(), "a checkpoint")


def check_converted_target(target: Path, source: Path, form: str, replace: bool) -> None:
    """See `check_target`; what may be replaced is a file, or for `universal` such a folder."""
    if form == "universal":
        names = [path.name for path in target.iterdir()] if target.is_dir() else [""]
        is_ours = all(name == LATEST_FILE or name.endswith("_universal") for name in names)
        check_target(target, source, replace, is_ours and not target.is_symlink(), "a universal checkpoint")
    else:
        is_form = is_safetensors if form == "weights" else begins_with(_ZIP)
        is_ours = target.is_file() and not target.is_symlink() and is_form(target)
        check_target(target, source, replace, is_ours, f"a file that `convert --to {form}` writes")


def bytes_to_write(checkpoint: Checkpoint, form: str | None = None) -> int:
    """About how much a form (None: consolidated) takes on the disk while it is written."""
    if form == "weights":
        return checkpoint.num_bytes(WEIGHTS) + _SLACK_BYTES
    files: int = sum(entry["bytes"] for entry in checkpoint.manifest["files"].values())
    return (2 if form == "torch" else 1) * files + _SLACK_BYTES


def consolidate(checkpoint: Checkpoint, target: Path, replace: bool, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint as one process would have written it; the state file is copied as it is.

    Args:
        checkpoint: to be written.
        target: its new folder; written whole or not at all.
        replace: take the place of a checkpoint that is there.
        advance: is called with the number of bytes written.

    Raises:
        CheckpointError: it cannot be written.
    """
    with whole_target(target, bytes_to_write(checkpoint), replace) as folder:
        folder.mkdir()
        try:
            shutil.copyfile(checkpoint.folder / STATE_FILE, folder / STATE_FILE)
        except FileNotFoundError as error:
            raise CheckpointError(f"{checkpoint.folder} was removed meanwhile by its run; name a newer one") from error
        written = {STATE_FILE: describe_file(folder / STATE_FILE)}
        for kind in (WEIGHTS, OPTIMIZER):
            name = file_name(kind, 0, 1)
            written[name] = write_pieces(folder / name, whole_pieces(checkpoint, kind, advance))
        manifest = manifest_text(checkpoint.step, dict(sorted(written.items())), checkpoint.manifest["info"])
        write_atomically(folder / MANIFEST_FILE, manifest)


def convert(checkpoint: Checkpoint, target: Path, form: str, replace: bool, advance: Advance = lambda _: None) -> None:
    """Write a checkpoint in another form.

    Args:
        checkpoint: to be written.
        target: a file, for `universal` a folder; written whole or not at all.
        form: weights, torch or universal.
        replace: take the place of what is there.
        advance: is called with the number of bytes written.

    Raises:
        CheckpointError: it cannot be written.
    """
    write: dict[str, Callable[[Path], None]] = {
        "weights": lambda new: _write_weights(checkpoint, new, advance),
        "torch": lambda new: _write_torch(checkpoint, new, advance),
        "universal": lambda new: write_universal(checkpoint, new, advance),
    }
    with whole_target(target, bytes_to_write(checkpoint, form), replace) as new:
        write[form](new)


def whole_pieces(checkpoint: Checkpoint, kind: str, advance: Advance) -> list[Piece]:
    """Return the tensors of a kind, WEIGHTS or OPTIMIZER, each whole and read when it is written."""
    reader, tensors = checkpoint.reader(kind), checkpoint.tensors.on_disk(kind)
    return [_piece(reader, name, shape, advance) for name, shape in tensors.items()]


def _piece(reader: ShardReader, name: str, shape: tuple[int, ...], advance: Advance) -> Piece:
    dtype = reader.read(name, 0, 0).dtype

    def read() -> Tensor:
        advance(prod(shape) * dtype.itemsize)
        return reader.read(name)

    return Piece(name, shape, 0, prod(shape), dtype, read)


def _write_weights(checkpoint: Checkpoint, path: Path, advance: Advance) -> None:
    metadata = {
        "format": "pt",
        "step": str(checkpoint.step),
        "recipe": dump_recipe(checkpoint.recipe),
        "written_by": f"pldr_train {__version__}",
    }
    write_pieces(path, whole_pieces(checkpoint, WEIGHTS, advance), metadata)


def _write_torch(checkpoint: Checkpoint, path: Path, advance: Advance) -> None:
    """torch.save wants all tensors at once: they are laid out in a file first, and mapped into memory from there."""
    tensors = checkpoint.tensors
    pages = path.with_name("mapped")
    pieces = [piece for kind in (WEIGHTS, OPTIMIZER) for piece in whole_pieces(checkpoint, kind, advance)]
    mapped = {piece.name: tensor for piece, tensor in zip(pieces, _map(pages, pieces), strict=True)}
    moments = {
        moment: {name: mapped[f"{moment}/{name}"] for name in names} for moment, names in tensors.moments.items()
    }
    content = {
        "model": {name: mapped[name] for name in tensors.on_disk(WEIGHTS)},
        "optimizer": {**moments, "step": int(checkpoint.state()[STATE_KEY]["optimizer_step"])},
    }
    save_state(path, content)
    pages.unlink()


def _map(path: Path, pieces: Sequence[Piece]) -> Iterator[Tensor]:
    """Write the pieces into a file and give them as tensors in its pages, which the system drops when it likes."""
    offsets = []
    with path.open("wb") as file:
        for piece in pieces:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            offsets.append(file.tell())
            content: Any = piece.read().contiguous().view(torch.uint8).numpy()
            file.write(memoryview(content))
        file.write(bytes(_ALIGNMENT))  # a file of no bytes cannot be mapped
    pages = np.memmap(path, dtype=np.uint8, mode="c")
    for piece, offset in zip(pieces, offsets, strict=True):
        part = torch.from_numpy(pages[offset : offset + piece.num_bytes])
        yield part.view(piece.dtype).view(piece.shape)


LATEST_FILE = "latest_universal"
_LAYOUT_OF = "0.19.8"
"""The deepspeed whose layout this is; its readers refuse a checkpoint that names none."""
_LAYOUT_VERSION = 0.4
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write_universal(checkpoint: Checkpoint, target: Path, advance: Advance) -> None:
    """Write a universal checkpoint as a folder that does not exist yet; one tensor at a time is in memory.

    Raises:
        OSError: it cannot be written.
        CheckpointError: the checkpoint's state cannot be read, or its optimizer is none that DeepSpeed reads back.
    """
    optim = checkpoint.recipe.optim
    if optim.name != "adamw" or optim.groups:
        raise CheckpointError(
            f"{checkpoint.folder}: trained with optim.name={optim.name} and {len(optim.groups)} optim.groups, and "
            "DeepSpeed reads universal checkpoints of AdamW with one group alone (it gives each the first one's "
            "settings); convert it --to torch or --to weights"
        )
    state = checkpoint.state()
    folder = target / f"global_step{checkpoint.step}_universal"
    zero = folder / "zero"
    zero.mkdir(parents=True)
    step = torch.tensor(float(state[STATE_KEY]["optimizer_step"]))
    for name, shape in checkpoint.tensors.parameters.items():
        (zero / name).mkdir()
        save_state(zero / name / "step.pt", step)
        readers = {"fp32": (checkpoint.weights, name)}
        readers |= {moment: (checkpoint.moments, f"{moment}/{name}") for moment in checkpoint.tensors.moments}
        for file, (reader, stored) in readers.items():
            content = {"cat_dim": 0, "param": reader.whole(stored)}
            save_state(zero / name / f"{file}.pt", content)
            advance(4 * prod(shape))
    save_state(zero / "optimizer_state.pt", _optimizer_state(checkpoint, state, step))
    for file in _MODEL_FILES:
        save_state(folder / file, _model_state(checkpoint, state))
    write_atomically(target / LATEST_FILE, folder.name)


def _optimizer_state(checkpoint: Checkpoint, state: dict[str, Any], step: torch.Tensor) -> dict[str, Any]:
    optim, schedule = checkpoint.recipe.optim, state["lr_schedulers"][0]
    group = {
        "lr": float(schedule["_last_lr"][0]),
        "initial_lr": float(schedule["base_lrs"][0]),
        "betas": tuple(optim.betas),
        "eps": optim.eps,
        "weight_decay": optim.weight_decay,
        "params": [0],
    }
    clipping = {} if optim.clip_norm is None else {"clip_grad": optim.clip_norm}
    return {
        "ds_version": _LAYOUT_OF,
        "dynamic_loss_scale": False,
        "overflow": False,
        **clipping,
        "param_groups": [dict(group)],
        "optimizer_state_dict": {"state": {0: {"step": step}}, "param_groups": [dict(group)]},  # stage 3 looks here
    }


def _model_state(checkpoint: Checkpoint, state: dict[str, Any]) -> dict[str, Any]:
    steps, taken = int(state[STATE_KEY]["step"]), int(state[STATE_KEY]["optimizer_step"])
    return {
        "module": {name: checkpoint.weights.whole(name) for name in checkpoint.tensors.buffers},
        "buffer_names": list(checkpoint.tensors.buffers),
        "lr_scheduler": state["lr_schedulers"][0],
        "global_steps": steps,
        "skipped_steps": steps - taken,
        "global_samples": steps * checkpoint.recipe.trainer.batch_size,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "ds_version": _LAYOUT_OF,
        "universal_checkpoint_info": {"universal_checkpoint_version": _LAYOUT_VERSION},
        STATE_KEY: {"step": steps, "recipe": recipe_to_dict(checkpoint.recipe)},
    }
