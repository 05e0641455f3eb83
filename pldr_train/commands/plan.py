"""`pldr-train plan`: what a recipe's run takes on a cluster, for each strategy."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pldr_train.commands import EXIT_CODES
from pldr_train.commands.options import number, share, whole_number
from pldr_train.commands.plan_text import USABLE_SHARE, render_plan, strategy_name
from pldr_train.errors import UserError
from pldr_train.metrics.cluster_memory import (
    SAVED_BYTES,
    Placement,
    Work,
    cluster_memory,
    network_traffic,
    parts,
    recomputed_flops_per_token,
)
from pldr_train.metrics.hardware import ASSUMED_MFU, Gpu, gpu_named
from pldr_train.metrics.throughput import count_parameters, flops_per_token
from pldr_train.recipe import ModelSection, Recipe, load_recipe, strategy_in_force
from pldr_train.recipe.schema import Recomputed

_S_PER_DAY = 86_400
_MOST_GPUS, _MOST_MACHINES, _MOST_OF_A_CARD = 1024, 100_000, 1e6


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train plan",
        description="Say what a run takes on a cluster, for each strategy: memory of a GPU by parts, network volume, "
        "time; and how rows and lanes are dealt. Nothing is trained, read or written; docs/plan.md has the formulas.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    parser.add_argument(
        "--gpus", metavar="N", type=whole_number(1, _MOST_GPUS), required=True, help="GPUs of each machine"
    )
    parser.add_argument(
        "--nodes", metavar="M", type=whole_number(1, _MOST_MACHINES), default=1, help="machines (default 1)"
    )
    parser.add_argument("--gpu", metavar="NAME", default="h200", help="h100, h200 (default), a100-80gb, rtx4090, ...")
    parser.add_argument(
        "--gpu-memory-gib", metavar="GIB", type=number(0, _MOST_OF_A_CARD), help="another card's memory"
    )
    parser.add_argument(
        "--peak-tflops", metavar="TFLOPS", type=number(0, _MOST_OF_A_CARD), help="another card's dense peak"
    )
    parser.add_argument(
        "--mfu",
        metavar="SHARE",
        type=share,
        default=ASSUMED_MFU,
        help=f"share of the peak that the run is assumed to reach (default {ASSUMED_MFU}); the time is no better than "
        "this guess",
    )
    parser.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the plan."""
    recipe = load_recipe(options.recipe, options.overrides)
    gpu = gpu_named(options.gpu)
    peak = options.peak_tflops
    gpu = replace(
        gpu,
        memory_gib=options.gpu_memory_gib or gpu.memory_gib,
        bf16_tflops=peak or gpu.bf16_tflops,
        fp32_tflops=peak or gpu.fp32_tflops,
    )
    batches = deal_batches(recipe, options.gpus * options.nodes)
    plan = make_plan(recipe.resolved(), batches, gpu, options.gpus, options.nodes, options.mfu)
    plan["command"] = _fit_command(options, batches)
    print(json.dumps(plan, indent=1) if options.json else render_plan(plan))
    return 0


# ----------------------------------------------------------------------------------------------------- rows and lanes


@dataclass(frozen=True)
class Batches:
    """How the rows of a step and the lanes are dealt to the processes and their loader workers."""

    rows_per_step: int
    rows_per_gpu: int
    micro_batch_size: int
    micro_batches: int
    tokens_per_step: int
    num_lanes: int
    lanes_per_worker: float
    """Of each loader worker; of each GPU with data.num_workers=0. A fraction: they do not divide."""
    fixes: dict[str, str]
    """key=value to add -> why."""


def deal_batches(recipe: Recipe, processes: int) -> Batches:
    """Deal a recipe's batch to `processes`; raises UserError where trainer.batch_size does not divide.

    Where a smaller micro-batch or more lanes help, the plan uses them and lists them in `fixes`.
    """
    trainer, data = recipe.trainer, recipe.data
    batch = trainer.batch_size
    if batch % processes:
        below, above = batch // processes * processes, -(-batch // processes) * processes
        near = f"{below} or {above}" if below else str(above)
        fewer = max(n for n in range(1, processes) if batch % n == 0)
        raise UserError(
            f"trainer.batch_size={batch}: not divisible by the {processes} GPUs of --gpus times --nodes; set "
            f"trainer.batch_size to {near}, or plan with {fewer} GPUs"
        )
    rows = batch // processes
    asked = trainer.micro_batch_size or rows
    micro = max(size for size in range(1, min(asked, rows) + 1) if rows % size == 0)
    fixes = {}
    if rows % asked:
        fixes[f"trainer.micro_batch_size={micro}"] = f"{asked} does not divide the {rows} rows of a GPU"
    workers = max(1, data.num_workers)
    share = processes * micro * workers
    if processes * workers > 1 and data.num_lanes % share:
        lanes = -(-data.num_lanes // share) * share
        fixes[f"data.num_lanes={lanes}"] = (
            f"{data.num_lanes} is no multiple of GPUs {processes} * micro-batch {micro} * workers {workers} = {share}; "
            "it decides the data order, so choose it once, for the most GPUs you will use; or fewer data.num_workers"
        )
    return Batches(
        rows_per_step=batch,
        rows_per_gpu=rows,
        micro_batch_size=micro,
        micro_batches=rows // micro,
        tokens_per_step=batch * data.context_length,
        num_lanes=data.num_lanes,
        lanes_per_worker=data.num_lanes / (processes * workers),
        fixes=fixes,
    )


# ------------------------------------------------------------------------------------------------------------- the plan


@dataclass(frozen=True)
class _Context:
    """What an estimate needs besides work and placement."""

    model: ModelSection
    usable_bytes: float

    def row(self, work: Work, placement: Placement) -> dict[str, Any]:
        """Return one strategy's figures, in bytes."""
        memory = cluster_memory(self.model, work, placement)
        traffic = network_traffic(self.model, placement)
        return {
            "strategy": placement.strategy,
            "weights": placement.weights,
            "offload_optimizer": placement.offload_optimizer,
            "offload_parameters": placement.offload_parameters,
            "memory_bytes": dict(parts(memory)),
            "fits": memory.total <= self.usable_bytes,
            "network_bytes_per_micro_batch": traffic.per_micro_batch,
            "network_bytes_per_step": traffic.total(work.micro_batches),
        }


def make_plan(recipe: Recipe, batches: Batches, gpu: Gpu, gpus: int, nodes: int, mfu: float) -> dict[str, Any]:
    """Return everything that the command prints, as plain values; sizes in bytes, of one GPU unless named otherwise."""
    # Imported here: torch takes seconds, which a mistake in the recipe should not cost.

    model, trainer, context = recipe.model, recipe.trainer, recipe.data.context_length
    dag_tensors = len(recipe.dag.trained)
    checkpointing = recipe.parallel.activation_checkpointing
    work = Work(
        context_length=context,
        micro_batch_size=batches.micro_batch_size,
        micro_batches=batches.micro_batches,
        precision=trainer.precision,
        fused_attention=recipe.model.attn_implementation != "eager",
        dag_tensors=dag_tensors,
        activation_checkpointing=checkpointing,
    )
    flops = flops_per_token(model, context, dag_tensors=dag_tensors).total
    recomputed = recomputed_flops_per_token(model, context, checkpointing)
    step_s = (flops + recomputed) * batches.tokens_per_step / (gpus * nodes * gpu.peak_flops(trainer.precision) * mfu)
    estimates = _Context(model, USABLE_SHARE * gpu.memory_gib * 2**30)
    placements = list(_placements(recipe, gpus * nodes))
    rows = [
        estimates.row(work, each) | {"chosen": each == _chosen(recipe, gpus * nodes), "host_bytes_per_machine": 0}
        for each in placements
    ]
    copies = SAVED_BYTES * count_parameters(model) // nodes if recipe.checkpoint.async_save else 0
    for row in rows:
        row["host_bytes_per_machine"] = gpus * row["memory_bytes"]["host"] + copies
    return {
        "run": recipe.run.name,
        "gpu": gpu.name,
        "gpu_memory_gib": gpu.memory_gib,
        "usable_gib": USABLE_SHARE * gpu.memory_gib,
        "peak_tflops": gpu.peak_flops(trainer.precision) / 1e12,
        "interconnect": gpu.interconnect,
        "link_gb_per_s": gpu.link_gb_per_s,
        "gpus_per_machine": gpus,
        "machines": nodes,
        "precision": trainer.precision,
        "activation_checkpointing": checkpointing,
        "parameters": count_parameters(model),
        "flops_per_token": flops,
        "recomputed_flops_per_token": recomputed,
        "assumed_mfu": mfu,
        "step_s": step_s,
        "steps": trainer.max_steps,
        "days": step_s * trainer.max_steps / _S_PER_DAY,
        "batch": {name: getattr(batches, name) for name in Batches.__dataclass_fields__},
        "strategies": rows,
        "advice": _advice(rows, work, placements, estimates, recipe),
    }


def _placements(recipe: Recipe, processes: int) -> Iterator[Placement]:
    """Yield every strategy, the simplest first; ZeRO with the recipe's offload where the stage has it."""
    yield Placement("single" if processes == 1 else "ddp", processes)
    if processes > 1:
        yield Placement("fsdp", processes)
    parallel = recipe.parallel
    for weights in ("fp32", "bf16") if recipe.trainer.precision == "bf16" else ("fp32",):
        for stage in (1, 2, 3):
            offload = parallel.offload_optimizer
            yield Placement(
                f"zero-{stage}",
                processes,
                weights,
                offload if stage == 3 or offload != "nvme" else None,
                parallel.offload_parameters if stage == 3 else None,
                parallel.reduce_bucket_mib,
            )


def _chosen(recipe: Recipe, processes: int) -> Placement | None:
    """Return the recipe's own strategy; None where it cannot be had with so many processes."""
    parallel = recipe.parallel
    wanted = strategy_in_force(parallel.strategy, processes)
    name = f"zero-{parallel.zero_stage}" if wanted == "deepspeed" else wanted
    weights = parallel.weights if wanted == "deepspeed" else "fp32"
    return next(
        (each for each in _placements(recipe, processes) if (each.strategy, each.weights) == (name, weights)), None
    )


# --------------------------------------------------------------------------------------------------------------- advice


def _keys(row: dict[str, Any]) -> str:
    """Return the recipe's keys that choose a row."""
    strategy = row["strategy"]
    if not strategy.startswith("zero-"):
        return f"parallel.strategy={strategy}"
    return f"parallel.strategy=deepspeed parallel.zero_stage={strategy[-1]} parallel.weights={row['weights']}"


def _advice(
    rows: Sequence[dict[str, Any]], work: Work, placements: Sequence[Placement], estimates: _Context, recipe: Recipe
) -> str:
    """Return one line: the simplest strategy that fits, or what to change so that one does."""
    chosen = next((row for row in rows if row["chosen"]), None)
    fitting = next((row for row in rows if row["fits"]), None)
    if fitting is not None:
        text = f"{strategy_name(fitting)} is the simplest that fits ({_keys(fitting)})"
        if chosen is None:
            return f"{text}; parallel.strategy={recipe.parallel.strategy} does not go with so many processes"
        if chosen is fitting:
            return f"{text}, and what the recipe chooses"
        return f"{text}; the recipe's {strategy_name(chosen)} {'fits, too' if chosen['fits'] else 'does not fit'}"
    for change, changed_work, offload in _changes(work):
        for placement in placements:
            if offload and placement.stage < 2:
                continue
            row = estimates.row(changed_work, replace(placement, offload_optimizer="cpu") if offload else placement)
            if row["fits"]:
                return f"nothing fits as it is; add {change}, then {strategy_name(row)} does ({_keys(row)})"
    return (
        "nothing fits, not even with trainer.micro_batch_size=1, parallel.activation_checkpointing=layers and "
        "parallel.offload_optimizer=cpu; take more GPUs, a larger --gpu, or a shorter data.context_length"
    )


def _changes(work: Work) -> Iterator[tuple[str, Work, bool]]:
    """(keys to set, the work then, whether the optimizer is offloaded), the cheapest first."""
    rows = work.micro_batch_size * work.micro_batches
    smaller = [size for size in range(work.micro_batch_size - 1, 0, -1) if rows % size == 0]
    sized = [
        (f"trainer.micro_batch_size={size}", replace(work, micro_batch_size=size, micro_batches=rows // size))
        for size in smaller
    ]
    more: dict[Recomputed, tuple[Recomputed, ...]]
    more = {"none": ("metric_learner", "layers"), "metric_learner": ("layers",), "layers": ()}
    recomputed: list[tuple[str, Recomputed]] = [
        (f"parallel.activation_checkpointing={what}", what) for what in more[work.activation_checkpointing]
    ]
    again = [(key, replace(work, activation_checkpointing=what)) for key, what in recomputed]
    both = [
        (f"{size} {key}", replace(changed, activation_checkpointing=what))
        for size, changed in sized
        for key, what in recomputed
    ]
    candidates = [*sized, *again, *both]
    yield from ((key, changed, False) for key, changed in candidates)
    offload = "parallel.offload_optimizer=cpu"
    yield offload, work, True
    yield from ((f"{key} {offload}", changed, True) for key, changed in candidates)


def _fit_command(options: argparse.Namespace, batches: Batches) -> str:
    nodes = [f"trainer.num_nodes={options.nodes}"] if options.nodes > 1 else []
    added = [f"trainer.devices={options.gpus}", *nodes, *batches.fixes]
    replaced = {"trainer.devices", "trainer.num_nodes", *(word.partition("=")[0] for word in added)}
    kept = [word for word in options.overrides if word.partition("=")[0] not in replaced]
    return shlex.join(["pldr-train", "fit", options.recipe, *kept, *added])
