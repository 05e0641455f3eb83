"""Tokens per second of greedy decoding: with the K, V and G cache, with no cache, and a Llama of the same shape.

Each side generates the same number of new tokens from a prompt of the same length through `generate`, batch 1. The
models are 5 layers x 14 heads x d 64 with 32,000 tokens of vocabulary and random weights (speed does not depend on
them); the Llama has as many layers and heads and the same widths. The cached sides alternate within one run, so that a
busy machine slows both; the uncached side, which takes minutes, runs once in between.

    python benchmarks/bench_decode.py [--repeats 7] [--new-tokens 256] [--prompt 32] [--device cpu] [--json FILE]
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
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from pldr_train.model import PldrllmConfig, PldrllmForCausalLM

NO_CACHE_BAR = 5.0
LLAMA_BAR = 0.9


def models() -> dict[str, Any]:
    torch.manual_seed(0)
    config = PldrllmConfig()
    sizes = {
        name: getattr(config, name)
        for name in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "max_position_embeddings",
        )
    }  # fmt: skip
    llama = LlamaConfig(**sizes, num_key_value_heads=config.num_attention_heads, tie_word_embeddings=False)
    return {
        "learned G": PldrllmForCausalLM(config),
        "causal Gram, chunks of 64": PldrllmForCausalLM(PldrllmConfig(gram_chunk_size=64)),
        "G = identity": PldrllmForCausalLM(PldrllmConfig(custom_G_type="identity")),
        "Llama": LlamaForCausalLM(llama),
    }


def timed(model: Any, prompt: torch.Tensor, new_tokens: int, use_cache: bool) -> float:
    """Tokens per second of one generation."""
    _synchronize(prompt.device)
    start = time.perf_counter()
    with torch.no_grad():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, use_cache=use_cache,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        )  # fmt: skip
    _synchronize(prompt.device)
    assert ids.shape[1] == prompt.shape[1] + new_tokens
    return new_tokens / (time.perf_counter() - start)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    logging.set_verbosity_error()
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(6, 32000, (1, options.prompt), generator=generator).to(options.device)
    sides: dict[str, Callable[[], float]] = {}
    for name, model in models().items():
        model.to(options.device).eval()
        sides[name] = lambda model=model: timed(model, prompt, options.new_tokens, use_cache=True)
        if name == "learned G":
            uncached = lambda model=model: timed(model, prompt, options.new_tokens, use_cache=False)  # noqa: E731
        timed(model, prompt, 8, use_cache=True)
    speeds: dict[str, list[float]] = {name: [] for name in sides}
    without = 0.0
    for repeat in range(options.repeats):
        for name, run in sides.items():
            speeds[name].append(run())
        if repeat == options.repeats // 2:
            without = uncached()
    medians = {name: statistics.median(values) for name, values in speeds.items()}
    pairs = [ours / theirs for ours, theirs in zip(speeds["learned G"], speeds["Llama"], strict=True)]
    return {
        "tokens_per_s": medians | {"learned G, no cache": without},
        "spread": {name: (min(values), max(values)) for name, values in speeds.items()},
        "over_no_cache": medians["learned G"] / without,
        "over_llama": statistics.median(pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    result = measure(options)
    for name, speed in result["tokens_per_s"].items():
        low, high = result["spread"].get(name, (speed, speed))
        print(f"{name:<28} {speed:8.1f} tokens/s   ({low:.1f} to {high:.1f})")
    print(f"cached over no cache {result['over_no_cache']:.1f} x (bar {NO_CACHE_BAR}); ", end="")
    print(f"over Llama, pair by pair {result['over_llama']:.3f} (bar {LLAMA_BAR})")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
