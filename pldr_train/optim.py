"""AdamW, the schedules of the learning rate, and gradient clipping as the PLDR-LLM papers train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pldr_train.recipe import OptimSection, Recipe


def lr_at_step(
    step: int,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    final_fraction: float,
    schedule: str = "cosine",
    decay_fraction: float = 1.0,
) -> float:
    """Return the learning rate of optimizer step `step`, counted from 0.

    It rises linearly from 0 over `warmup_steps` (so the very first step has learning rate 0, as in the papers). Then

    - `cosine` (the papers'): half a cosine from `peak` to `final_fraction * peak` at `total_steps`;
    - `linear`: a straight line between the two;
    - `wsd`: `peak`, and a straight line down over the last `decay_fraction * total_steps` steps;
    - `constant`: `peak`, whatever `final_fraction` is.

    From `total_steps` on it stays where it is.
    """
    if step < warmup_steps:
        return peak * step / warmup_steps
    if schedule == "constant":
        return peak
    if step >= total_steps:
        return peak * final_fraction
    begin = warmup_steps
    if schedule == "wsd":
        begin = max(begin, total_steps - round(decay_fraction * total_steps))
    progress = max(0.0, (step - begin) / (total_steps - begin))
    left = 0.5 * (1.0 + math.cos(math.pi * progress)) if schedule == "cosine" else 1.0 - progress
    return peak * (final_fraction + (1.0 - final_fraction) * left)


def lr_of_recipe(recipe: Recipe, step: int, peak: float | None = None) -> float:
    """Return the learning rate of step `step`, counted from 0, of a resolved recipe; `peak` replaces `optim.lr`."""
    optim = recipe.optim
    return lr_at_step(
        step,
        optim.lr if peak is None else peak,
        optim.warmup_steps,
        recipe.trainer.max_steps,
        optim.final_lr_fraction,
        optim.schedule,
        optim.decay_fraction,
    )


def build_adamw(
    parameters: Iterable[nn.Parameter],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    weight_decay: float = 0.1,
) -> AdamW:
    """AdamW over all parameters in one group: the papers decay every parameter, norms and biases included.

    The fused kernel is used where all parameters lie on one kind of device that has it.
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    fused = len({parameter.device.type for parameter in trainable} - {"cuda", "cpu"}) == 0
    return AdamW(trainable, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


def adamw_of_recipe(named_parameters: Iterable[tuple[str, nn.Parameter]], settings: OptimSection) -> AdamW:
    """Return the papers' AdamW over all parameters, as a recipe's section `optim` says."""
    parameters = [parameter for _, parameter in named_parameters]
    return build_adamw(parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay)


def adamw_update(
    read: Callable[[str], Tensor], weights: Tensor, settings: OptimSection, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u u, u w' and w' w' of AdamW's last update of some elements, each a scalar.

    With w before and w' after the step,

        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        w' = w - lr (u + decay w)

    Args:
        read: the name of a moment -> its elements (n,) after the step.
        weights: w', (n,) in fp32.
        settings: for betas and eps.
        step: t, the number of steps taken.
    """
    beta1, beta2 = settings.betas
    # Few passes over the memory: u = c m / (sqrt(v) + eps').
    correction = math.sqrt(1 - beta2**step)
    direction = read("exp_avg_sq").float().sqrt().add_(settings.eps * correction)
    torch.div(read("exp_avg").float(), direction, out=direction)
    scale = correction / (1 - beta1**step)
    return scale**2 * direction.dot(direction), scale * direction.dot(weights), weights.dot(weights)


def clip_before_step(
    optimizer: Optimizer, clip_value: float | None = None, clip_norm: float | None = None
) -> Callable[[], None]:
    """Clip the gradients each time before the optimizer steps.

    By value (the papers' way) every element is clamped to [-clip_value, clip_value]; clamping is elementwise, so it
    also holds where an optimizer sees only its shard of the gradients. By norm the total 2-norm is scaled to at
    most `clip_norm`.

    Args:
        optimizer: any optimizer that supports step pre-hooks.
        clip_value: limit of each element, or `None`.
        clip_norm: limit of the total norm, or `None`.

    Returns:
        A function that removes the hook.

    Raises:
        ValueError: both limits are given, or one is not positive.
    """
    if clip_value is not None and clip_norm is not None:
        raise ValueError(f"give clip_value={clip_value} or clip_norm={clip_norm}, not both")
    for name, limit in (("clip_value", clip_value), ("clip_norm", clip_norm)):
        if limit is not None and not limit > 0:
            raise ValueError(f"{name}={limit} must be positive; leave it out to clip nothing")

    def clip(opt: Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [p for group in opt.param_groups for p in group["params"] if p.grad is not None]
        if clip_value is not None:
            for parameter in parameters:
                assert parameter.grad is not None
                # One pass over the memory; torch's own helper clamps each side in a pass of its own.
                parameter.grad.clamp_(-clip_value, clip_value)
        elif clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)

    return optimizer.register_step_pre_hook(clip).remove
