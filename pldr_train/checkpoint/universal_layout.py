"""DeepSpeed's universal checkpoint, as `ds_to_universal` of deepspeed 0.19.8 writes it and its engine reads it.

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

from math import prod
from pathlib import Path
from typing import Any

import torch

from pldr_train.checkpoint.state import STATE_KEY, save_state
from pldr_train.checkpoint.verifying import Advance, Checkpoint
from pldr_train.recipe import recipe_to_dict
from pldr_train.runs.folder import write_atomically

LATEST_FILE = "latest_universal"
_LAYOUT_OF = "0.19.8"
"""The deepspeed whose layout this is; its readers refuse a checkpoint that names none."""
_LAYOUT_VERSION = 0.4
_MODEL_FILES = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt")


def write_universal(checkpoint: Checkpoint, target: Path, advance: Advance) -> None:
    """Write a universal checkpoint as a folder that does not exist yet; one tensor at a time is in memory.

    Raises:
        OSError: it cannot be written.
        CheckpointError: the checkpoint's state cannot be read.
    """
    state = checkpoint.state()
    folder = target / f"global_step{checkpoint.step}_universal"
    zero = folder / "zero"
    zero.mkdir(parents=True)
    step = torch.tensor(float(state[STATE_KEY]["optimizer_step"]))
    for name, shape in checkpoint.tensors.parameters.items():
        (zero / name).mkdir()
        save_state(zero / name / "step.pt", step, sync=False)
        readers = {"fp32": (checkpoint.weights, name)}
        readers |= {moment: (checkpoint.moments, f"{moment}/{name}") for moment in checkpoint.tensors.moments}
        for file, (reader, stored) in readers.items():
            content = {"cat_dim": 0, "param": reader.whole(stored)}
            save_state(zero / name / f"{file}.pt", content, sync=False)
            advance(4 * prod(shape))
    save_state(zero / "optimizer_state.pt", _optimizer_state(checkpoint, state, step), sync=False)
    for file in _MODEL_FILES:
        save_state(folder / file, _model_state(checkpoint, state), sync=False)
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
