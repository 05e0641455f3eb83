"""Peak memory and time of the cross-entropy and its backward: whole logits against the loss without logits.

From hidden states (rows x positions, 896) to their gradient and that of the output head with its bias, in bf16 autocast
over 32,000 tokens. The peak is that of all tensors allocated after the hidden states and the weights, by torch's
profiler; the gradients themselves, 0.16 GiB at 16 x 1,024, are in it.

    python benchmarks/bench_loss_memory.py [--rows 16] [--length 1024] [--vocab 32000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pldr_train.model.output_head import OutputHead
from pldr_train.training.objective import TokenLoss, token_loss

WIDTH = 896
BAR = 3.0


def peak_bytes(action: Callable[[], Any]) -> int:
    """Return the most memory of tensors that an action has allocated at once, on the CPU."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    events = [each for each in profiler.profiler.kineto_results.events() if each.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda each: each.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def whole(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    found: TokenLoss = token_loss(head(hidden), targets)
    return found.cross_entropy_sum / targets.numel()


def in_chunks(head: OutputHead, hidden: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = head(hidden, targets, 1 / targets.numel())[0]
    return loss


def measure(loss_of: Callable[..., Tensor], options: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    head = OutputHead(WIDTH, options.vocab)
    hidden = torch.randn(options.rows, options.length, WIDTH, requires_grad=True)
    targets = torch.randint(1, options.vocab, (options.rows, options.length))
    found: dict[str, Any] = {}

    def loss_and_backward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(head, hidden, targets)
        loss.backward()
        found["loss"] = float(loss.detach())

    begun = time.perf_counter()
    found["peak_bytes"] = peak_bytes(loss_and_backward)
    found["seconds"] = time.perf_counter() - begun
    assert hidden.grad is not None
    assert head.weight.grad is not None
    return found | {
        "hidden_norm": float(hidden.grad.double().norm()),
        "weight_norm": float(head.weight.grad.double().norm()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    print(f"{options.rows} x {options.length} positions, {options.vocab} tokens, torch {torch.__version__}\n")
    print("| loss | peak (GiB) | time (s) | loss (nat/token) | norm of the weight's gradient |")
    print("|---|---|---|---|---|")
    rows = {name: measure(loss_of, options) for name, loss_of in (("whole", whole), ("in chunks", in_chunks))}
    for name, row in rows.items():
        print(
            f"| {name} | {row['peak_bytes'] / 2**30:.2f} | {row['seconds']:.1f} | {row['loss']:.7f} "
            f"| {row['weight_norm']:.7f} |"
        )
    ratio = rows["whole"]["peak_bytes"] / rows["in chunks"]["peak_bytes"]
    print(f"\n{ratio:.1f} times less; bar {BAR}: {'reached' if ratio >= BAR else 'missed'}")
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
