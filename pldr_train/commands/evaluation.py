"""The work of `pldr-train evaluate`: opens the model and its rows, measures, and prints."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.commands.evaluate import ROWS_IN_A_PASS, STDOUT
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import CheckpointError, DataError, first_line
from pldr_train.model import PldrllmForCausalLM
from pldr_train.models.evaluating import (
    PUBLISHED_PROMPTS,
    PUBLISHED_WORDS,
    EvaluationSettings,
    evaluate,
    read_texts,
    rows_of_texts,
)
from pldr_train.models.extract_g import load_tokenizer_of
from pldr_train.models.loading import RunCheckpoint, find_checkpoint, load_model, suppress_ids_without_piece
from pldr_train.printing import log_to_terminal
from pldr_train.published import ORDER_PARAMETERS, ORDER_TENSORS, published_as
from pldr_train.recipe import Recipe
from pldr_train.runs.layout import DATA_FILE
from pldr_train.tasks.scoring import is_causal
from pldr_train.training.quiet import quiet_libraries

_log = logging.getLogger(__name__)

_SMALL_NAT = 0.01
"""Gaps below it are shown with an exponent."""


@dataclass(frozen=True)
class EvaluationRows:
    """What a model is measured on."""

    ids: Tensor
    """(R, S + 1)."""
    described: str
    pieces: int
    """Of the tokenizer."""


def measure(options: argparse.Namespace, recipe: Recipe | None) -> None:
    """Measure, print a table, and write JSON; `recipe`: whose validation rows to take, None for the run's own."""
    quiet_libraries()
    log_to_terminal(stream="stderr")
    checkpoint = find_checkpoint(options.source)
    model = load_model(options.source) if checkpoint is None else checkpoint.load_model()
    rows = open_rows(options, recipe, checkpoint, model)
    suppress_ids_without_piece(model, rows.pieces)
    device = move_model(model, options.device)
    settings = evaluation_settings(options, recipe if checkpoint is None else checkpoint.recipe)
    prompts = None
    if options.order_parameter == "published":
        _check_published_protocol(model)
        prompts = [ids.to(device) for ids in _published_prompts(options, model)]
    found = evaluate(model, rows.ids.to(device), settings, prompts)
    values = found.as_json() | {"source": source_values(options, options.source, checkpoint, rows.described, device)}
    show(values, evaluation_text, options.json)


def evaluation_settings(options: argparse.Namespace, recipe: Recipe | None) -> EvaluationSettings:
    """Return how much to measure of a model; `recipe`: that of its run, else of the rows, else None."""
    return EvaluationSettings(
        max_gap=EvaluationSettings.max_gap if recipe is None else recipe.monitor.max_gap,
        positions=options.positions,
        batch_size=options.batch_size or ROWS_IN_A_PASS,
        prompts=options.prompts,
        new_tokens=options.new_tokens,
        seed=options.seed,
        document_mask=recipe is not None and recipe.data.document_mask,
    )


def _check_published_protocol(model: PldrllmForCausalLM) -> None:
    """Raise DataError for models that the paper's protocol says nothing of."""
    kind = model.config.custom_G_type
    if is_causal(model):
        what = (
            f"G is {kind}"
            if kind is not None
            else f"the Gram is causal (gram_chunk_size={model.config.gram_chunk_size})"
        )
        raise DataError(f"--order-parameter published: of a G that a whole sequence makes, but {what}; leave it out")


def _published_prompts(options: argparse.Namespace, model: PldrllmForCausalLM) -> list[Tensor]:
    """Return the prompts of the paper's protocol: the first 200 words of 100 texts each, without BOS and EOS."""
    if options.prompt_file is not None:
        lines = read_texts([options.prompt_file], "--prompt-file")[0].splitlines()
        texts = [line for line in lines if line.strip()]
        where = f"--prompt-file {options.prompt_file}"
    else:
        texts, where = _reviews(), f"{_REVIEWS} of the Hub"
    if len(texts) < PUBLISHED_PROMPTS:
        raise DataError(f"{where}: {len(texts)} prompts, and the protocol takes {PUBLISHED_PROMPTS}; give more lines")
    short = [
        number for number, text in enumerate(texts[:PUBLISHED_PROMPTS], start=1) if len(text.split()) < _FEWEST_WORDS
    ]
    if short:
        raise DataError(f"{where}: prompt {short[0]} has fewer than {_FEWEST_WORDS} words; give longer ones")
    tokenizer = load_tokenizer_of(options.source)
    prompts = [
        torch.tensor(tokenizer(" ".join(text.split()[:PUBLISHED_WORDS]), add_special_tokens=False)["input_ids"])
        for text in texts[:PUBLISHED_PROMPTS]
    ]
    longest, context = max(map(len, prompts)), int(model.config.max_position_embeddings)
    if longest >= context:
        raise DataError(
            f"{where}: a prompt of {longest} tokens leaves no room in the model's context of {context}; give "
            "shorter ones"
        )
    return prompts


_REVIEWS, _FEWEST_WORDS = "stanfordnlp/imdb", 4


def _reviews() -> list[str]:
    """Return the first reviews of IMDB's test split, from the Hub. Raises DataError."""
    from datasets import load_dataset  # noqa: PLC0415, takes seconds and is seldom needed

    try:
        rows = load_dataset(_REVIEWS, split="test", streaming=True)
        return [str(row["text"]) for row in itertools.islice(rows, PUBLISHED_PROMPTS)]
    except Exception as error:  # the library raises whatever its transports raise
        raise DataError(
            f"--order-parameter published: {_REVIEWS} cannot be read from the Hub ({first_line(error)}); give the "
            "prompts with --prompt-file"
        ) from error


def move_model(model: PldrllmForCausalLM, device: str) -> Any:
    """Move a model to a device, `auto` included, and return it. Raises DataError."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model.to(device)
    except (RuntimeError, AssertionError) as error:
        raise DataError(f"--device {device}: {first_line(error)}; use cpu") from error
    return model.device


def open_rows(
    options: argparse.Namespace, recipe: Recipe | None, checkpoint: RunCheckpoint | None, model: PldrllmForCausalLM
) -> EvaluationRows:
    """Return the rows that the options name: of texts, of a recipe, or of the run's own validation.

    Raises:
        DataError: there are none, or they do not fit the model.
    """
    context = model.config.max_position_embeddings
    if options.context is not None and options.context > context:
        raise DataError(
            f"--context {options.context} is more than the context of {options.source}, {context} tokens; lower it"
        )
    if options.text is not None:
        return _rows_of_text(options, model)
    if recipe is not None:
        return _rows_of_recipe(recipe, options, model, _tokenizer_file(options.source, checkpoint))
    if checkpoint is None:
        raise DataError(
            f"{options.source} is no run, so it has no validation rows of its own; give --text FILE or --data RECIPE"
        )
    return _rows_of_recipe(checkpoint.recipe, options, model, checkpoint.tokenizer_file, checkpoint.run)


def _rows_of_text(options: argparse.Namespace, model: PldrllmForCausalLM) -> EvaluationRows:
    texts = read_texts(options.text)
    tokenizer = load_tokenizer_of(options.source)
    context = options.context or model.config.max_position_embeddings
    ids, whole = rows_of_texts(tokenizer, texts, model.config.eos_token_id, context, options.rows)
    return EvaluationRows(
        ids, f"{len(texts)} text file{'s' if len(texts) > 1 else ''} of {whole:,} rows", len(tokenizer)
    )


def _rows_of_recipe(
    recipe: Recipe,
    options: argparse.Namespace,
    model: PldrllmForCausalLM,
    tokenizer: Path | None,
    run: Path | None = None,
) -> EvaluationRows:
    """Return the first validation rows of a recipe; `run` is the folder of the run whose list of files counts."""
    if run is not None:
        recipe = recipe.going_on(recipe)
    manifest = None
    context = options.context or recipe.data.context_length
    if context > model.config.max_position_embeddings:
        raise DataError(
            f"data.context_length={context} is more than the context of {options.source}, "
            f"{model.config.max_position_embeddings} tokens; give --context {model.config.max_position_embeddings}"
        )
    # Tokens have their tokenizer with them; a recipe's own comes before the model's, to be compared with it.
    if tokenizer is not None and recipe.data.source != "tokens" and (run is not None or recipe.data.tokenizer is None):
        recipe = recipe.replaced({"data.tokenizer": str(tokenizer)})
    if run is not None and (run / DATA_FILE).is_file():
        manifest = run / DATA_FILE
    recipe = recipe.replaced(
        {
            "data.context_length": context,
            "model.vocab_size": model.config.vocab_size,
            # In one batch, however large batches are in training.
            "trainer.micro_batch_size": options.rows,
            "trainer.validation_rows": options.rows,
        }
    )
    data = PldrDataModule(recipe, manifest_path=manifest, rank=0, world_size=1)
    data.setup()
    ids = next(iter(data.val_dataloader()))["input_ids"]
    described = f"validation documents {data.split.validation_text()}, of {options.data or f'run {recipe.run.name}'}"
    pieces = [data.tokenizer.id_to_piece(each) for each in range(data.tokenizer.get_piece_size())]
    if run is None:
        _check_tokenizer(options, pieces)
    return EvaluationRows(ids, described, len(pieces))


def _tokenizer_file(source: Path, checkpoint: RunCheckpoint | None) -> Path | None:
    if checkpoint is not None:
        return checkpoint.tokenizer_file
    exported = source / "tokenizer.model"
    return exported if exported.is_file() else None


def _check_tokenizer(options: argparse.Namespace, pieces: list[str]) -> None:
    """Refuse rows whose ids mean other pieces than the model learned. Raises DataError."""
    try:
        tokenizer = load_tokenizer_of(options.source)
    except CheckpointError:
        _log.warning(f"{options.source} has no tokenizer: whether --data {options.data} has the model's cannot be told")
        return
    if tokenizer.convert_ids_to_tokens(range(len(tokenizer))) != pieces:
        raise DataError(
            f"--data {options.data}: its tokenizer is not that of {options.source}, so its ids would mean nothing "
            "to the model; set data.tokenizer in it to the model's tokenizer.model, or give --text FILE"
        )


def source_values(
    options: argparse.Namespace, source: Path, checkpoint: RunCheckpoint | None, described: str, device: Any
) -> dict[str, Any]:
    """Return what was measured on what, in plain types; `described`: the rows or tasks."""
    return {
        "path": str(source),
        "checkpoint": None if checkpoint is None else str(checkpoint.folder),
        "step": None if checkpoint is None else checkpoint.step,
        "rows_of": described,
        "device": str(device),
        "seed": options.seed,
    }


def show(values: dict[str, Any], as_text: Callable[[dict[str, Any]], str], path: Path | None) -> None:
    """Print figures as text and write them as JSON to `path`, where there is one; `-`: print JSON alone."""
    text = json.dumps(values, indent=1) + "\n"
    if path == STDOUT:
        print(text, end="")
        return
    print(as_text(values))
    if path is not None:
        write_file_atomically(path, text.encode(), fix="name another file")


# -------------------------------------------------------------------------------------------------------------- shown


def evaluation_text(found: dict[str, Any]) -> str:
    """Return what an evaluation found, for people; ends with the verdict on the gap."""
    lines = [
        model_line(found),
        rows_line(found),
        "",
        *_likelihoods(found),
        "",
        *_positions(found["gap"]["by_position"]),
    ]
    if found["order_parameter"] is not None:
        lines += ["", *_order_parameter(found["order_parameter"], published_as(found["source"]["path"]))]
    if found["g_cache"] is not None:
        lines += ["", *_differences(found)]
    gap = found["gap"]
    lines += [
        "",
        f"gap      {interval_text(gap)} nat/token, sequential - block, 95 % interval",
        f"verdict  {_verdict(found)}",
    ]
    return "\n".join(lines)


def model_line(found: Mapping[str, Any], name: str = "model") -> str:
    """Return what the figures are of, for people, after `name`."""
    model, source = found["model"], found["source"]
    step = "" if source["step"] is None else f", step {source['step']:,}"
    gram = "" if model["gram_chunk_size"] is None else f", causal Gram of chunks of {model['gram_chunk_size']} tokens"
    return f"{name:<8} {source['path']}{step}: {model['parameters']:,} parameters, G {model['G']}{gram}"


def rows_line(found: Mapping[str, Any]) -> str:
    """Return which rows were measured, for people."""
    rows = found["rows"]
    return f"rows     {rows['rows']:,} of {rows['context_length']:,} tokens and the next; {found['source']['rows_of']}"


def _likelihoods(found: dict[str, Any]) -> list[str]:
    every = found["block_all_tokens"]
    rows = (
        ("block, all tokens", every["tokens"], every),
        ("block, sampled", found["gap"]["targets"], found["block"]),
        ("sequential, sampled", found["gap"]["targets"], found["sequential"]),
    )
    lines = [f"{'':<20} {'targets':>9} {'NLL':>10} {'perplexity':>12} {'accuracy':>9}"]
    for name, targets, values in rows:
        lines.append(
            f"{name:<20} {targets:>9,} {values['nll']:>10.4f} {_number(values['perplexity'], '>12,.2f', 12)} "
            f"{values['accuracy']:>9.1%}"
        )
    return lines


def _positions(bins: list[dict[str, Any]]) -> list[str]:
    lines = [f"{'positions':<20} {'targets':>9} {'block':>10} {'sequential':>12} {'gap':>31}"]
    for each in bins:
        span = f"{each['first_position']:,} - {each['last_position']:,}"
        lines.append(
            f"{span:<20} {each['targets']:>9,} {each['block_nll']:>10.4f} {each['sequential_nll']:>12.4f} "
            f"{interval_text(each):>31}"
        )
    return lines


def _order_parameter(found: dict[str, Any], named: str | None) -> list[str]:
    is_published = found["protocol"] == "published"
    how = f"by the published protocol, {found['new_tokens']:.0f} new tokens on average"
    lines = [
        f"order parameter of {found['prompts']} prompts, "
        + (how if is_published else f"{found['new_tokens']} new tokens each"),
        f"{'':<8} {'RMSE12/|mean|':>14} {'RMSE1C/|mean|':>14} {'bounded 12':>12} {'bounded 1C':>12}",
    ]
    for name, values in found["tensors"].items():
        pairs = [values[pair] for pair in ("x1_x2", "xc_x1")]
        source = " ".join(_number(each["relative_rmse"], ">14.3e", 14) for each in pairs)
        bounded = " ".join(_number(each["bounded"], ">12.3e", 12) for each in pairs)
        lines.append(f"{name:<8} {source} {bounded}")
    if is_published and named is not None and named in ORDER_PARAMETERS:
        lines.append(f"published of {named}")
        pairs_of = zip(ORDER_TENSORS, ORDER_PARAMETERS[named], strict=True)
        lines += [f"{name:<8} {twelve:>14.3e} {cached:>14.3e}" for name, (twelve, cached) in pairs_of]
    return lines


def _differences(found: dict[str, Any]) -> list[str]:
    cache, padding = found["g_cache"], found["padding"]
    lines = [f"{'logit difference':<24} {'largest':>10} {'mean':>10}"]
    for name, values in (("with and without cache", cache), ("alone and left-padded", padding)):
        largest, mean = (values[f"{each}_logit_difference"] for each in ("largest", "mean"))
        more = (
            f"   same choice in {values['same_choice']:.0%} of {values['steps']:,} steps" if values.get("steps") else ""
        )
        lines.append(f"{name:<24} {_number(largest, '>10.2e', 10)} {_number(mean, '>10.2e', 10)}{more}")
    return lines


def _verdict(found: dict[str, Any]) -> str:
    text: str = found["gap"]["verdict_text"]
    return f"{text} (causal by its making)" if found["model"]["is_causal"] else text


def interval_text(gap: Mapping[str, Any]) -> str:
    """Return a mean with the ends of its interval, in nat/token, for people."""
    values = [gap[name] for name in ("mean", "low", "high") if gap[name] is not None]
    mean, *ends = (f"{value:{'+.4f' if max(map(abs, values)) >= _SMALL_NAT else '+.1e'}}" for value in values)
    return f"{mean} ({', '.join(ends) or 'no interval'})"


def _number(value: float | None, form: str, width: int) -> str:
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"
