"""`pldr-train fit`: train what a recipe says."""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.checkpoint.manifest import Defect, read_manifest
from pldr_train.commands import EXIT_BY_SIGNAL, importing_much
from pldr_train.errors import LeakageError, RecipeError, UserError
from pldr_train.launching import end_with_parent, is_launched, launch, newest_step
from pldr_train.memory_errors import worded_out_of_memory
from pldr_train.metrics.catalog import DAG_TENSORS
from pldr_train.printing import outlive_standard_streams, printable_text
from pldr_train.recipe import (
    Recipe,
    compare_for_resume,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
    refused_resume,
)
from pldr_train.recipe.checks import missing_data_files, missing_model_files
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, LAST_LINK, checkpoint_folders, linked_last
from pldr_train.runs.validations import early_end_of

if TYPE_CHECKING:
    from pldr_train.fit import Outcome

_log = logging.getLogger(__name__)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train fit",
        description="Train what a recipe says, or go on with it: the same command resumes an interrupted run.",
        epilog="exit codes: 0 done; 2 an error that the message explains; 129, 130 or 143 saved and left on a signal",
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="YAML file, or the name of a recipe that comes along, such as quickstart"
    )
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", help="recipe values to replace, for instance optim.lr=1e-3"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|PATH|never",
        help="auto (default): from the run's newest whole checkpoint; PATH: from that one; never: afresh, the "
        "earlier run is kept aside",
    )
    parser.add_argument("--force", action="store_true", help="resume although the recipe differs from the checkpoint's")
    parser.add_argument("--print-recipe", action="store_true", help="print the resolved recipe and leave")
    parser.add_argument(
        "--dry-run", action="store_true", help="print parameters, FLOPs, memory and steps, train nothing and leave"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Train, or print what would be trained."""
    if not (options.print_recipe or options.dry_run):
        outlive_standard_streams()
    os.environ.setdefault("PYTHONSAFEPATH", "1")  # for what it starts: no module comes from the working directory
    recipe = load_recipe(options.recipe, options.overrides)
    if options.print_recipe:
        print(dump_recipe(recipe.resolved()), end="")
        return 0
    if options.dry_run:
        # Data that is to come is noted; a model cannot be described without what its recipe names.
        if problems := missing_model_files(recipe):
            raise RecipeError("\n".join(problem.text for problem in problems))
        with importing_much():
            from pldr_train.plan import describe  # noqa: PLC0415

        description = describe(recipe)
        print(description.text)
        if description.problem is not None:
            raise RecipeError(description.problem)
        return 0
    end_with_parent()
    if not is_launched():
        _check_files(recipe, options)
    if recipe.trainer.world_size > 1 and not is_launched():
        return _launch(recipe, options)
    with importing_much():
        from pldr_train.fit import fit  # noqa: PLC0415

    try:
        with worded_out_of_memory(_what_takes_less_memory(recipe)):
            outcome = fit(recipe, options.resume, options.force)
    except LeakageError:
        _print_page(Path(recipe.run.dir) / recipe.run.name)  # the curves show what the message says
        raise
    if os.environ.get("RANK", "0") == "0":
        _report(outcome, recipe, options)
    return 0 if outcome.stopped_by is None else EXIT_BY_SIGNAL[outcome.stopped_by]


def _what_takes_less_memory(recipe: Recipe) -> str:
    trainer = recipe.resolved().trainer
    words = []
    if trainer.micro_batch_size != 1:
        words.append(f"lower trainer.micro_batch_size={trainer.micro_batch_size} (the training stays the same)")
    if recipe.parallel.activation_checkpointing != "layers":
        words.append("set parallel.activation_checkpointing=layers")
    words.append(f"lower data.context_length={recipe.data.context_length}, or take a smaller model")
    return f"{'; '.join(words)}. Checkpoints are whole: the same command goes on from the newest"


def _check_files(recipe: Recipe, options: argparse.Namespace) -> None:
    """Refuse missing files and another run's recipe before seconds of imports, and before processes are started.

    A run that is done needs no data. Raises RecipeError.
    """
    problems = [*missing_model_files(recipe), *missing_data_files(recipe)]
    checkpoints = _checkpoints_of(recipe)
    step = newest_step(checkpoints)
    done = step >= recipe.trainer.max_steps or early_end_of(checkpoints.parent, recipe, step) is not None
    if problems and not (done and options.resume == "auto"):
        raise RecipeError("\n".join(problem.text for problem in problems))
    if options.resume == "auto" and not options.force:
        _refuse_another_recipe(recipe)


def _checkpoints_of(recipe: Recipe) -> Path:
    return Path(recipe.run.dir) / recipe.run.name / CHECKPOINTS_FOLDER


def _refuse_another_recipe(recipe: Recipe) -> None:
    """Refuse to go on with a run of another recipe, as the start does, but before it: manifests need no torch.

    Raises RecipeError.
    """
    for folder in checkpoint_folders(_checkpoints_of(recipe)):
        manifest = read_manifest(folder)
        if isinstance(manifest, Defect):  # damaged; the start goes on from the one before
            continue
        try:
            saved = recipe_from_dict(manifest["info"]["recipe"], str(folder))
        except (RecipeError, KeyError, TypeError):  # damaged otherwise, which the start finds out
            return
        problems = compare_for_resume(saved, recipe)
        if problems:
            raise RecipeError(refused_resume(problems, folder))
        return


def _launch(recipe: Recipe, options: argparse.Namespace) -> int:
    nodes, restarts = recipe.trainer.num_nodes, recipe.parallel.max_restarts
    if nodes > 1:
        raise RecipeError(
            f"trainer.num_nodes={nodes}: this command starts processes on this machine only; start the run with "
            "launch/torchrun on every machine, launch/hostfile or launch/slurm.sbatch (see docs/launching.md), or set "
            "trainer.num_nodes=1"
        )
    if restarts and options.resume != "auto":
        _log.warning(
            f"parallel.max_restarts={restarts}: no restarts with --resume {options.resume}, they would start there too"
        )
        restarts = 0
    checkpoints = _checkpoints_of(recipe)
    command = [sys.executable, "-m", "pldr_train", *options.given]
    return launch(command, recipe.trainer.devices, restarts, progress=lambda: newest_step(checkpoints))


def _report(outcome: Outcome, recipe: Recipe, options: argparse.Namespace) -> None:
    again = shlex.join(["pldr-train", "fit", options.recipe, *options.overrides])
    if outcome.stopped_by is not None:
        print(f"{outcome.stopped_by}: saved after step {outcome.step:,} and left; go on with: {again}")
        return
    steps = f"step {outcome.step:,} of {recipe.trainer.max_steps:,}"
    further = "a higher trainer.max_steps=N"
    if outcome.ended_early is not None:
        steps += f", {outcome.ended_early}"
        further = "a higher trainer.early_stop.patience, or trainer.early_stop=null"
    if not outcome.trained:
        print(
            f"run {recipe.run.name} is complete ({steps}). Train on with {further}, or start over with --resume never "
            "(this run is kept aside)"
        )
    for text in outcome.samples:
        print(f"\nsample: {printable_text(text)}")
    print(f"\nrun         {outcome.folder}")
    checkpoints = outcome.folder / CHECKPOINTS_FOLDER
    # Where there can be no link, the folder that it would name.
    newest = next(iter(checkpoint_folders(checkpoints)), None)
    if newest is not None:
        print(f"checkpoint  {newest if linked_last(checkpoints) is None else checkpoints / LAST_LINK}")
    print(f"metrics     {outcome.folder / 'metrics.jsonl'}")
    if outcome.trained:
        _print_page(outcome.folder)
    print(f'try         {shlex.join(["pldr-train", "generate", str(outcome.folder)])} "a prompt"')
    if outcome.trained:
        print("next        change a value and compare, under another name, for instance:")
        print(f"            {next_experiment(recipe, options)}")
        if outcome.ended_early is not None:
            print(f"\n{steps}")


def next_experiment(recipe: Recipe, options: argparse.Namespace) -> str:
    """Return a command for the same run with the DAG loss off, or on where it is off.

    A predefined G, which has no DAG loss, becomes learned.
    """
    if recipe.model.custom_G_type != "learned":
        name, changes = "learned", {"model.custom_G_type": "learned", "model.custom_G_path": "null"}
        if recipe.model.custom_G_path is None:
            changes.pop("model.custom_G_path")
        if recipe.model.random_distribution != "uniform":
            changes["model.random_distribution"] = "uniform"
    else:
        name, value = ("no-dag", "0") if recipe.dag.trained else ("dag", "0.005")
        changes = {f"dag.{tensor}": value for tensor in DAG_TENSORS}
        for tensor in DAG_TENSORS:
            if recipe.dag.trained and recipe.dag.schedule(tensor)[0] != "constant":  # with 0 nothing can be scheduled
                changes |= {f"dag.{tensor}_schedule": "constant", f"dag.{tensor}_steps": "null"}
    base = recipe.run.name.removesuffix("-no-dag").removesuffix("-dag").removesuffix("-learned")
    changes = {"run.name": f"{base}-{name}", **changes}
    kept = [word for word in options.overrides if word.partition("=")[0].strip() not in changes]
    words = [f"{key}={value}" for key, value in changes.items()]
    return shlex.join(["pldr-train", "fit", options.recipe, *kept, *words])


def _print_page(run: Path) -> None:
    """Write the run's page and say where; that it cannot be written is no failure of a run that is done."""
    # Only a run that has ended needs them.
    from pldr_train.commands.report import write_page  # noqa: PLC0415
    from pldr_train.report.runs import open_runs  # noqa: PLC0415

    path = run / "report.html"
    try:
        write_page(*open_runs([run]), path, "free some space, then: pldr-train report")
    except UserError as error:
        print(f"report      none: {error}")
    else:
        print(f"report      {path}")
