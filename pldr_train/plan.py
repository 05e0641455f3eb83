"""What a recipe amounts to, before anything is trained: parameters, FLOPs, memory, steps."""

from __future__ import annotations

from pathlib import Path

import torch

from pldr_train.metrics.throughput import ModelShape, count_parameters, flops_per_token, memory_estimate
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe
from pldr_train.training.module import model_config
from pldr_train.training.system_metrics import model_shape, trained_dag_tensors


def describe(recipe: Recipe) -> str:
    """Build the recipe's model on the meta device and say what a run of it takes.

    Nothing is allocated, read or written; a data file that is not there yet is noted, not an error.
    """
    recipe = recipe.resolved()
    with torch.device("meta"):
        model = PldrllmForCausalLM(model_config(recipe))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    shape = model_shape(recipe)
    assert parameters == count_parameters(shape)
    lines = [
        ("run", f"{recipe.run.name}, in {Path(recipe.run.dir) / recipe.run.name}"),
        ("parameters", f"{parameters:,}"),
        *_work(recipe, shape),
        *_memory(recipe, shape),
        *_data(recipe),
    ]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _work(recipe: Recipe, shape: ModelShape) -> list[tuple[str, str]]:
    trainer, context = recipe.trainer, recipe.data.context_length
    tokens_per_step = trainer.batch_size * context
    flops = flops_per_token(shape, context, dag_tensors=trained_dag_tensors(recipe))
    total_tokens = trainer.max_steps * tokens_per_step
    share = flops.total - flops.projections - flops.feed_forward - flops.attention - flops.output_head
    return [
        ("tokens per step", f"{tokens_per_step:,} ({trainer.batch_size} sequences of {context:,})"),
        ("steps", f"{trainer.max_steps:,} ({total_tokens / 1e9:,.3g} B tokens)"),
        (
            "FLOPs per token",
            f"{flops.total:,.0f} in training; {share / flops.total:.1%} of them for G and the DAG loss",
        ),
        ("FLOPs in all", f"{flops.total * total_tokens:.3g}"),
    ]


def _memory(recipe: Recipe, shape: ModelShape) -> list[tuple[str, str]]:
    trainer = recipe.trainer
    assert trainer.micro_batch_size is not None
    memory = memory_estimate(
        shape,
        recipe.data.context_length,
        trainer.micro_batch_size,
        precision=trainer.precision,
        fused_attention=recipe.model.attn_implementation != "eager",
        dag_tensors=trained_dag_tensors(recipe),
    )

    def gib(size: int) -> str:
        return f"{size / 2**30:.2f}"

    parts = (
        f"parameters {gib(memory.parameters + memory.cast_weights)}, gradients {gib(memory.gradients)}, "
        f"optimizer {gib(memory.optimizer)}, activations {gib(memory.activations)}, logits {gib(memory.logits)}"
    )
    rows = f"micro-batch of {trainer.micro_batch_size}, {trainer.precision}"
    return [("memory estimate", f"{gib(memory.total)} GiB a device ({rows}): {parts}")]


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
