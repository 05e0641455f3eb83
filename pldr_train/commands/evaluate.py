"""`pldr-train evaluate`: block and sequential likelihood of a trained model, and how its G behaves."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pldr_train.commands.bounded_numbers import device, seed, whole_number
from pldr_train.commands.export import EXIT_CODES
from pldr_train.errors import CheckpointError, DataError, first_line
from pldr_train.outputs import check_output
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.untrusted import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from pldr_train.hub.evaluating import Evaluation
    from pldr_train.hub.loading import RunCheckpoint
    from pldr_train.model import PldrllmForCausalLM

_STDOUT = Path("-")
_LEAST_CONTEXT = 4


def build_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train evaluate",
        description="Measure a trained model on held-out rows: likelihood in one pass over a block and of generating "
        "the same tokens, the gap between the two (a model with a learned G may read the future in a block), and how "
        "much its G depends on the input, on caches and on padding. docs/evaluation.md says what each figure means.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a run, a checkpoint, or an exported folder")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--text", metavar="FILE", type=Path, nargs="+", help="text files to measure on, each a document")
    data.add_argument(
        "--data",
        metavar="RECIPE",
        help="a recipe whose validation rows to measure on (default: those of the run's own recipe)",
    )
    _add_sizes(parser)
    parser.add_argument("--seed", type=seed, default=0, help="of targets and continuations (default 0)")
    parser.add_argument("--device", type=device, default="auto", help="auto (default), cpu, cuda, cuda:1, ...")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the figures as JSON; -: print them instead")
    return parser


def _add_sizes(parser: argparse.ArgumentParser) -> None:
    for option, least, default, meaning in (
        ("--rows", 1, 32, "rows at most"),
        ("--positions", 1, 16, "targets of each row that are predicted from the tokens before them alone"),
        ("--context", _LEAST_CONTEXT, None, "tokens of a row (default: the recipe's; for --text the model's context)"),
        ("--prompts", 0, 4, "beginnings of rows to continue; 0: likelihoods only"),
        ("--new-tokens", 1, 32, "tokens of a continuation"),
        ("--batch-size", 1, 8, "rows in a pass"),
    ):
        shown = meaning if default is None else f"{meaning} (default {default})"
        parser.add_argument(option, metavar="N", type=whole_number(least), default=default, help=shown)


@dataclass(frozen=True)
class _Rows:
    """What a model is measured on."""

    ids: Tensor
    """(R, S + 1)."""
    described: str
    pieces: int
    """Of the tokenizer."""
    document_mask: bool = False


def run(options: argparse.Namespace) -> int:
    """Measure, print a table, and write JSON."""
    if options.json not in (None, _STDOUT) and not options.json.parent.is_dir():
        raise DataError(f"--json {options.json}: no folder {options.json.parent}; make it, or name another file")
    if options.json not in (None, _STDOUT):
        check_output(options.json, "--json", _is_evaluation, "an evaluation that this command wrote")
    recipe = None if options.data is None else load_recipe(options.data).resolved()
    # Imported here: torch takes seconds, which a mistake in the command should not cost.
    from pldr_train.hub.evaluating import EvaluationSettings, evaluate
    from pldr_train.hub.loading import find_checkpoint, load_model, suppress_ids_without_piece
    from pldr_train.training.quiet import quiet_libraries

    quiet_libraries()
    checkpoint = find_checkpoint(options.source, _say)
    model = load_model(options.source, _say) if checkpoint is None else checkpoint.load_model()
    rows = _open_rows(options, recipe, checkpoint, model)
    suppress_ids_without_piece(model, rows.pieces)
    device = _move(model, options.device)
    source_recipe = recipe if checkpoint is None else checkpoint.recipe
    settings = EvaluationSettings(
        max_gap=EvaluationSettings.max_gap if source_recipe is None else source_recipe.monitor.max_gap,
        positions=options.positions,
        batch_size=options.batch_size,
        prompts=options.prompts,
        new_tokens=options.new_tokens,
        seed=options.seed,
        document_mask=rows.document_mask,
    )
    found = evaluate(model, rows.ids.to(device), settings, _say)
    _show(found, options, checkpoint, rows.described, str(device))
    return 0


def _is_evaluation(path: Path) -> bool:
    values = read_json(path)
    source = values.get("source") if isinstance(values, dict) else None
    return isinstance(source, dict) and source.keys() >= {"path", "checkpoint", "rows_of", "device"}


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _move(model: PldrllmForCausalLM, device: str) -> Any:
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {device}: {first_line(error)}; use cpu") from error
    return model.device


def _open_rows(
    options: argparse.Namespace, recipe: Recipe | None, checkpoint: RunCheckpoint | None, model: PldrllmForCausalLM
) -> _Rows:
    context = model.config.max_position_embeddings
    if options.context is not None and options.context > context:
        raise DataError(
            f"--context {options.context} is more than the context of {options.source}, {context} tokens; lower it"
        )
    keeps_apart = checkpoint is not None and checkpoint.recipe.data.document_mask
    if options.text is not None:
        return replace(_rows_of_text(options, model), document_mask=keeps_apart)
    if recipe is not None:
        rows = _rows_of_recipe(recipe, options, model, _tokenizer_file(options.source, checkpoint))
        return replace(rows, document_mask=keeps_apart if checkpoint is not None else recipe.data.document_mask)
    if checkpoint is None:
        raise DataError(
            f"{options.source} is no run, so it has no validation rows of its own; give --text FILE or --data RECIPE"
        )
    rows = _rows_of_recipe(checkpoint.recipe, options, model, checkpoint.tokenizer_file, checkpoint.run)
    return replace(rows, document_mask=keeps_apart)


def _rows_of_text(options: argparse.Namespace, model: PldrllmForCausalLM) -> _Rows:
    from pldr_train.hub.evaluating import read_texts, rows_of_texts
    from pldr_train.hub.extract_g import load_tokenizer_of

    texts = read_texts(options.text)
    tokenizer = load_tokenizer_of(options.source, _say)
    context = options.context or model.config.max_position_embeddings
    ids, whole = rows_of_texts(tokenizer, texts, model.config.eos_token_id, context, options.rows)
    return _Rows(ids, f"{len(texts)} text file{'s' if len(texts) > 1 else ''} of {whole:,} rows", len(tokenizer))


def _rows_of_recipe(
    recipe: Recipe,
    options: argparse.Namespace,
    model: PldrllmForCausalLM,
    tokenizer: Path | None,
    run: Path | None = None,
) -> _Rows:
    """The first validation rows of a recipe; `run`: the folder of the run whose list of files is to be kept to."""
    from pldr_train.data.datamodule import PldrDataModule
    from pldr_train.data.settings import TOKENS, data_settings
    from pldr_train.runs.layout import DATA_FILE

    if run is not None:
        recipe = recipe.going_on(recipe)
    settings = data_settings(recipe)
    context = options.context or settings.context_length
    if context > model.config.max_position_embeddings:
        raise DataError(
            f"data.context_length={context} is more than the context of {options.source}, "
            f"{model.config.max_position_embeddings} tokens; give --context {model.config.max_position_embeddings}"
        )
    # Tokens have their tokenizer with them; a recipe's own comes before the model's, to be compared with it.
    if tokenizer is not None and settings.source != TOKENS and (run is not None or settings.tokenizer is None):
        settings = replace(settings, tokenizer=str(tokenizer))
    if run is not None and (run / DATA_FILE).is_file():
        settings = replace(settings, manifest_path=str(run / DATA_FILE))
    settings = replace(
        settings,
        context_length=context,
        vocab_size=model.config.vocab_size,
        # In one batch, however large batches are in training.
        micro_batch_size=options.rows,
        validation_rows=options.rows,
    )
    data = PldrDataModule(settings, rank=0, world_size=1, say=_say)
    data.setup()
    ids = next(iter(data.val_dataloader()))["input_ids"]
    described = f"validation documents {data.split.validation_text()}, of {options.data or f'run {recipe.run.name}'}"
    pieces = [data.tokenizer.id_to_piece(each) for each in range(data.tokenizer.get_piece_size())]
    if run is None:
        _check_tokenizer(options, pieces)
    return _Rows(ids, described, len(pieces))


def _tokenizer_file(source: Path, checkpoint: RunCheckpoint | None) -> Path | None:
    if checkpoint is not None:
        return checkpoint.tokenizer_file
    exported = source / "tokenizer.model"
    return exported if exported.is_file() else None


def _check_tokenizer(options: argparse.Namespace, pieces: list[str]) -> None:
    """Refuse rows whose ids mean other pieces than the model learned. Raises DataError."""
    from pldr_train.hub.extract_g import load_tokenizer_of

    try:
        tokenizer = load_tokenizer_of(options.source, _say)
    except CheckpointError:
        _say(f"{options.source} has no tokenizer: whether --data {options.data} has the model's cannot be told")
        return
    if tokenizer.convert_ids_to_tokens(range(len(tokenizer))) != pieces:
        raise DataError(
            f"--data {options.data}: its tokenizer is not that of {options.source}, so its ids would mean nothing "
            "to the model; set data.tokenizer in it to the model's tokenizer.model, or give --text FILE"
        )


def _show(
    found: Evaluation, options: argparse.Namespace, checkpoint: RunCheckpoint | None, described: str, device: str
) -> None:
    from pldr_train.commands.evaluation_text import evaluation_text
    from pldr_train.data.files import write_file_atomically

    values = found.as_json()
    values["source"] = {
        "path": str(options.source),
        "checkpoint": None if checkpoint is None else str(checkpoint.folder),
        "step": None if checkpoint is None else checkpoint.step,
        "rows_of": described,
        "device": device,
        "seed": options.seed,
    }
    text = json.dumps(values, indent=1) + "\n"
    if options.json == _STDOUT:
        print(text, end="")
        return
    print(evaluation_text(values))
    if options.json is not None:
        write_file_atomically(options.json, text.encode(), fix="name another file")
