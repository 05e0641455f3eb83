"""A folder in transformers' format that loads with and without this package installed, with its model card.

It holds config.json, model.safetensors with the published names, the tokenizer, generation_config.json, a model card,
and the model's code, which `trust_remote_code=True` runs where pldr_train is not installed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

import pldr_train.model as model_package
from pldr_train.data.files import build_folder_atomically
from pldr_train.data.tokenizer.training import check_vocabulary, load_tokenizer
from pldr_train.errors import CheckpointError, DataError
from pldr_train.model import AUTO_MODELS, PldrllmConfig, PldrllmForCausalLM, PldrllmTokenizer, PldrllmTokenizerFast
from pldr_train.models.card import Publication, model_card
from pldr_train.models.hub import RECORD_FILE
from pldr_train.models.loading import RunCheckpoint, find_checkpoint, suppress_ids_without_piece
from pldr_train.outputs import keep_off_runs
from pldr_train.untrusted import read_json, read_text

_WRITTEN_NAMES = {
    "README.md", "config.json", "generation_config.json", "model.safetensors.index.json", "special_tokens_map.json",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "__pycache__", RECORD_FILE,
}  # fmt: skip
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_CARD_MARK = "pldr_train"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(
    source: Path,
    target: Path,
    tokenizer_file: Path | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
    publication: Publication | None = None,
) -> RunCheckpoint:
    """Write the model of a run or of one of its checkpoints as a folder.

    Args:
        source: the run's folder (its newest whole checkpoint) or a checkpoint's.
        target: the folder to write; made whole or not at all.
        tokenizer_file: SentencePiece model; `None`: the run's.
        dtype: fp32 as trained, or the weights rounded to bf16 or fp16.
        overwrite: replace the model at `target`; never a folder that holds other things.
        publication: where on the Hub the folder goes; its card then names no paths.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: no run there, a damaged checkpoint, or no tokenizer to be found.
        DataError: the target exists or cannot be written, the tokenizer does not fit the model, or the weights do not
            fit the type.
    """
    check_target(target, overwrite)
    checkpoint = find_checkpoint(source)
    if checkpoint is None:
        raise CheckpointError(
            f"{source} holds no run and no checkpoint; name a folder like runs/NAME or runs/NAME/checkpoints/last"
        )
    tokenizer_file = tokenizer_of(checkpoint, tokenizer_file)
    model = checkpoint.load_model().to(DTYPES[dtype])
    _check_finite(model, dtype)
    write_model_folder(model, target, tokenizer_file, checkpoint, overwrite, publication=publication)
    return checkpoint


def tokenizer_of(checkpoint: RunCheckpoint, given: Path | None) -> Path:
    """Return the SentencePiece model to export: the given one, else the run's. Raises CheckpointError."""
    found = given or checkpoint.tokenizer_file
    if found is None:
        raise CheckpointError(
            f"{checkpoint.run} has no tokenizer.model; name the run's SentencePiece model with --tokenizer FILE"
        )
    return found


def write_model_folder(
    model: PldrllmForCausalLM,
    target: Path,
    tokenizer_file: Path | None,
    checkpoint: RunCheckpoint | None,
    overwrite: bool = False,
    averaged_steps: Sequence[int] = (),
    beside: Mapping[str, str] = MappingProxyType({}),
    publication: Publication | None = None,
) -> None:
    """Write a model, its tokenizer if there is one, its code and its card.

    Args:
        model: in the type that is written.
        target: the folder.
        tokenizer_file: SentencePiece model.
        checkpoint: of the run that the model is from.
        overwrite: as `export_run`.
        averaged_steps: of the checkpoints whose mean the model is.
        beside: further text files, by name, of those that `check_target` knows.
        publication: where on the Hub the folder goes.

    Raises:
        DataError: as `export_run`.
    """
    check_target(target, overwrite)
    if tokenizer_file is not None:
        pieces = load_tokenizer(tokenizer_file)
        check_vocabulary(pieces, model.config.vocab_size)
        suppress_ids_without_piece(model, pieces.get_piece_size())
    _set_generation_defaults(model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        _update_json(folder / "config.json", {"auto_map": _auto_map()})
        if tokenizer_file is not None:
            _write_tokenizer(folder, tokenizer_file, model.config)
        for file in _model_code():
            shutil.copyfile(file, folder / file.name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        name = target.resolve().name if publication is None else publication.repository.rpartition("/")[2]
        card = model_card(name, model.config, parameters, checkpoint, averaged_steps, publication)
        for name, text in {"README.md": card, **beside}.items():
            (folder / name).write_text(text, encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)

    _build_and_swap(target.resolve(), fill)


def _build_and_swap(target: Path, fill: Callable[[Path], None]) -> None:
    """Build beside the target, and put it in place only when it is whole: until then the earlier one stays."""
    fix = "name another folder, or free some space"
    if not target.exists():
        build_folder_atomically(target, fill, fix)
        return
    new, old = (target.with_name(f".{state}-{target.name}-{os.getpid()}") for state in ("new", "replaced"))
    try:
        build_folder_atomically(new, fill, fix)
        target.rename(old)
        new.rename(target)
    except OSError as error:
        raise DataError(f"cannot replace {target}: {error.strerror or error}; {fix}") from error
    finally:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def check_target(target: Path, overwrite: bool) -> None:
    """Check that a model may be written to `target`, before the work is done.

    Raises:
        DataError: it is a file, or a folder that is not empty (with `overwrite`: that holds other things than a model).
    """
    keep_off_runs(target, "the folder to write,")
    if target.is_file():
        raise DataError(f"{target} is a file; name a folder")
    entries = sorted(target.iterdir()) if target.is_dir() else []
    if not entries:
        return
    if not overwrite:
        raise DataError(f"{target} exists and is not empty; name another folder, or pass --overwrite to replace it")
    if not (target / "config.json").is_file():
        raise DataError(f"{target} holds no model (no config.json), so it is not replaced; name another folder")
    known = _WRITTEN_NAMES | {file.name for file in _model_code()}
    others = [each.name for each in entries if each.name not in known and not _WEIGHTS.fullmatch(each.name)]
    if others:
        raise DataError(
            f"{target} holds {others[0]} beside the model, so it is not replaced; name another folder, or remove that"
        )
    if not _is_export(target):
        raise DataError(
            f"{target} holds a model that was not exported from here (by its config.json and README.md), so it is not "
            "replaced; name another folder, or remove it"
        )


def _is_export(folder: Path) -> bool:
    """Return whether `write_model_folder` has written a folder: by its configuration and its card."""
    try:
        config = read_json(folder / "config.json")
        card = read_text(folder / "README.md")
    except (OSError, ValueError):
        return False
    is_ours = isinstance(config, dict) and config.get("model_type") == PldrllmConfig.model_type
    return is_ours and isinstance(config.get("auto_map"), dict) and _CARD_MARK in card


def _check_finite(model: PldrllmForCausalLM, dtype: str) -> None:
    """Refuse weights that rounding made infinite: fp16 ends at 65,504."""
    for name, tensor in model.state_dict().items():
        if not bool(torch.isfinite(tensor).all()):
            raise DataError(f"--dtype {dtype}: {name} holds values that are not finite in it; use fp32")


def _model_code() -> list[Path]:
    """Without the Triton kernels: transformers refuses code that imports what is not installed."""
    folder = Path(str(model_package.__file__)).parent
    return sorted(file for file in folder.glob("*.py") if file.name not in ("__init__.py", "refining_kernel.py"))


def _auto_map() -> dict[str, str]:
    return {"AutoConfig": _reference(PldrllmConfig)} | {
        auto_class.__name__: _reference(cls) for auto_class, cls in AUTO_MODELS.items()
    }


def _reference(cls: type) -> str:
    """Return a class as custom code names it: file and class."""
    return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"


def _write_tokenizer(folder: Path, tokenizer_file: Path, config: PldrllmConfig) -> None:
    """Write the tokenizer for both classes, or for the slow one alone where the fast one cannot be made (BPE)."""
    given: dict[str, Any] = {"vocab_file": str(tokenizer_file), "model_max_length": config.max_position_embeddings}
    classes: list[str | None] = [_reference(PldrllmTokenizer), _reference(PldrllmTokenizerFast)]
    try:
        tokenizer = PldrllmTokenizerFast(**given, add_bos_token=False)
    except ValueError:
        tokenizer, classes[1] = PldrllmTokenizer(**given), None
    tokenizer.save_pretrained(folder)
    _update_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": classes}})


def _set_generation_defaults(model: PldrllmForCausalLM) -> None:
    generation, config = model.generation_config, model.config
    # What generation without a prompt begins with: a document begins after the END of the one before, and the model
    # never saw a START. config.json keeps the published bos_token_id.
    generation.bos_token_id = generation.eos_token_id = config.eos_token_id
    generation.pad_token_id, generation.use_cache = config.pad_token_id, True
    generation._from_model_config = False


def _update_json(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
