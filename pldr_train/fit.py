"""From a recipe to a trained run: wiring only."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.loggers.logger import Logger

from pldr_train.checkpoint.manifest import STATE_FILE, read_info
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.loader import LaneState
from pldr_train.data.tokenizer.training import load_tokenizer
from pldr_train.distributed.world import World
from pldr_train.errors import DataError, RecipeError, UserError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.printing import log_to_terminal_by_default
from pldr_train.recipe import Recipe, dump_recipe, recipe_from_dict, recipe_to_dict
from pldr_train.runs.folder import RunFolder
from pldr_train.runs.layout import DATA_FILE, ENVIRONMENT_FILE, RECIPE_FILE, TOKENIZER_FILE, folder_name
from pldr_train.runs.nonfinite import RollbackRequestedError
from pldr_train.runs.notes import environment, keeping_stop_reason, write_stop_reason
from pldr_train.runs.validations import early_end_of
from pldr_train.training.attention import check_attention
from pldr_train.training.deepspeed_config import users_config
from pldr_train.training.loggers import Progress, ProgressCallback, recipe_loggers
from pldr_train.training.module import PldrllmModule, whole_model
from pldr_train.training.quiet import quiet_libraries
from pldr_train.training.sampling import sample_texts
from pldr_train.training.saving import PlainCheckpointIO
from pldr_train.training.start import AUTO, Start, choose_start
from pldr_train.training.step_boundary import StepBoundary
from pldr_train.training.stop_signals import StopRequestedError
from pldr_train.training.strategies import LaunchedEnvironment, build_strategy, trains_on_gpu
from pldr_train.training.task_evaluation import check_installed
from pldr_train.training.weights import saved_model
from pldr_train.untrusted import read_text
from pldr_train.wandb_switch import resolve_mode

_log = logging.getLogger(__name__)

_AFTER_WATCHDOG_S = 30.0
"""A collective gives up so long after the watchdog, whose message says more."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended."""

    folder: Path
    step: int
    trained: bool
    """False if the run was complete already."""
    stopped_by: str | None = None
    """Name of the signal that the run left on."""
    samples: tuple[str, ...] = ()
    ended_early: str | None = None
    """Why the run ended before its last step, by `trainer.early_stop`."""


@dataclass(frozen=True)
class Extras:
    """What a caller adds to a run."""

    callbacks: tuple[pl.Callback, ...] = ()
    loggers: tuple[Logger, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what would save a run in a second way."""
        for callback in self.callbacks:
            if isinstance(callback, Checkpoint):
                raise RecipeError(
                    f"callbacks: {type(callback).__name__}: a run saves its own checkpoints, from which it resumes "
                    "exactly; leave it out and set checkpoint.every_steps, checkpoint.keep_last or "
                    "checkpoint.also_keep_steps"
                )


def fit(
    recipe: Recipe,
    resume: str = "auto",
    force: bool = False,
    environment_variables: Mapping[str, str] = os.environ,
    *,
    callbacks: Sequence[pl.Callback] = (),
    loggers: Sequence[Logger] = (),
) -> Outcome:
    """Train a run to its end, or until it is asked to stop.

    Each process of a run calls this; how many there are, and which this is, stands in torch's env:// variables.
    Messages go to the logger "pldr_train"; where no logging is set up, rank 0 prints them.

    Args:
        recipe: what to train.
        resume: see `training.start.choose_start`.
        force: resume although the recipe differs.
        environment_variables: RANK, WORLD_SIZE and so on; without them the run has one process.
        callbacks: Lightning callbacks, on every rank, called after the run's own. `trainer.callback_metrics` has the
            values of the last validation. A callback that sets `trainer.should_stop` ends the run, which is saved;
            the same call goes on with it. What `state_dict` of a callback returns is part of every checkpoint.
        loggers: Lightning loggers; rank 0's get every line of the metrics, and the recipe as hyperparameters.

    Raises:
        UserError: for all that the user can correct; the run's checkpoints are whole.
        LostProcessError: another process ended or does not answer.
    """
    world = World.join(environment_variables, recipe.parallel.timeout_s + _AFTER_WATCHDOG_S, trains_on_gpu(recipe))
    log_to_terminal_by_default(world.rank)
    extras = Extras(tuple(callbacks), tuple(loggers))
    try:
        outcome = _fit_in(world, for_world(recipe, world), resume, force, extras)
    except UserError:
        world.leave()
        raise
    # After any other error the others may be gone, and parting from them could wait for ever.
    world.leave()
    return outcome


def for_world(recipe: Recipe, world: World) -> Recipe:
    """Return the recipe with as many processes as there are.

    Raises:
        RecipeError: the recipe wants several processes and there is one, or does not fit the number of processes.
    """
    nodes, devices = world.num_nodes, world.local_size
    if world.size == 1:
        nodes = devices = 1
        if recipe.trainer.world_size > 1:
            raise RecipeError(
                f"trainer.devices={recipe.trainer.devices}, trainer.num_nodes={recipe.trainer.num_nodes}: this is one "
                "process, and no launcher has said of which; start the run with pldr-train fit, torchrun or SLURM (see "
                "docs/launching.md), or set both to 1"
            )
    if (recipe.trainer.devices, recipe.trainer.num_nodes) == (devices, nodes):
        return recipe
    _log.info(f"{nodes} x {devices} processes were started: trainer.num_nodes={nodes}, trainer.devices={devices}")
    values = recipe_to_dict(recipe)
    values["trainer"] |= {"devices": devices, "num_nodes": nodes}
    return recipe_from_dict(values, "the recipe for this number of processes")


def _fit_in(world: World, recipe: Recipe, resume: str, force: bool, extras: Extras) -> Outcome:
    folder = RunFolder(Path(recipe.run.dir) / recipe.run.name)
    world.on_all(folder.acquire, here=world.is_main)
    rolled_back = None
    try:
        while True:
            start = world.on_main(functools.partial(choose_start, folder, recipe, resume, force))
            recipe = world.on_main(functools.partial(_settled, recipe, start))
            early = world.on_main(functools.partial(_early_end, recipe, folder, start.step))
            if early is not None or start.step >= recipe.trainer.max_steps:
                samples = world.on_main(functools.partial(_samples_of_complete_run, recipe, folder, start))
                return Outcome(folder.path, start.step, trained=False, samples=samples, ended_early=early)
            try:
                with keeping_stop_reason(folder, passing=(RollbackRequestedError,)), _finishing_mirror(recipe):
                    outcome = _train(recipe, folder, start, world, rolled_back, extras)
                if outcome.stopped_by is None:
                    early = world.on_main(functools.partial(_early_end, recipe, folder, outcome.step))
                    outcome = replace(outcome, ended_early=early)
                if early is None and outcome.step < recipe.trainer.max_steps and world.is_main:
                    by = outcome.stopped_by or "a callback set trainer.should_stop"
                    write_stop_reason(folder, f"{by}: saved after step {outcome.step:,} and left")
                return outcome
            except RollbackRequestedError as request:
                rolled_back, resume, force = request, AUTO, True
    finally:
        folder.release()


def _early_end(recipe: Recipe, folder: RunFolder, step: int) -> str | None:
    """Return why a run that stands at a step ended before its last one, and note it; None if it did not."""
    why = early_end_of(folder.path, recipe, step)
    if why is not None:
        write_stop_reason(folder, why, is_finished=True)
    return why


def _settled(recipe: Recipe, start: Start) -> Recipe:
    """Return the recipe, resolved; what it leaves open is that of the run that it goes on with."""
    if start.checkpoint is None:
        return recipe.going_on(None).resolved()
    info = read_info(start.checkpoint)
    return recipe.going_on(recipe_from_dict(info["recipe"], str(start.checkpoint))).resolved()


def _train(
    recipe: Recipe,
    folder: RunFolder,
    start: Start,
    world: World,
    rolled_back: RollbackRequestedError | None,
    extras: Extras,
) -> Outcome:
    quiet_libraries()
    text = dump_recipe(recipe)
    world.on_all(lambda: _write_beginning(text, folder), here=world.is_main)
    world.on_all(lambda: _check_folder_is_shared(text, recipe, folder, world))
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    world.on_all(lambda: _check_devices(recipe))
    world.on_all(lambda: check_attention(recipe))
    world.on_all(lambda: users_config(recipe))
    world.on_all(lambda: check_installed(recipe))
    pl.seed_everything(recipe.run.seed, verbose=False)
    manifest = folder.path / DATA_FILE
    world.on_all(lambda: _bring_list_of_files(folder, start), here=world.is_main)
    datamodule, module = PldrDataModule(recipe, manifest_path=manifest), PldrllmModule(recipe, world=world)
    trainer = build_trainer(recipe, folder, world, start, rolled_back, extras)
    _log.info(_beginning(recipe, folder, start))
    _prepare_data(datamodule, world)
    # A resumed run keeps its own: should the recipe's be another file by now, resuming is refused further on.
    copy_in = functools.partial(folder.copy_in, TOKENIZER_FILE, replace=start.checkpoint is None)
    world.on_all(lambda: copy_in(datamodule.tokenizer_path), here=world.is_main)
    if rolled_back is not None:
        datamodule.lane_state = LaneState.from_state_dict(rolled_back.lanes)
    state = None if start.checkpoint is None else start.checkpoint / STATE_FILE
    try:
        with world.noticing_loss():
            trainer.fit(module, datamodule=datamodule, ckpt_path=state)
    except StopRequestedError as stop:
        return Outcome(folder.path, stop.step, trained=True, stopped_by=stop.signal_name)
    except DataError as error:
        raise _with_what_was_saved(error, trainer, start) from error
    samples = world.on_main(lambda: _sample_at_end(recipe, module, datamodule, folder, trainer.global_step))
    return Outcome(folder.path, trainer.global_step, trained=True, samples=samples)


def _write_beginning(text: str, folder: RunFolder) -> None:
    folder.write(RECIPE_FILE, text)
    folder.write(ENVIRONMENT_FILE, json.dumps(environment(), indent=1) + "\n")


def _check_folder_is_shared(text: str, recipe: Recipe, folder: RunFolder, world: World) -> None:
    try:
        seen = read_text(folder.path / RECIPE_FILE)
    except (OSError, ValueError):
        seen = ""
    if seen != text:
        raise RecipeError(
            f"run.dir={recipe.run.dir}: rank {world.rank} on {platform.node()} does not see {folder.path}/recipe.yaml "
            "as rank 0 wrote it; put run.dir on a disk that all machines share, under the same path"
        )


def _prepare_data(datamodule: PldrDataModule, world: World) -> None:
    """Rank 0 lists the files and builds what is missing, then one process of every other machine, then all open it."""
    first_here = world.local_rank == 0 and not world.is_main
    world.on_all(datamodule.prepare_data, here=world.is_main)
    world.on_all(datamodule.prepare_data, here=first_here)
    world.on_all(datamodule.setup)


def _bring_list_of_files(folder: RunFolder, start: Start) -> None:
    """Put right where the run keeps the list of its files: an earlier run's is removed, another checkpoint's copied."""
    path = folder.path / DATA_FILE
    if start.checkpoint is None:
        path.unlink(missing_ok=True)
    else:
        theirs = start.checkpoint.absolute().parents[1] / DATA_FILE
        if theirs.exists() and theirs.resolve() != path.resolve():
            folder.copy_in(DATA_FILE, theirs, replace=False)


def _with_what_was_saved(error: DataError, trainer: pl.Trainer, start: Start) -> DataError:
    if trainer.global_step <= start.step:
        return error
    return DataError(
        f"{error}\nThe run was saved after step {trainer.global_step:,}; once this is corrected, the same command goes "
        "on from there"
    )


def _check_devices(recipe: Recipe) -> None:
    if recipe.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "trainer.accelerator=cuda: this machine has no CUDA device that torch can use; set auto or cpu"
        )
    if trains_on_gpu(recipe) and recipe.trainer.devices > torch.cuda.device_count():
        raise RecipeError(
            f"trainer.devices={recipe.trainer.devices}: this machine has {torch.cuda.device_count()} GPUs; lower it, "
            "or set trainer.accelerator=cpu"
        )


def build_trainer(
    recipe: Recipe,
    folder: RunFolder,
    world: World | None = None,
    start: Start | None = None,
    rolled_back: RollbackRequestedError | None = None,
    extras: Extras | None = None,
) -> pl.Trainer:
    """Return a Lightning trainer for a resolved recipe; all that goes on between steps is `StepBoundary`'s."""
    settings, world = recipe.trainer, world or World()
    checkpoint = None if start is None else start.checkpoint
    boundary = StepBoundary(recipe, folder, world=world, checkpoint=checkpoint, rolled_back=rolled_back)
    extras = extras or Extras()
    callbacks: list[pl.Callback] = [boundary, *extras.callbacks]
    shows_progress = any(isinstance(each, ProgressBar) for each in extras.callbacks)
    loggers: list[Logger] = []
    if world.is_main:
        loggers += [*recipe_loggers(recipe, folder.path, 0 if start is None else start.step), *extras.loggers]
        for logger in loggers:
            logger.log_hyperparams(recipe_to_dict(recipe))
    if recipe.logging.progress and world.is_main and not shows_progress:
        progress = Progress(recipe)
        loggers.append(progress)
        # First, so that the bar stands before the first validation is shown.
        callbacks.insert(0, ProgressCallback(progress))
    if world.is_main and _is_mirrored(recipe):
        from pldr_train.training.wandb_mirror import MirrorCallback, wandb_mirror  # noqa: PLC0415, see _is_mirrored

        mirror = wandb_mirror(recipe, folder.path)
        if mirror is not None:
            loggers.append(mirror)
            callbacks.append(MirrorCallback(mirror))  # last: it shows what the others have left in the folder
    return pl.Trainer(
        accelerator="gpu" if trains_on_gpu(recipe) else "cpu",
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=build_strategy(recipe, world),
        precision="32-true",  # bf16 is the module's own autocast, the same under every strategy
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=settings.validate_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=[PlainCheckpointIO(), LaunchedEnvironment(world)],
        default_root_dir=folder.path,
        enable_checkpointing=False,
        enable_progress_bar=shows_progress,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _is_mirrored(recipe: Recipe) -> bool:
    """Return whether to load W&B, which takes as long as all of this package."""
    return resolve_mode(recipe.logging.wandb) != "disabled"


def _finishing_mirror(recipe: Recipe) -> contextlib.AbstractContextManager[None]:
    if not _is_mirrored(recipe):
        return contextlib.nullcontext()
    from pldr_train.training.wandb_mirror import finishing_mirror  # noqa: PLC0415, see _is_mirrored

    return finishing_mirror()


def _beginning(recipe: Recipe, folder: RunFolder, start: Start) -> str:
    tokens = recipe.trainer.batch_size * recipe.data.context_length
    steps = f"{recipe.trainer.max_steps:,} steps of {tokens:,} tokens"
    if start.checkpoint is None:
        return f"run {recipe.run.name}: {steps}, in {folder.path}"
    return f"run {recipe.run.name}: {steps}; resuming after step {start.step:,} from {start.checkpoint}"


def _sample(recipe: Recipe, model: PldrllmForCausalLM, tokenizer: Any, folder: RunFolder, step: int) -> tuple[str, ...]:
    texts = sample_texts(model, tokenizer, recipe.sample, recipe.run.seed)
    folder.add_samples(step, recipe.sample.prompts, texts)
    return tuple(texts)


def _sample_at_end(
    recipe: Recipe, module: PldrllmModule, datamodule: PldrDataModule, folder: RunFolder, step: int
) -> tuple[str, ...]:
    model = whole_model(recipe, module, folder.checkpoints_path / folder_name(step))
    return _sample(recipe, model, datamodule.tokenizer, folder, step)


def _samples_of_complete_run(recipe: Recipe, folder: RunFolder, start: Start) -> tuple[str, ...]:
    """Return the texts of a run's end, made now if the process was gone before it could make them."""
    step, texts = folder.last_samples()
    if start.checkpoint is None or step >= start.step or not recipe.sample.prompts:
        return texts
    # A checkpoint from elsewhere may be complete where this run has not begun.
    candidates = (folder.path / TOKENIZER_FILE, *([Path(recipe.data.tokenizer)] if recipe.data.tokenizer else []))
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        return texts
    tokenizer = load_tokenizer(path)
    return _sample(recipe, saved_model(recipe, start.checkpoint), tokenizer, folder, start.step)
