"""Tokens per second of a whole training step, against a literal eager implementation of the papers' formulas and
against transformers' Llama of the same shape.

A step is forward, cross-entropy plus DAG loss (0.005 on all three tensors), backward, clipping by value and AdamW, for
5 layers x 14 heads x d 64, 32,000 tokens of vocabulary. The baseline is `tests/oracle.py`: S x S attention scores, DAG
loss by autograd through torch.linalg.matrix_exp, torch.optim.AdamW as it comes. Both start from the same weights, see
the same batches and alternate step by step within one run, so that a busy machine slows both; where the ratio of the
medians and that of the fastest steps differ, the machine was busy and the run should be repeated.

    python benchmarks/bench_train_step.py [--repeats 5] [--batch 1] [--length 512] [--profile] [--json FILE]
    python benchmarks/bench_train_step.py --growth 256 512 1024 2048 4096
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.model.published_layout import to_published
from pldr_train.optim import build_adamw, clip_before_step
from tests.oracle import Oracle, OracleSizes, total_loss

COEFFICIENTS = (0.005, 0.005, 0.005)
LEARNING_RATE = 1e-5  # small, so that the baseline's matrix exponential stays within fp32 for the run
BAR = 1.2

Loss = Callable[[Tensor], Tensor]


def loss_of(
    model: Any, coefficients: tuple[float, float, float] | None = COEFFICIENTS, document_tokens: int | None = None
) -> Loss:
    """The loss as training takes it, without logits; without coefficients the cross-entropy alone.

    With `document_tokens` rows hold documents of that length, which are kept apart; they end elsewhere in each row.
    """

    def positions(rows: Tensor) -> Tensor | None:
        if document_tokens is None:
            return None
        tokens, row = torch.arange(rows.shape[1], device=rows.device), torch.arange(len(rows), device=rows.device)
        return (tokens + row[:, None]) % document_tokens

    def loss(ids: Tensor) -> Tensor:
        scored = ids[:, 1:]
        outputs = model(
            ids[:, :-1], position_ids=positions(ids[:, :-1]), targets=scored, loss_factor=1 / scored.numel(),
            use_cache=False, output_deductive_outputs=coefficients is not None,
        )  # fmt: skip
        cross_entropy: Tensor = outputs.loss
        if coefficients is None:
            return cross_entropy
        return cross_entropy + dag_loss(outputs.deductive_outputs, DagCoefficients(*coefficients)).total

    return loss


def llama_of(config: PldrllmConfig) -> LlamaForCausalLM:
    """transformers' Llama of the same shape."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size, hidden_size=config.hidden_size, intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers, num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_attention_heads, max_position_embeddings=config.max_position_embeddings,
            attn_implementation="sdpa",
        )
    ).train()  # fmt: skip


def llama_loss_of(model: Any) -> Loss:
    """Its cross-entropy, of whole logits."""

    def loss(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())

    return loss


def baseline(config: PldrllmConfig, weights: dict[str, Tensor]) -> tuple[Oracle, Loss]:
    oracle = Oracle(
        OracleSizes(config.num_hidden_layers, config.num_attention_heads, config.head_dim, config.vocab_size)
    )
    oracle.load_state_dict(weights)
    return oracle, lambda ids: total_loss(oracle(ids[:, :-1]), ids[:, 1:], COEFFICIENTS)


class Contestant:
    """A model, its loss and its optimizer; `step` takes one training step and returns its seconds and loss."""

    def __init__(self, model: nn.Module, loss: Loss, optimizer: torch.optim.Optimizer, bf16: bool) -> None:
        self.model, self.loss, self.optimizer, self.bf16 = model, loss, optimizer, bf16
        clip_before_step(optimizer, clip_value=1.0)

    def step(self, ids: Tensor) -> tuple[float, float]:
        synchronize(ids)
        start = time.perf_counter()
        self.optimizer.zero_grad()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=self.bf16):
            loss = self.loss(ids)
        loss.backward()
        self.optimizer.step()
        synchronize(ids)
        return time.perf_counter() - start, loss.item()


def synchronize(ids: Tensor) -> None:
    if ids.is_cuda:
        torch.cuda.synchronize()


def contestants(config: PldrllmConfig, bf16: bool, device: str) -> dict[str, Contestant]:
    torch.manual_seed(0)
    model = PldrllmForCausalLM(config).train()
    oracle, oracle_loss = baseline(config, to_published(model.state_dict()))
    model.to(device)
    oracle.to(device)
    plain = PldrllmConfig(num_hidden_layers=config.num_hidden_layers, custom_G_type="identity")
    identity, llama = PldrllmForCausalLM(plain).train().to(device), llama_of(config).to(device)
    literal_adamw = torch.optim.AdamW(
        oracle.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1
    )

    def contestant(model: nn.Module, loss: Loss) -> Contestant:
        return Contestant(model, loss, build_adamw(model.parameters(), lr=LEARNING_RATE), bf16)

    return {
        "ours": contestant(model, loss_of(model)),
        "literal": Contestant(oracle, oracle_loss, literal_adamw, bf16),
        "identity": contestant(identity, loss_of(identity, None)),
        "llama": contestant(llama, llama_loss_of(llama)),
    }


def compare(config: PldrllmConfig, bf16: bool, arguments: argparse.Namespace) -> dict[str, Any]:
    both = contestants(config, bf16, arguments.device)
    batches = token_batches(config, arguments)
    times: dict[str, list[float]] = {name: [] for name in both}
    losses: dict[str, list[float]] = {name: [] for name in both}
    for index, ids in enumerate(batches):
        for name, contestant in both.items():
            step_s, loss = contestant.step(ids)
            losses[name].append(loss)
            if index >= arguments.warmup:
                times[name].append(step_s)
    same = zip(losses["ours"], losses["literal"], strict=True)
    if not all(abs(a / b - 1) < (2e-2 if bf16 else 1e-4) for a, b in same):
        raise SystemExit(f"the two do not compute the same: losses {losses}")
    for name in both if arguments.profile else ():
        profile(name, both[name], batches[-1])
    tokens = arguments.batch * arguments.length
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "precision": "bf16" if bf16 else "fp32",
        "ours_tokens_per_s": tokens / medians["ours"],
        "literal_tokens_per_s": tokens / medians["literal"],
        "identity_tokens_per_s": tokens / medians["identity"],
        "llama_tokens_per_s": tokens / medians["llama"],
        "ratio": medians["literal"] / medians["ours"],
        "ratio_to_llama": medians["llama"] / medians["ours"],
        "identity_to_llama": medians["llama"] / medians["identity"],
        "ratio_of_fastest": min(times["literal"]) / min(times["ours"]),
        "first_loss": losses["ours"][0],
        "step_s": times,
    }


def growth(arguments: argparse.Namespace) -> None:
    """Print what a position costs at different lengths of a row, fp32: forward and backward, and the DAG loss alone."""
    config = PldrllmConfig(num_hidden_layers=arguments.layers, max_position_embeddings=max(arguments.growth))
    torch.manual_seed(0)
    model = PldrllmForCausalLM(config).train().to(arguments.device)
    loss, trained = loss_of(model, None), DagCoefficients(*COEFFICIENTS)
    seconds: dict[int, list[tuple[float, float]]] = {length: [] for length in arguments.growth}
    for index in range(arguments.warmup + arguments.repeats):
        for length in arguments.growth:
            ids = torch.randint(4, config.vocab_size, (arguments.batch, length + 1), device=arguments.device)
            model.zero_grad()
            model_s = timed(ids, lambda ids=ids: loss(ids).backward())
            with torch.no_grad():
                found = model(ids[:, :-1], use_cache=False, output_deductive_outputs=True).deductive_outputs
            leaves = [each.map(lambda tensor: tensor.requires_grad_()) for each in found]
            dag_s = timed(ids, lambda leaves=leaves: dag_loss(leaves, trained).total.backward())
            if index >= arguments.warmup:
                seconds[length].append((model_s, dag_s))
    print("| positions | forward and backward (s) | a position (ms) | DAG loss (s) |\n|---|---|---|---|")
    for length, pairs in seconds.items():
        model_s, dag_s = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(f"| {length:,} | {model_s:.2f} | {1e3 * model_s / arguments.batch / length:.2f} | {dag_s:.3f} |")


def timed(ids: Tensor, action: Callable[[], Any]) -> float:
    synchronize(ids)
    start = time.perf_counter()
    action()
    synchronize(ids)
    return time.perf_counter() - start


def token_batches(config: PldrllmConfig, arguments: argparse.Namespace) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shape = (arguments.warmup + arguments.repeats, arguments.batch, arguments.length + 1)
    return list(torch.randint(4, config.vocab_size, shape, generator=generator).to(arguments.device))


def profile(name: str, contestant: Contestant, ids: Tensor) -> None:
    print(f"one training step, {name}:")
    with torch.profiler.profile() as profiler:
        contestant.step(ids)
    sort_by = "self_cuda_time_total" if ids.is_cuda else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort_by, row_limit=25, max_name_column_width=45))


def hardware(device: str) -> str:
    if device == "cuda":
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    cpu_info = Path("/proc/cpuinfo")
    lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measured steps of each")
    parser.add_argument("--warmup", type=int, default=1, help="unmeasured steps of each before them")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", action="store_true", help="print where a step of each spends its time")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument(
        "--growth", type=int, nargs="+", metavar="LENGTH", help="compare these lengths of a row instead"
    )
    arguments = parser.parse_args()
    if arguments.growth is not None:
        growth(arguments)
        return

    config = PldrllmConfig(num_hidden_layers=arguments.layers)
    results = [compare(config, precision == "bf16", arguments) for precision in arguments.precisions]
    print(
        f"{hardware(arguments.device)}; {arguments.layers}L x 14H x d64, {arguments.batch} x {arguments.length} tokens"
    )
    print(f"median of {arguments.repeats} alternating steps\n")
    heads = ("precision", "ours (tokens/s)", "literal", "ratio", "of the fastest steps", "identity", "Llama")
    print(f"| {' | '.join(heads)} | ours over Llama | identity over it |")
    print("|---|---|---|---|---|---|---|---|---|")
    for row in results:
        print(
            f"| {row['precision']} | {row['ours_tokens_per_s']:.0f} | {row['literal_tokens_per_s']:.0f} "
            f"| {row['ratio']:.2f} | {row['ratio_of_fastest']:.2f} | {row['identity_tokens_per_s']:.0f} "
            f"| {row['llama_tokens_per_s']:.0f} | {row['ratio_to_llama']:.2f} | {row['identity_to_llama']:.2f} |"
        )
    below = [row["precision"] for row in results if row["ratio"] < BAR]
    print(f"\nbar {BAR}: {'missed in ' + ', '.join(below) if below else 'reached'}")
    if arguments.json is not None:
        report = {"hardware": hardware(arguments.device), "layers": arguments.layers, "batch": arguments.batch}
        report |= {"length": arguments.length, "repeats": arguments.repeats, "results": results}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
