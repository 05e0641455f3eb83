"""Imports point one way, lazy and relative ones included; heavy packages are imported only where they belong."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "pldr_train"

LOW_ROOMS = {
    "errors", "recipe", "model", "dag", "data", "optim", "metrics", "curvature", "runs", "file_locks", "untrusted",
    "outputs", "optimizers", "building", "parameter_sets",
}  # fmt: skip
HIGH_ROOMS = {
    "distributed", "checkpoint", "training", "wandb_runs", "tasks", "models", "run", "fit", "sweeps", "commands", "cli",
}  # fmt: skip
SIDE_ROOMS = {"doctor", "launching"}
"""Work before and beside a run; only commands and the command line bring them and the run together."""
MAY_NOT_KNOW = dict.fromkeys(LOW_ROOMS, HIGH_ROOMS | SIDE_ROOMS) | {
    "doctor": HIGH_ROOMS | {"launching"},
    "launching": HIGH_ROOMS | {"doctor", "model", "dag", "data", "optim", "metrics", "curvature", "building"},
    "distributed": HIGH_ROOMS - {"distributed"} | SIDE_ROOMS,
    "checkpoint": HIGH_ROOMS - {"checkpoint", "distributed"} | SIDE_ROOMS,
    "wandb_runs": HIGH_ROOMS - {"wandb_runs"} | {"model", "dag", "data", "optim", "curvature", "building"} | SIDE_ROOMS,
    "tasks": HIGH_ROOMS - {"tasks"} | SIDE_ROOMS,
    "training": {"models", "run", "fit", "sweeps", "commands", "cli"} | SIDE_ROOMS,
    "models": {"run", "fit", "sweeps", "commands", "cli"} | SIDE_ROOMS,
    "run": {"fit", "sweeps", "commands", "cli"} | SIDE_ROOMS,
    "fit": {"models", "run", "sweeps", "commands", "cli"} | SIDE_ROOMS,
    "sweeps": HIGH_ROOMS - {"run", "sweeps"} | {"model", "dag", "optim", "curvature", "building", "doctor"},
    "commands": {"cli"},
}

SELF_CONTAINED = {
    "model": {"torch", "transformers", "huggingface_hub", "safetensors", "tokenizers", "sentencepiece", "triton"},
    "dag": {"torch", "triton"},
}
"""Rooms that import these packages, the standard library and their own files alone."""

BANNED = {
    "recipe": {"torch", "lightning", "pytorch_lightning"},
    "parameter_sets": {"torch", "lightning", "pytorch_lightning", "transformers"},
    "runs": {"torch", "lightning", "pytorch_lightning"},
    "launching": {"torch", "lightning", "pytorch_lightning", "deepspeed", "transformers"},
    "wandb_runs": {"torch", "lightning", "pytorch_lightning"},
    "sweeps": {"torch", "lightning", "pytorch_lightning", "transformers"},
}

WANDB = {"wandb", "wandb_workspaces", "PIL"}
WANDB_HOME = "wandb_runs/"
"""The room that shows runs there, and the pictures for it."""

OPTUNA_HOME = "sweeps/study.py"
"""A sweep is read without Optuna, which takes a while to import."""

LIGHTNING = {"lightning", "pytorch_lightning"}
LIGHTNING_HOMES = ("data/datamodule.py", "training/", "fit.py")


def room_of(path: str) -> str:
    """The room of a file of the package or of a dotted module below it."""
    return path.replace(".", "/").split("/")[0]


def imported(source: str, path: str) -> Iterator[tuple[str, bool]]:
    """Yield (dotted module, whether relative) for every import of a file; of `from a import b`, both a and a.b."""
    here = [PACKAGE, *path.removesuffix(".py").split("/")]
    package = here[:-1]  # also for a package's __init__.py
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, False) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module, node.level > 0
            yield from ((f"{module}.{alias.name}", node.level > 0) for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).rpartition(".")[2]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.args[0].value, False


def problems_of_file(path: str, source: str) -> Iterator[str]:
    """Yield what the imports of the file `path` (below the package) break."""
    room = room_of(path)
    for module, relative in imported(source, path):
        top, _, below = module.partition(".")
        inside = room_of(below) if top == PACKAGE and below else None
        if inside in MAY_NOT_KNOW.get(room, ()):
            yield f"{path}: {room} may not know {inside} (imports {module})"
        if room in SELF_CONTAINED:
            if top == PACKAGE and not (relative and (inside == room or module == PACKAGE)):
                yield f"{path}: {room} may import only its own files, relatively (imports {module})"
            if top != PACKAGE and top not in SELF_CONTAINED[room] | sys.stdlib_module_names:
                yield f"{path}: {room} may not import {top}"
        if top in BANNED.get(room, ()):
            yield f"{path}: {room} may not import {top}"
        if top == "deepspeed" and path != "training/strategies.py":
            yield f"{path}: only training/strategies.py may import deepspeed"
        if top in LIGHTNING and not path.startswith(LIGHTNING_HOMES):
            yield f"{path}: only {', '.join(LIGHTNING_HOMES)} may import {top}"
        if top == "optuna" and path != OPTUNA_HOME:
            yield f"{path}: only {OPTUNA_HOME} may import optuna"
        if top in WANDB and not path.startswith(WANDB_HOME):
            yield f"{path}: only {WANDB_HOME} may import {top}"


def problems_of_package(files: Mapping[str, str]) -> list[str]:
    """List what the imports of all files (path below the package -> source) break."""
    problems = [problem for path, source in files.items() for problem in problems_of_file(path, source)]
    return sorted(set(problems))


def test_the_packages_imports_point_one_way() -> None:
    folder = ROOT / PACKAGE
    files = {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}
    assert {"errors.py", "recipe/schema.py", "metrics/throughput.py", "model/modeling_pldrllm.py"} <= files.keys()
    assert problems_of_package(files) == []


def test_the_folders_of_data_import_one_way() -> None:
    order = ["rows", "sources", "tokenizer", "tokens"]
    folder = ROOT / PACKAGE / "data"
    for path in folder.glob("*/*.py"):
        own = order.index(path.parent.name)
        for module, _ in imported(path.read_text(), path.relative_to(ROOT / PACKAGE).as_posix()):
            below = module.split(".")[2:]
            if module.startswith(f"{PACKAGE}.data.") and below[0] in order and below[:2] != ["tokenizer", "pieces"]:
                assert order.index(below[0]) <= own, f"{path.relative_to(folder)} imports {module}"


def test_no_module_imports_itself_through_others() -> None:
    folder = ROOT / PACKAGE
    names = {path: ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in folder.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for path, name in names.items()}
    graph = {}
    for name, path in modules.items():
        top_level = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        source = "\n".join(map(ast.unparse, top_level))
        # Of `from a import b` both a and a.b are listed; where b is a module, a is its package, not what is imported.
        found = {module for module, _ in imported(source, path.relative_to(folder).as_posix())} & modules.keys()
        packages = {module for module in found if any(other.startswith(f"{module}.") for other in found)}
        graph[name] = found - packages - {name}
    order = list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules
    assert order.index("pldr_train.errors") < order.index("pldr_train.fit")


@pytest.mark.parametrize(
    ("path", "source", "problem"),
    [
        ("data/documents.py", "import pldr_train.training.module", "data may not know training"),
        ("data/documents.py", "from pldr_train import fit", "data may not know fit"),
        ("data/documents.py", "from .. import cli", "data may not know cli"),
        ("data/documents.py", "from ..training.saving import x", "data may not know training"),
        ("data/__init__.py", "from ..fit import x", "data may not know fit"),
        ("data/documents.py", "def f():\n    from pldr_train.fit import fit", "data may not know fit"),
        ("data/documents.py", "import importlib\nimportlib.import_module('pldr_train.cli')", "data may not know cli"),
        ("optim.py", "from . import fit", "optim may not know fit"),
        ("errors.py", "from pldr_train.training import x", "errors may not know training"),
        ("recipe/reading.py", "from pldr_train.fit import x", "recipe may not know fit"),
        ("metrics/a.py", "import pldr_train.cli as c", "metrics may not know cli"),
        ("training/module.py", "from ..fit import fit", "training may not know fit"),
        ("training/module.py", "def f():\n    import pldr_train.cli", "training may not know cli"),
        ("fit.py", "from pldr_train.cli import main", "fit may not know cli"),
        ("model/rotary.py", "import numpy", "model may not import numpy"),
        ("model/rotary.py", "from pldr_train.model.cache import C", "model may import only its own files, relatively"),
        ("model/rotary.py", "from ..errors import UserError", "model may import only its own files"),
        ("dag/loss.py", "from transformers import x", "dag may not import transformers"),
        ("dag/loss.py", "from ..model import x", "dag may import only its own files"),
        ("recipe/schema.py", "if True:\n    import torch.nn", "recipe may not import torch"),
        ("recipe/schema.py", "def f():\n    import lightning", "recipe may not import lightning"),
        ("data/documents.py", "import lightning as L", "may import lightning"),
        ("optim.py", "from pytorch_lightning import x", "may import pytorch_lightning"),
        ("training/module.py", "import deepspeed", "only training/strategies.py may import deepspeed"),
        ("distributed/world.py", "from pldr_train.launching import is_launched", "distributed may not know launching"),
        ("distributed/world.py", "from ..checkpoint import x", "distributed may not know checkpoint"),
        ("checkpoint/state.py", "from ..training.saving import x", "checkpoint may not know training"),
        ("data/documents.py", "from ..doctor import x", "data may not know doctor"),
        ("doctor/disk.py", "from pldr_train.distributed.world import World", "doctor may not know distributed"),
        ("doctor/disk.py", "from ..models import x", "doctor may not know models"),
        ("doctor/recipes.py", "from pldr_train import fit", "doctor may not know fit"),
        ("doctor/recipes.py", "from pldr_train.commands import doctor", "doctor may not know commands"),
        ("doctor/__init__.py", "from ..cli import main", "doctor may not know cli"),
        ("launching.py", "from pldr_train.fit import fit", "launching may not know fit"),
        ("launching.py", "from .training import saving", "launching may not know training"),
        ("launching.py", "def f():\n    from pldr_train.data.files import x", "launching may not know data"),
        ("launching.py", "def f():\n    import torch.distributed", "launching may not import torch"),
        ("training/wandb_mirror.py", "import wandb", "only wandb_runs/ may import wandb"),
        ("fit.py", "def f():\n    from wandb.sdk import x", "only wandb_runs/ may import wandb"),
        ("commands/wandb.py", "import wandb_workspaces.workspaces", "only wandb_runs/ may import wandb_workspaces"),
        ("report/page.py", "from PIL import Image", "only wandb_runs/ may import PIL"),
        ("wandb_runs/media.py", "import torch", "wandb_runs may not import torch"),
        ("wandb_runs/media.py", "from pldr_train.training.module import x", "wandb_runs may not know training"),
        ("runs/folder.py", "from pldr_train.training.module import x", "runs may not know training"),
        ("runs/snapshots.py", "import torch", "runs may not import torch"),
        ("tasks/running.py", "from pldr_train.models.loading import x", "tasks may not know models"),
        ("tasks/scoring.py", "from ..training import module", "tasks may not know training"),
        ("training/saving.py", "from pldr_train.run import Run", "training may not know run"),
        ("sweeps/sweep.py", "def f():\n    import torch", "sweeps may not import torch"),
        ("sweeps/runner.py", "from pldr_train.fit import fit", "sweeps may not know fit"),
        ("sweeps/sweep.py", "import optuna", "only sweeps/study.py may import optuna"),
        ("fit.py", "from pldr_train.sweeps import Sweep", "fit may not know sweeps"),
        ("metrics/table.py", "from ..wandb_runs import media", "metrics may not know wandb_runs"),
    ],
)
def test_a_violation_is_found(path: str, source: str, problem: str) -> None:
    found = problems_of_package({path: source})
    assert len([each for each in found if problem in each]) >= 1
    assert all(each.startswith(f"{path}: ") for each in found)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("cli.py", "from pldr_train.fit import fit\nfrom .training import x"),
        (
            "fit.py",
            "import lightning\nfrom pldr_train.training.module import x\nfrom pldr_train.recipe import load_recipe",
        ),
        ("training/strategies.py", "def f():\n    import deepspeed, lightning"),
        ("training/module.py", "from ..model import PldrllmConfig\nimport pldr_train.dag"),
        ("data/datamodule.py", "import lightning\nfrom pldr_train.recipe import Recipe\nfrom . import packing"),
        ("model/modeling_pldrllm.py", "import math, torch\nfrom transformers import x\nfrom .rotary import rotate"),
        ("model/modeling_pldrllm.py", "from . import rotary"),
        ("dag/loss.py", "from .log_trace_exp import log_trace_exp\nimport torch"),
        ("recipe/yaml_text.py", "from pldr_train.errors import RecipeError\nimport ruamel.yaml"),
        ("doctor/recipes.py", "import torch\nfrom pldr_train.recipe import Recipe\nfrom ..data import local_files"),
        ("launching.py", "import subprocess\nfrom pldr_train.errors import UserError"),
        ("cli.py", "from pldr_train.launching import launch"),
        ("wandb_runs/media.py", "import numpy, wandb\nfrom PIL import Image\nfrom ..metrics import catalog"),
        ("training/wandb_mirror.py", "import lightning\nfrom pldr_train.wandb_runs.opening import open_run"),
        ("cli.py", "from pldr_train.commands import wandb"),
        ("commands/doctor.py", "def f():\n    from pldr_train.doctor import disk"),
    ],
)
def test_what_is_allowed_passes(path: str, source: str) -> None:
    assert problems_of_package({path: source}) == []
