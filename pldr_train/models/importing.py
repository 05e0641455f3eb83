"""Checkpoints of the original PLDR-LLM code, turned into folders that load here and with transformers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pldr_train.checkpoint.torch_files import DamagedFileError, ForbiddenContentError, read_torch_file
from pldr_train.curvature.files import read_curvature, write_curvature
from pldr_train.errors import CheckpointError, DataError, first_line
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM, PldrllmTokenizer
from pldr_train.model.published_layout import from_published, to_published
from pldr_train.models.distributed_checkpoint import METADATA_FILE, read_distributed_checkpoint
from pldr_train.models.exporting import check_target, write_model_folder
from pldr_train.models.hub import RECORD_FILE, HubSource, check_record
from pldr_train.training.weights import load_model_folder
from pldr_train.untrusted import read_json

_MARKER = "decoder.embedding.weight"
"""The tensor by which a state dict of a language model is recognised."""
_PLACES: tuple[tuple[str, ...], ...] = (
    ("model_state_dict",), ("app", "model"), ("state_dict",), ("model",), ("module",), (),
)  # fmt: skip
"""Where a checkpoint file keeps the weights: the original code, `dcp_to_torch`, Lightning, others, the file itself."""
_WRAPPERS = ("module.", "_orig_mod.", "_forward_module.")
_LAYER = re.compile(r"decoder\.dec_layers\.(\d+)\.")
_SOURCES = "a .pth checkpoint, a DCP folder, a model's folder, or a .pkl with a predefined G"
_FLAGS = ("decoder.predefined_is_set",)
"""What is no number among a model's tensors."""
_UNSAID = (
    "max_position_embeddings", "reference_rope", "rope_theta", "rope_parameters", "layer_norm_eps", "pad_token_id",
    "bos_token_id", "eos_token_id", "gram_chunk_size", "cache_first_G", "attention_dropout",
)  # fmt: skip
"""Keys of a configuration that cannot be read off the weights."""


@dataclass(frozen=True)
class ImportOptions:
    """What a checkpoint of the original code does not say about itself; `None` stands for the published value."""

    context_length: int | None = None
    reference_rope: bool | None = None
    config_file: Path | None = None
    """A config.json, or the folder that holds it, with these and the rest (`layer_norm_eps`, special ids, ...)."""
    tokenizer_file: Path | None = None
    curvature_file: Path | None = None
    """G of a model with a predefined G whose checkpoint does not hold it."""
    overwrite: bool = False
    origin: HubSource | None = None
    """What of the Hub the source is; kept in the folder that is written."""


def is_model_checkpoint(source: Path) -> bool:
    """Return whether a path is a model's checkpoint or folder (rather than a pickle of tensors), by its content.

    Raises:
        DataError: there is no such file, or a folder holds no model.
    """
    if source.is_dir():
        if (source / METADATA_FILE).is_file() or (source / "config.json").is_file():
            return True
        raise DataError(f"{source} is a folder without {METADATA_FILE} and config.json; name {_SOURCES}")
    if not source.is_file():
        raise DataError(f"{source}: no such file; name {_SOURCES}")
    # torch.save writes a zip; before 2020 it wrote a pickle that begins with this number.
    legacy = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    with source.open("rb") as file:
        start = file.read(64)
    return start.startswith(b"PK\x03\x04") or legacy in start


def import_model(source: Path, target: Path, options: ImportOptions = ImportOptions()) -> PldrllmConfig:
    """Turn a checkpoint of the original code, or a folder in transformers' format, into a model folder of ours.

    A checkpoint is a `.pth`, or the folder of `torch.distributed.checkpoint`; its sizes are read off the tensors.
    Nothing in it is executed.

    Returns:
        The configuration that was found.

    Raises:
        CheckpointError: the file is no such checkpoint, or its tensors do not fit together.
        DataError: the target or a file among the options cannot be used.
    """
    check_target(target, options.overwrite)
    if options.origin is not None:
        check_record(target, options.origin)
    if (source / "config.json").is_file():
        return _import_folder(source, target, options)
    weights = _read_weights(source)
    _check_numbers(source, weights)
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
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(
            f"{source}: its tensors do not fit a PLDR-LLM of the sizes they have: {reason}"
        ) from error
    write_model_folder(model.eval(), target, options.tokenizer_file, None, options.overwrite)
    return config


def import_curvature(source: Path, target: Path, overwrite: bool = False) -> tuple[int, ...]:
    """Turn a `.pkl` with a predefined G into safetensors with "G" (and "A_LM", "A_P"); returns the shape of G.

    Raises:
        DataError: the file holds anything but tensors, they do not fit together, or the target may not be written.
    """
    tensors = read_curvature(source)
    write_curvature(target, tensors, {"source": source.name}, overwrite)
    return tuple(tensors["G"].shape)


def _import_folder(source: Path, target: Path, options: ImportOptions) -> PldrllmConfig:
    """Write the model and the tokenizer of a folder in transformers' format anew."""
    given = {
        "--context-length": options.context_length,
        "--rope": options.reference_rope,
        "--config": options.config_file,
        "--g": options.curvature_file,
    }
    unused = [name for name, value in given.items() if value is not None]
    if unused:
        raise DataError(f"{unused[0]}: {source} has a config.json that says this; leave the option out, or change that")
    model = load_model_folder(source)
    _check_numbers(source, model.state_dict())
    _check_stored_types(source)
    tokenizer = options.tokenizer_file or source / PldrllmTokenizer.vocab_files_names["vocab_file"]
    if options.tokenizer_file is None and not tokenizer.is_file():
        raise DataError(
            f"{source} has no {tokenizer.name}, and a tokenizer.json of another class gives other tokens; give the "
            "SentencePiece model that it was trained with, --tokenizer FILE"
        )
    beside = {} if options.origin is None else {RECORD_FILE: options.origin.as_json()}
    write_model_folder(model, target, tokenizer, None, options.overwrite, beside=beside)
    config: PldrllmConfig = model.config
    return config


def _read_weights(source: Path) -> dict[str, Tensor]:
    if source.is_dir():
        return _named_as_published(read_distributed_checkpoint(source, _MARKER))
    try:
        loaded = read_torch_file(source)
    except ForbiddenContentError as error:
        raise CheckpointError(
            f"{source} is refused: it holds more than tensors and plain types ({error}). Nothing in it was executed"
        ) from error
    except (OSError, DamagedFileError) as error:
        raise CheckpointError(f"{source} is damaged: {first_line(error)}; copy it anew") from error
    for place in _PLACES:
        state: Any = loaded
        for key in place:
            state = state.get(key) if isinstance(state, Mapping) else None
        if isinstance(state, Mapping) and state and all(isinstance(value, Tensor) for value in state.values()):
            return _named_as_published(state)
    raise CheckpointError(f"{source}: no model_state_dict of tensors in it; give a .pth of the original PLDR-LLM code")


def _check_numbers(source: Path, weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that no model computes with. Raises CheckpointError."""
    for name, tensor in weights.items():
        if name in _FLAGS:
            continue
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{source}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, and weights are floating-point "
                "numbers; give the checkpoint that was trained"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{source}: {name} holds values that are not finite; give another checkpoint")


def _check_stored_types(source: Path) -> None:
    """Refuse a folder whose files hold other numbers, which transformers would convert. Raises CheckpointError."""
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, framework="pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a mapping
                kind = stored.get_slice(name).get_dtype()
                if not kind.startswith(("F", "BF")) and not name.endswith(tuple(_FLAGS)):
                    raise CheckpointError(
                        f"{file}: {name} holds {kind}, and weights are floating-point numbers; copy the folder anew"
                    )


def _named_as_published(state: Mapping[Any, Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their published names, whatever a wrapper or this package calls them."""
    return to_published({_without_wrappers(str(name)): tensor for name, tensor in state.items()})


def _without_wrappers(name: str) -> str:
    while any(name.startswith(wrapper) for wrapper in _WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def _derive_config(
    source: Path, weights: Mapping[str, Tensor], curvature: Tensor | None, options: ImportOptions
) -> PldrllmConfig:
    def shape(name: str, axes: int = 2) -> tuple[int, ...]:
        fix = "give a .pth of the original PLDR-LLM code"
        if name not in weights:
            raise CheckpointError(f"{source}: no tensor {name!r}; {fix}")
        found = tuple(weights[name].shape)
        if len(found) != axes:
            raise CheckpointError(f"{source}: {name} has shape {found}, and it must have {axes} axes; {fix}")
        return found

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
        heads, head_dim, _ = shape(f"{attention}plgatt_layer.Wlst", axes=3)
        unit = re.escape(attention + "reslayerAs.")
        sizes |= {
            "num_reslayerA": count(unit + r"(\d+)\."),
            "num_denseA": count(unit + r"0\.denseAs\.(\d+)\."),
            "A_dff": shape(f"{attention}reslayerAs.0.denseAs.0.gluw1.weight")[0],
        }
    else:
        heads, head_dim = _sizes_of_predefined(source, weights, curvature)
        sizes["custom_G_type"] = "external"
    sizes |= {
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "attention_bias": f"{attention}wq.bias" in weights,
        "glu_bias": "decoder.dec_layers.0.ffn.gluw1.bias" in weights,
        "final_bias": "final_layer.bias" in weights,
    }
    unsaid = _unsaid(source, sizes, options)
    try:
        return PldrllmConfig(**sizes, **unsaid)
    except ValueError as error:
        raise CheckpointError(f"{source}: its tensors and the G given do not fit together: {error}") from error


def _unsaid(source: Path, sizes: Mapping[str, Any], options: ImportOptions) -> dict[str, Any]:
    """Return what is not in the weights, from the options; a configuration that contradicts the weights is an error."""
    stated = {} if options.config_file is None else _read_config(options.config_file)
    wrong = [
        f"{key}={stated[key]!r} (the weights say {value!r})"
        for key, value in sizes.items()
        if stated.get(key) is not None and key != "custom_G_type" and stated[key] != value
    ]
    if wrong:
        raise DataError(f"--config {options.config_file} is not of {source}: {', '.join(wrong)}; give its own")
    values = {key: stated[key] for key in _UNSAID if key in stated}
    if options.context_length is not None:
        values["max_position_embeddings"] = options.context_length
    if options.reference_rope is not None:
        values["reference_rope"] = options.reference_rope
    context = values.get("max_position_embeddings", 1)
    if type(context) is not int or context < 1:
        raise DataError(f"--context-length {context}: must be at least 1")
    return values


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise DataError(f"--config {file} cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise DataError(f"--config {file} holds no configuration; give a PLDR-LLM's config.json")
    return config


def _sizes_of_predefined(source: Path, weights: Mapping[str, Tensor], curvature: Tensor | None) -> tuple[int, int]:
    if curvature is not None:
        return int(curvature.shape[1]), int(curvature.shape[2])
    buffer = weights.get("decoder.past_G_values")
    if buffer is None:
        raise CheckpointError(
            f"{source} has no metric learner and no G: give the predefined G it was trained with, --g FILE (.pkl or "
            "safetensors)"
        )
    if buffer.dim() != 6:
        raise CheckpointError(
            f"{source}: decoder.past_G_values has shape {tuple(buffer.shape)}; it must be (layers, 3, 1, heads, d, d)"
        )
    return int(buffer.shape[3]), int(buffer.shape[4])
