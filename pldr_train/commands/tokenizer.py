"""`pldr-train tokenizer`: train a tokenizer on a recipe's documents; say what one is and how it does."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.commands.bounded_numbers import document_number
from pldr_train.commands.export import EXIT_CODES
from pldr_train.commands.two_words import Action, TwoWordParser
from pldr_train.errors import DataError
from pldr_train.outputs import begins_with, check_output
from pldr_train.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from pldr_train.data.documents import DocumentBlock, Unreadable
    from pldr_train.data.intervals import Interval
    from pldr_train.data.line_sample import LineSample
    from pldr_train.data.sources import FileSource
    from pldr_train.data.tokenizer_settings import TokenizerSettings

DEFAULT_SAMPLE_BYTES = 2_000_000_000
"""Nearly what SentencePiece's suffix array can hold: 2**31 characters."""
_BYTES_PER_SAMPLE_BYTE = 20
_READ_DOCUMENTS = 1024
_READING_THREADS = 4
_INSPECTED_DOCUMENTS = 1000
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
_TEXT_CHUNK_CHARACTERS = 1_000_000


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    return TwoWordParser(
        "pldr-train tokenizer",
        "Train a SentencePiece tokenizer on the documents of a recipe, or say what one is.",
        {
            "train": Action(_train_parser, _train, "train one on a recipe's documents"),
            "inspect": Action(_inspect_parser, _inspect, "say what one is, and how it does on documents"),
        },
    )


def run(options: argparse.Namespace) -> int:
    """Do what the second word says."""
    code: int = options.run(options)
    return code


def _train_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pldr-train tokenizer train",
        description="Train a SentencePiece unigram tokenizer of model.vocab_size pieces on the documents that a "
        "recipe's data section names, with the papers' settings (data/tokenizer.yaml lists them). The same arguments "
        "give the same file.",
        epilog=f"memory: training takes about {_BYTES_PER_SAMPLE_BYTE} bytes for each byte of text, so 20 GB for "
        f"--sample-bytes 1GB. {EXIT_CODES}",
    )
    parser.add_argument("recipe", metavar="RECIPE", help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help="document numbers to train on, STOP excluded (default: as the settings say, 0 to 2,000,000 or as many as "
        "there are)",
    )
    parser.add_argument("--settings", metavar="FILE", type=Path, help="other settings, a file like data/tokenizer.yaml")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the .model file to write (default: the recipe's data.tokenizer)"
    )
    parser.add_argument(
        "--sample-bytes",
        metavar="N",
        type=_sample_bytes,
        default=DEFAULT_SAMPLE_BYTES,
        help="train on at most so much text, such as 500MB; of more, lines are sampled evenly (default and most: "
        f"{DEFAULT_SAMPLE_BYTES / 1e9:.0f}GB)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    parser.add_argument("--verbose", action="store_true", help="show SentencePiece's own log")
    return parser


def _inspect_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pldr-train tokenizer inspect",
        description="Compare a SentencePiece model with the published layout and, given documents, say how long they "
        "become and which pieces they use.",
        epilog=EXIT_CODES,
    )
    parser.add_argument(
        "model", metavar="MODEL", type=Path, help="a .model file, or a run's or exported model's folder"
    )
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="values to replace in --recipe's recipe")
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--recipe", metavar="RECIPE", help="YAML file that names documents to tokenise")
    text.add_argument("--text-file", metavar="FILE", type=Path, help="a UTF-8 file to tokenise instead")
    parser.add_argument(
        "--documents",
        metavar=("START", "STOP"),
        nargs=2,
        type=document_number,
        help=f"with --recipe: document numbers, STOP excluded (default: the first {_INSPECTED_DOCUMENTS:,} of its "
        "data.validation_documents or, where it has none, of its training documents)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _sample_bytes(text: str) -> int:
    found = re.fullmatch(r"([\d_]+(?:\.\d+)?)([KMG]?)B?", text.strip().upper())
    value = float(found[1].replace("_", "")) * _UNITS[found[2]] if found and found[1].strip("_") else 0
    if not 1 <= value <= DEFAULT_SAMPLE_BYTES:
        raise argparse.ArgumentTypeError(
            f"{text}: must be a number of bytes from 1 to {DEFAULT_SAMPLE_BYTES:,}, such as 500MB or 1_000_000_000"
        )
    return int(value)


def _train(options: argparse.Namespace) -> int:
    from pldr_train.data.tokenizer_settings import TokenizerSettings, load_settings

    recipe = load_recipe(options.recipe, options.overrides).resolved()
    settings = TokenizerSettings() if options.settings is None else load_settings(options.settings)
    _check_vocab_size(recipe, settings, options)
    output = _output_file(options, recipe)
    source, start, stop = _documents_to_train_on(options, recipe, settings)
    begun_at = time.monotonic()
    sample = _read_sample(source, start, stop, settings, options.sample_bytes)
    print(f"read        documents [{start:,}, {stop:,}), {sample.num_bytes_seen / 1e6:,.1f} MB in {_seconds(begun_at)}")
    size = _write_model(sample, recipe.model.vocab_size, settings, output, quiet=not options.verbose)
    print(f"pieces      {recipe.model.vocab_size:,} in {_seconds(begun_at)}")
    print(f"file        {output} ({size:,} bytes)")
    print(f"use         data.tokenizer={output}")
    again = [options.recipe, *options.overrides]
    print(f"inspect     {shlex.join(['pldr-train', 'tokenizer', 'inspect', str(output), '--recipe', *again])}")
    return 0


def _check_vocab_size(recipe: Recipe, settings: TokenizerSettings, options: argparse.Namespace) -> None:
    if settings.vocab_size not in (None, recipe.model.vocab_size):
        raise DataError(
            f"{options.settings}: vocab_size={settings.vocab_size} is not the recipe's "
            f"model.vocab_size={recipe.model.vocab_size}; pass model.vocab_size={settings.vocab_size}, or remove the "
            "line"
        )


def _output_file(options: argparse.Namespace, recipe: Recipe) -> Path:
    """Where to write, tried before hours of work. Raises DataError."""
    name = options.output or recipe.data.tokenizer
    if name is None:
        raise DataError(f"{options.recipe} names no data.tokenizer; say with --output FILE where to write the model")
    output = Path(name)
    if output.is_dir():
        raise DataError(f"{output} is a folder; name a file in it, such as {output / 'tokenizer.model'}")
    if output.exists() and not options.overwrite:
        raise DataError(f"{output} is there already; pass --overwrite, or name another file with --output")
    # Its first field is the list of pieces.
    check_output(output, "--output", begins_with(b"\n"), "a SentencePiece model")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise DataError(f"cannot write {output}: {error.strerror}; name another file with --output") from error
    return output


def _documents_to_train_on(
    options: argparse.Namespace, recipe: Recipe, settings: TokenizerSettings
) -> tuple[FileSource, int, int]:
    start, stop = options.documents or settings.documents
    source = _open(options, recipe, start, stop)
    available = source.num_documents
    if options.documents is None and start < available < stop:
        print(f"documents   [{start:,}, {available:,}), all that there are of [{start:,}, {stop:,})")
        stop = available
    _check_within(options, start, stop, available)
    held_out = recipe.data.validation_documents
    if held_out is not None and max(start, held_out[0]) < min(stop, held_out[1]):
        print(f"note: these documents overlap the recipe's data.validation_documents={list(held_out)}")
    return source, start, stop


def _open(options: argparse.Namespace, recipe: Recipe, start: int, stop: int | None) -> FileSource:
    from pldr_train.data.opening import open_source
    from pldr_train.data.settings import TOKENS, data_settings
    from pldr_train.training.quiet import quiet_libraries

    if stop is not None and not 0 <= start < stop:
        raise DataError(f"--documents {start} {stop} is no interval; give START and STOP with 0 <= START < STOP")
    if recipe.data.source == TOKENS:
        raise DataError(
            f"data.source={recipe.data.source} in {options.recipe}: token ids, no text; name the documents that they "
            "were made from, for instance with data.source=parquet data.path=..."
        )
    quiet_libraries()
    return open_source(data_settings(recipe), until=stop)


def _check_within(options: argparse.Namespace, start: int, stop: int, available: int) -> None:
    if stop > available:
        name = "--documents" if options.documents else "the settings' documents:"
        raise DataError(
            f"{name} {start} {stop} exceeds the {available:,} documents of the recipe's source; "
            f"{'lower STOP' if start < available else 'choose others'}"
        )


def _read_sample(
    source: FileSource, start: int, stop: int, settings: TokenizerSettings, sample_bytes: int
) -> LineSample:
    from pldr_train.commands.tokenizer_progress import ReadingProgress
    from pldr_train.data.line_sample import LineSample

    longest = settings.trainer["max_sentence_length"]
    sample = LineSample(sample_bytes, settings.trainer["input_sentence_size"], longest)
    progress = ReadingProgress(stop - start)
    unreadable: dict[int, Unreadable] = {}
    try:
        for block in _blocks(source, start, stop):
            unreadable |= {part.start: part for part in block.unreadable}
            sample.add(block.start, block.texts())
            progress.advance(block.start + len(block.raw) - start, sample)
    finally:
        progress.end()
    for part in unreadable.values():
        print(f"skipped     {part.place}: {part.reason}")
    if sample.num_too_long:
        print(f"left out    {sample.num_too_long:,} lines of more than {longest:,} bytes (max_sentence_length)")
    sample.finish()
    return sample


def _blocks(source: FileSource, start: int, stop: int) -> Iterator[DocumentBlock]:
    """The documents in order, read ahead, at most a row group or some thousand at a time."""
    from collections import deque
    from functools import partial

    from pldr_train.data.reading_ahead import Fetched, ReadingAhead

    ahead = ReadingAhead(_READING_THREADS)
    waiting: deque[Fetched[DocumentBlock]] = deque()
    while start < stop or waiting:
        while start < stop and len(waiting) <= _READING_THREADS:
            end = min(stop, start + _READ_DOCUMENTS, source.manifest.locate(start).group_stop)
            waiting.append(ahead.fetch(partial(source.read, start, end)))
            start = end
        yield waiting.popleft().result()


def _write_model(sample: LineSample, vocab_size: int, settings: TokenizerSettings, output: Path, quiet: bool) -> int:
    """Train on the sample and write the file; its size in bytes."""
    from pldr_train.commands.tokenizer_progress import with_heartbeat
    from pldr_train.data.files import write_file_atomically
    from pldr_train.data.tokenizer_training import train_model

    of = "all" if sample.num_lines == sample.num_lines_seen - sample.num_too_long else f"of {sample.num_lines_seen:,}"
    needed = _BYTES_PER_SAMPLE_BYTE * sample.num_bytes
    print(
        f"training    {vocab_size:,} pieces on {sample.num_lines:,} lines ({of}), {sample.num_bytes / 1e6:,.1f} MB; "
        f"needs about {_in_words(needed)} of memory",
        flush=True,
    )
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        print(
            f"warning: this machine has {_in_words(installed)} of memory; if that runs out, pass --sample-bytes "
            f"{installed // (2 * _BYTES_PER_SAMPLE_BYTE) // 10**6}MB"
        )
    try:
        model = with_heartbeat(lambda: train_model(sample.drain(), vocab_size, settings.trainer, quiet=quiet))
    except DataError as error:
        sampled = "" if of == "all" else f" (a sample {of} lines: raise --sample-bytes or input_sentence_size)"
        raise DataError(f"{error}{sampled}") from error
    write_file_atomically(output, model, "name another file with --output")
    return len(model)


def _in_words(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.1f} GB" if num_bytes >= 10**9 else f"{num_bytes / 1e6:,.0f} MB"


def _seconds(begun_at: float) -> str:
    from pldr_train.training.progress import format_seconds

    return format_seconds(time.monotonic() - begun_at)


def _inspect(options: argparse.Namespace) -> int:
    from pldr_train.commands.tokenizer_table import as_json, as_table
    from pldr_train.data.tokenizer_report import describe_vocabulary, measure, open_model

    path = options.model / "tokenizer.model" if options.model.is_dir() else options.model
    if options.recipe is None and options.overrides:
        raise DataError(f"{options.overrides[0]}: replaces a recipe's value, but there is no --recipe; name one")
    if options.recipe is None and options.documents:
        raise DataError(
            f"--documents {options.documents[0]} {options.documents[1]}: of what? Name a recipe with --recipe"
        )
    tokenizer = open_model(path)
    vocabulary = describe_vocabulary(tokenizer)
    texts = _texts(options)
    report = None if texts is None else measure(tokenizer, texts)
    print(as_json(path, vocabulary, report) if options.json else as_table(path, vocabulary, report))
    return 0


def _texts(options: argparse.Namespace) -> Iterator[str] | None:
    if options.text_file is not None:
        return _texts_of_file(options.text_file)
    if options.recipe is None:
        return None
    recipe = load_recipe(options.recipe, options.overrides).resolved()
    start, stop = options.documents or _documents_to_inspect(recipe)
    source = _open(options, recipe, start, stop)
    if not options.documents:
        stop = min(stop, source.num_documents)
    _check_within(options, start, max(stop, start + 1), source.num_documents)
    return (text for block in _blocks(source, start, stop) for text in block.texts())


def _documents_to_inspect(recipe: Recipe) -> Interval:
    start, stop = recipe.data.validation_documents or recipe.data.train_documents or (0, _INSPECTED_DOCUMENTS)
    return start, min(stop, start + _INSPECTED_DOCUMENTS)


def _texts_of_file(path: Path) -> Iterator[str]:
    """A file's text in parts of whole lines, which become the same tokens as the whole."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while lines := file.readlines(_TEXT_CHUNK_CHARACTERS):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text-file {path} cannot be read: {error}") from error
