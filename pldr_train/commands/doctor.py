"""`pldr-train doctor`: look at this machine before a run."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.doctor import accounts, all_reduce, disk, machine
from pldr_train.doctor.all_reduce import Reduction
from pldr_train.doctor.finding import Check, Finding, as_json, as_table, run_checks
from pldr_train.doctor.machine import check_gpus, driver_version
from pldr_train.doctor.packages import check_packages, check_python, read_declared
from pldr_train.errors import UserError
from pldr_train.metrics.throughput import count_parameters

if TYPE_CHECKING:
    from pldr_train.recipe import Recipe

_MOST_PROCESSES = 64
_REDUCED_BYTES = {"gloo": 16 * 2**20, "nccl": 256 * 2**20}


def build_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        prog="pldr-train doctor",
        description="Look at this machine before a run: versions, GPUs, cores and limits, an all-reduce among "
        "processes, the disk, accounts, build locks; with a recipe also its devices, files and room for its "
        "checkpoints. Takes about 10 s. Nothing is changed without --fix, and no key is shown; docs/doctor.md says "
        "what each line means.",
        epilog="exit codes: 0 nothing failed; 1 something would stop a run, see 'what to do'; 2 a mistake in the "
        "command or the recipe",
    )
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="YAML file, for instance recipes/soc-110m-2.yaml")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="recipe values to replace")
    parser.add_argument(
        "--run-dir", metavar="DIR", type=Path, help="folder of runs, whose disk is tried (default: run.dir, or runs)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--fix", action="store_true", help="remove stale locks of extension builds")
    parser.add_argument(
        "--processes",
        metavar="N",
        type=_count,
        help="processes of the all-reduce (default: trainer.devices, or all GPUs, or 2 on the CPU)",
    )
    return parser


def _count(text: str) -> int:
    value = int(text)
    if not 1 <= value <= _MOST_PROCESSES:
        raise argparse.ArgumentTypeError(f"{text} must be from 1 to {_MOST_PROCESSES}")
    return value


def run(options: argparse.Namespace) -> int:
    """Check, and print what was found; 1 if something failed."""
    recipe = None
    if options.recipe:
        # Imported here: the schema of recipes takes longer than all of the help.
        from pldr_train.recipe import load_recipe  # noqa: PLC0415

        recipe = load_recipe(options.recipe, options.overrides)
    runs = options.run_dir or Path(recipe.run.dir if recipe else "runs")
    if os.path.exists(runs) and not os.path.isdir(runs):
        raise UserError(f"{'--run-dir ' if options.run_dir else 'run.dir='}{runs}: is a file; name a folder")
    subject = Subject(recipe, runs, options.processes, options.fix, count_gpus(), os.environ)
    reduction = subject.reduction()
    if sys.stderr.isatty():
        print("looking, about 10 s ...", file=sys.stderr)
    findings = run_checks([*_machine_checks(subject, reduction), *_recipe_checks(subject)])
    print(as_json(findings) if options.json else as_table(findings))
    return 1 if any(finding.level == "fail" for finding in findings) else 0


def count_gpus() -> int:
    """GPUs that torch sees; 0 also where torch cannot be imported, which a check reports."""
    try:
        import torch  # noqa: PLC0415 - takes seconds, which a mistake in the recipe should not cost

        return int(torch.cuda.device_count()) if torch.cuda.is_available() else 0
    except Exception:
        return 0


@dataclass(frozen=True)
class Subject:
    """What is looked at."""

    recipe: Recipe | None
    runs: Path
    """Folder of runs."""
    processes: int | None
    """Asked for on the command line."""
    fix: bool
    gpus: int
    environment: Mapping[str, str]

    @property
    def on_gpus(self) -> bool:
        """Whether a run here computes on GPUs."""
        from pldr_train.doctor.recipes import takes_gpus  # noqa: PLC0415 - see `_recipe_checks`

        return self.gpus > 0 and (self.recipe is None or takes_gpus(self.recipe, self.gpus))

    @property
    def run_processes(self) -> int:
        """Processes of a run on this machine."""
        if self.recipe is not None:
            return self.recipe.trainer.devices
        return self.processes or (self.gpus if self.on_gpus else 1)

    @property
    def uses_deepspeed(self) -> bool:
        """Whether the run builds DeepSpeed's extensions."""
        return self.recipe is not None and self.recipe.parallel.strategy == "deepspeed"

    def reduction(self) -> Reduction:
        """Return the all-reduce to measure; raises UserError for more processes than GPUs."""
        backend = "nccl" if self.on_gpus else "gloo"
        wanted = self.recipe.trainer.devices if self.recipe is not None else 1
        if wanted == 1:
            wanted = self.gpus if self.on_gpus else 2
        processes = self.processes or (min(wanted, self.gpus) if self.on_gpus else min(wanted, _MOST_PROCESSES))
        if self.on_gpus and processes > self.gpus:
            raise UserError(
                f"--processes {processes}: each takes a GPU, and torch sees {self.gpus}; ask for {self.gpus} at most, "
                "or set CUDA_VISIBLE_DEVICES= to try the CPU"
            )
        needed = self.run_processes > 1 or self.processes is not None
        return Reduction(backend, processes, needed, _REDUCED_BYTES[backend])


# --------------------------------------------------------------------------------------------------------------- checks


def _machine_checks(subject: Subject, reduction: Reduction) -> Iterator[Check]:
    environment, home, recipe = subject.environment, Path.home(), subject.recipe
    processes, root = subject.run_processes, Path("/")
    yield Check("packages", _packages)
    # Before the GPUs are looked at: a card in exclusive mode would then be taken by this process.
    yield Check("all-reduce", lambda: all_reduce.check_all_reduce(reduction, environment), limit_s=None)
    yield Check("gpus", _gpus)
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Check("cores", lambda: machine.check_cores(environment, processes, machine.read_cgroup(), affinity))
    yield Check("memory", lambda: machine.check_memory((root / "proc/meminfo").read_text(), machine.read_cgroup()))
    yield Check("shared memory", machine.check_shared_memory)
    yield Check("open files", machine.check_open_files)
    yield Check("locked memory", machine.check_locked_memory)
    yield Check("disk", lambda: disk.check_disk(subject.runs))
    reads_hub = recipe is not None and recipe.data.source == "hub"
    yield Check("hugging face", lambda: accounts.check_hub(environment, home, reads_hub))
    yield Check("wandb", lambda: accounts.check_wandb(environment, recipe.logging.wandb if recipe else None))
    folder = disk.extension_folder(environment, home)
    fix, needed = subject.fix, subject.uses_deepspeed
    yield Check("build locks", lambda: disk.check_locks(folder, time.time(), fix, needed))


def _recipe_checks(subject: Subject) -> Iterator[Check]:
    # Imported here: it lists data files with NumPy, which --help should not cost.
    from pldr_train.doctor import recipes  # noqa: PLC0415

    recipe = subject.recipe
    if recipe is None:
        return
    yield Check("devices", lambda: recipes.check_devices(recipe, subject.gpus))
    yield Check("attention", lambda: recipes.check_attention(recipe, subject.gpus))
    find = lambda: _kernels(recipe)  # noqa: E731
    yield Check("Triton kernels", lambda: recipes.check_kernels(recipe, subject.gpus, subject.environment, find))
    yield Check("files", lambda: recipes.check_files(recipe))
    yield Check("checkpoints", lambda: recipes.check_room(recipe, lambda: _count_parameters(recipe), subject.runs))


def _packages() -> Iterator[Finding]:
    declared = read_declared()
    yield from check_python(declared.python)
    yield from check_packages(declared.requirements)


def _gpus() -> Iterator[Finding]:
    try:
        import torch  # noqa: PLC0415 - see `count_gpus`
    except Exception as error:
        text = f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        yield Finding(
            "fail", "torch", text, "install it again: pip install --force-reinstall torch (see constraints.txt)"
        )
        return
    yield from check_gpus(torch.cuda, torch.version.cuda, driver_version())


def _kernels(recipe: Recipe) -> tuple[dict[str, bool], str]:
    # Imported here: see `count_gpus`.
    import torch  # noqa: PLC0415

    from pldr_train.building import model_config  # noqa: PLC0415
    from pldr_train.dag.log_trace_exp import TRITON_SWITCH, kernel_for  # noqa: PLC0415
    from pldr_train.model.power_law_attention import learner_sizes  # noqa: PLC0415
    from pldr_train.model.refining import is_at_once  # noqa: PLC0415

    device, config = torch.device("cuda", 0), model_config(recipe)
    dtype = torch.bfloat16 if recipe.trainer.precision == "bf16" else torch.float32
    taken = {
        "metric learner": is_at_once(device, dtype, learner_sizes(config)),
        "DAG loss": kernel_for(device, config.head_dim) is not None,
    }
    return taken, TRITON_SWITCH


def _count_parameters(recipe: Recipe) -> int:
    return count_parameters(recipe.model)
