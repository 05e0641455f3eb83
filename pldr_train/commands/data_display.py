"""What `pldr-train data` shows: how far it is, and what was found."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from tqdm import tqdm

from pldr_train.training.progress import can_show_a_bar

_SAY_EVERY_S = 5.0
_BAR_WIDTH = 40
_ROW_END = 400
"""Characters shown of a row's beginning and of its end."""


class DataProgress:
    """Documents, tokens a second and the time left: a moving bar in a terminal, else a line every few seconds.

    Args:
        verb: what is done to the documents.
        stream: where to.
        clock: seconds, monotonic.
    """

    def __init__(self, verb: str, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb, self._stream, self._clock = verb, stream or sys.stdout, clock
        self._bar: Any = None
        self._total = self._first = self._documents = self._tokens = 0
        self._begun_at = self._said_at = 0.0

    def begin(self, total_documents: int, documents: int) -> None:
        """`documents` of them are done already."""
        self._total, self._first, self._documents, self._tokens = total_documents, documents, documents, 0
        self._begun_at = self._said_at = self._clock()
        if can_show_a_bar(self._stream):
            self._bar = tqdm(
                total=total_documents, initial=documents, file=self._stream, unit="doc", dynamic_ncols=True, leave=False
            )

    def advance(self, documents: int, tokens: int) -> None:
        """So many more are done."""
        self._documents, self._tokens, now = self._documents + documents, self._tokens + tokens, self._clock()
        seconds = now - self._begun_at
        if self._bar is not None:
            rate = self._tokens / max(seconds, 1e-9)
            self._bar.set_postfix_str(f"{self._tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            self._bar.update(documents)
        elif now - self._said_at >= _SAY_EVERY_S:
            self._said_at = now
            left = seconds / (self._documents - self._first) * (self._total - self._documents)
            print(
                f"{self._verb:<12}{self._documents:,} of {self._total:,} documents, {self._tokens:,} tokens, "
                f"{self._tokens / seconds:,.0f} tokens/s, ETA {tqdm.format_interval(left)}",
                file=self._stream,
                flush=True,
            )

    def end(self) -> None:
        """All is done, or left."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def inspection_text(found: Mapping[str, Any], max_steps: int) -> str:
    """What `inspection.summary` found, for people."""
    sample, estimate, interval = found["sample"], found["estimate"], found["interval"]
    counted = "" if found["counted_files"] == found["files"] else f", {found['counted_files']:,} of them counted"
    lines = [
        ("files", f"{found['files']:,}{counted}"),
        ("documents", f"{_interval(found['documents'])}{' known so far' if counted else ''}"),
        ("train", _part(found, "train")),
        ("validation", _part(found, "validation")),
        ("looked at", _looked_at(sample, interval, estimate["is_exact"])),
        ("text", _text(sample, estimate, found)),
        ("tokens", _tokens(sample, estimate)),
        ("odd ones", ", ".join(f"{sample[name]:,} {label}" for name, label in _KINDS.items())),
        *_lengths(found["document_tokens"]),
        ("pad", f"{found['padding_with_pad']:.1%} of the tokens of rows would be padding with data.packing=pad"),
        ("epochs", f"{found['epochs']:.3g} of the training interval in trainer.max_steps={max_steps:,}"),
    ]
    if found["documents_kept"] < 1:
        lines.append(("kept", f"{found['documents_kept']:.1%} of the documents, by the limits of length"))
    text = "\n".join(f"{name:<12}{value}" for name, value in lines)
    return "\n".join([text, *_bars(found["histogram"]), *_rows(found["rows"])])


_KINDS = {"null": "null", "empty": "empty", "invalid_utf8": "invalid UTF-8", "unreadable": "unreadable"}


def _interval(interval: list[int]) -> str:
    return f"[{interval[0]:,}, {interval[1]:,}), {interval[1] - interval[0]:,} documents"


def _part(found: Mapping[str, Any], name: str) -> str:
    interval, number = found[f"{name}_documents"], found[f"num_{name}_documents"]
    if number == interval[1] - interval[0]:
        return _interval(interval)
    spread = " spread over it" if name == "validation" else ""
    return f"[{interval[0]:,}, {interval[1]:,}), {number:,} documents{spread}"


def _looked_at(sample: Mapping[str, int], interval: list[int], is_exact: bool) -> str:
    number = "all documents" if is_exact else f"{sample['documents']:,} documents, evenly spaced,"
    return f"{number} of [{interval[0]:,}, {interval[1]:,})"


def _text(sample: Mapping[str, int], estimate: Mapping[str, int], found: Mapping[str, Any]) -> str:
    text = f"{_size(sample['bytes'])}, {sample['characters']:,} characters{_whole(estimate, 'bytes', _size)}"
    if found["bytes_per_token"] is not None:
        text += f"; {found['bytes_per_token']:.2f} bytes, {found['characters_per_token']:.2f} characters a token"
    return text


def _tokens(sample: Mapping[str, int], estimate: Mapping[str, int]) -> str:
    with_eos = "" if estimate["is_exact"] else "about "
    whole = _whole(estimate, "tokens", _count)
    return f"{sample['tokens']:,}{whole}; with EOS {with_eos}{_count(estimate['tokens_with_eos'])}"


def _whole(estimate: Mapping[str, int], name: str, show: Callable[[int], str]) -> str:
    return "" if estimate["is_exact"] else f"; the interval about {show(estimate[name])}"


def _size(number: int) -> str:
    for unit, size in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6)):
        if number >= size:
            return f"{number / size:,.2f} {unit}"
    return f"{number:,} bytes"


def _count(number: int) -> str:
    return f"{number / 10**9:,.2f} B" if number >= 10**9 else f"{number:,}"


def _lengths(statistics: Mapping[str, float]) -> list[tuple[str, str]]:
    if not statistics:
        return []
    percentiles = "  ".join(f"{name} {value:,.0f}" for name, value in statistics.items() if name not in ("mean", "p50"))
    return [("lengths", f"mean {statistics['mean']:,.1f}, median {statistics['p50']:,.0f} tokens;  {percentiles}")]


def _bars(histogram: list[Mapping[str, int]]) -> list[str]:
    most = max((each["documents"] for each in histogram), default=0)
    lines = ["", "tokens of a document, EOS not counted"] if histogram else []
    for each in histogram:
        bar = "#" * round(_BAR_WIDTH * each["documents"] / most)
        span = f"{each['first']:,}" if each["first"] == each["last"] else f"{each['first']:,} - {each['last']:,}"
        lines.append(f"{span:>21}  {bar:<{_BAR_WIDTH}}  {each['documents']:,}")
    return lines


def _rows(rows: list[str]) -> list[str]:
    lines = []
    for number, row in enumerate(rows):
        shown = row if len(row) <= 2 * _ROW_END else f"{row[:_ROW_END]} ... {row[-_ROW_END:]}"
        lines += ["", f"row {number}, in the documents' order: {shown}"]
    return lines
