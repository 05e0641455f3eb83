"""What `pldr-train checkpoint` shows: tables, JSON, and how far it is."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pldr_train.printing import printable
from pldr_train.training.checkpoint_list import Leftover, Listed
from pldr_train.training.progress import can_show_a_bar

_SMALL_BYTES = 50_000_000
"""Of so little no bar is shown."""


class BytesProgress:
    """A moving bar of bytes in a terminal, for what takes a while; nothing elsewhere.

    Args:
        verb: what is done.
        total_bytes: how many will be read and written.
        stream: where to.
    """

    def __init__(self, verb: str, total_bytes: int, stream: TextIO | None = None) -> None:
        stream = stream or sys.stderr
        self._bar: Any = None
        if total_bytes >= _SMALL_BYTES and can_show_a_bar(stream):
            self._bar = tqdm(
                total=total_bytes, desc=verb, file=stream, unit="B", unit_scale=True, dynamic_ncols=True, leave=False
            )

    def advance(self, num_bytes: int) -> None:
        """So many more are done."""
        if self._bar is not None:
            self._bar.update(num_bytes)

    def __enter__(self) -> BytesProgress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def size_text(num_bytes: int) -> str:
    """Bytes for people."""
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes / 1000:,.1f} kB"


def list_as_table(listed: Sequence[Listed], leftovers: Sequence[Leftover], dangling: str | None) -> str:
    """Checkpoints as a table, newest first, and what lies beside them."""
    lines = [f"{'step':>10}  {'size':>9}  {'written':<19}  {'strategy':<9}  {'processes':>9}  state"]
    lines += [_row(each) for each in listed]
    if not listed:
        lines = ["no checkpoint yet"]
    if dangling is not None:
        lines.append(f"last names {printable(dangling)}, which is not there")
    if leftovers:
        lines += ["", "beside them:"]
        lines += [printable(f"  {each.folder.name}  {size_text(each.num_bytes)}  {each.reason}") for each in leftovers]
    return "\n".join(lines)


def _row(listed: Listed) -> str:
    state = "whole by sizes" if listed.problem is None else f"DAMAGED: {printable(listed.problem)}"
    marks = [word for word, is_so in (("last", listed.is_last), ("kept for ever", listed.is_kept)) if is_so]
    written = "" if listed.written_s is None else time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(listed.written_s))
    processes = "?" if listed.processes is None else f"{listed.processes:,}"
    return (
        f"{listed.step:>10,}  {size_text(listed.num_bytes):>9}  {written:<19}  {printable(listed.strategy or '?'):<9}  "
        f"{processes:>9}  {', '.join([state, *marks])}"
    )


def list_as_values(listed: Sequence[Listed], leftovers: Sequence[Leftover], dangling: str | None) -> dict[str, Any]:
    """The same for JSON."""
    return {
        "checkpoints": [
            {
                "folder": str(each.folder),
                "step": each.step,
                "bytes": each.num_bytes,
                "written": _time(each.written_s),
                "strategy": each.strategy,
                "processes": each.processes,
                "whole_by_sizes": each.problem is None,
                "problem": each.problem,
                "last": each.is_last,
                "kept_for_ever": each.is_kept,
            }
            for each in listed
        ],
        "leftovers": [
            {"folder": str(each.folder), "bytes": each.num_bytes, "reason": each.reason} for each in leftovers
        ],
        "last_names_what_is_not_there": dangling,
    }


def _time(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def verified_as_values(problems: Mapping[Path, Sequence[str]]) -> list[dict[str, Any]]:
    """What was found of each checkpoint, for JSON."""
    return [{"folder": str(folder), "ok": not found, "problems": list(found)} for folder, found in problems.items()]
