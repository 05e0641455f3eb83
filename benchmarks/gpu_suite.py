"""All that only a GPU can tell, in one run of a few minutes: the tests marked `gpu`, then all figures side by side.

Steps are bf16 autocast of 5 layers x 14 heads x d 64 with 32,000 tokens: forward, loss, backward, clipping and AdamW.
MFU counts the model's own FLOPs (PaLM's convention). A row that fails says why, and the others run.

    python benchmarks/gpu_suite.py [--json FILE] [--rows NAME ...]      # on one CUDA device
    python benchmarks/gpu_suite.py --rehearse                           # the same rows, tiny, on the CPU
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_log_trace_exp import by_matrix_exp, inputs
from benchmarks.bench_loss_memory import in_chunks, whole
from benchmarks.bench_train_step import COEFFICIENTS, LEARNING_RATE, Loss, llama_loss_of, llama_of, loss_of
from pldr_train.dag import log_trace_exp
from pldr_train.metrics.hardware import gpu_of_device
from pldr_train.metrics.throughput import flops_per_token, model_flops_utilisation
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM, refining
from pldr_train.model.casting import weights_cast_together
from pldr_train.model.output_head import OutputHead
from pldr_train.model.power_law_attention import MetricLearner
from pldr_train.model.published_layout import to_published
from pldr_train.optim import build_adamw, clip_before_step
from pldr_train.recipe import ModelSection
from pldr_train.recipe.attention import FLASH_PACKAGES, FLEX, is_installed
from pldr_train.training.weights import compile_layers, recompute
from tests.oracle import Oracle, OracleSizes, total_loss

ROOT = Path(__file__).resolve().parent.parent
TESTS_LIMIT_S = 150
BACKENDS = (
    FLEX,
    "flash_attention_2",
    *(name for name in list(FLASH_PACKAGES)[1:] if is_installed(FLASH_PACKAGES[name])),
)
"""Of attention, on GPUs only. Of FlashAttention the newer versions where they are installed."""


@dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    device: str
    layers: int
    heads: int
    head_dim: int
    units: int
    """Residual units of a metric learner."""
    vocab: int
    batch: int
    length: int
    lengths: tuple[int, ...]
    matrices: int
    warmup: int
    repeats: int
    backend: str
    """Of torch.compile."""

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    def model(self, **changes: Any) -> PldrllmConfig:
        return PldrllmConfig(
            vocab_size=self.vocab, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            head_dim=self.head_dim, num_reslayerA=self.units, hidden_size=self.width,
            max_position_embeddings=max(*self.lengths, self.length), **changes,
        )  # fmt: skip

    def section(self, **changes: Any) -> ModelSection:
        return ModelSection(
            vocab_size=self.vocab, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            head_dim=self.head_dim, num_reslayerA=self.units, **changes,
        )  # fmt: skip


FULL = Size("cuda", 5, 14, 64, 8, 32_000, 16, 1024, (256, 512, 1024, 2048, 4096), 3360, 5, 15, "inductor")
REHEARSAL = Size("cpu", 1, 2, 16, 1, 200, 2, 32, (16, 32), 8, 1, 2, "eager")


# ------------------------------------------------------------------------------------------------------------- steps


def ours(
    size: Size,
    dag: tuple[float, float, float] | None = COEFFICIENTS,
    compiled: bool = True,
    again: Any = "none",
    attention: str = "sdpa",
    document_tokens: int | None = None,
    **changes: Any,
) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = PldrllmForCausalLM._from_config(size.model(**changes), attn_implementation=attention)
    model = model.to(size.device).train()
    recompute(model, again)
    if compiled:
        compile_layers(model, size.backend)
    return model, loss_of(model, dag, document_tokens)


def llama(size: Size, compiled: bool) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    model = llama_of(size.model()).to(size.device)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend=size.backend)
    return model, llama_loss_of(model)


def literal(size: Size) -> tuple[nn.Module, Loss]:
    torch.manual_seed(0)
    oracle = Oracle(OracleSizes(size.layers, size.heads, size.head_dim, size.vocab, num_reslayerA=size.units))
    oracle.load_state_dict(to_published(PldrllmForCausalLM(size.model()).state_dict()))
    oracle.to(size.device)
    return oracle, lambda ids: total_loss(oracle(ids[:, :-1]), ids[:, 1:], COEFFICIENTS)


def measure_step(size: Size, model: nn.Module, loss: Loss, length: int | None = None) -> dict[str, float | None]:
    """Return the median seconds of a step, and the peak of allocated memory on a GPU."""
    optimizer = build_adamw(model.parameters(), lr=LEARNING_RATE)
    clip_before_step(optimizer, clip_value=1.0)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(4, size.vocab, (size.batch, (length or size.length) + 1), generator=generator).to(size.device)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(size.device, torch.bfloat16):
            value = loss(ids)
        value.backward()
        optimizer.step()

    for _ in range(size.warmup):
        step()
    reset_peak(size)
    times = [seconds(size, step) for _ in range(size.repeats)]
    return {"step_s": statistics.median(times), "peak_gib": peak_gib(size)}


def seconds(size: Size, action: Callable[[], Any]) -> float:
    synchronize(size)
    start = time.perf_counter()
    action()
    synchronize(size)
    return time.perf_counter() - start


def synchronize(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.synchronize()


def reset_peak(size: Size) -> None:
    if size.device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(size: Size) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if size.device == "cuda" else None


# -------------------------------------------------------------------------------------------------------------- rows


@dataclass
class Suite:
    """Rows by name, each measured on its own; `results` has what came out, or why nothing did."""

    size: Size
    results: dict[str, dict[str, Any]] = field(default_factory=dict)

    def rows(self) -> dict[str, Callable[[], dict[str, Any]]]:
        size = self.size
        rows: dict[str, Callable[[], dict[str, Any]]] = {
            "tests": self.tests,
            "step, Llama": lambda: self.step(lambda: llama(size, compiled=False), None),
            "step, Llama, compiled": lambda: self.step(lambda: llama(size, compiled=True), None),
            "step, literal code": lambda: self.step(lambda: literal(size), size.section()),
            "step, learned G with DAG, eager": lambda: self.step(lambda: ours(size, compiled=False), size.section()),
            "step, learned G with DAG": lambda: self.step(lambda: ours(size), size.section()),
            "step, learned G without DAG": lambda: self.step(lambda: ours(size, dag=None), size.section()),
            "step, identity": lambda: self.step(
                lambda: ours(size, dag=None, custom_G_type="identity"), size.section(custom_G_type="identity")
            ),
            "step, causal Gram": lambda: self.step(
                lambda: ours(size, dag=None, gram_chunk_size=size.length // 4),
                size.section(gram_chunk_size=size.length // 4),
            ),
        }
        for what in ("metric_learner", "layers"):
            rows[f"step, {what} recomputed"] = lambda what=what: self.step(  # type: ignore[misc]
                lambda: ours(size, again=what), size.section()
            )
        for backend in ("eager", *BACKENDS):
            rows[f"step, attention {backend}"] = lambda backend=backend: self.step(  # type: ignore[misc]
                lambda: ours(size, attention=backend), size.section()
            )
        for backend in ("sdpa", *BACKENDS):
            rows[f"step, documents, attention {backend}"] = lambda backend=backend: self.step(  # type: ignore[misc]
                lambda: ours(size, attention=backend, document_tokens=size.length // 4), size.section()
            )
        for length in size.lengths:
            # Not compiled: another length would be another compilation.
            rows[f"step, {length} positions, eager"] = lambda length=length: self.step(  # type: ignore[misc]
                lambda: ours(size, compiled=False), size.section(), length
            )
        rows["DAG kernel"] = self.dag_kernel
        rows["metric learner"] = self.metric_learner
        rows["loss, whole logits"] = lambda: self.loss(whole)
        rows["loss, in chunks"] = lambda: self.loss(in_chunks)
        return rows

    def run(self, names: list[str]) -> None:
        for name, row in self.rows().items():
            if names and name not in names:
                continue
            torch._dynamo.reset()
            try:
                self.results[name] = row()
            except Exception as error:
                first = str(error).strip().splitlines()
                self.results[name] = {"failed": f"{type(error).__name__}: {first[0] if first else ''}"[:300]}
            print(line_of(name, self.results[name]), flush=True)
            gc.collect()
            if self.size.device == "cuda":
                torch.cuda.empty_cache()

    def tests(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
        if self.size.device == "cpu":
            command.append("--collect-only")  # they skip without a GPU; here it is that they are found
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TESTS_LIMIT_S, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"pytest ended with {done.returncode}: {done.stdout.strip()[-200:]}")
        return {"text": done.stdout.strip().splitlines()[-1].strip("= ")}

    def step(
        self, build: Callable[[], tuple[nn.Module, Loss]], section: ModelSection | None, length: int | None = None
    ) -> dict[str, Any]:
        size = self.size
        found: dict[str, Any] = dict(measure_step(size, *build(), length))
        found["tokens_per_s"] = size.batch * (length or size.length) / found["step_s"]
        gpu = gpu_of_device(torch.cuda.get_device_name()) if size.device == "cuda" else None
        if section is not None and gpu is not None:
            flops = flops_per_token(section, length or size.length).total
            found["mfu"] = model_flops_utilisation(found["tokens_per_s"], flops, gpu.peak_flops("bf16"))
        return found

    def dag_kernel(self) -> dict[str, Any]:
        size = self.size
        matrix = inputs([size.matrices, size.head_dim, size.head_dim])["potential"].to(size.device)

        def timed(function: Callable[[Tensor], Tensor]) -> float:
            leaf = matrix.clone().requires_grad_()
            action = lambda: torch.autograd.backward(function(leaf).mean())  # noqa: E731
            for _ in range(size.warmup):
                action()
            return statistics.median(seconds(size, action) for _ in range(size.repeats))

        ours_s, reference_s = timed(log_trace_exp), timed(by_matrix_exp)
        error = float((log_trace_exp(matrix) / by_matrix_exp(matrix) - 1).abs().max())
        return {"ours_s": ours_s, "matrix_exp_s": reference_s, "ratio": reference_s / ours_s, "difference": error}

    def metric_learner(self) -> dict[str, Any]:
        """Forward and backward of a layer's, compiled: its units at once where there is a kernel, and one by one."""
        size = self.size
        torch.manual_seed(0)
        learner = MetricLearner(size.model()).to(size.device).train()
        learner.compile(backend=size.backend)
        gram = torch.randn(size.batch, size.heads, size.head_dim, size.head_dim, device=size.device)

        def action() -> Tensor:
            cast = weights_cast_together(learner, size.device, compiled=True)
            with torch.autocast(size.device, torch.bfloat16), cast:
                metric: Tensor = learner(gram.clone().requires_grad_())
            metric.square().mean().backward()  # type: ignore[no-untyped-call]
            return metric.detach()

        def timed() -> tuple[float, Tensor]:
            for _ in range(size.warmup):
                action()
            return statistics.median(seconds(size, action) for _ in range(size.repeats)), action()

        ours_s, metric = timed()
        with mock.patch.object(refining, "kernels_for", return_value=None):
            singly_s, expected = timed()
        error = float((metric - expected).norm() / expected.norm())
        return {"ours_s": ours_s, "one_by_one_s": singly_s, "ratio": singly_s / ours_s, "difference": error}

    def loss(self, loss_of: Callable[..., Tensor]) -> dict[str, Any]:
        size = self.size
        torch.manual_seed(0)
        head = OutputHead(size.width, size.vocab).to(size.device)
        hidden = torch.randn(size.batch, size.length, size.width, device=size.device, requires_grad=True)
        targets = torch.randint(1, size.vocab, (size.batch, size.length), device=size.device)

        def action() -> None:
            with torch.autocast(size.device, torch.bfloat16):
                value = loss_of(head, hidden, targets)
            value.backward()

        for _ in range(size.warmup):
            action()
        reset_peak(size)
        times = [seconds(size, action) for _ in range(size.repeats)]
        return {"step_s": statistics.median(times), "peak_gib": peak_gib(size)}

    # What the figures are held against.

    def checks(self) -> Iterator[tuple[str, float | None, str]]:
        """Yield each bar: what it is about, the figure (None where it was not measured), the bar."""
        rate = {name: row.get("tokens_per_s") for name, row in self.results.items()}
        learned, plain = rate.get("step, learned G with DAG"), rate.get("step, learned G without DAG")
        compiled, identity = rate.get("step, Llama, compiled"), rate.get("step, identity")
        over_literal, over_plain = _ratio(learned, rate.get("step, literal code")), _ratio(learned, plain)
        yield "learned G with DAG, tokens/s over the literal code's", over_literal, ">= 4"
        yield "the same over the compiled Llama's", _ratio(learned, compiled), ">= 0.85"
        yield "identity over the compiled Llama", _ratio(identity, compiled), ">= 0.97"
        yield "share of the DAG loss in a step", None if over_plain is None else 1 - over_plain, "<= 0.04"
        yield "MFU, learned G with DAG", self.results.get("step, learned G with DAG", {}).get("mfu"), ">= 0.45"
        yield "DAG kernel over matrix_exp", self.results.get("DAG kernel", {}).get("ratio"), ">= 30"
        yield "units of a metric learner at once", self.results.get("metric learner", {}).get("ratio"), ">= 1"
        peaks = [self.results.get(f"loss, {name}", {}).get("peak_gib") for name in ("whole logits", "in chunks")]
        yield "peak memory of the loss, whole logits over chunks", _ratio(*peaks), ">= 3"


def _ratio(of: float | None, to: float | None) -> float | None:
    return None if of is None or not to else of / to


def line_of(name: str, row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "failed" in row:
        return f"| {name} | failed: {row['failed']} |"
    if "text" in row:
        return f"| {name} | {row['text']} |"
    words = {
        "tokens_per_s": "{:,.0f} tokens/s", "step_s": "{:.4f} s", "mfu": "MFU {:.1%}", "peak_gib": "peak {:.2f} GiB",
        "ours_s": "{:.5f} s", "matrix_exp_s": "matrix_exp {:.5f} s", "one_by_one_s": "one by one {:.5f} s",
        "ratio": "{:.1f} x", "difference": "off by {:.1e}",
    }  # fmt: skip
    return f"| {name} | {', '.join(text.format(row[key]) for key, text in words.items() if row.get(key) is not None)} |"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU, to see that every row runs")
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="only these")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        parser.error("there is no CUDA device; --rehearse runs every row on the CPU, tiny")
    suite = Suite(REHEARSAL if options.rehearse else FULL)
    if unknown := [name for name in options.rows if name not in suite.rows()]:
        parser.error(f"--rows {unknown[0]}: there are {', '.join(suite.rows())}")
    hardware = "CPU, rehearsal" if options.rehearse else torch.cuda.get_device_name()
    size = suite.size
    print(f"{hardware}, torch {torch.__version__}; {size.layers}L x {size.heads}H x d{size.head_dim}, bf16, ", end="")
    print(
        f"{size.batch} x {size.length} tokens, {size.vocab:,} in the vocabulary\n\n| row | figures |\n|---|---|",
        flush=True,
    )
    start = time.perf_counter()
    suite.run(options.rows)
    took_s = time.perf_counter() - start
    print(f"\n{took_s:.0f} s\n\n| bar | figure | asked for |\n|---|---|---|")
    checks = list(suite.checks())
    for name, value, bar in checks:
        print(f"| {name} | {'not measured' if value is None else format(value, '.3g')} | {bar} |")
    if options.json is not None:
        report = {"hardware": hardware, "torch": torch.__version__, "seconds": took_s, "rows": suite.results}
        report["bars"] = [{"name": name, "figure": value, "bar": bar} for name, value, bar in checks]
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
