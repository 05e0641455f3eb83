"""What a recipe asks of this machine: devices, files, and room for its checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from pldr_train.data.sources.local_files import SUFFIXES, local_manifest
from pldr_train.doctor.disk import existing_part, free_bytes
from pldr_train.doctor.finding import Finding
from pldr_train.doctor.machine import size_text
from pldr_train.errors import DataError
from pldr_train.recipe import Recipe
from pldr_train.recipe.attention import missing_for_attention
from pldr_train.runs.layout import CHECKPOINTS_FOLDER

_BYTES_PER_PARAMETER = 3 * 4
"""Of a checkpoint: the weight and AdamW's two moments, in fp32."""


def takes_gpus(recipe: Recipe, gpus: int) -> bool:
    """Return whether the recipe's run would compute on GPUs, `gpus` of which are here."""
    return recipe.trainer.accelerator == "cuda" or (recipe.trainer.accelerator == "auto" and gpus > 0)


def check_devices(recipe: Recipe, gpus: int) -> Iterator[Finding]:
    """Yield the recipe's devices against those that are here."""
    trainer = recipe.trainer
    wanted, key = trainer.devices, f"trainer.devices={trainer.devices}"
    figures = {"wanted": wanted, "gpus": gpus, "accelerator": trainer.accelerator}
    if not takes_gpus(recipe, gpus):
        text = f"{key}: {'one process' if wanted == 1 else f'{wanted} processes'} on the CPU"
        yield Finding("ok", "devices", text, figures=figures)
    elif not gpus:
        text = "trainer.accelerator=cuda, but torch sees no GPU"
        yield Finding(
            "fail", "devices", text, "repair the driver (see gpus), or set trainer.accelerator=auto or cpu", figures
        )
    elif wanted > gpus:
        text = f"{key}, but torch sees {gpus} GPU{'s' if gpus > 1 else ''}"
        yield Finding("fail", "devices", text, f"set trainer.devices={gpus}, or look at CUDA_VISIBLE_DEVICES", figures)
    elif wanted < gpus:
        text = f"{key} of {gpus} GPUs: the others stay idle"
        yield Finding("note", "devices", text, f"trainer.devices={gpus}, if they are yours to use", figures)
    else:
        yield Finding("ok", "devices", f"{key}, as many as there are GPUs", figures=figures)
    if trainer.num_nodes > 1:
        text = f"trainer.num_nodes={trainer.num_nodes}: this looked at one machine, and at no network between them"
        yield Finding("note", "machines", text, "run the same on every machine")


def check_attention(recipe: Recipe, gpus: int) -> Iterator[Finding]:
    """Yield what the recipe's backend of attention needs and is not here; nothing where it runs everywhere."""
    missing = missing_for_attention(recipe, gpus if takes_gpus(recipe, gpus) else 0)
    if missing is not None:
        text, _, fix = missing.partition("; ")
        yield Finding("fail", "attention", text, fix)


def check_kernels(
    recipe: Recipe, gpus: int, environment: Mapping[str, str], find: Callable[[], tuple[Mapping[str, bool], str]]
) -> Iterator[Finding]:
    """Yield whether the package's own Triton kernels run on the first GPU; nothing without a GPU or a learned G.

    Args:
        recipe: of the run.
        gpus: that are here.
        environment: of the run.
        find: gives, by what a kernel is for, whether it was built here and computes what torch's operations do; and the
            name of the environment variable that rules kernels out.
    """
    if not gpus or not takes_gpus(recipe, gpus) or not recipe.model.learned_g:
        return
    taken, switch = find()
    left, figures = [name for name, there in taken.items() if not there], {"taken": dict(taken)}
    if not left:
        text = f"{' and '.join(taken)}: built, and in agreement with torch's operations"
        yield Finding("ok", "Triton kernels", text, figures=figures)
    elif environment.get(switch) == "0":
        yield Finding("note", "Triton kernels", f"{switch}=0 rules them out", "unset it", figures)
    else:
        text = f"none for {' and '.join(left)}, which takes many more launches"
        advice = (
            "they need Triton, compute capability 8 or 9, trainer.precision=bf16 and model.head_dim of 16 to 128 "
            "(DAG loss: 64)"
        )
        yield Finding("note", "Triton kernels", text, advice, figures)


# ---------------------------------------------------------------------------------------------------------------- files


def check_files(recipe: Recipe) -> Iterator[Finding]:
    """Yield the files and folders that the recipe names: they are there, and this user can read them."""
    missing = False
    for key, path in _named(recipe).items():
        text = _problem(Path(path))
        if text is not None:
            missing = True
            advice = f"set {key} to what is there, or put it there; paths are relative to {Path.cwd()}"
            yield Finding("fail", "files", f"{key}={path}: {text}", advice, {"key": key, "path": path})
    offload = recipe.parallel.offload_path
    if offload is not None and not os.access(there := existing_part(Path(offload)), os.W_OK | os.X_OK):
        missing = True
        text = f"parallel.offload_path={offload}: this user may not write in {there}"
        yield Finding("fail", "files", text, "set parallel.offload_path to a folder of your own on a fast disk")
    for finding in _data(recipe):
        missing = missing or finding.level == "fail"
        yield finding
    if not missing and _named(recipe):
        yield Finding("ok", "files", f"{', '.join(_named(recipe))}: there")


def _named(recipe: Recipe) -> Mapping[str, str]:
    """Return key -> path of every file or folder, but for the documents."""
    paths = {
        "data.tokenizer": recipe.data.tokenizer,
        "model.init_from": recipe.model.init_from,
        "model.custom_G_path": recipe.model.custom_G_path,
        "parallel.deepspeed_config": recipe.parallel.deepspeed_config,
    }
    return {key: path for key, path in paths.items() if path is not None}


def _problem(path: Path) -> str | None:
    if not path.exists():
        return "no such file or folder"
    if not os.access(path, os.R_OK):
        return "this user may not read it"
    return None


def _data(recipe: Recipe) -> Iterator[Finding]:
    data = recipe.data
    if data.source in ("quickstart", "hidden_class"):
        yield Finding("ok", "data", f"data.source={data.source}: built at first use in {data.cache_dir}")
    elif data.source == "hub":
        yield Finding("ok", "data", f"data.source=hub: {data.repository} (the Hub was not asked)")
    elif data.source == "tokens":
        assert data.path is not None
        if text := _problem(Path(data.path)):
            advice = "make the tokens with `pldr-train data tokenize`, or set data.path to their folder"
            yield Finding("fail", "data", f"data.path={data.path}: {text}", advice)
        else:
            yield Finding("ok", "data", f"data.path={data.path}: there; `pldr-train data verify` looks into it")
    else:
        yield _documents(data.path or "", data.text_column, data.source)


def _documents(path: str, text_column: str, source: str) -> Finding:
    try:
        manifest, root = local_manifest(path, text_column, SUFFIXES[source], source)
    except DataError as error:
        problem, _, fix = str(error).partition("; ")
        return Finding("fail", "data", problem, fix or None)
    locked = [file.name for file in manifest.files if not os.access(root / file.name, os.R_OK)]
    if locked:
        return Finding(
            "fail", "data", f"data.path={path}: this user may not read {locked[0]}", f"chmod +r {root / locked[0]}"
        )
    size = sum(file.size_bytes for file in manifest.files)
    figures = {"files": len(manifest.files), "size_bytes": size}
    return Finding("ok", "data", f"data.path={path}: {len(manifest.files):,} files, {size_text(size)}", figures=figures)


# ----------------------------------------------------------------------------------------------------------------- room


def kept_checkpoints(recipe: Recipe) -> int:
    """Return the most checkpoints that are there at once: the kept ones, and the one being written."""
    settings, last = recipe.resolved().checkpoint, recipe.trainer.max_steps
    kept = {step for step in settings.also_keep_steps if step <= last}
    best = 0 if settings.keep_best is None else settings.keep_best.n
    return settings.keep_last + len(kept) + best + 1


def check_room(recipe: Recipe, count_parameters: Callable[[], int], runs: Path) -> Iterator[Finding]:
    """Yield what the checkpoints of the whole run need, against what is free or held by this run's own already.

    Args:
        recipe: of the run.
        count_parameters: of its model; called here, for it may take a while.
        runs: the folder of runs.
    """
    parameters = count_parameters()
    each = _BYTES_PER_PARAMETER * parameters
    kept = kept_checkpoints(recipe)
    there = _size(runs / recipe.run.name / CHECKPOINTS_FOLDER)
    need, free = kept * each, free_bytes(existing_part(runs))
    text = f"{kept} checkpoints of {parameters:,} parameters ({size_text(each)} each) need {size_text(need)}"
    text += f", {size_text(there)} of them there" if there else ""
    text += f"; {size_text(free)} free for {runs}"
    figures = {
        "need_bytes": need,
        "there_bytes": there,
        "free_bytes": free,
        "parameters": parameters,
        "checkpoints": kept,
    }
    if need - there > free:
        advice = "free some space, set run.dir to another disk, or keep fewer: checkpoint.keep_last, also_keep_steps"
        yield Finding("fail", "checkpoints", text, advice, figures)
    elif need - there > free / 2:
        advice = "little is left for logs and other runs: free some space, or keep fewer (checkpoint.also_keep_steps)"
        yield Finding("note", "checkpoints", text, advice, figures)
    else:
        yield Finding("ok", "checkpoints", text, figures=figures)


def _size(folder: Path) -> int:
    """Return the bytes of all files below a folder, links left aside; 0 where there is none."""
    paths = (Path(parent) / name for parent, _, names in os.walk(folder) for name in names)
    return sum(path.lstat().st_size for path in paths if not path.is_symlink())
