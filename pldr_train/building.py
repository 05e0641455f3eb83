"""A model whose initial weights do not depend on how it is spread over processes.

The model is made without memory (on torch's meta device) and then filled module by module. Each module draws its
weights from a generator of its own, seeded by the run's seed and the module's name: the same numbers whatever was drawn
before, so one process, DDP, FSDP and ZeRO start from equal weights, and a sharded model never stands whole in memory.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pldr_train.errors import RecipeError
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.model.power_law_attention import PowerLaw
from pldr_train.parameter_sets import SETS, matches, unmatched
from pldr_train.recipe import Recipe
from pldr_train.recipe.attention import PORTABLE

Put = Callable[[nn.Module, dict[str, Tensor]], None]
"""Takes a module and the whole values of its own parameters and buffers, on the CPU."""


def model_config(recipe: Recipe) -> PldrllmConfig:
    """Return the configuration of a recipe's model; the keys of the section `model` have its names.

    A backend of attention that does not run everywhere is left to training, which sets it: the model is of any machine.
    """
    model = recipe.resolved().model
    others = {
        "attn_implementation", "custom_G_type", "custom_G_path", "init", "init_from", "init_from_only", "rope_theta",
    }  # fmt: skip
    return PldrllmConfig(
        **model.model_dump(exclude=others),
        attn_implementation=model.attn_implementation if model.attn_implementation in PORTABLE else "sdpa",
        custom_G_type=None if model.learned_g else model.custom_G_type,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        max_position_embeddings=recipe.data.context_length,
    )


def empty_model(config: PldrllmConfig) -> PldrllmForCausalLM:
    """Return the model without memory: every parameter and buffer on the meta device."""
    with torch.device("meta"):
        return PldrllmForCausalLM(config)


def parameters_taken(model: PldrllmForCausalLM, recipe: Recipe) -> list[str]:
    """Return the names of the parameters that `model.init_from_only` takes from `model.init_from`.

    Raises:
        RecipeError: one of its patterns matches no parameter.
    """
    patterns = recipe.model.init_from_only or ()
    names = [name for name, _ in model.named_parameters()]
    if wrong := unmatched(names, patterns):
        sets = [each for each in SETS if not unmatched(names, [each])]
        raise RecipeError(
            f"model.init_from_only: {wrong[0]!r} matches no parameter of this recipe's model; name one of "
            f"{', '.join(sets)}, or give a pattern over names such as {names[-1]}"
        )
    return [name for name in names if matches(name, patterns)]


def fill_model(
    model: PldrllmForCausalLM, seed: int, put: Put, given: Mapping[str, Tensor] | None = None, law: str = "native"
) -> None:
    """Give every module of an empty model its values, inner modules before those that hold them.

    Args:
        model: from `empty_model`, sharded or not.
        seed: the run's.
        put: receives each module's values.
        given: values by name that are used instead of random ones, of all tensors or of some.
        law: what random values are drawn from, see `initialise`.
    """
    for prefix, module in reversed(list(model.named_modules())):
        shapes = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if not shapes:
            continue
        values = {name: torch.empty(like.shape, dtype=like.dtype) for name, like in shapes.items()}
        dotted = f"{prefix}." if prefix else ""
        ready = {name: given[dotted + name] for name in values if dotted + name in given} if given else {}
        if ready.keys() != values.keys():
            _initialise(model, prefix, module, values, _seed_of(seed, prefix), law)
        put(module, {name: ready[name].to(value.dtype) if name in ready else value for name, value in values.items()})


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
def _initialise(
    model: PldrllmForCausalLM, name: str, module: nn.Module, values: dict[str, Tensor], seed: int, law: str
) -> None:
    """Fill `values` as the law initialises that module, through a copy of it that holds them."""
    shadow = copy.copy(module)
    shadow._parameters = {
        name: None if old is None else nn.Parameter(values[name], requires_grad=False)
        for name, old in module._parameters.items()
    }
    shadow._buffers = {name: None if old is None else values[name] for name, old in module._buffers.items()}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # not those of devices, which nothing is drawn from
        initialise(model, name, shadow, law)


@torch.no_grad()
def initialise(model: PldrllmForCausalLM, name: str, module: nn.Module, law: str) -> None:
    """Draw a module's own parameters and buffers from torch's generator.

    Args:
        model: whose `_init_weights` is the law `native`.
        name: the module's in the model.
        module: with memory.
        law: `native`: as the model initialises itself. `legacy`: W_v and its bias are uniform within 1/sqrt(fan_in),
            torch's default, as in the original code before February 2025. `hf_port`: W, P and a are Xavier-uniform.
            `width_scaled`: as `hf_port`, times `width_factor`.

    What a law does not name is that of `native`.
    """
    if law == "legacy" and name.endswith(".attention.value"):
        assert isinstance(module, nn.Linear)
        bound = 1 / math.sqrt(module.in_features)
        for tensor in module.parameters(recurse=False):
            tensor.uniform_(-bound, bound)
        return
    if law in ("hf_port", "width_scaled") and isinstance(module, PowerLaw):
        module.metric_bias.zero_()
        module.coupling_bias.zero_()
        for tensor in (module.metric_weight, module.power_exponent, module.coupling):
            nn.init.xavier_uniform_(tensor)
            if law == "width_scaled":
                tensor.mul_(width_factor(model.config, name, module))
        return
    model._init_weights(module)
    if law == "width_scaled" and isinstance(module, nn.Linear):
        module.weight.mul_(width_factor(model.config, name, module))


def width_factor(config: PldrllmConfig, name: str, module: PowerLaw | nn.Linear) -> float:
    """Return what `width_scaled` multiplies a module's Xavier draw by; 1 in a model of two heads.

    The reference is the model with two heads of the same width d: D = 2 d and an inner width of floor(8/3 D), at d = 64
    128 and 341. W, P and a get its variance, 2 / (d (d + 2)). A Linear whose counterpart there goes from `ref_in` to
    `ref_out` gets the variance 2 ref_in / (fan_in (ref_in + ref_out)): fan_in times the variance is as there, and so is
    the variance of its outputs. The metric learner's Linears have the same sizes at any number of heads, and stay.
    """
    if isinstance(module, PowerLaw):
        heads, width, _ = module.coupling.shape
        return math.sqrt((width + heads) / (width + 2))
    hidden = 2 * config.head_dim
    inner = 8 * hidden // 3
    references = {
        ("attention",): (hidden, hidden),
        ("*.feed_forward.gate.*", "*.feed_forward.up.*"): (hidden, inner),
        ("*.feed_forward.down.*",): (inner, hidden),
        ("output_head",): (hidden, module.out_features),
    }
    for patterns, (ref_in, ref_out) in references.items():
        if matches(f"{name}.weight", patterns):
            fan_in, fan_out = module.in_features, module.out_features
            return math.sqrt(ref_in * (fan_in + fan_out) / (fan_in * (ref_in + ref_out)))
    return 1.0


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # what a torch generator takes
