"""AdamW, the schedules of the learning rate, and gradient clipping as the PLDR-LLM papers train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Muon, Optimizer

from pldr_train.optimizers import OPTIMIZERS, ParameterGroup, group_parameters
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
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-5,
    weight_decay: float = 0.1,
) -> AdamW:
    """AdamW, with the papers' settings by default: they decay every parameter, norms and biases included.

    The fused kernel is used where all parameters lie on one kind of device that has it.

    Args:
        parameters: those to train, or groups of them as torch's optimizers take them.
        lr: peak learning rate.
        betas: decay rates of the two moments.
        eps: term in the denominator.
        weight_decay: decoupled decay.
    """
    given: list[Any] = list(parameters)
    trained = [each for one in given for each in (one["params"] if isinstance(one, dict) else (one,))]
    fused = len({parameter.device.type for parameter in trained} - {"cuda", "cpu"}) == 0
    return AdamW(given, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused)


Members = Sequence[tuple[ParameterGroup, Sequence[tuple[str, nn.Parameter]]]]
"""Groups with their named parameters."""


def adamw_of_groups(groups: Members, settings: OptimSection) -> AdamW:
    """Return the papers' AdamW over groups of parameters."""
    return build_adamw(
        [_adamw_group(group, [parameter for _, parameter in members], settings) for group, members in groups],
        settings.lr, settings.betas, settings.eps, settings.weight_decay,
    )  # fmt: skip


def _adamw_group(group: ParameterGroup, parameters: list[nn.Parameter], settings: OptimSection) -> dict[str, Any]:
    return {
        "params": parameters,
        "lr": settings.lr * group.lr_factor,
        "betas": group.betas,
        "eps": group.eps,
        "weight_decay": group.weight_decay,
        LABEL: group.label,
    }


class MuonWithAdamW(Optimizer):
    """torch's Muon for weight matrices and AdamW for all else, as one optimizer.

    Muon's rates are matched to AdamW's by the root mean square of an update (Moonshot's rule), so both follow the same
    schedule. A matrix that FSDP2 shards is gathered for its update: every process computes it alike and keeps its rows.

    Args:
        matrices: groups of matrices, as Muon takes them.
        others: groups of all other parameters, as AdamW takes them.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]]) -> None:
        self._both: list[Optimizer] = []
        if matrices:
            self._both.append(Muon(matrices, adjust_lr_fn=_MUON_RATES))
        if others:
            self._both.append(build_adamw(others, lr=0.0))
        super().__init__([group for each in self._both for group in each.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()

    def _share(self) -> None:
        """Let both have this optimizer's state and its groups, whose learning rates a schedule sets."""
        for each in self._both:
            is_muon = isinstance(each, Muon)
            each.state = self.state
            each.param_groups = [group for group in self.param_groups if ("momentum" in group) is is_muon]

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step of both; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if "momentum" in group:
                for parameter in group["params"]:
                    if isinstance(parameter, DTensor) and parameter.grad is not None:
                        self._step_gathered(parameter, group)
        for each in self._both:
            each.step()
        return loss

    def _step_gathered(self, parameter: Any, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        whole = nn.Parameter(parameter.full_tensor())
        whole.grad = parameter.grad.full_tensor()
        settings = {name: group[name] for name in ("lr", "weight_decay", "momentum")}
        muon = Muon([whole], adjust_lr_fn=_MUON_RATES, **settings)
        muon.state[whole]["momentum_buffer"] = state["momentum_buffer"].full_tensor()
        muon.step()  # type: ignore[no-untyped-call]
        for kept, new in ((parameter, whole), (state["momentum_buffer"], muon.state[whole]["momentum_buffer"])):
            kept.to_local().copy_(_own_rows(new, parameter.device_mesh))
        parameter.grad = None  # what follows passes over it


_MUON_RATES = "match_rms_adamw"


def _own_rows(whole: Tensor, mesh: DeviceMesh) -> Tensor:
    chunks, place = whole.chunk(mesh.size()), mesh.get_local_rank()
    return chunks[place] if place < len(chunks) else whole[:0]


def muon_of_groups(groups: Members, settings: OptimSection) -> MuonWithAdamW:
    """Return Muon over the matrices of the groups and AdamW over all else."""
    kind = OPTIMIZERS["muon"]
    matrices, others = [], []
    for group, members in groups:
        is_matrix = [kind.state_of(name, each.shape) is kind.matrix_state for name, each in members]
        own = [each for (_, each), muon in zip(members, is_matrix, strict=True) if muon]
        rest = [each for (_, each), muon in zip(members, is_matrix, strict=True) if not muon]
        if own:
            matrices.append({
                "params": own,
                "lr": settings.lr * group.lr_factor,
                "weight_decay": group.weight_decay,
                "momentum": settings.momentum,
                LABEL: group.label,
            })  # fmt: skip
        if rest:
            others.append(_adamw_group(group, rest, settings))
    return MuonWithAdamW(matrices, others)


LABEL = "label"
"""Key of a torch optimizer's group: the name of the recipe's group that it holds parameters of."""


def trained_groups(settings: OptimSection, model: nn.Module) -> list[tuple[ParameterGroup, list[tuple[str, Any]]]]:
    """Return the groups of a model's parameters that are trained, with the parameters.

    Raises:
        RecipeError: the groups do not fit the model.
    """
    parameters = dict(model.named_parameters())
    groups = group_parameters(settings, list(parameters))
    return [(group, [(name, parameters[name]) for name in group.names]) for group in groups if not group.frozen]


def freeze(settings: OptimSection, model: nn.Module) -> None:
    """Let the parameters of frozen groups need no gradient.

    Raises:
        RecipeError: the groups do not fit the model.
    """
    parameters = dict(model.named_parameters())
    for group in group_parameters(settings, list(parameters)):
        for name in group.names:
            parameters[name].requires_grad_(not group.frozen)


def adamw_update(
    read: Callable[[str], Tensor], weights: Tensor, group: ParameterGroup, step: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return u u, u w' and w' w' of AdamW's last update of some elements, each a scalar.

    With w before and w' after the step,

        u = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
        w' = w - lr (u + decay w)

    Args:
        read: the name of a moment -> its elements (n,) after the step.
        weights: w', (n,) in fp32.
        group: for betas and eps.
        step: t, the number of steps taken.
    """
    beta1, beta2 = group.betas
    # Few passes over the memory: u = c m / (sqrt(v) + eps').
    correction = math.sqrt(1 - beta2**step)
    direction = read("exp_avg_sq").float().sqrt().add_(group.eps * correction)
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
            clamp_all([p.grad for p in parameters if p.grad is not None], clip_value)
        elif clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)

    return optimizer.register_step_pre_hook(clip).remove


def clamp_all(gradients: Sequence[Tensor], limit: float) -> None:
    """Clamp every element to [-limit, limit], in place.

    On a CPU one by one, in one pass over the memory. On a GPU all in a few launches, which are two passes.
    """
    local = [each.to_local() if isinstance(each, DTensor) else each for each in gradients]
    if local and not one_by_one(local[0].device):
        torch._foreach_clamp_min_(local, -limit)
        torch._foreach_clamp_max_(local, limit)
        return
    for each in local:
        each.clamp_(-limit, limit)


def one_by_one(device: torch.device) -> bool:
    """Return whether a pass over the memory costs more than a launch."""
    return device.type == "cpu"
