"""From a recipe to a trained run: wiring only."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.settings import DataSettings
from pldr_train.errors import DataError, RecipeError
from pldr_train.recipe import Recipe, dump_recipe
from pldr_train.training.callbacks import PlainCheckpointIO, StepBoundary
from pldr_train.training.checkpoints import STATE_FILE
from pldr_train.training.module import PldrllmModule
from pldr_train.training.progress import Progress, ProgressCallback
from pldr_train.training.quiet import quiet_libraries
from pldr_train.training.run_folder import DATA_FILE, TOKENIZER_FILE, RunFolder, environment
from pldr_train.training.sampling import sample_texts
from pldr_train.training.start import Start, choose_start
from pldr_train.training.stop_signals import StopRequestedError
from pldr_train.training.wandb_mirror import finish_mirror, wandb_mirror

SAMPLES_FILE = "samples.jsonl"


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


def fit(recipe: Recipe, resume: str = "auto", force: bool = False, say: Callable[[str], None] = print) -> Outcome:
    """Train a run to its end, or until it is asked to stop.

    Args:
        recipe: what to train.
        resume: see `training.start.choose_start`.
        force: resume although the recipe differs.
        say: is told what a user should know.

    Raises:
        UserError: whatever the user can mend; the run's checkpoints are whole.
    """
    recipe = recipe.resolved()
    folder = RunFolder(Path(recipe.run.dir) / recipe.run.name)
    folder.acquire()
    try:
        start = choose_start(folder, recipe, resume, force, say)
        if start.step >= recipe.trainer.max_steps:
            return Outcome(folder.path, start.step, trained=False, samples=_earlier_samples(folder))
        return _train(recipe, folder, start, say)
    finally:
        folder.release()


def _train(recipe: Recipe, folder: RunFolder, start: Start, say: Callable[[str], None]) -> Outcome:
    quiet_libraries()
    folder.write("recipe.yaml", dump_recipe(recipe))
    folder.write("environment.json", json.dumps(environment(), indent=1) + "\n")
    if recipe.trainer.threads is not None:
        torch.set_num_threads(recipe.trainer.threads)
    _check_devices(recipe)
    pl.seed_everything(recipe.run.seed, verbose=False)
    settings = replace(data_settings(recipe), manifest_path=str(_list_of_files(folder, start)))
    datamodule, module = PldrDataModule(settings, say=say), PldrllmModule(recipe)
    trainer = build_trainer(recipe, folder, say)
    say(_beginning(recipe, folder, start))
    datamodule.prepare_data()
    datamodule.setup()
    # A resumed run keeps its own: should the recipe's be another file by now, resuming is refused further on.
    folder.copy_in(TOKENIZER_FILE, datamodule.tokenizer_path, replace=start.checkpoint is None)
    try:
        trainer.fit(
            module, datamodule=datamodule, ckpt_path=None if start.checkpoint is None else start.checkpoint / STATE_FILE
        )
    except StopRequestedError as stop:
        return Outcome(folder.path, stop.step, trained=True, stopped_by=stop.signal_name)
    except DataError as error:
        raise _with_what_was_saved(error, trainer, start) from error
    finally:
        finish_mirror()
    samples = _sample(recipe, module, datamodule, folder)
    return Outcome(folder.path, trainer.global_step, trained=True, samples=samples)


def _list_of_files(folder: RunFolder, start: Start) -> Path:
    """Where the run keeps the list of its files; an earlier run's is removed, another checkpoint's copied."""
    path = folder.path / DATA_FILE
    if start.checkpoint is None:
        path.unlink(missing_ok=True)
    else:
        theirs = start.checkpoint.resolve().parents[1] / DATA_FILE
        if theirs.exists() and theirs.resolve() != path.resolve():
            folder.copy_in(DATA_FILE, theirs, replace=False)
    return path


def _with_what_was_saved(error: DataError, trainer: pl.Trainer, start: Start) -> DataError:
    if trainer.global_step <= start.step:
        return error
    return DataError(
        f"{error}\nThe run was saved after step {trainer.global_step:,}; once this is mended, the same command goes on "
        "from there"
    )


def _check_devices(recipe: Recipe) -> None:
    if recipe.trainer.accelerator == "cuda" and not torch.cuda.is_available():
        raise RecipeError(
            "trainer.accelerator=cuda: this machine has no CUDA device that torch can use; set auto or cpu"
        )
    if recipe.trainer.devices > 1:
        raise RecipeError(
            f"trainer.devices={recipe.trainer.devices}: this version trains in one process; set trainer.devices=1 "
            "and, if memory is short, a smaller trainer.micro_batch_size (the steps stay the same)"
        )


def data_settings(recipe: Recipe) -> DataSettings:
    """The data module's settings out of a resolved recipe."""
    data, trainer = recipe.data, recipe.trainer
    assert trainer.micro_batch_size is not None
    return DataSettings(
        source=data.source,
        path=data.path,
        text_column=data.text_column,
        train_documents=data.train_documents,
        validation_documents=data.validation_documents,
        validation_fraction=data.validation_fraction,
        tokenizer=data.tokenizer,
        cache_dir=data.cache_dir,
        context_length=data.context_length,
        num_lanes=data.num_lanes,
        shuffle=data.shuffle,
        shuffle_window_documents=data.shuffle_window_documents,
        num_workers=data.num_workers,
        seed=recipe.run.seed,
        vocab_size=recipe.model.vocab_size,
        batch_size=trainer.batch_size,
        micro_batch_size=trainer.micro_batch_size,
        validation_batches=trainer.validation_batches,
        repository=data.repository,
        revision=data.revision,
        config=data.config,
        split=data.split,
        data_files=data.data_files,
        packing=data.packing,
        min_document_tokens=data.min_document_tokens,
        max_document_tokens=data.max_document_tokens,
        on_bad_shard=data.on_bad_shard,
        retries=data.retries,
    )


def build_trainer(recipe: Recipe, folder: RunFolder, say: Callable[[str], None] = print) -> pl.Trainer:
    """A Lightning trainer for a resolved recipe; all that goes on between steps is `StepBoundary`'s."""
    settings = recipe.trainer
    callbacks: list[pl.Callback] = [StepBoundary(recipe, folder, say=say)]
    loggers: list[Any] = []
    if recipe.logging.progress:
        progress = Progress(recipe)
        loggers.append(progress)
        # First, so that the bar stands before the first validation is shown.
        callbacks.insert(0, ProgressCallback(progress))
    mirror = wandb_mirror(recipe, folder.path)
    if mirror is not None:
        loggers.append(mirror)
    return pl.Trainer(
        accelerator={"cuda": "gpu"}.get(settings.accelerator, settings.accelerator),
        devices=settings.devices,
        precision="bf16-mixed" if settings.precision == "bf16" else "32-true",
        max_steps=settings.max_steps,
        max_epochs=-1,
        val_check_interval=settings.validate_every_steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=loggers or False,
        callbacks=callbacks,
        plugins=[PlainCheckpointIO()],
        default_root_dir=folder.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )


def _beginning(recipe: Recipe, folder: RunFolder, start: Start) -> str:
    tokens = recipe.trainer.batch_size * recipe.data.context_length
    steps = f"{recipe.trainer.max_steps:,} steps of {tokens:,} tokens"
    if start.checkpoint is None:
        return f"run {recipe.run.name}: {steps}, in {folder.path}"
    return f"run {recipe.run.name}: {steps}; resuming after step {start.step:,} from {start.checkpoint}"


def _sample(recipe: Recipe, module: PldrllmModule, datamodule: PldrDataModule, folder: RunFolder) -> tuple[str, ...]:
    settings = recipe.sample
    texts = sample_texts(
        module.model,
        datamodule.tokenizer,
        settings.prompts,
        settings.max_new_tokens,
        settings.temperature,
        settings.top_p,
        recipe.run.seed,
    )
    lines = [
        json.dumps({"step": recipe.trainer.max_steps, "prompt": prompt, "text": text}, ensure_ascii=False) + "\n"
        for prompt, text in zip(settings.prompts, texts, strict=True)
    ]
    folder.write(SAMPLES_FILE, "".join(lines))
    return tuple(texts)


def _earlier_samples(folder: RunFolder) -> tuple[str, ...]:
    path = folder.path / SAMPLES_FILE
    if not path.exists():
        return ()
    return tuple(json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines())
