"""The actions of `pldr-train tokenizer`, and what `inspect` prints."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

from pldr_train.commands.tokenizer import BYTES_PER_SAMPLE_BYTE, INSPECTED_DOCUMENTS
from pldr_train.commands.tokenizer_progress import ReadingProgress, with_heartbeat
from pldr_train.data.documents import DocumentBlock, Unreadable
from pldr_train.data.files import write_file_atomically
from pldr_train.data.rows.reading_ahead import Fetched, ReadingAhead
from pldr_train.data.rows.split import Interval
from pldr_train.data.sources.file_source import FileSource
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.line_sample import LineSample
from pldr_train.data.tokenizer.pieces import SPECIAL_PIECES
from pldr_train.data.tokenizer.report import TextReport, VocabularyReport, describe_vocabulary, measure, open_model
from pldr_train.data.tokenizer.settings import TokenizerSettings, load_settings
from pldr_train.data.tokenizer.training import train_model
from pldr_train.errors import DataError
from pldr_train.outputs import begins_with, check_output
from pldr_train.printing import format_seconds
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.training.quiet import quiet_libraries

_READ_DOCUMENTS = 1024
_READING_THREADS = 4
_TEXT_CHUNK_CHARACTERS = 1_000_000
_SHARES = (
    "tokens_per_word",
    "bytes_per_token",
    "characters_per_token",
    "byte_token_share",
    "unknown_token_share",
    "vocabulary_used",
    "round_trip_share",
)


def _train(options: argparse.Namespace) -> int:
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
    """Return where to write, tried before hours of work. Raises DataError."""
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
    if stop is not None and not 0 <= start < stop:
        raise DataError(f"--documents {start} {stop} is no interval; give START and STOP with 0 <= START < STOP")
    if recipe.data.source == "tokens":
        raise DataError(
            f"data.source={recipe.data.source} in {options.recipe}: token ids, no text; name the documents that they "
            "were made from, for instance with data.source=parquet data.path=..."
        )
    quiet_libraries()
    return open_source(recipe.data, until=stop)


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
    """Yield the documents in order, read ahead, at most a row group or some thousand at a time."""
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

    of = "all" if sample.num_lines == sample.num_lines_seen - sample.num_too_long else f"of {sample.num_lines_seen:,}"
    needed = BYTES_PER_SAMPLE_BYTE * sample.num_bytes
    print(
        f"training    {vocab_size:,} pieces on {sample.num_lines:,} lines ({of}), {sample.num_bytes / 1e6:,.1f} MB; "
        f"needs about {_in_words(needed)} of memory",
        flush=True,
    )
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > installed:
        print(
            f"warning: this machine has {_in_words(installed)} of memory; if that runs out, pass --sample-bytes "
            f"{installed // (2 * BYTES_PER_SAMPLE_BYTE) // 10**6}MB"
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
    return format_seconds(time.monotonic() - begun_at)


def _inspect(options: argparse.Namespace) -> int:
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
    start, stop = recipe.data.validation_documents or recipe.data.train_documents or (0, INSPECTED_DOCUMENTS)
    return start, min(stop, start + INSPECTED_DOCUMENTS)


def _texts_of_file(path: Path) -> Iterator[str]:
    """Yield a file's text in parts of whole lines, which become the same tokens as the whole."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            while lines := file.readlines(_TEXT_CHUNK_CHARACTERS):
                yield "".join(lines)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--text-file {path} cannot be read: {error}") from error


ACTIONS = {"train": _train, "inspect": _inspect}
"""By the second word of the command."""


# -------------------------------------------------------------------------------------------------------------- shown


def as_json(path: Path, vocabulary: VocabularyReport, text: TextReport | None) -> str:
    """Return the reports as JSON: `file`, `vocabulary`, and `text`, null without documents."""
    measured = None if text is None else asdict(text) | {name: getattr(text, name) for name in _SHARES}
    content = {"file": str(path), "vocabulary": asdict(vocabulary), "text": measured}
    return json.dumps(content, indent=1, ensure_ascii=False)


def as_table(path: Path, vocabulary: VocabularyReport, text: TextReport | None) -> str:
    """Return the reports as lines of a name and a value."""
    special = ", ".join(f"{index} {piece}" for index, piece in enumerate(vocabulary.special_pieces))
    rows = [
        ("file", str(path)),
        ("pieces", f"{vocabulary.num_pieces:,}, of which {vocabulary.num_byte_pieces} bytes"),
        ("model", f"{vocabulary.model_type}, {vocabulary.normalization}{_options(vocabulary)}"),
        ("special", special),
        ("layout", "as published" if not vocabulary.differences else "differs from the published one:"),
        *(("", difference) for difference in vocabulary.differences),
        ("longest", "  ".join(vocabulary.longest_pieces)),
    ]
    if text is not None:
        rows += _text_rows(text)
    return "\n".join(f"{name:<22}{value}" for name, value in rows)


def _options(vocabulary: VocabularyReport) -> str:
    words = {"split_digits": "digits split", "byte_fallback": "byte fallback"}
    return "".join(f", {word}" for name, word in words.items() if getattr(vocabulary, name))


def _text_rows(text: TextReport) -> list[tuple[str, str]]:
    read = f"{text.documents:,} documents, {text.lines:,} lines, {text.words:,} words, {text.bytes / 1e6:,.2f} MB"
    used = f"{text.learned_pieces_used:,} of {text.learned_pieces:,} learned pieces"
    frequent = "  ".join(f"{piece} {count / text.tokens:.1%}" for piece, count in text.frequent_pieces)
    return [
        ("text", read),
        ("tokens", f"{text.tokens:,}"),
        ("tokens per word", f"{text.tokens_per_word:.3f}"),
        ("bytes per token", f"{text.bytes_per_token:.3f}"),
        ("characters per token", f"{text.characters_per_token:.3f}"),
        ("byte tokens", f"{text.byte_tokens:,}, {text.byte_token_share:.3%} of all"),
        (SPECIAL_PIECES[1], f"{text.unknown_tokens:,}, {text.unknown_token_share:.3%} of all"),
        ("vocabulary used", f"{text.vocabulary_used:.1%}, {used}"),
        ("lines that come back", f"{text.round_trip_share:.3%}, {text.round_trip_lines:,} of {text.lines:,}"),
        ("most frequent", frequent),
    ]
