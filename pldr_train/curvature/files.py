"""G of all layers, (L, H, d, d), out of the files that may hold it.

- safetensors with the tensor "G" (`write_curvature` writes it; beside it "A_LM" and "A_P" may stand);
- the original code's `.pkl`: a list over layers of G_LM alone, of [A_LM, G_LM] or of [A_LM, G_LM, A_P], each tensor
  (1, H, d, d);
- the folder of a model with a predefined G, in transformers' format;
- a run's folder, or a snapshot in it: G_LM of the run's fixed validation row, at its last validation with a snapshot.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pldr_train.curvature.restricted_pickle import load_tensors
from pldr_train.data.files import write_file_atomically
from pldr_train.errors import DataError
from pldr_train.outputs import check_output, is_safetensors
from pldr_train.runs.layout import is_run, snapshot_files
from pldr_train.runs.snapshots import parse_tensor_name, tensor_name

NAME = "G"
_PICKLED_NAMES = {1: (NAME,), 2: ("A_LM", NAME), 3: ("A_LM", NAME, "A_P")}
"""What the tensors of a pickled layer are, by how many there are."""
_PUBLISHED_BUFFER = "decoder.past_G_values"
_CURVATURE_SLOT = 2
_SNAPSHOT_NAME = "G_LM"


def read_curvature(path: Path) -> dict[str, Tensor]:
    """Return the deductive tensors of a file or folder by name; "G" (L, H, d, d) is always there, in fp32 or as stored.

    Raises:
        DataError: it is missing, is none of the kinds above, is damaged, or G is not finite or not of four axes.
    """
    if path.is_dir() and is_run(path):
        tensors = _from_safetensors(_last_snapshot(path))
    elif path.is_dir():
        tensors = _from_model_folder(path)
    elif not path.is_file():
        raise DataError(f"{path}: no such file; give a safetensors file with the tensor {NAME!r}, a .pkl or a folder")
    elif _is_pickle(path):
        tensors = _from_pickle(path)
    else:
        tensors = _from_safetensors(path)
    curvature = tensors[NAME]
    if curvature.dim() != 4 or curvature.shape[-1] != curvature.shape[-2]:
        raise DataError(f"{path}: {NAME} has shape {tuple(curvature.shape)}; it must be (layers, heads, d, d)")
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"{path}: {name} holds values that are not finite; extract or export it again")
    return tensors


def check_curvature_target(path: Path, overwrite: bool = False) -> None:
    """Check that a file of G may be written to `path`, before the work is done.

    Raises:
        DataError: it is a folder, exists already, or has another suffix.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder; name the safetensors file to write, such as {path / 'G.safetensors'}")
    if path.suffix != ".safetensors":
        raise DataError(f"{path}: G is written as safetensors; name a file that ends in .safetensors")
    if path.exists() and not overwrite:
        raise DataError(f"{path} exists; name another file, or pass --overwrite to replace it")
    check_output(path, "the file to write,", is_safetensors, "a safetensors file")


def write_curvature(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], overwrite: bool = False
) -> None:
    """Write deductive tensors as safetensors, whole or not at all.

    Raises:
        DataError: the file cannot be written, or `check_curvature_target` refuses it.
    """
    check_curvature_target(path, overwrite)
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_file_atomically(path, save(plain, metadata=dict(metadata)), fix="name another file")


def _is_pickle(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(2)
    # Protocol 2 and later begin with the opcode PROTO and the protocol's number.
    return path.suffix == ".pkl" or (start[:1] == b"\x80" and 2 <= start[-1] <= 5)


def _from_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} is no whole safetensors file: {error}; copy it anew") from error
    parsed = sorted(each for each in map(parse_tensor_name, tensors) if each is not None and each[1] == _SNAPSHOT_NAME)
    if parsed:
        return {NAME: torch.stack([tensors[tensor_name(*each)] for each in parsed])}
    if NAME not in tensors:
        raise DataError(f"{path} holds {sorted(tensors)[:6]}; it must hold a tensor named {NAME!r}")
    return tensors


def _from_pickle(path: Path) -> dict[str, Tensor]:
    loaded = load_tensors(path)
    # A bare tensor stands for G alone: that is how the original code writes the G that it trains with.
    layers = [[layer] if isinstance(layer, Tensor) else layer for layer in loaded]
    counts = {len(layer) for layer in layers}
    fits = all(isinstance(each, Tensor) for layer in layers for each in layer)
    if not fits or len(counts) != 1 or not counts <= _PICKLED_NAMES.keys():
        raise DataError(
            f"{path}: not a list over layers of G_LM, of [A_LM, G_LM] or of [A_LM, G_LM, A_P], the same for every layer"
        )
    tensors = {}
    for name, parts in zip(_PICKLED_NAMES[counts.pop()], zip(*layers, strict=True), strict=True):
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) > 1 or len(parts[0].shape) != 4 or parts[0].shape[0] != 1:
            raise DataError(f"{path}: {name} has the shapes {sorted(shapes)}; each layer's must be (1, heads, d, d)")
        tensors[name] = torch.cat(parts)
    return tensors


def _last_snapshot(run: Path) -> Path:
    found = snapshot_files(run)
    if not found:
        raise DataError(
            f"{run}: this run has no snapshot of its G (monitor.snapshots and monitor.deductive keep them at "
            f"validations); take it from a text: pldr-train extract-g {run} G.safetensors --text TEXT"
        )
    return found[-1][1]


def _from_model_folder(path: Path) -> dict[str, Tensor]:
    if not (path / "config.json").is_file():
        raise DataError(
            f"{path}: a folder without config.json; give a file with G, or a model's folder (pldr-train export makes "
            "one of a run)"
        )
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                if _PUBLISHED_BUFFER not in weights.keys():  # noqa: SIM118 - not a mapping
                    continue
                buffer = weights.get_tensor(_PUBLISHED_BUFFER)
        except SafetensorError as error:
            raise DataError(f"{file} is no whole safetensors file: {error}; copy it anew") from error
        if buffer.dim() != 6:
            raise DataError(
                f"{file}: {_PUBLISHED_BUFFER} has shape {tuple(buffer.shape)}; it must be (layers, 3, 1, heads, d, d)"
            )
        return {NAME: buffer[:, _CURVATURE_SLOT, 0]}
    raise DataError(
        f"{path}: this model learns its G, which depends on the text; take it from a text first: "
        f"pldr-train extract-g {path} G.safetensors --text TEXT"
    )
