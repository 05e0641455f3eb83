"""G of a trained model on a given text, as a file that `custom_G_type: external` takes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pldr_train import __version__
from pldr_train.curvature.files import check_curvature_target, write_curvature
from pldr_train.errors import CheckpointError, DataError
from pldr_train.model import PldrllmForCausalLM, PldrllmTokenizer, PldrllmTokenizerFast
from pldr_train.models.loading import find_checkpoint, load_model, suppress_ids_without_piece


def extract_curvature(
    source: Path,
    target: Path,
    text: str | None = None,
    ids: Sequence[int] | None = None,
    overwrite: bool = False,
) -> tuple[tuple[int, ...], int]:
    """Run a model over a text once and write the deductive outputs of all layers.

    The file holds "G" and, of a model that learns it, "A", "A_LM" and "A_P", each (L, H, d, d) in fp32. Of a model with
    a causal Gram they are the last chunk's. A predefined G is written as it is; the text then changes nothing.

    Args:
        source: a run, a checkpoint, or a folder in transformers' format.
        target: the safetensors file to write.
        text: what the model reads; needs the model's tokenizer.
        ids: token ids instead of a text.
        overwrite: replace the file if there is one.

    Returns:
        The shape of G and the number of tokens read.

    Raises:
        CheckpointError: no model or no tokenizer there.
        DataError: an empty text, one longer than the model's context, ids beyond the vocabulary, or a target that
            may not be written.
    """
    assert (text is None) != (ids is None)
    check_curvature_target(target, overwrite)
    if ids is None:
        model, tokenizer = load_with_tokenizer(source)
        ids = tokenizer(text)["input_ids"]
        if not ids:
            raise DataError(f"the text {text!r} has no tokens; give one that has")
    else:
        model = load_model(source)
        _check_ids(ids, model.config.vocab_size)
    if len(ids) > model.config.max_position_embeddings:
        raise DataError(
            f"the text has {len(ids)} tokens, more than the context of {model.config.max_position_embeddings} of "
            f"{source}; give a shorter one"
        )
    tensors = deductive_tensors(model, ids)
    metadata = {
        "source": str(source),
        "tokens": str(len(ids)),
        "ids_sha256": hashlib.sha256(" ".join(map(str, ids)).encode()).hexdigest(),
        "custom_G_type": str(model.config.custom_G_type or "learned"),
        "gram_chunk_size": str(model.config.gram_chunk_size),
        "versions": f"pldr_train {__version__}, torch {torch.__version__}",
    }
    if text is not None:
        metadata["text_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    write_curvature(target, tensors, metadata, overwrite)
    return tuple(tensors["G"].shape), len(ids)


def _check_ids(ids: Sequence[int], vocab_size: int) -> None:
    wrong = [each for each in ids if not 0 <= each < vocab_size]
    if wrong:
        raise DataError(f"--ids: {wrong[0]} is no id of this model's vocabulary; use 0 to {vocab_size - 1}")


@torch.no_grad()
def deductive_tensors(model: PldrllmForCausalLM, ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the deductive outputs of a model on one sequence, by name, each (L, H, d, d)."""
    outputs = model.decoder(torch.tensor([list(ids)]), use_cache=False, output_deductive_outputs=True).deductive_outputs
    names = {"A": "metric", "A_LM": "positive_metric", "A_P": "potential", "G": "curvature"}
    tensors = {}
    for name, field in names.items():
        layers = [getattr(layer, field) for layer in outputs]
        if layers[0] is None:
            continue
        # (1, H, d, d), with a causal Gram (1, N, H, d, d).
        tensors[name] = torch.stack([layer[0] if layer.dim() == 4 else layer[0, -1] for layer in layers]).float()
    return tensors


def load_with_tokenizer(source: Path) -> tuple[PldrllmForCausalLM, Any]:
    """Return a model and its tokenizer, of a run, a checkpoint, or a folder in transformers' format.

    Raises:
        CheckpointError: there is no model or no tokenizer.
        DataError: a file is damaged, or the tokenizer has more pieces than the model's vocabulary.
    """
    model, tokenizer = load_model(source), load_tokenizer_of(source)
    if len(tokenizer) > model.config.vocab_size:
        raise DataError(
            f"{source}: the tokenizer has {len(tokenizer)} pieces, the model's vocabulary only "
            f"{model.config.vocab_size}; put the tokenizer there that the model was trained with"
        )
    suppress_ids_without_piece(model, len(tokenizer))
    return model, tokenizer


def load_tokenizer_of(source: Path) -> Any:
    """Return the tokenizer of a run, a checkpoint, or a folder in transformers' format, adding no special pieces to a
    text.

    Training packs documents with [END] between them alone, whatever a published folder says of [START].

    Raises:
        CheckpointError: there is none.
        DataError: its file is damaged.
    """
    checkpoint = find_checkpoint(source)
    try:
        if checkpoint is not None and checkpoint.tokenizer_file is not None:
            return PldrllmTokenizer(str(checkpoint.tokenizer_file))
        if checkpoint is None and (source / "tokenizer.json").is_file():
            return PldrllmTokenizerFast.from_pretrained(source, add_bos_token=False, add_eos_token=False)
        if checkpoint is None and (source / "tokenizer.model").is_file():
            return PldrllmTokenizer.from_pretrained(source, add_bos_token=False, add_eos_token=False)
    except (OSError, ValueError) as error:
        raise DataError(f"{source}: its tokenizer cannot be loaded: {error}") from error
    raise CheckpointError(f"{source} has no tokenizer (tokenizer.model or tokenizer.json); copy it there")
