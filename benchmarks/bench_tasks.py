"""Sequential scoring of candidates: `score_rows` against one prefix a call, both on the same requests.

The requests have the shapes of two of the papers' tasks: questions of 25 tokens with 4 candidates of 4 (ARC), and of 60
with 4 of 20 (HellaSwag). The literal side makes one pass over each prefix, alone, without padding or a cache, and keeps
the last logits only. The models have random weights; speed does not depend on them. `small` is the leakage demo's size.

    python benchmarks/bench_tasks.py [--items 8] [--repeats 3] [--batch-size 32] [--device cpu] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.tasks.scoring import Row, RowScore, score_rows

BAR = 5.0
SHAPES = {"ARC": (25, 4, 4), "HellaSwag": (60, 4, 20)}
SMALL = {
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "head_dim": 32,
    "hidden_size": 64,
    "vocab_size": 320,
    "num_reslayerA": 2,
}
MODELS: dict[str, dict[str, Any]] = {
    "110M, learned G": {},
    "110M, causal Gram, chunks of 64": {"gram_chunk_size": 64},
    "110M, G = identity": {"custom_G_type": "identity"},
    "small, learned G": SMALL,
}


def requests(shape: tuple[int, int, int], items: int, vocab_size: int) -> list[Row]:
    context, candidates, length = shape
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(6, vocab_size, (count,), generator=generator).tolist())

    rows = []
    for _ in range(items):
        question = draw(context)
        rows += [Row(question + draw(length), length) for _ in range(candidates)]
    return rows


@torch.no_grad()
def literal(model: Any, rows: list[Row]) -> list[RowScore]:
    scores = []
    for row in rows:
        total, greedy = 0.0, True
        for end in range(len(row.ids) - row.scored, len(row.ids)):
            ids = torch.tensor([row.ids[:end]], device=model.device)
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
            total += float(logits.log_softmax(-1)[row.ids[end]])
            greedy = greedy and int(logits.argmax()) == row.ids[end]
        scores.append(RowScore(total, greedy))
    return scores


def timed(work: Any) -> tuple[float, list[RowScore]]:
    start = time.perf_counter()
    scores = work()  # log-likelihoods are on the host, so the device has finished
    return time.perf_counter() - start, scores


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    found = []
    for name, sizes in MODELS.items():
        torch.manual_seed(0)
        model = PldrllmForCausalLM(PldrllmConfig(**sizes)).to(options.device).eval()
        for shape_name, shape in SHAPES.items():
            rows = requests(shape, options.items, model.config.vocab_size)
            tokens = sum(row.scored for row in rows)
            score_rows(model, rows[:4], "sequential", options.batch_size)
            times: list[tuple[float, float]] = []
            for _ in range(options.repeats):
                ours, scores = timed(lambda m=model, r=rows: score_rows(m, r, "sequential", options.batch_size))
                theirs, expected = timed(lambda m=model, r=rows: literal(m, r))
                times.append((ours, theirs))
            largest = max(abs(a.log_likelihood - b.log_likelihood) for a, b in zip(scores, expected, strict=True))
            ratio = statistics.median(theirs / ours for ours, theirs in times)
            row = {
                "model": name, "task": shape_name, "ours_tokens_per_s": tokens / statistics.median(t for t, _ in times),
                "literal_tokens_per_s": tokens / statistics.median(t for _, t in times), "ratio": ratio,
                "largest_difference_nat": largest,
            }  # fmt: skip
            found.append(row)
            print(
                f"{name:<34} {shape_name:<10} {row['ours_tokens_per_s']:>9.1f} {row['literal_tokens_per_s']:>9.1f} "
                f"{ratio:>6.1f} x {largest:>9.1e}"
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else None)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'model':<34} {'task':<10} {'tokens/s':>9} {'literal':>9} {'ratio':>8} {'difference':>9}")
    found = measure(options)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
