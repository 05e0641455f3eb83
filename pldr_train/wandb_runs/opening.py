"""Opening a W&B run for a run's folder: mode, id, config, tags and group; and ending W&B's own process."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
from wandb.sdk import wandb_setup

from pldr_train.errors import UserError
from pldr_train.metrics.catalog import DAG_TENSORS, STEP, TASKS_GROUP, TOKENS, all_metrics
from pldr_train.recipe import name_without_seed
from pldr_train.runs.layout import ENVIRONMENT_FILE, WANDB_FILE
from pldr_train.untrusted import read_json

BESIDE = {"replay": "wandb-replay", "upload": "wandb-upload"}
"""Where the records of other job types lie in a run's folder: `wandb sync RUN/wandb/offline-run-*` uploads those
of the training alone and not the same curves twice."""
INIT_TIMEOUT_S = 60.0
_MOST_TAG_CHARACTERS = 64

Values = Mapping[str, Mapping[str, Any]]
"""A recipe as nested plain values."""


@dataclass(frozen=True)
class Target:
    """Where on W&B a run goes to, and how."""

    mode: str
    run_id: str
    project: str
    entity: str | None = None
    name: str | None = None
    job_type: str = "train"
    resume: bool = True
    """Go on with a run of this id if there is one; offline, when the record is uploaded."""
    finish_timeout_s: float = 120.0
    """How long the end waits for what is not uploaded yet; it stays on the disk for `wandb sync`."""
    system_metrics: bool = True
    """Let W&B measure this machine."""


def open_run(target: Target, folder: Path, values: Values, environment: Mapping[str, Any] | None = None) -> Any:
    """Start a W&B run whose files lie in `folder`/wandb, or below a folder of its job type's, with its metrics defined.

    Args:
        target: where to.
        folder: the run's folder.
        values: its recipe, the config there.
        environment: its environment.json, in the config under `environment`.

    Raises:
        Exception: whatever W&B raises.
    """
    records = folder / BESIDE.get(target.job_type, "")
    records.mkdir(exist_ok=True)
    run = wandb.init(
        mode=target.mode,  # type: ignore[arg-type]
        id=target.run_id,
        name=target.name,
        project=target.project,
        entity=target.entity,
        job_type=target.job_type,
        tags=tags_of(values),
        notes=value_of(values, "run.notes"),
        group=None if os.environ.get("WANDB_RUN_GROUP") else group_of(values),
        dir=str(records),
        config=config_of(values, environment),
        # A resumed run may have other values of some keys, for instance a higher trainer.max_steps.
        allow_val_change=True,
        # In an offline record it makes `wandb sync` join it to the run of its id instead of replacing that.
        resume="allow" if target.resume else None,
        reinit="create_new",
        # Without a key W&B would ask for one in a terminal and wait; forced, it raises.
        force=target.mode == "online",
        settings=wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_TIMEOUT_S,
            finish_timeout=target.finish_timeout_s,
            x_disable_stats=not target.system_metrics,
            x_disable_machine_info=not target.system_metrics,
        ),
    )
    define_metrics(run, num_layers_of(values))
    return run


def define_metrics(run: Any, num_layers: int) -> None:
    """Define every metric of a run: drawn over the step, for W&B knows one axis a metric; tokens can be chosen there.

    The step is W&B's own step as well, so that media have it, too.
    """
    run.define_metric(STEP)
    run.define_metric(TOKENS, step_metric=STEP)
    infos = all_metrics(num_layers)
    groups = dict.fromkeys(info.name.partition("/")[0] for info in infos if "/" in info.name)
    for group in (*groups, TASKS_GROUP):
        run.define_metric(f"{group}/*", step_metric=STEP)
    for info in infos:
        if info.best is not None:
            run.define_metric(info.name, step_metric=STEP, summary=f"{info.best},last")


@contextmanager
def told_to_the_user() -> Iterator[None]:
    """Word what W&B raises for the user.

    Raises:
        UserError: instead of W&B's errors.
    """
    try:
        yield
    except wandb.Error as error:
        raise UserError(
            f"Weights & Biases: {str(error).strip() or type(error).__name__}; check the network, the key "
            "(`wandb login`) and the names of --project and --entity, or write it on this disk with --mode offline"
        ) from error
    except OSError as error:
        raise UserError(
            f"Weights & Biases cannot write its files: {str(error).strip() or type(error).__name__}; free some space, "
            "or let WANDB_DATA_DIR, WANDB_CACHE_DIR and WANDB_CONFIG_DIR name folders that can be written"
        ) from error


def read_environment(folder: Path) -> dict[str, Any] | None:
    """Return a run's environment.json, or `None` where it cannot be read."""
    try:
        environment = read_json(folder / ENVIRONMENT_FILE)
    except (OSError, ValueError):
        return None
    return environment if isinstance(environment, dict) else None


def record_folder(run: Any) -> Path:
    """Return the folder of an open run's files, `wandb/offline-run-...` or `wandb/run-...`."""
    return Path(run.dir).parent


def sync_command(run: Any) -> list[str]:
    """Return the command that uploads an offline run."""
    return ["wandb", "sync", str(record_folder(run))]


def run_id_of(folder: Path) -> str:
    """Return the id that a run's folder keeps on W&B over resumes; a folder without one gets one.

    Raises:
        UserError: the file that keeps it is damaged.
    """
    path = folder / WANDB_FILE
    if path.exists():
        try:
            return str(read_json(path)["id"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged ({error}); remove it, and the run begins a new one on W&B") from error
    run_id = new_run_id()
    path.write_text(json.dumps({"id": run_id}) + "\n", encoding="utf-8")
    return run_id


def new_run_id() -> str:
    """Return an id that no other run has."""
    return secrets.token_hex(4)


# ------------------------------------------------------------------------------------------------------ of the recipe


def value_of(values: Values, key: str, default: Any = None) -> Any:
    """Return a recipe's value by its dotted key; the default where there is none."""
    section, _, leaf = key.partition(".")
    found = values.get(section)
    value = found.get(leaf) if isinstance(found, Mapping) else None
    return default if value is None else value


def num_layers_of(values: Values) -> int:
    """Return how many layers the model has, 0 where the recipe does not say."""
    return int(value_of(values, "model.num_hidden_layers", 0))


def tokens_per_step_of(values: Values) -> int | None:
    """Tokens of a step over all processes, or `None` where the recipe does not say."""
    rows, length = value_of(values, "trainer.batch_size"), value_of(values, "data.context_length")
    return None if rows is None or length is None else int(rows) * int(length)


def config_of(values: Values, environment: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the config of a W&B run: the recipe's sections, and the environment beside them."""
    config: dict[str, Any] = dict(values)
    tokens = tokens_per_step_of(values)
    if tokens is not None:
        config["tokens_per_step"] = tokens
    if environment:
        config["environment"] = dict(environment)
    return config


def tags_of(values: Values) -> list[str]:
    """Return what runs are picked by: `run.tags`, the model's size, its G, whether the DAG loss is trained, the data,
    the processes.
    """
    layers, heads = value_of(values, "model.num_hidden_layers"), value_of(values, "model.num_attention_heads")
    width = value_of(values, "model.head_dim")
    tags = [] if None in (layers, heads, width) else [f"{layers}L-{heads}H-{width}d"]
    tags.append(f"G-{value_of(values, 'model.custom_G_type', 'learned')}")
    trained = any(value_of(values, f"dag.{tensor}", 0) for tensor in DAG_TENSORS)
    tags.append("dag" if trained else "no-dag")
    source = value_of(values, "data.source")
    name = value_of(values, "data.repository") if source == "hub" else source
    tags += [] if name is None else [str(name)]
    processes = value_of(values, "trainer.devices", 1) * value_of(values, "trainer.num_nodes", 1)
    tags += [f"{processes}-processes"] if processes > 1 else []
    own = [str(tag) for tag in value_of(values, "run.tags", ())]
    of_environment = [tag.strip() for tag in os.environ.get("WANDB_TAGS", "").split(",")]
    return [tag[:_MOST_TAG_CHARACTERS] for tag in dict.fromkeys([*of_environment, *own, *tags]) if tag]


def group_of(values: Values) -> str | None:
    """Return `run.group`, else the group of runs that differ in their seed alone: the run's name where it ends in its
    own seed, without that.
    """
    group = value_of(values, "run.group")
    if group is not None:
        return str(group)
    return name_without_seed(str(value_of(values, "run.name") or ""), value_of(values, "run.seed"))


def abandon_service() -> None:
    """End W&B's process, if there is one, with all that it has not done.

    Otherwise the end of this process would wait for one that does not answer, or complain of one that is dead.
    """
    connection = getattr(wandb_setup._singleton, "_connection", None)
    process: Any = getattr(getattr(connection, "_proc", None), "_process", None)
    if process is not None:
        process.kill()
    # Of a killed process it reports the exit code, in whatever way it takes; all that counts is that it is rid of it.
    with contextlib.suppress(Exception, SystemExit):
        wandb.teardown()
