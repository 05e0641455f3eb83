"""Checkpoints of the original PLDR-LLM code, turned into folders that load here and with transformers."""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pldr_train.curvature.files import read_curvature, write_curvature
from pldr_train.errors import CheckpointError, DataError
from pldr_train.hub.exporting import write_model_folder
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.model.published_layout import from_published

_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
_LAYER = re.compile(r"decoder\.dec_layers\.(\d+)\.")


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint of the original code does not say about itself."""

    context_length: int = 1024
    reference_rope: bool = True
    tokenizer_file: Path | None = None
    curvature_file: Path | None = None
    """G of a model with a predefined G whose checkpoint does not hold it."""
    overwrite: bool = False


def is_model_checkpoint(source: Path) -> bool:
    """Whether a file is a torch checkpoint (rather than a pickle of tensors), by its content.

    Raises:
        DataError: there is no such file.
    """
    if not source.is_file():
        raise DataError(f"{source}: no such file; name a .pth checkpoint or a .pkl with a predefined G")
    # torch.save writes a zip; before 2020 it wrote a pickle that begins with this number.
    legacy = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    with source.open("rb") as file:
        return zipfile.is_zipfile(source) or legacy in file.read(64)


def import_model(source: Path, target: Path, options: ImportOptions = ImportOptions()) -> PldrllmConfig:
    """Turn a `.pth` of the original code into a model folder.

    The sizes are read off the tensors. Nothing in the file is executed.

    Returns:
        The configuration that was found.

    Raises:
        CheckpointError: the file is no such checkpoint, or its tensors do not fit together.
        DataError: the target or a file among the options cannot be used.
    """
    weights = _read_weights(source)
    curvature = None if options.curvature_file is None else read_curvature(options.curvature_file)["G"]
    config = _derive_config(source, weights, curvature, options)
    model = PldrllmForCausalLM(config)
    state = from_published(weights)
    if curvature is not None:
        try:
            model.decoder.set_predefined_curvature(curvature)
        except ValueError as error:
            raise DataError(f"{options.curvature_file}: {error}") from error
        kept = ("decoder.predefined_outputs", "decoder.predefined_is_set")
        state = {name: model.state_dict()[name] for name in kept} | state
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(f"{source}: its tensors do not fit a PLDR-LLM of the sizes they have: {error}") from error
    write_model_folder(model.eval(), target, options.tokenizer_file, None, options.overwrite)
    return config


def import_curvature(source: Path, target: Path) -> tuple[int, ...]:
    """Turn a `.pkl` with a predefined G into safetensors with "G" (and "A_LM", "A_P"); returns the shape of G.

    Raises:
        DataError: the file holds anything but tensors, or they do not fit together.
    """
    if target.is_dir():
        raise DataError(f"{target} is a folder; name the safetensors file to write, such as G.safetensors")
    tensors = read_curvature(source)
    write_curvature(target, tensors, {"source": source.name})
    return tuple(tensors["G"].shape)


def _read_weights(source: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"{source} is refused: it holds more than tensors and plain types ({reason}). Nothing in it was executed"
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise CheckpointError(f"{source} is damaged: {error}; copy it anew") from error
    state: Any = loaded.get("model_state_dict", loaded) if isinstance(loaded, Mapping) else None
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f"{source}: no model_state_dict of tensors in it; give a .pth of the original PLDR-LLM code"
        )
    return {_without_wrappers(name): tensor for name, tensor in state.items()}


def _without_wrappers(name: str) -> str:
    while any(name.startswith(wrapper) for wrapper in _WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _derive_config(
    source: Path, weights: Mapping[str, Tensor], curvature: Tensor | None, options: ImportOptions
) -> PldrllmConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in weights:
            raise CheckpointError(f"{source}: no tensor {name!r}; give a .pth of the original PLDR-LLM code")
        return tuple(weights[name].shape)

    def count(pattern: str) -> int:
        found = {match[1] for name in weights if (match := re.match(pattern, name))}
        return len(found)

    attention = "decoder.dec_layers.0.mha1."
    vocab_size, width = shape("decoder.embedding.weight")
    sizes: dict[str, Any] = {
        "vocab_size": vocab_size,
        "hidden_size": width,
        "intermediate_size": shape("decoder.dec_layers.0.ffn.gluw1.weight")[0],
        "num_hidden_layers": count(_LAYER.pattern),
    }
    if f"{attention}plgatt_layer.Wlst" in weights:
        heads, head_dim, _ = shape(f"{attention}plgatt_layer.Wlst")
        unit = re.escape(attention + "reslayerAs.")
        sizes |= {
            "num_reslayerA": count(unit + r"(\d+)\."),
            "num_denseA": count(unit + r"0\.denseAs\.(\d+)\."),
            "A_dff": shape(f"{attention}reslayerAs.0.denseAs.0.gluw1.weight")[0],
        }
    else:
        heads, head_dim = _sizes_of_predefined(source, weights, curvature)
        sizes["custom_G_type"] = "external"
    try:
        return _config(weights, heads, head_dim, sizes, options)
    except ValueError as error:
        raise CheckpointError(f"{source}: its tensors and the G given do not fit together: {error}") from error


def _config(
    weights: Mapping[str, Tensor], heads: int, head_dim: int, sizes: Mapping[str, Any], options: ImportOptions
) -> PldrllmConfig:
    return PldrllmConfig(
        num_attention_heads=heads,
        head_dim=head_dim,
        attention_bias="decoder.dec_layers.0.mha1.wq.bias" in weights,
        glu_bias="decoder.dec_layers.0.ffn.gluw1.bias" in weights,
        final_bias="final_layer.bias" in weights,
        max_position_embeddings=options.context_length,
        reference_rope=options.reference_rope,
        **sizes,
    )


def _sizes_of_predefined(source: Path, weights: Mapping[str, Tensor], curvature: Tensor | None) -> tuple[int, int]:
    buffer = weights.get("decoder.past_G_values")
    held = curvature if curvature is not None else (None if buffer is None else buffer[:, 2, 0])
    if held is None:
        raise CheckpointError(
            f"{source} has no metric learner and no G: give the predefined G it was trained with, --g FILE (.pkl or "
            "safetensors)"
        )
    return int(held.shape[1]), int(held.shape[2])
