"""`pldr-train recipes`: the recipes that come with the package, the published runs among them."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pldr_train.commands import EXIT_CODES
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import DataError, RecipeError
from pldr_train.metrics.hardware import ASSUMED_MFU, GPUS
from pldr_train.metrics.throughput import count_parameters, training_flops
from pldr_train.outputs import check_output, is_recipe
from pldr_train.published import PUBLISHED_RUNS, PublishedRun
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.recipe.yaml_text import RECIPE, packaged_files


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train recipes",
        description="List, show or copy the recipes that come with the package. `pldr-train fit NAME` trains one.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("action", choices=("list", "show", "copy"), help="show prints the YAML, copy writes it")
    parser.add_argument("name", metavar="NAME", nargs="?", help="of the recipe to show or copy")
    parser.add_argument("target", metavar="FILE", nargs="?", type=Path, help="where to copy (default NAME.yaml here)")
    parser.add_argument("--markdown", action="store_true", help="with list: print docs/recipes.md")
    parser.add_argument("--overwrite", action="store_true", help="with copy: replace a recipe that is there")
    return parser


def run(options: argparse.Namespace) -> int:
    """List, show or copy."""
    _check_options(options)
    if options.action == "list":
        print(_page() if options.markdown else _table(), end="")
        return 0
    shipped = _shipped(options.name)
    if options.action == "show":
        print(
            "".join(f"# {line}\n" for line in _facts(shipped)) + "\n" + shipped.path.read_text(encoding="utf-8"), end=""
        )
        return 0
    target = options.target or Path(f"{options.name}.yaml")
    check_output(target, "FILE", is_recipe, "a recipe")
    if target.exists() and not options.overwrite:
        raise DataError(f"{target} exists; name another file, or replace it with --overwrite")
    write_file_atomically(target, shipped.path.read_bytes(), fix="name another file")
    print(f"recipe      {target}")
    print(f"next        pldr-train fit {target}")
    return 0


def _check_options(options: argparse.Namespace) -> None:
    action = options.action
    if action != "list" and options.name is None:
        raise RecipeError(f"recipes {action}: name a recipe; `pldr-train recipes list` has them")
    if action == "list" and options.name is not None:
        raise RecipeError(f"recipes list lists all; leave {options.name} out, or write recipes show {options.name}")
    if options.target is not None and action != "copy":
        raise RecipeError(f"recipes {action} writes no file; leave {options.target} out, or use copy")
    if options.markdown and action != "list":
        raise RecipeError(f"--markdown is for list; leave it out of {action}")
    if options.overwrite and action != "copy":
        raise RecipeError(f"--overwrite is for copy; leave it out of {action}")


@dataclass(frozen=True)
class _Shipped:
    """A recipe of the package."""

    name: str
    path: Path
    recipe: Recipe
    """Resolved."""

    @property
    def what(self) -> str:
        """What the run is, in a sentence: what the file begins with."""
        lines = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            if not line.startswith("# "):
                break
            lines.append(line.removeprefix("# "))
        text = " ".join(lines)
        return text.partition(". ")[0].rstrip(".:") + "."

    @property
    def published(self) -> PublishedRun | None:
        """What its paper says of it."""
        return PUBLISHED_RUNS.get(self.name)

    @property
    def tokens(self) -> int:
        """Of the whole training."""
        trainer = self.recipe.trainer
        return trainer.max_steps * trainer.batch_size * self.recipe.data.context_length


def _shipped(name: str) -> _Shipped:
    paths = packaged_files(RECIPE)
    wanted = name.removeprefix("recipes/").removesuffix(".yaml")
    if wanted not in paths:
        near = difflib.get_close_matches(wanted, paths, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(f"{name}: no such recipe; {hint}there are {', '.join(paths)}")
    return _Shipped(wanted, paths[wanted], load_recipe(paths[wanted], notice=lambda _: None).resolved())


def _all() -> list[_Shipped]:
    """Return the published runs in their papers' order, then the others."""
    names = packaged_files(RECIPE)
    return [_shipped(name) for name in (*PUBLISHED_RUNS, *(name for name in names if name not in PUBLISHED_RUNS))]


def _table() -> str:
    rows = [("recipe", "parameters", "tokens", "what")]
    rows += [
        (each.name, f"{count_parameters(each.recipe.model):,}", f"{each.tokens / 1e6:,.4g} M", each.what)
        for each in _all()
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "".join(
        f"{name:<{widths[0]}}  {parameters:>{widths[1]}}  {tokens:>{widths[2]}}  {what}\n"
        for name, parameters, tokens, what in rows
    )


def _facts(shipped: _Shipped) -> Iterator[str]:
    run = shipped.published
    if run is None:
        return
    yield f"repeats {run.title}, {run.source}" + (f"; {run.regime}" if run.regime else "")
    if run.results is not None:
        yield "published: " + _results(run)
    if run.assumed:
        yield f"not published, chosen here: {run.assumed}"
    if run.before:
        yield f"first: {run.before}"


def _results(run: PublishedRun) -> str:
    results = run.results
    if results is None:
        return ""
    averages = ", ".join(f"Avg{number} {results.average(number):.2f} %" for number in range(3))
    return (
        f"block loss {results.block_loss:g} nat/token, accuracy {results.accuracy:g}, order parameter of G_LM "
        f"{results.order_parameter:g}, zero-shot {averages}"
    )


# ---------------------------------------------------------------------------------------------------- docs/recipes.md

_INTRODUCTION = """# Recipes

Made by `pldr-train recipes list --markdown`. `pldr-train recipes show NAME` prints a recipe, `recipes copy NAME` writes
it as a file to change, `pldr-train fit NAME` trains it, and `--dry-run` says what that takes. The recipes of published
runs hold what papers, scripts and model cards say; what they leave open is listed below. Their data is RefinedWeb as
local Parquet files with a tokenizer of 32,000 pieces ([data.md](data.md), [tokenizers.md](tokenizers.md)), or streamed
with `data.source=hub`. [recipes/README.md](../recipes/README.md) says how to write one.

A published block loss is that of one pass over a block, in which a learned G can read the future: compare
`leakage/sequential_nll` as well ([leakage.md](leakage.md)). Zero-shot averages are those of the SOC paper's table: Avg0
of six tasks, Avg1 with ARC-challenge, Avg2 with TruthfulQA, whose mc2 is highest for models near chance. Days are those
of one H200 at {share} of its bf16 or fp32 peak, an assumption.
"""
_COMMANDS = """
## Commands

`pldr-train fit NAME` trains any of them on one GPU; `trainer.devices=2` is the papers' set-up, with the same batches.
What has to be made before:

"""


def _page() -> str:
    recipes = _all()
    published = [each for each in recipes if each.published is not None]
    parts = [
        _INTRODUCTION.format(share=f"{ASSUMED_MFU:.0%}"),
        "\n## Published runs\n\n",
        _lines(
            ("recipe", "what", "source", "parameters", "tokens", "lr", "warm-up", "documents", "days"),
            (_published_row(each) for each in published),
        ),
        "\n## Their published results\n\n",
        _lines(
            ("recipe", "regime", "block loss", "accuracy", "order parameter of G_LM", "Avg0", "Avg1", "Avg2"),
            (_result_row(each) for each in published if each.published and each.published.regime),
        ),
        "\n## What is not published\n\n",
        *(
            f"- `{each.name}`: {each.published.assumed}.\n"
            for each in published
            if each.published is not None and each.published.assumed
        ),
        _COMMANDS,
        *(
            f"- `{each.name}`: `{each.published.before}`\n"
            for each in published
            if each.published and each.published.before
        ),
        "\n## Others\n\n",
        _lines(
            ("recipe", "what", "parameters", "tokens"), (_other_row(each) for each in recipes if not each.published)
        ),
    ]
    return "".join(parts)


def _published_row(each: _Shipped) -> tuple[str, ...]:
    recipe, run = each.recipe, each.published
    assert run is not None
    gpu = GPUS["h200"]
    days = training_flops(recipe) / (gpu.peak_flops(recipe.trainer.precision) * ASSUMED_MFU) / 86_400
    documents = recipe.data.train_documents
    return (
        f"`{each.name}`", run.title, run.source, f"{count_parameters(recipe.model):,}", f"{each.tokens / 1e9:.3g} B",
        f"{recipe.optim.lr:g}", f"{recipe.optim.warmup_steps:,}",
        "" if documents is None else f"[{documents[0]:,}, {documents[1]:,})", f"{days:.2g}",
    )  # fmt: skip


def _result_row(each: _Shipped) -> tuple[str, ...]:
    run = each.published
    assert run is not None
    if run.results is None:
        return (f"`{each.name}`", run.regime, *[""] * 6)
    found = run.results
    averages = (f"{found.average(number):.2f} %" for number in range(3))
    figures = (f"{figure:g}" for figure in (found.block_loss, found.accuracy, found.order_parameter))
    return (f"`{each.name}`", run.regime, *figures, *averages)


def _other_row(each: _Shipped) -> tuple[str, ...]:
    return (f"`{each.name}`", each.what, f"{count_parameters(each.recipe.model):,}", f"{each.tokens / 1e6:.3g} M")


def _lines(head: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (head, ("---",) * len(head), *rows))
