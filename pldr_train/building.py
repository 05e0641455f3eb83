"""A model whose initial weights do not depend on how it is spread over processes.

The model is made without memory (on torch's meta device) and then filled module by module. Each module draws its
weights from a generator of its own, seeded by the run's seed and the module's name: the same numbers whatever was drawn
before, so one process, DDP, FSDP and ZeRO start from equal weights, and a sharded model never stands whole in memory.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.recipe import Recipe

Put = Callable[[nn.Module, dict[str, Tensor]], None]
"""Takes a module and the whole values of its own parameters and buffers, on the CPU."""


def model_config(recipe: Recipe) -> PldrllmConfig:
    """Return the configuration of a recipe's model; the keys of the section `model` have its names."""
    model = recipe.resolved().model
    return PldrllmConfig(
        **model.model_dump(exclude={"custom_G_type", "custom_G_path", "init_from", "rope_theta"}),
        custom_G_type=None if model.learned_g else model.custom_G_type,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=recipe.data.context_length,
    )


def empty_model(config: PldrllmConfig) -> PldrllmForCausalLM:
    """Return the model without memory: every parameter and buffer on the meta device."""
    with torch.device("meta"):
        return PldrllmForCausalLM(config)


def fill_model(model: PldrllmForCausalLM, seed: int, put: Put, given: Mapping[str, Tensor] | None = None) -> None:
    """Give every module of an empty model its values, inner modules before those that hold them.

    Args:
        model: from `empty_model`, sharded or not.
        seed: the run's.
        put: receives each module's values.
        given: values by name that are used instead of random ones, all of the model's or none.
    """
    for prefix, module in reversed(list(model.named_modules())):
        shapes = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if not shapes:
            continue
        values = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in shapes.items()}
        if given is None:
            _initialise(model, module, values, _seed_of(seed, prefix))
        else:
            dotted = f"{prefix}." if prefix else ""
            values = {name: given[dotted + name].to(value.dtype) for name, value in values.items()}
        put(module, values)


def put_whole(module: nn.Module, values: dict[str, Tensor]) -> None:
    """Let a module have its values as they are: for strategies that keep the model whole."""
    for name, value in values.items():
        if name in module._parameters:
            old = module._parameters[name]
            assert old is not None
            module._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
        else:
            module._buffers[name] = value


@torch.no_grad()
def _initialise(model: PldrllmForCausalLM, module: nn.Module, values: dict[str, Tensor], seed: int) -> None:
    """Fill `values` as the model initialises that module, through a copy of it that holds them."""
    shadow = copy.copy(module)
    shadow._parameters = {
        name: None if old is None else nn.Parameter(values[name], requires_grad=False)
        for name, old in module._parameters.items()
    }
    shadow._buffers = {name: None if old is None else values[name] for name, old in module._buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of devices, which nothing is drawn from
        model._init_weights(shadow)


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # what a torch generator takes
