"""`pldr-train data`: tokenise documents ahead, look at them, check files, fetch them."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.commands.bounded_numbers import document_number, natural, positive_int, whole_number
from pldr_train.commands.export import EXIT_CODES
from pldr_train.commands.two_words import Action, TwoWordParser
from pldr_train.errors import DataError
from pldr_train.outputs import keep_off_runs
from pldr_train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pldr_train.data.intervals import Interval
    from pldr_train.data.manifest import Manifest
    from pldr_train.data.settings import DataSettings
    from pldr_train.data.verification import Verified

_SAMPLE_DOCUMENTS, _SHOWN_ROWS = 2000, 2
_EXIT_ON_SIGTERM = 143
_MOST_WORKERS = 4096


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    return TwoWordParser(
        "pldr-train data",
        "Tokenise a recipe's documents ahead, look at them, check their files, fetch them.",
        {
            "tokenize": Action(_tokenize_parser, _tokenize, "write documents as token ids, for data.source=tokens"),
            "inspect": Action(_inspect_parser, _inspect, "say what documents are like, and how often a run sees them"),
            "verify": Action(_verify_parser, _verify, "look for damaged and missing files"),
            "download": Action(_download_parser, _download, "fetch files of the Hub ahead, for data.source=hub"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    code: int = options.run(options)
    return code


def _parser(action: str, description: str, recipe: str = "RECIPE") -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pldr-train data {action}", description=description, epilog=EXIT_CODES)
    parser.add_argument("recipe", metavar=recipe, help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    return parser


def _add_documents(parser: argparse.ArgumentParser, default: str) -> None:
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help=f"document numbers, STOP excluded (default: {default})",
    )


def _tokenize_parser() -> argparse.ArgumentParser:
    from pldr_train.data.token_shards import DOCUMENTS_PER_SHARD

    parser = _parser(
        "tokenize",
        "Tokenise the documents of a recipe into a folder that data.source=tokens reads. The rows of a run are the "
        "same as when it tokenises as it trains. Interrupted, the same command goes on.",
    )
    parser.add_argument("--output", metavar="FOLDER", type=Path, required=True, help="the folder to write")
    _add_documents(parser, "what the recipe trains and validates on")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole_number(1, _MOST_WORKERS),
        default=cores,
        help=f"processes (default: {cores})",
    )
    parser.add_argument(
        "--documents-per-shard",
        metavar="N",
        type=positive_int,
        default=DOCUMENTS_PER_SHARD,
        help=f"documents of one file (default: {DOCUMENTS_PER_SHARD:,})",
    )
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = _parser("inspect", "Tokenise a sample of a recipe's documents, and say what they are like.")
    _add_documents(parser, "the training interval")
    parser.add_argument(
        "--sample",
        metavar="N",
        type=positive_int,
        default=_SAMPLE_DOCUMENTS,
        help=f"documents to read, evenly spaced (default: {_SAMPLE_DOCUMENTS:,})",
    )
    parser.add_argument(
        "--rows", metavar="N", type=natural, default=_SHOWN_ROWS, help=f"rows to show (default: {_SHOWN_ROWS})"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _verify_parser() -> argparse.ArgumentParser:
    parser = _parser(
        "verify",
        "Check the files of a folder of tokens, or those that a recipe's intervals touch, and list every fault.",
        "RECIPE_OR_FOLDER",
    )
    parser.add_argument("--quick", action="store_true", help="sizes and headers only, not what is in the files")
    parser.add_argument("--all", action="store_true", help="of a recipe: all files, whatever its intervals touch")
    return parser


def _download_parser() -> argparse.ArgumentParser:
    parser = _parser("download", "Fetch the files of the Hub that a recipe's intervals touch into data.cache_dir.")
    parser.add_argument("--force", action="store_true", help="although the disk is too small for all of them")
    return parser


def _settings(options: argparse.Namespace) -> tuple[Recipe, DataSettings]:
    recipe = load_recipe(options.recipe, options.overrides).resolved()
    # Imported here: torch takes seconds, which a mistake in the recipe should not cost.
    from pldr_train.data.settings import data_settings
    from pldr_train.training.quiet import quiet_libraries

    quiet_libraries()
    return recipe, data_settings(recipe)


def _documents(options: argparse.Namespace) -> Interval | None:
    return None if options.documents is None else (options.documents[0], options.documents[1])


def _tokenize(options: argparse.Namespace) -> int:
    keep_off_runs(options.output, "--output")
    _, settings = _settings(options)
    from pldr_train.commands.data_display import DataProgress
    from pldr_train.data.tokenize_ahead import tokenize_ahead

    # Ended by a signal, it should take its workers along and leave nothing half written.
    earlier = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_EXIT_ON_SIGTERM))
    try:
        outcome = tokenize_ahead(
            settings,
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
    recipe, settings = _settings(options)
    from pldr_train.commands.data_display import DataProgress, inspection_text
    from pldr_train.data.inspection import first_rows, open_data, summary, take_sample

    # What is said on the way must not stand in the midst of JSON.
    stream = sys.stderr if options.json else sys.stdout
    data = open_data(settings, _documents(options), lambda line: print(line, file=stream))
    interval = _documents(options) or data.train
    progress = DataProgress("read", stream)
    progress.begin(min(options.sample, interval[1] - interval[0]), 0)
    try:
        sample = take_sample(data, settings, interval, options.sample, progress.advance)
    finally:
        progress.end()
    rows = first_rows(data, settings, interval, options.rows)
    found = summary(data, settings, sample, recipe.trainer.max_steps, rows)
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
        recipe, settings = _settings(options)
        if settings.source == "tokens":
            assert settings.path is not None
            found, what = _verified_tokens(Path(settings.path), options), settings.path
        else:
            from pldr_train.data.verification import verify_source

            found = verify_source(settings, kept=_list_of_run(recipe), every_file=options.all, quick=options.quick)
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
    from pldr_train.data.verification import verify_tokens

    return verify_tokens(folder, quick=options.quick)


def _list_of_run(recipe: Recipe) -> Manifest | None:
    """The list of files that the recipe's run began with, if it has begun."""
    from pldr_train.data.manifest import Manifest
    from pldr_train.runs.layout import DATA_FILE

    path = Path(recipe.run.dir) / recipe.run.name / DATA_FILE
    return Manifest.load(path) if path.exists() else None


def _download(options: argparse.Namespace) -> int:
    _, settings = _settings(options)
    if settings.source != "hub":
        print(f"nothing to download: data.source={settings.source} reads no data set of the Hub (data.source=hub does)")
        return 0
    from pldr_train.data.downloading import fetch, wanted_files

    wanted = wanted_files(settings)
    there = len(wanted.files) - len(wanted.missing)
    print(f"files       {len(wanted.files):,} of {len(wanted.manifest.files):,}; {there:,} are there already")
    print(
        f"to fetch    {wanted.missing_bytes / 1e9:,.2f} GB into {settings.cache_dir}; "
        f"{wanted.free_bytes / 1e9:,.2f} GB are free there",
        flush=True,
    )
    done = fetch(settings, wanted, force=options.force)
    if done.problems:
        raise DataError(
            f"{len(done.problems):,} of {len(wanted.files):,} files could not be fetched: {'; '.join(done.problems)}"
        )
    print(
        f"fetched     {done.fetched:,} files, {done.fetched_bytes / 1e9:,.2f} GB; a run reads them without the network"
    )
    return 0
