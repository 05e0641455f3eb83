"""The actions of `pldr-train data`, and what they show: how far they are, and what was found."""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

from tqdm import tqdm

from pldr_train.commands import EXIT_BY_SIGNAL
from pldr_train.data.downloading import fetch, wanted_files
from pldr_train.data.inspection import first_rows, open_data, summary, take_sample
from pldr_train.data.rows.split import Interval
from pldr_train.data.sources.manifest import Manifest
from pldr_train.data.tokens.tokenize_ahead import tokenize_ahead
from pldr_train.data.verification import Verified, verify_source, verify_tokens
from pldr_train.errors import DataError
from pldr_train.outputs import keep_off_runs
from pldr_train.printing import can_show_a_bar, log_to_terminal
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.runs.layout import DATA_FILE
from pldr_train.training.quiet import quiet_libraries

_SAY_EVERY_S = 5.0
_BAR_WIDTH = 40
_ROW_END = 400
"""Characters shown of a row's beginning and of its end."""


def _recipe(options: argparse.Namespace) -> Recipe:
    recipe = load_recipe(options.recipe, options.overrides).resolved()
    quiet_libraries()
    return recipe


def _documents(options: argparse.Namespace) -> Interval | None:
    return None if options.documents is None else (options.documents[0], options.documents[1])


def _tokenize(options: argparse.Namespace) -> int:
    keep_off_runs(options.output, "--output")
    recipe = _recipe(options)
    # Ended by a signal, it should take its workers along and leave nothing half written.
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_BY_SIGNAL["SIGTERM"]))
    try:
        outcome = tokenize_ahead(
            recipe,
            options.output,
            documents=_documents(options),
            documents_per_shard=options.documents_per_shard,
            num_workers=options.workers,
            progress=DataProgress("tokenised"),
        )
    finally:
        signal.signal(signal.SIGTERM, earlier)
    manifest, totals = outcome.manifest, outcome.manifest.totals
    if not outcome.written_shards:
        print(f"finished    {options.output} was complete already; nothing was done")
    start, stop = manifest.documents
    print(f"documents   [{start:,}, {stop:,}), {totals['documents']:,} in {manifest.num_shards:,} files")
    print(f"tokens      {totals['tokens']:,} with EOS, {manifest.dtype_name}")
    odd = [f"{totals[name]:,} {name}" for name in ("null", "empty", "invalid_utf8", "unreadable") if totals[name]]
    if odd:
        print(f"odd ones    {', '.join(odd)}")
    for part in manifest.unreadable_parts:
        print(f"skipped     documents [{part.start:,}, {part.stop:,}), {part.place}: {part.reason}")
    print(f"folder      {options.output}")
    print(f"use         data.source=tokens data.path={options.output} data.tokenizer=null")
    fixed = [value for value in options.overrides if not value.startswith(("data.source=", "data.path="))]
    again = ["pldr-train", "fit", options.recipe, *fixed, "data.source=tokens", f"data.path={options.output}"]
    print(f"try         {shlex.join([*again, 'data.tokenizer=null'])}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    recipe = _recipe(options)
    # What is said on the way must not stand in the midst of JSON.
    stream = sys.stderr if options.json else sys.stdout
    log_to_terminal(stream="stderr" if options.json else "stdout")
    data = open_data(recipe, _documents(options))
    interval = _documents(options) or data.train
    progress = DataProgress("read", stream)
    progress.begin(min(options.sample, interval[1] - interval[0]), 0)
    try:
        sample = take_sample(data, recipe.data, interval, options.sample, progress.advance)
    finally:
        progress.end()
    rows = first_rows(data, recipe.data, interval, options.rows)
    found = summary(data, recipe, sample, rows)
    print(
        json.dumps(found, indent=1, ensure_ascii=False)
        if options.json
        else inspection_text(found, recipe.trainer.max_steps)
    )
    return 0


def _verify(options: argparse.Namespace) -> int:
    folder = Path(options.recipe)
    if folder.is_dir():
        if options.overrides:
            raise DataError(
                f"{options.overrides[0]}: replaces a recipe's value, but {folder} is a folder; leave it out"
            )
        found, what = _verified_tokens(folder, options), str(folder)
    else:
        recipe = _recipe(options)
        data = recipe.data
        if data.source == "tokens":
            assert data.path is not None
            found, what = _verified_tokens(Path(data.path), options), data.path
        else:
            found = verify_source(data, kept=_list_of_run(recipe), every_file=options.all, quick=options.quick)
            what = options.recipe
    for problem in found.problems:
        print(f"bad         {problem}")
    for note in found.notes:
        print(f"note        {note}")
    looked = f"{found.files:,} files, {found.bytes / 1e6:,.1f} MB{', sizes and headers only' if options.quick else ''}"
    if found.problems:
        raise DataError(f"{what}: {len(found.problems):,} faults in {looked}; the lines above say what to do")
    print(f"whole       {looked}")
    return 0


def _verified_tokens(folder: Path, options: argparse.Namespace) -> Verified:
    return verify_tokens(folder, quick=options.quick)


def _list_of_run(recipe: Recipe) -> Manifest | None:
    """Return the list of files that the recipe's run began with, if it has begun."""

    path = Path(recipe.run.dir) / recipe.run.name / DATA_FILE
    return Manifest.load(path) if path.exists() else None


def _download(options: argparse.Namespace) -> int:
    data = _recipe(options).data
    if data.source != "hub":
        print(f"nothing to download: data.source={data.source} reads no data set of the Hub (data.source=hub does)")
        return 0

    wanted = wanted_files(data)
    there = len(wanted.files) - len(wanted.missing)
    print(f"files       {len(wanted.files):,} of {len(wanted.manifest.files):,}; {there:,} are there already")
    print(
        f"to fetch    {wanted.missing_bytes / 1e9:,.2f} GB into {data.cache_dir}; "
        f"{wanted.free_bytes / 1e9:,.2f} GB are free there",
        flush=True,
    )
    done = fetch(data, wanted, force=options.force)
    if done.problems:
        raise DataError(
            f"{len(done.problems):,} of {len(wanted.files):,} files could not be fetched: {'; '.join(done.problems)}"
        )
    print(
        f"fetched     {done.fetched:,} files, {done.fetched_bytes / 1e9:,.2f} GB; a run reads them without the network"
    )
    return 0


ACTIONS = {"tokenize": _tokenize, "inspect": _inspect, "verify": _verify, "download": _download}
"""By the second word of the command."""


# -------------------------------------------------------------------------------------------------------------- shown


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
    """Return what `inspection.summary` found, for people."""
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
