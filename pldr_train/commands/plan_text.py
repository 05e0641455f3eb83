"""The text of `pldr-train plan`."""

from __future__ import annotations

from typing import Any

USABLE_SHARE = 0.9
"""Share of a card's memory that a plan may fill: the rest is for the CUDA context, fragmentation and NCCL."""
_COLUMNS = (
    ("weights", "parameters"),
    ("gradients", "gradients"),
    ("optimizer", "optimizer"),
    ("cast", "cast_copies"),
    ("gathered", "gathered"),
    ("buckets", "buckets"),
    ("activations", "activations"),
    ("logits", "logits"),
    ("total", "total"),
)


def strategy_name(row: dict[str, Any]) -> str:
    """Return a strategy's name as the table shows it."""
    return f"{row['strategy']} {row['weights']}" if row["strategy"].startswith("zero-") else str(row["strategy"])


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


def render_plan(plan: dict[str, Any]) -> str:
    """Return the plan as text; ends with the advice."""
    batch = plan["batch"]
    machines = f"{plan['machines']} machine{'s' if plan['machines'] > 1 else ''}"
    recomputed = plan["recomputed_flops_per_token"]
    work = f"{plan['flops_per_token']:,.0f} in training" + (f", {recomputed:,.0f} recomputed" if recomputed else "")
    lines = [
        ("run", f"{plan['run']}, {plan['parameters']:,} parameters, {plan['precision']}"),
        (
            "cluster",
            f"{machines} of {plan['gpus_per_machine']} {plan['gpu']}: {plan['gpu_memory_gib']:g} GiB "
            f"({plan['usable_gib']:.1f} usable), {plan['peak_tflops']:g} TFLOPS at best, {plan['interconnect']}",
        ),
        (
            "batch",
            f"{batch['rows_per_step']} rows a step ({batch['tokens_per_step']:,} tokens), {batch['rows_per_gpu']} a "
            f"GPU: {batch['micro_batches']} micro-batch{'es' if batch['micro_batches'] > 1 else ''} of "
            f"{batch['micro_batch_size']}",
        ),
        ("lanes", f"{batch['num_lanes']}, {batch['lanes_per_worker']:g} for each GPU and loader worker"),
        ("FLOPs per token", work),
        (
            "time",
            f"{plan['step_s']:.3g} s a step, {plan['days']:.3g} days ({24 * plan['days']:.3g} h) for "
            f"{plan['steps']:,} steps, if {plan['assumed_mfu']:.0%} of the peak is reached: an assumption, not a "
            "measurement",
        ),
        *(("to change", f"{fix}: {why}") for fix, why in batch["fixes"].items()),
    ]
    width = max(len(name) for name, _ in lines)
    head = [f"{name:<{width}}  {text}" for name, text in lines]
    return "\n".join(
        [*head, "", *_table(plan), "", *_notes(plan), f"run it: {plan['command']}", f"advice: {plan['advice']}"]
    )


def _table(plan: dict[str, Any]) -> list[str]:
    hosts = any(row["host_bytes_per_machine"] for row in plan["strategies"])
    titles = ["", *(title for title, _ in _COLUMNS), "fits", "network", *(["host"] if hosts else [])]
    lines = [titles]
    for row in plan["strategies"]:
        memory = row["memory_bytes"]
        lines.append(
            [
                f"{'*' if row['chosen'] else ' '} {strategy_name(row)}",
                *(_gib(memory[part]) for _, part in _COLUMNS),
                "yes" if row["fits"] else "no",
                _gib(row["network_bytes_per_step"]),
                *([_gib(row["host_bytes_per_machine"])] if hosts else []),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]

    def aligned(line: list[str]) -> str:
        name, *cells = line
        return "  ".join(
            [name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))]
        )

    return [aligned(line) for line in lines]


def _notes(plan: dict[str, Any]) -> list[str]:
    chosen = next((row for row in plan["strategies"] if row["chosen"]), None)
    host = ", host: memory of a machine" if any(row["host_bytes_per_machine"] for row in plan["strategies"]) else ""
    notes = [
        f"GiB of a GPU; optimizer: moments and fp32 masters; network: sent by a GPU in a step{host}; "
        f"fits: total within {USABLE_SHARE:.0%} of the card"
    ]
    if chosen is not None:
        notes.append(
            "* the recipe's own choice"
            + ("" if plan["activation_checkpointing"] == "none" else ", with activation checkpointing")
        )
    if chosen is not None and plan["machines"] == 1 and chosen["network_bytes_per_step"]:
        link_s = chosen["network_bytes_per_step"] / (plan["link_gb_per_s"] / 2 * 1e9)
        notes.append(
            f"network: its volume takes {link_s * 1e3:.2g} ms at least over {plan['interconnect']}; the time above "
            "assumes it hidden in the share of the peak"
        )
    return notes
