"""A folder in transformers' format that loads with and without this package installed.

It holds config.json, model.safetensors with the published names, the tokenizer, generation_config.json, a model card,
and the model's code, which `trust_remote_code=True` runs where pldr_train is not installed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

import pldr_train.model as model_package
from pldr_train.data.files import build_folder_atomically
from pldr_train.data.tokenizer_training import check_vocabulary, load_tokenizer
from pldr_train.errors import CheckpointError, DataError
from pldr_train.hub.loading import RunCheckpoint, find_checkpoint
from pldr_train.hub.model_card import model_card
from pldr_train.model import AUTO_MODELS, PldrllmConfig, PldrllmForCausalLM, PldrllmTokenizerFast

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export_run(
    source: Path,
    target: Path,
    tokenizer_file: Path | None = None,
    dtype: str = "fp32",
    overwrite: bool = False,
    report: Callable[[str], None] = print,
) -> RunCheckpoint:
    """Write the model of a run or of one of its checkpoints as a folder.

    Args:
        source: the run's folder (its newest whole checkpoint) or a checkpoint's.
        target: the folder to write; made whole or not at all.
        tokenizer_file: SentencePiece model; `None`: the run's.
        dtype: fp32 as trained, or the weights rounded to bf16 or fp16.
        overwrite: replace what is at `target`.
        report: told of damaged checkpoints that are passed over.

    Returns:
        The checkpoint that was exported.

    Raises:
        CheckpointError: no run there, a damaged checkpoint, or no tokenizer to be found.
        DataError: the target exists, cannot be written, or the tokenizer does not fit the model.
    """
    _check_target(target, overwrite)
    checkpoint = find_checkpoint(source, report)
    if checkpoint is None:
        raise CheckpointError(
            f"{source} holds no run and no checkpoint; name a folder like runs/NAME or runs/NAME/checkpoints/last"
        )
    tokenizer_file = tokenizer_file or checkpoint.tokenizer_file
    if tokenizer_file is None:
        raise CheckpointError(
            f"{checkpoint.run} has no tokenizer.model; name the run's SentencePiece model with --tokenizer FILE"
        )
    model = checkpoint.load_model().to(DTYPES[dtype])
    write_model_folder(model, target, tokenizer_file, checkpoint, overwrite)
    return checkpoint


def write_model_folder(
    model: PldrllmForCausalLM,
    target: Path,
    tokenizer_file: Path | None,
    checkpoint: RunCheckpoint | None,
    overwrite: bool = False,
) -> None:
    """Write a model, its tokenizer if there is one, its code and its card.

    Raises:
        DataError: as `export_run`.
    """
    _check_target(target, overwrite)
    if tokenizer_file is not None:
        check_vocabulary(load_tokenizer(tokenizer_file), model.config.vocab_size)
    _set_generation_defaults(model)

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        _update_json(folder / "config.json", {"auto_map": _auto_map()})
        if tokenizer_file is not None:
            _write_tokenizer(folder, tokenizer_file, model.config)
        for file in _model_code():
            shutil.copyfile(file, folder / file.name)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        card = model_card(target.resolve().name, model.config, parameters, checkpoint)
        (folder / "README.md").write_text(card, encoding="utf-8")
        for file in folder.iterdir():
            file.chmod(0o644)

    target = target.resolve()
    replaced = target.with_name(f".replaced-{target.name}")
    if target.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        target.rename(replaced)
    try:
        build_folder_atomically(target, fill, fix="name another folder, or free some space")
    except BaseException:
        if replaced.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_file():
        raise DataError(f"{target} is a file; name a folder")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise DataError(f"{target} exists and is not empty; name another folder, or pass --overwrite to replace it")
    if target.is_dir() and overwrite and any(target.iterdir()) and not (target / "config.json").is_file():
        raise DataError(f"{target} holds no model (no config.json), so it is not replaced; name another folder")


def _model_code() -> list[Path]:
    folder = Path(str(model_package.__file__)).parent
    return sorted(file for file in folder.glob("*.py") if file.name != "__init__.py")


def _auto_map() -> dict[str, str]:
    def reference(cls: type) -> str:
        return f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"

    return {"AutoConfig": reference(PldrllmConfig)} | {
        auto_class.__name__: reference(cls) for auto_class, cls in AUTO_MODELS.items()
    }


def _write_tokenizer(folder: Path, tokenizer_file: Path, config: PldrllmConfig) -> None:
    tokenizer = PldrllmTokenizerFast(
        vocab_file=str(tokenizer_file), model_max_length=config.max_position_embeddings, add_bos_token=False
    )
    tokenizer.save_pretrained(folder)
    classes = ["tokenization_pldrllm.PldrllmTokenizer", "tokenization_pldrllm_fast.PldrllmTokenizerFast"]
    _update_json(folder / "tokenizer_config.json", {"auto_map": {"AutoTokenizer": classes}})


def _set_generation_defaults(model: PldrllmForCausalLM) -> None:
    generation, config = model.generation_config, model.config
    generation.bos_token_id, generation.eos_token_id = config.bos_token_id, config.eos_token_id
    generation.pad_token_id, generation.use_cache = config.pad_token_id, True
    generation._from_model_config = False


def _update_json(path: Path, values: dict[str, object]) -> None:
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
