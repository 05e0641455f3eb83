"""Forward and backward of log_trace_exp against autograd through torch.linalg.matrix_exp, on the CPU in fp32.

The two alternate within one run and the medians are compared, so a busy machine slows both. Inputs: `potential`, about
1 everywhere as A_P is at initialisation, scaled where matrix_exp would overflow; `small`, about 0.3.

    python benchmarks/bench_log_trace_exp.py [--shape 1120 64 64] [--repeats 7] [--json FILE]
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
from torch import Tensor

from pldr_train.dag import log_trace_exp

LARGEST_NORM = 80.0  # of M o M: matrix_exp overflows fp32 near 88


def by_matrix_exp(matrix: Tensor) -> Tensor:
    """The formula as written: ln(tr(exp(M o M))/d) of M (..., d, d)."""
    exponential: Tensor = torch.linalg.matrix_exp(matrix * matrix)
    trace = exponential.diagonal(dim1=-2, dim2=-1).sum(-1)
    return (trace / matrix.shape[-1]).log()


def inputs(shape: list[int]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(shape, generator=generator)
    potential = 1 + 0.01 * noise
    norm = potential.square().sum(-1).max().item()
    return {"potential": potential * min(1.0, LARGEST_NORM / norm) ** 0.5, "small": 0.3 + 0.05 * noise}


def seconds(function: Callable[[Tensor], Tensor], matrix: Tensor) -> float:
    """Wall time of one forward and backward pass through the mean."""
    leaf = matrix.clone().requires_grad_()
    start = time.perf_counter()
    torch.autograd.backward(function(leaf).mean())
    return time.perf_counter() - start


def compare(matrix: Tensor, repeats: int) -> dict[str, float]:
    ours, reference = [], []
    for _ in range(repeats + 1):
        ours.append(seconds(log_trace_exp, matrix))
        reference.append(seconds(by_matrix_exp, matrix))
    ours_s, reference_s = statistics.median(ours[1:]), statistics.median(reference[1:])  # the first one warms up
    error = (log_trace_exp(matrix) / by_matrix_exp(matrix) - 1).abs().max().item()
    return {"ours_s": ours_s, "matrix_exp_s": reference_s, "ratio": reference_s / ours_s, "largest_difference": error}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs="+", default=[1120, 64, 64], help="of the batch of matrices")
    parser.add_argument("--repeats", type=int, default=7, help="timed runs of each, after one that warms up")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    if len(options.shape) < 2 or options.shape[-1] != options.shape[-2] or options.repeats < 1:
        parser.error("--shape needs two equal sizes at its end, --repeats at least 1")
    machine = f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    shape = " x ".join(map(str, options.shape))
    rows: list[dict[str, Any]] = []
    print("| input | shape | log_trace_exp | matrix_exp | faster by | largest relative difference | hardware |")
    print("|---|---|---|---|---|---|---|")
    for name, matrix in inputs(options.shape).items():
        row = compare(matrix, options.repeats)
        rows.append({"input": name, "shape": options.shape, "hardware": machine, "repeats": options.repeats, **row})
        print(
            f"| {name} | {shape} | {row['ours_s'] * 1e3:.1f} ms | {row['matrix_exp_s'] * 1e3:.1f} ms "
            f"| {row['ratio']:.1f} x | {row['largest_difference']:.1e} | {machine} |",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
