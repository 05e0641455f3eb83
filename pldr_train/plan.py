"""What a recipe amounts to, before anything is trained: parameters, FLOPs, memory, steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch

from pldr_train.building import model_config, parameters_taken
from pldr_train.doctor.machine import usable_memory_bytes
from pldr_train.metrics.hardware import ASSUMED_MFU, GPUS, Gpu
from pldr_train.metrics.throughput import count_parameters, flops_per_token, memory_estimate, training_flops
from pldr_train.model import PldrllmForCausalLM
from pldr_train.optimizers import group_parameters, stored_moments
from pldr_train.recipe import Recipe


@dataclass(frozen=True)
class Description:
    """What a run takes."""

    text: str
    """A table for people."""
    problem: str | None
    """Why this machine cannot run it, with the fix."""


def describe(recipe: Recipe) -> Description:
    """Build the recipe's model on the meta device and say what a run of it takes, and whether this machine has that.

    Nothing is allocated, read or written; a data file that is not there yet is noted, not an error.

    Raises:
        RecipeError: `model.init_from_only` names no parameter of the model.
    """
    recipe = recipe.resolved()
    with torch.device("meta"):
        model = PldrllmForCausalLM(model_config(recipe))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == count_parameters(recipe.model)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    memory, needed = _memory(recipe, shapes)
    machine, problem = _on_this_machine(recipe, needed)
    lines = [
        ("run", f"{recipe.run.name}, in {Path(recipe.run.dir) / recipe.run.name}"),
        ("parameters", f"{parameters:,}"),
        *_groups(recipe, shapes),
        *_initial_weights(recipe, model),
        *_work(recipe),
        ("memory estimate", memory),
        ("this machine", machine),
        *_data(recipe),
    ]
    width = max(len(name) for name, _ in lines)
    return Description("\n".join(f"{name:<{width}}  {text}" for name, text in lines), problem)


def _initial_weights(recipe: Recipe, model: PldrllmForCausalLM) -> list[tuple[str, str]]:
    """Return where the weights come from, if not all of them are drawn by the law `native`."""
    law, source, only = recipe.model.init, recipe.model.init_from, recipe.model.init_from_only
    if source is None:
        return [] if law == "native" else [("initial weights", f"law {law}")]
    if only is None:
        return [("initial weights", source)]
    taken = sum(model.get_parameter(name).numel() for name in parameters_taken(model, recipe))
    return [("initial weights", f"{taken:,} parameters ({', '.join(only)}) of {source}, the others by the law {law}")]


def _work(recipe: Recipe) -> list[tuple[str, str]]:
    trainer, context = recipe.trainer, recipe.data.context_length
    tokens_per_step = trainer.batch_size * context
    flops = flops_per_token(recipe.model, context, dag_tensors=len(recipe.dag.trained))
    total_tokens = trainer.max_steps * tokens_per_step
    share = flops.total - flops.projections - flops.feed_forward - flops.attention - flops.output_head
    return [
        ("tokens per step", f"{tokens_per_step:,} ({trainer.batch_size} sequences of {context:,})"),
        ("steps", f"{trainer.max_steps:,} ({total_tokens / 1e9:,.3g} B tokens)"),
        (
            "FLOPs per token",
            f"{flops.total:,.0f} in training; {share / flops.total:.1%} of them for G and the DAG loss",
        ),
        ("FLOPs in all", f"{training_flops(recipe):.3g}"),
        ("time", f"{_time_on(GPUS['h200'], recipe)} on one H200 at an assumed {ASSUMED_MFU:.0%} of its peak"),
    ]


def _time_on(gpu: Gpu, recipe: Recipe) -> str:
    seconds = training_flops(recipe) / (gpu.peak_flops(recipe.trainer.precision) * ASSUMED_MFU)
    return f"{seconds / 86_400:,.1f} days" if seconds > 8640 else f"{seconds / 60:,.1f} minutes"


def _groups(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, str]]:
    """Return a line for each group of parameters, if the recipe has any."""
    optim = recipe.optim
    if not optim.groups:
        return []
    lines = []
    for group in group_parameters(optim, list(shapes)):
        count = sum(prod(shapes[name]) for name in group.names)
        how = "frozen"
        if not group.frozen:
            how = (
                f"lr {optim.lr * group.lr_factor:g}, weight decay {group.weight_decay:g}, betas {list(group.betas)}, "
                f"eps {group.eps:g}"
            )
        lines.append((f"group {group.label}", f"{count:,} parameters in {len(group.names)} tensors; {how}"))
    return lines


def _state_elements(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Return the number of elements that have a gradient, and of those in the optimizer's state."""
    moments = stored_moments(recipe.optim, shapes)
    counts = {name: prod(shape) for name, shape in shapes.items()}
    return (
        sum(count for name, count in counts.items() if moments[name]),
        sum(count * len(moments[name]) for name, count in counts.items()),
    )


def _memory(recipe: Recipe, shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, int]:
    """In words, and the bytes of one device."""
    trainer = recipe.trainer
    assert trainer.micro_batch_size is not None
    memory = memory_estimate(
        recipe.model,
        recipe.data.context_length,
        trainer.micro_batch_size,
        precision=trainer.precision,
        fused_attention=recipe.model.attn_implementation != "eager",
        dag_tensors=len(recipe.dag.trained),
    )
    with_gradient, in_state = _state_elements(recipe, shapes)
    memory = replace(memory, gradients=4 * with_gradient, optimizer=4 * in_state)

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f}"

    parts = (
        f"parameters {gib(memory.parameters + memory.cast_weights)}, gradients {gib(memory.gradients)}, "
        f"optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}, logits {gib(memory.logits)}"
    )
    rows = f"micro-batch of {trainer.micro_batch_size}, {trainer.precision}"
    return f"{gib(memory.total)} GiB a device ({rows}): {parts}", memory.total


def _on_this_machine(recipe: Recipe, needed: int) -> tuple[str, str | None]:
    """Return what there is to compute with, and why that is not enough.

    A recipe for GPUs is often looked at where there is none. Then it has to fit the largest one that is known.
    """
    accelerator, largest = recipe.trainer.accelerator, max(GPUS.values(), key=lambda gpu: gpu.memory_gib)
    if torch.cuda.is_available() and accelerator != "cpu":
        there = int(torch.cuda.get_device_properties(0).total_memory)
        text = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(0)}, {there / 2**30:.1f} GiB each"
    else:
        there = usable_memory_bytes()
        text = f"no GPU, {there / 2**30:.1f} GiB of memory"
        if accelerator != "cpu" and there < needed:
            there = int(largest.memory_gib * 2**30)
            text += f"; a GPU of {needed / 2**30:.0f} GiB is needed"
    if recipe.trainer.world_size > 1 and recipe.parallel.strategy in ("fsdp", "deepspeed"):
        return f"{text}; the devices share the model, `pldr-train plan` says what each holds", None
    # Processes on the CPU share its memory; GPUs have each their own.
    share = recipe.trainer.devices if accelerator == "cpu" else 1
    if needed * share <= there:
        return text, None
    processes = f" for each of {share} processes" if share > 1 else ""
    return f"{text}: not enough", (
        f"{recipe.run.name} needs about {needed / 2**30:,.1f} GiB{processes}, and "
        f"{largest.name if 'GPU of' in text else 'this machine'} has {there / 2**30:,.1f}; lower "
        f"trainer.micro_batch_size={recipe.trainer.micro_batch_size} or data.context_length="
        f"{recipe.data.context_length}, or shard the model over more devices (parallel.strategy; `pldr-train plan` "
        "says what that takes)"
    )


def _data(recipe: Recipe) -> list[tuple[str, str]]:
    data = recipe.data
    if data.source == "quickstart":
        return [("data", f"the quickstart corpus, built at first use in {data.cache_dir}")]
    if data.source == "hidden_class":
        return [("data", f"the hidden-class corpus, built at first use in {data.cache_dir}")]
    if data.source == "hub":
        what = data.data_files or f"split {data.split}"
        at = f" at {data.revision}" if data.revision else ""
        origin, needed = f"{data.repository}{at} on the Hub, {what}", [data.tokenizer]
    else:
        assert data.path is not None
        origin, needed = data.path, [data.path, data.tokenizer]
    if data.tokenizer is not None:
        tokenizer = f"tokenizer {data.tokenizer}"
    elif data.source == "tokens":
        tokenizer = "the tokens' own tokenizer"
    else:
        tokenizer = f"a tokenizer of {recipe.model.vocab_size:,} pieces trained at first use"
    missing = [
        path for path in needed if path is not None and not any(c in path for c in "*?[") and not Path(path).exists()
    ]
    note = f" (not there yet: {', '.join(missing)})" if missing else ""
    return [("data", f"{origin}, {tokenizer}{note}"), *_documents(recipe)]


def _documents(recipe: Recipe) -> list[tuple[str, str]]:
    data = recipe.data
    if data.train_documents is None:
        return []
    start, stop = data.train_documents
    validation = f", validation {list(data.validation_documents)}" if data.validation_documents else ""
    return [("documents", f"{stop - start:,}, {list(data.train_documents)}{validation}, in {data.num_lanes} lanes")]
