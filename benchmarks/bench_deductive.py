"""Cost of the deductive metrics relative to a forward and backward pass of the same model, on one thread.

A pass is forward with deductive outputs, cross-entropy and backward. The cheap and the costly set are one update and
one compute on the pass' own outputs, so what a logged step or a validation batch pays; the parameters' norms, the order
parameter of two runs and the entropy of given attention weights stand beside them. All alternate within one run; the
figures are medians of CPU seconds, which a busy machine changes less than wall time.

    python benchmarks/bench_deductive.py [--repeats 3] [--models quickstart 110m] [--length 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_train.checkpoint.live_state import WholeState
from pldr_train.distributed.world import World
from pldr_train.metrics.deductive import AttentionEntropy, DeductiveMetrics, OrderParameter
from pldr_train.metrics.tensor_metrics import CHEAP, COSTLY
from pldr_train.model import DeductiveOutputs, PldrllmConfig, PldrllmForCausalLM
from pldr_train.training.observing import power_law_norms

QUICKSTART = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 128, "A_dff": 85, "vocab_size": 4096}
MODELS: dict[str, tuple[dict[str, int], int, int | None]] = {"quickstart": (QUICKSTART, 16, 128), "110m": ({}, 4, None)}
"""Sizes, batch size and length; a length of None is the option's."""
PASS = "forward and backward"


def one_pass(model: PldrllmForCausalLM, ids: Tensor) -> list[DeductiveOutputs]:
    model.zero_grad()
    output = model(ids[:, :-1], use_cache=False, output_deductive_outputs=True)
    F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    return [layer.map(Tensor.detach) for layer in output.deductive_outputs]


def measured(config: PldrllmConfig, model: PldrllmForCausalLM, ids: Tensor) -> dict[str, Callable[[list[Any]], Any]]:
    """What is timed, each a function of the pass' deductive outputs."""
    layers, heads, d, length = config.num_hidden_layers, config.num_attention_heads, config.head_dim, ids.shape[1] - 1
    weights = torch.rand(len(ids), heads, length, length).tril()
    weights /= weights.sum(-1, keepdim=True)
    live = WholeState(model, torch.optim.AdamW(model.parameters()))

    def deductive(*sets: str) -> Callable[[list[Any]], Any]:
        def measure(outputs: list[Any]) -> Any:
            metrics = DeductiveMetrics(layers, heads, d, sets=sets)
            metrics.update(outputs)
            return metrics.compute()

        return measure

    def order(outputs: list[Any]) -> Any:
        parameter = OrderParameter(layers)
        parameter.update(outputs, [layer.map(torch.clone) for layer in outputs])
        return parameter.compute()

    def entropy(_: list[Any]) -> Any:
        metrics = AttentionEntropy(layers)
        metrics.update([weights] * layers)
        return metrics.compute()

    return {
        "cheap set": deductive(CHEAP),
        "costly set": deductive(COSTLY),
        "norms of the parameters": lambda _: power_law_norms(live, layers, World()),
        "order parameter, two runs given": order,
        "attention entropy, weights given": entropy,
    }


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def compare(name: str, repeats: int, length: int) -> dict[str, Any]:
    sizes, batch, own_length = MODELS[name]
    length = own_length or length
    torch.manual_seed(0)
    config = PldrllmConfig(**sizes)
    model = PldrllmForCausalLM(config).train()
    ids = torch.randint(4, config.vocab_size, (batch, length + 1))
    functions = measured(config, model, ids)
    seconds: dict[str, list[float]] = {PASS: []} | {each: [] for each in functions}
    for _ in range(repeats + 1):
        pass_s, outputs = cpu_seconds(lambda: one_pass(model, ids))
        seconds[PASS].append(pass_s)
        for each, function in functions.items():
            seconds[each].append(cpu_seconds(lambda function=function, outputs=outputs: function(outputs))[0])
    medians = {each: statistics.median(values[1:]) for each, values in seconds.items()}  # the first one warms up
    return {"model": name, "batch": batch, "length": length, "seconds": medians}


def hardware() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, 1 thread, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds, after one that warms up")
    parser.add_argument("--models", nargs="+", choices=sorted(MODELS), default=list(MODELS))
    parser.add_argument("--length", type=int, default=512, help="context of the 110M model")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if options.repeats < 1 or options.length < 2:
        parser.error("--repeats needs at least 1, --length at least 2")
    torch.set_num_threads(1)
    print(f"{hardware()}; medians of {options.repeats}\n")
    print("| model, batch x context | measured | CPU time | share of a pass |")
    print("|---|---|---|---|")
    rows = []
    for name in options.models:
        row = compare(name, options.repeats, options.length)
        rows.append(row)
        for each, value_s in row["seconds"].items():
            share = 100 * value_s / row["seconds"][PASS]
            print(
                f"| {name}, {row['batch']} x {row['length']} | {each} | {value_s * 1e3:.1f} ms | {share:.2f} % |",
                flush=True,
            )
    if options.json is not None:
        options.json.write_text(json.dumps({"hardware": hardware(), "results": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
