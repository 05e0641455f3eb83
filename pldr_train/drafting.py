"""A recipe for texts of one's own: sizes that fit the amount of text and the machine, each line with its reason."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pldr_train.data.sources.file_source import FileSource
from pldr_train.data.sources.local_files import SUFFIXES, local_manifest, sources_at
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.training import fitting_vocab_size, iterate_texts
from pldr_train.errors import DataError, first_line
from pldr_train.metrics.throughput import count_parameters, flops_per_token
from pldr_train.recipe import DataSection, ModelSection, recipe_from_dict
from pldr_train.recipe.yaml_text import parse_yaml, show
from pldr_train.untrusted import parse_json

BYTES_PER_TOKEN = 4
"""English text under a tokenizer of some thousand pieces or more; smaller ones come to 2 to 3."""
CPU_FLOPS_PER_CORE = 25e9
"""A little less than the quickstart reaches on a core in fp32 (measured: 8.1 MFLOP/token, 7,100 tokens/s on two)."""
GPU_FLOPS = 50e12
"""An assumption on the low side: 10 % of the peak of a card that multiplies bf16 at 500 TFLOP/s."""
CPU_BUDGET_S, GPU_BUDGET_S = 900, 3600
EPOCHS = 4
"""Repeating a text so often costs little of what new text would give (arXiv 2305.16264)."""
TOKENS_PER_PARAMETER = 5
"""With EPOCHS passes the 20 tokens for each parameter that a compute-optimal model sees (arXiv 2203.15556)."""
_FEW_DOCUMENTS = 20
_SAMPLED_DOCUMENTS = 400
_TRIED_BYTES, _TRIED_PIECES = 4e6, 4096
"""A tokenizer is tried on so much of a text, which takes seconds; large texts allow their number of pieces anyway."""
_TEXT_COLUMNS = ("content", "text", "body", "document")
_VOCABULARIES = ((200e3, 512), (1e6, 1024), (20e6, 4096), (200e6, 8192), (2e9, 16_384), (math.inf, 32_000))
"""Up to so many bytes of text, so many pieces."""


@dataclass(frozen=True)
class Size:
    """A model that a draft may choose."""

    layers: int
    heads: int
    head_dim: int
    context_length: int
    lr: float

    def shape(self, vocab_size: int) -> ModelSection:
        """Return its sizes with the papers' proportions."""
        return ModelSection(
            vocab_size=vocab_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            head_dim=self.head_dim,
            A_dff=8 * self.head_dim // 3,
        )


SIZES = (Size(2, 4, 32, 128, 2e-3), Size(4, 6, 48, 256, 1e-3), Size(5, 8, 64, 512, 1e-3), Size(5, 14, 64, 1024, 1e-3))
"""From the quickstart's model to the papers' one of 110M parameters."""
_LARGEST_ON_CPU = 2


@dataclass(frozen=True)
class Machine:
    """What is there to compute with."""

    cores: int
    has_gpu: bool


@dataclass(frozen=True)
class Texts:
    """What the files hold; `vocab_size` is a number of pieces that suits them."""

    source: str
    text_column: str
    separator: str | None
    documents: int
    mean_bytes: float
    vocab_size: int

    @property
    def tokens(self) -> int:
        """An estimate, see `BYTES_PER_TOKEN`."""
        return round(self.documents * self.mean_bytes / BYTES_PER_TOKEN)


@dataclass(frozen=True)
class Draft:
    """A recipe and what it was made from."""

    text: str
    """YAML with comments; it loads as a recipe."""
    texts: Texts
    parameters: int
    steps: int
    minutes: float


def draft_recipe(path: Path, name: str, machine: Machine, texts: Texts) -> Draft:
    """Write a recipe for the texts at `path`, which `look_at` has measured.

    Raises:
        DataError: there is too little text.
        RecipeError: the name cannot be a run's.
    """
    if texts.tokens < 2000:
        raise DataError(
            f"{path}: {texts.documents:,} documents of about {texts.tokens:,} tokens in all are too little to train "
            "on; give some thousand words at least"
        )
    vocab_size = texts.vocab_size
    sizes = SIZES if machine.has_gpu else SIZES[:_LARGEST_ON_CPU]
    fitting = [
        size for size in sizes if count_parameters(size.shape(vocab_size)) * TOKENS_PER_PARAMETER <= texts.tokens
    ]
    size = (fitting or [sizes[0]])[-1]
    batch = 32 if machine.has_gpu else 16
    flops = flops_per_token(size.shape(vocab_size), size.context_length, dag_tensors=3).total
    rate = GPU_FLOPS if machine.has_gpu else CPU_FLOPS_PER_CORE * machine.cores
    budget = GPU_BUDGET_S if machine.has_gpu else CPU_BUDGET_S
    step_tokens = batch * size.context_length
    steps = _rounded(max(100, min(EPOCHS * texts.tokens / step_tokens, budget * rate / flops / step_tokens)))
    text = _recipe_text(path, name, machine, texts, vocab_size, size, batch, steps)
    recipe_from_dict(parse_yaml(text), "the recipe drafted")
    minutes = steps * step_tokens * flops / rate / 60
    return Draft(text, texts, count_parameters(size.shape(vocab_size)), steps, minutes)


def look_at(
    path: Path,
    source: str | None = None,
    text_column: str | None = None,
    separator: str | None = None,
) -> Texts:
    """Count the documents of a file or folder and measure some of them.

    Args:
        path: text, Markdown, JSON lines or Parquet.
        source: text, jsonl or parquet; None: what the files are.
        text_column: of Parquet and JSON lines; None: the one that is named as texts usually are, or the only text.
        separator: of documents in a text file; None: each file is one, or where these are few each paragraph.

    Raises:
        DataError: there are no such files, several kinds of them, no column of text, or several.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give one with texts (txt, md, jsonl or parquet)")
    found = sources_at(path)
    if source is None:
        if len(found) != 1:
            what = " and ".join(f"{count:,} {kind} files" for kind, count in sorted(found.items())) or "no text files"
            raise DataError(
                f"{path} holds {what}; "
                + (
                    f"choose one with --source {' or '.join(sorted(found))}"
                    if found
                    else "give txt, md, jsonl or parquet files"
                )
            )
        source = next(iter(found))
    if source in ("parquet", "jsonl"):
        text_column = text_column or _column_of_text(path, source)
    data = _data_section(path, source, text_column, separator)
    opened = open_source(data)
    if source == "text" and separator is None and opened.num_documents < _FEW_DOCUMENTS:
        data = data.model_copy(update={"document_separator": "\n\n"})
        opened = open_source(data)
    mean_bytes = _mean_bytes(opened)
    vocab_size = next(pieces for limit, pieces in _VOCABULARIES if opened.num_documents * mean_bytes <= limit)
    tried = min(opened.num_documents, max(1, round(_TRIED_BYTES / max(1, mean_bytes))))
    lines = (line for text in iterate_texts(opened, 0, tried) for line in text.split("\n") if line.strip())
    if mean_bytes > 0 and vocab_size <= _TRIED_PIECES:
        vocab_size = fitting_vocab_size(lines, vocab_size)
    return Texts(source, data.text_column, data.document_separator, opened.num_documents, mean_bytes, vocab_size)


def _data_section(path: Path, source: str, text_column: str | None, separator: str | None) -> DataSection:
    """Return the section that opens the documents; all else has its default."""
    values = {"source": source, "path": str(path), "document_separator": separator}
    values |= {} if text_column is None else {"text_column": text_column}
    return recipe_from_dict({"run": {"name": "draft"}, "data": values}).data


def _mean_bytes(source: FileSource) -> float:
    """Of the UTF-8 of evenly spread documents."""
    total = source.num_documents
    runs = min(total, 8)
    each = math.ceil(min(total, _SAMPLED_DOCUMENTS) / runs)
    sizes: list[int] = []
    for index in range(runs):
        start = index * max(0, total - each) // max(1, runs - 1)
        sizes += [
            len(text.encode("utf-8", "replace")) for text in iterate_texts(source, start, min(total, start + each))
        ]
    return sum(sizes) / max(1, len(sizes))


def _column_of_text(path: Path, source: str) -> str:
    """Return the name of the column that holds the texts, by the first file."""
    manifest, root = local_manifest(str(path), "", SUFFIXES[source], source)
    file = root / manifest.files[0].name
    columns = _parquet_columns(file) if source == "parquet" else _json_keys(file)
    usual = [name for name in _TEXT_COLUMNS if name in columns]
    if usual or len(columns) == 1:
        return usual[0] if usual else columns[0]
    what = f"{len(columns)} columns of text ({', '.join(columns[:6])})" if columns else "no column of text"
    raise DataError(f"{file}: {what}; name the one to train on with --text-column")


def _parquet_columns(file: Path) -> list[str]:
    try:
        schema = pq.read_schema(file)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{file}: no Parquet file ({first_line(error)}); copy it anew or remove it") from error

    def is_text(kind: pa.DataType) -> bool:
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))

    return [field.name for field in schema if is_text(field.type)]


def _json_keys(file: Path) -> list[str]:
    try:
        with pa.input_stream(str(file)) as stream:
            head = stream.read(2**20)
        line = parse_json(head.split(b"\n", 1)[0].decode("utf-8-sig"))
    except (OSError, pa.ArrowException, ValueError) as error:
        raise DataError(f"{file}: its first line is no JSON object ({first_line(error)})") from error
    if not isinstance(line, dict):
        raise DataError(f"{file}: its first line is no JSON object; each line must be one")
    return [key for key, value in line.items() if isinstance(value, str)]


def _rounded(steps: float) -> int:
    """To two digits, downwards."""
    unit: int = 10 ** max(0, int(math.log10(steps)) - 1)
    return int(steps // unit) * unit


def _recipe_text(
    path: Path, name: str, machine: Machine, texts: Texts, vocab_size: int, size: Size, batch: int, steps: int
) -> str:
    parameters = count_parameters(size.shape(vocab_size))
    epochs = steps * batch * size.context_length / texts.tokens
    where = "a GPU" if machine.has_gpu else f"{machine.cores} CPU core{'s' if machine.cores > 1 else ''}"
    lanes = max(1, min(64 if machine.has_gpu else 16, texts.documents // 4))
    lines = [
        f"# {texts.documents:,} documents of about {texts.mean_bytes:,.0f} bytes, some {texts.tokens:,} tokens;",
        f"# for {where}. What is not listed has the papers' value; `pldr-train explain KEY` says what a key means.",
        "#   pldr-train fit THIS_FILE            trains; run it again to go on where it stopped",
        f'#   pldr-train generate runs/{name} "a prompt"',
        "run:",
        f"  name: {name}",
        "",
        _line("model:", f"{parameters / 1e6:,.1f} million parameters"),
        f"  num_hidden_layers: {size.layers}",
        f"  num_attention_heads: {size.heads}",
        f"  head_dim: {size.head_dim}",
        _line(f"  A_dff: {8 * size.head_dim // 3}", "floor(8/3 * head_dim), the papers' proportion"),
        _line(f"  vocab_size: {vocab_size}", "pieces of the tokenizer, which is trained on the texts at first use"),
        "",
        _line("dag:", "coefficients of the DAG loss on the three deductive outputs; 0: measured only"),
        "  A_LM: 0.005",
        "  A_P: 0.005",
        "  G_LM: 0.005",
        "",
        "data:",
        f"  source: {texts.source}",
        f"  path: {json.dumps(str(path))}",
    ]
    if texts.source in ("parquet", "jsonl"):
        lines.append(f"  text_column: {json.dumps(texts.text_column)}")
    if texts.separator is not None:
        separator = f"  document_separator: {json.dumps(texts.separator)}"
        lines.append(_line(separator, "what stands between two documents of a file"))
    # 64 rows, as a validation takes at least, but no more than a tenth.
    share = round(min(0.1, max(0.01, 64 * size.context_length / texts.tokens)), 2)
    lines += [
        _line(f"  context_length: {size.context_length}", "tokens that the model sees at once"),
        _line(f"  validation_fraction: {share}", "of the documents, spread over all; they do not train"),
        _line(f"  num_lanes: {lanes}", "streams of documents; decides their order"),
        "  num_workers: 1",
        "",
        "optim:",
        f"  lr: {show(size.lr)}",
        "",
        "trainer:",
        _line(f"  max_steps: {steps}", f"{epochs:,.1f} times through the text; all cadences follow it"),
        f"  batch_size: {batch}",
    ]
    lines.append(_line(f"  validate_every_steps: {max(1, steps // 8)}", "eight times in the run"))
    if not machine.has_gpu:
        lines += ["  precision: fp32", "  accelerator: cpu"]
        # Of the defaults a validation of so small a model would take longer than the training between two of them.
        # So does a line of metrics, and a checkpoint, after each few of its steps.
        lines += ["", "checkpoint:", f"  every_steps: {max(1, steps // 8)}"]
        lines += ["", "logging:", f"  every_steps: {max(1, steps // 25)}"]
        lines += ["", _line("monitor:", "little, for validations come every few seconds")]
        lines += ["  rows: 8", "  targets: 4", "  prompts: 2", "  new_tokens: 4"]
    lines += ["", "sample:", _line('  prompts: ["The"]', "continued at the end, to see what was learned"), ""]
    return "\n".join(lines)


def _line(text: str, why: str) -> str:
    return f"{text:<30}# {why}"
