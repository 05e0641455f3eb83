"""How long a checkpoint stops training, against writing as many bytes to the same disk.

Trains the 110M model (5 layers x 14 heads x d 64, 32,000 tokens of vocabulary) for some steps on the CPU with
checkpoints, in one process and in two (DDP, ZeRO-3). Every other one is written in the background
(`checkpoint.async_save`). Weights and AdamW's moments are 12 bytes a parameter. Right after each checkpoint rank 0
writes and syncs a plain file of the same size in the same folder: both sides see the same disk at the same time. What
is stated is the whole time that training stands still: collecting, writing, hashing, syncing, renaming, removing old
ones; in the background collecting, copying, renaming, removing, and waiting where the next one is due before.

    python benchmarks/bench_save.py [--repeats 5] [--folder DIR] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from tests.distributed.fleet import Fleet
from tests.tiny import tiny_values, write_corpus, write_tokenizer

BAR_S = 2.0
EVERY = 6
"""Steps between checkpoints: enough for one to be written meanwhile."""
SIDES: dict[str, tuple[int, dict[str, Any]]] = {
    "one process": (1, {}),
    "two processes, ddp": (2, {"strategy": "ddp"}),
    "two processes, ZeRO-3": (2, {"strategy": "deepspeed", "zero_stage": 3}),
}


def time_saves(rank: int, results: str) -> None:
    """Time every checkpoint and, on rank 0, the plain writing of as many bytes after it; every other one is written in
    the background.
    """
    from pldr_train.training import saving, step_boundary

    begin, publish, save = saving.Saver.begin, saving.Saver.publish, step_boundary.StepBoundary._save
    begun: list[dict[str, Any]] = []

    def timed_begin(self: Any, trainer: Any, module: Any, in_background: bool = False) -> bool:
        self.world.barrier()
        at = time.perf_counter()
        is_new = begin(self, trainer, module, in_background)
        self.world.barrier()
        if is_new:
            begun.append({"in_background": in_background, "begin_s": time.perf_counter() - at})
        return is_new

    def timed_publish(self: Any) -> int | None:
        if self._write is None:
            return publish(self)
        self.world.barrier()
        at = time.perf_counter()
        step = publish(self)
        self.world.barrier()
        line = begun[-1] | {"publish_s": time.perf_counter() - at}
        if rank == 0:
            folder = self.folder.checkpoints_path / "last"
            size = sum(path.stat().st_size for path in folder.iterdir())
            line |= {"bytes": size, "plain_s": plain_write(self.folder.path / "plain.bin", size)}
            with Path(results).open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(line) + "\n")
        self.world.barrier()
        return step

    def every_other(self: Any, trainer: Any, module: Any, in_background: bool = False) -> None:
        save(self, trainer, module, in_background and len(begun) % 2 == 1)

    saving.Saver.begin, saving.Saver.publish = timed_begin, timed_publish  # type: ignore[method-assign]
    step_boundary.StepBoundary._save = every_other  # type: ignore[method-assign]


def plain_write(path: Path, size: int) -> float:
    """Seconds to write and sync a file of `size` bytes, which is then removed."""
    chunk = os.urandom(1 << 24)
    begun = time.perf_counter()
    with path.open("wb") as handle:
        for at in range(0, size, len(chunk)):
            handle.write(chunk[: min(len(chunk), size - at)])
        handle.flush()
        os.fsync(handle.fileno())
    seconds = time.perf_counter() - begun
    path.unlink()
    return seconds


def measure(name: str, folder: Path, repeats: int) -> list[dict[str, float]]:
    size, parallel = SIDES[name]
    values = tiny_values(
        folder,
        folder / "runs",
        name.replace(" ", "-").replace(",", ""),
        model={"num_hidden_layers": 5, "num_attention_heads": 14, "head_dim": 64, "vocab_size": 32000, "A_dff": 170},
        trainer={
            "max_steps": EVERY * (2 * repeats + 1),
            "batch_size": 2,
            "validate_every_steps": 1000,
            "devices": size,
        },
        checkpoint={"every_steps": EVERY, "keep_last": 1, "async_save": True},
    )
    values["model"]["num_reslayerA"] = 8
    values["parallel"] = parallel
    results = folder / f"{values['run']['name']}.jsonl"
    fleet = Fleet(values, size, folder / "logs", time_saves, (str(results),))
    codes = fleet.join(1800)
    assert codes == [0] * size, fleet.text()
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    return lines[1:-1]  # the first one also warms the disk up, the last is the run's end


def stop_s(line: dict[str, float]) -> float:
    """Seconds that training stood still."""
    return line["begin_s"] + line["publish_s"]


def median_stop(lines: list[dict[str, float]]) -> float:
    return statistics.median(map(stop_s, lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: the temporary folder)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        write_corpus(folder / "corpus")
        write_tokenizer(folder / "tokenizer.model", folder / "corpus")
        measured = {side: measure(side, folder, options.repeats) for side in SIDES}
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    for side, lines in measured.items():
        waiting, beside = ([each for each in lines if each["in_background"] == kind] for kind in (False, True))
        plain_s = statistics.median(line["plain_s"] for line in lines)
        beyond = statistics.median(stop_s(line) - line["plain_s"] for line in waiting)
        size = lines[0]["bytes"]
        print(
            f"{side:24} {size / 1e9:.2f} GB  checkpoint {median_stop(waiting):6.2f} s  plain write {plain_s:6.2f} s "
            f"({size / plain_s / 1e9:.2f} GB/s)  beyond it {beyond:+.2f} s (bar {BAR_S:g} s)  "
            f"in the background {median_stop(beside):6.2f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1))


if __name__ == "__main__":
    main()
