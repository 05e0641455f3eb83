"""A trained model from wherever it lies: a run, one of its checkpoints, or a folder in transformers' format."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pldr_train.building import model_config
from pldr_train.checkpoint.finding import named_checkpoint
from pldr_train.checkpoint.manifest import read_info, step_of
from pldr_train.checkpoint.shards import read_weights
from pldr_train.errors import CheckpointError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.recipe.attention import PORTABLE
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, MANIFEST_FILE, TOKENIZER_FILE
from pldr_train.training.weights import load_model_folder

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RunCheckpoint:
    """A checkpoint of a run, and what the run knows about it."""

    folder: Path
    run: Path
    """The run's folder."""
    step: int
    recipe: Recipe

    @property
    def tokenizer_file(self) -> Path | None:
        """The SentencePiece model that the run was trained with, if it is still there."""
        candidates = [self.run / TOKENIZER_FILE]
        if self.recipe.data.tokenizer is not None:
            candidates.append(Path(self.recipe.data.tokenizer))
        return next((path for path in candidates if path.is_file()), None)

    def load_model(self) -> PldrllmForCausalLM:
        """Return the model with the checkpoint's weights, in fp32 on the CPU, in eval mode.

        Raises:
            CheckpointError: the weights cannot be read or do not fit the checkpoint's own recipe.
        """
        weights = read_weights(self.folder)
        backend = self.recipe.model.attn_implementation
        if backend not in PORTABLE:
            _log.info(f"{self.folder}: trained with model.attn_implementation={backend}; it attends through sdpa here")
        model = PldrllmForCausalLM(model_config(self.recipe))
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            raise CheckpointError(f"{self.folder}: its weights do not fit its own recipe: {error}") from error
        model.eval()
        return model


def find_checkpoint(source: Path) -> RunCheckpoint | None:
    """Return the checkpoint that a path names: a run's folder (its newest whole one), or the checkpoint's own folder.

    Args:
        source: the path.

    Returns:
        The checkpoint, or `None` if the path holds no run and no checkpoint.

    Raises:
        CheckpointError: there are checkpoints, and the named one or all are damaged.
    """
    folder = named_checkpoint(source)
    if folder is None and (source / CHECKPOINTS_FOLDER).is_dir():
        raise CheckpointError(f"{source}: the run has no checkpoint yet; train it further, or name another run")
    return None if folder is None else run_checkpoint(folder)


def run_checkpoint(folder: Path) -> RunCheckpoint:
    """Return what is known of a whole checkpoint."""
    recipe = recipe_from_dict(read_info(folder)["recipe"], str(folder)).resolved()
    return RunCheckpoint(folder, folder.parent.parent, step_of(folder), recipe)


def suppress_ids_without_piece(model: PldrllmForCausalLM, num_pieces: int) -> None:
    """Keep generation from ids beyond the tokenizer's, where the vocabulary was made larger: they stand for no text."""
    if num_pieces < model.config.vocab_size:
        model.generation_config.suppress_tokens = list(range(num_pieces, model.config.vocab_size))


def load_model(source: Path) -> PldrllmForCausalLM:
    """Return the causal language model at a path: a run, a checkpoint, or a folder in transformers' format.

    Raises:
        CheckpointError: the path holds none of them, or what it holds is damaged or not all of a model.
        DataError: a weights file is corrupt.
    """
    checkpoint = find_checkpoint(source)
    if checkpoint is not None:
        return checkpoint.load_model()
    if not source.exists():
        raise CheckpointError(f"{source}: no such folder; name a run, a checkpoint or an exported model")
    if not (source / "config.json").is_file():
        raise CheckpointError(
            f"{source} holds no model: name a run, a checkpoint (with {MANIFEST_FILE}) or "
            "a folder in transformers' format (with config.json)"
        )
    return load_model_folder(source)
