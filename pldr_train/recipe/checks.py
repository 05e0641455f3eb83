"""Checks of a recipe that concern several keys at once; each problem names key, value and fix."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import TYPE_CHECKING

from pldr_train.metrics.catalog import DAG_TENSORS, why_not_of_validations
from pldr_train.optimizers import DEFAULT_GROUP, OPTIMIZERS, group_labels
from pldr_train.recipe.attention import attention_clashes
from pldr_train.recipe.yaml_text import Problem, show

if TYPE_CHECKING:
    from pldr_train.recipe.schema import Recipe

MOST_WIDTH, MOST_UNITS = 2**20, 20_000
"""Far above any model's: the papers' have 80 GLUs in their metric learners."""
NUM_RESERVED_PIECES = 6 + 256
"""Special tokens and byte pieces that every tokenizer of the project holds before its first word piece."""


def cross_key_problems(recipe: Recipe) -> list[Problem]:
    """List everything in a recipe that is right by itself and wrong together."""
    return [
        *_model_problems(recipe),
        *_operator_problems(recipe),
        *_init_problems(recipe),
        *attention_clashes(recipe),
        *_schedule_problems(recipe),
        *_group_problems(recipe),
        *_layer_factor_problems(recipe),
        *_data_problems(recipe),
        *_training_problems(recipe),
        *_judged_problems(recipe),
        *_monitor_problems(recipe),
        *_parallel_problems(recipe),
    ]


LONG_WARMUP = 0.2
"""Share of a run; the papers' longest warm-up is 6,000 of 250,000 steps."""


def default_warmup_steps(max_steps: int) -> int:
    """Return the default warm-up steps: the 2,000 of most of the papers' runs, at most a tenth of the run."""
    return min(2000, max_steps // 10)


def unusual_values(recipe: Recipe) -> list[str]:
    """List what is allowed and rarely wanted, a line each."""
    warmup, steps = recipe.optim.warmup_steps, recipe.trainer.max_steps
    if warmup is None or warmup <= LONG_WARMUP * steps:
        return []
    return [
        f"optim.warmup_steps={warmup}: {warmup / steps:.0%} of trainer.max_steps={steps}, so that the learning rate "
        f"reaches optim.lr late in the run; null takes {default_warmup_steps(steps)}"
    ]


def _model_problems(recipe: Recipe) -> list[Problem]:
    model = recipe.model
    problems = []
    derived = model.num_attention_heads * model.head_dim
    if model.hidden_size not in (None, derived):
        text = (
            f"model.hidden_size={model.hidden_size}: not model.num_attention_heads * model.head_dim = "
            f"{model.num_attention_heads} * {model.head_dim} = {derived}; set it to {derived} or null"
        )
        problems.append(Problem(("model.hidden_size", "model.num_attention_heads", "model.head_dim"), text))
    if derived > MOST_WIDTH:
        text = (
            f"model.num_attention_heads * model.head_dim = {model.num_attention_heads} * {model.head_dim}: more than "
            f"{MOST_WIDTH:,}, the widest model that can be described; lower one of them"
        )
        problems.append(Problem(("model.num_attention_heads", "model.head_dim"), text))
    units = model.num_hidden_layers * model.num_reslayerA * model.num_denseA
    if units > MOST_UNITS:
        text = (
            f"model.num_hidden_layers * model.num_reslayerA * model.num_denseA = {model.num_hidden_layers} * "
            f"{model.num_reslayerA} * {model.num_denseA}: more than {MOST_UNITS:,} GLUs; lower one of them"
        )
        problems.append(Problem(("model.num_hidden_layers", "model.num_reslayerA", "model.num_denseA"), text))
    if model.head_dim % 2:
        text = f"model.head_dim={model.head_dim}: odd, but the rotary embedding turns pairs; use an even number"
        problems.append(Problem(("model.head_dim",), text))
    if model.vocab_size <= NUM_RESERVED_PIECES:
        text = (
            f"model.vocab_size={model.vocab_size}: too small for the {NUM_RESERVED_PIECES} special and byte pieces "
            "that every tokenizer holds; raise it to the number of pieces of your tokenizer"
        )
        problems.append(Problem(("model.vocab_size",), text))
    return problems


def _operator_problems(recipe: Recipe) -> list[Problem]:
    model, dag = recipe.model, recipe.dag
    problems = []
    g_keys = ("model.custom_G_type", "model.custom_G_path")
    if model.custom_G_type == "external" and model.custom_G_path is None:
        text = "model.custom_G_type=external: needs model.custom_G_path, a file with G (pldr-train extract-g); set it"
        problems.append(Problem(g_keys, text))
    if model.custom_G_type != "external" and model.custom_G_path is not None:
        text = (
            f"model.custom_G_path={show(model.custom_G_path)}: not used with "
            f"model.custom_G_type={model.custom_G_type}; set custom_G_type=external, or remove the path"
        )
        problems.append(Problem(g_keys, text))
    if model.custom_G_type != "random" and model.random_distribution != "uniform":
        text = (
            f"model.random_distribution={model.random_distribution}: not used with "
            f"model.custom_G_type={model.custom_G_type}; set custom_G_type=random, or remove it"
        )
        problems.append(Problem(("model.random_distribution", "model.custom_G_type"), text))
    if model.custom_G_type != "learned" and model.gram_chunk_size is not None:
        text = (
            f"model.gram_chunk_size={model.gram_chunk_size}: with model.custom_G_type={model.custom_G_type} there is "
            "no Gram matrix; set it to null"
        )
        problems.append(Problem(("model.gram_chunk_size", "model.custom_G_type"), text))
    if model.custom_G_type != "learned":
        for name in dag.trained:
            text = (
                f"dag.{name}={getattr(dag, name)}: with model.custom_G_type={model.custom_G_type} G is a constant and "
                "there is nothing to regularise; set it to 0"
            )
            problems.append(Problem((f"dag.{name}", "model.custom_G_type"), text))
    return problems


def _init_problems(recipe: Recipe) -> list[Problem]:
    model = recipe.model
    only, law = "model.init_from_only", "model.init"
    problems = []
    if model.init_from_only is not None and model.init_from is None:
        text = f"{only}={show(model.init_from_only)}: needs model.init_from, whose weights it takes; set it, or null"
        problems.append(Problem((only, "model.init_from"), text))
    if model.init_from_only == ():
        problems.append(Problem((only,), f"{only}=[]: names no parameter; set it to null"))
    if model.init != "native" and model.init_from is not None and model.init_from_only is None:
        text = (
            f"{law}={model.init}: not used with model.init_from, which gives all weights; set it to native, or "
            f"{only} to the parameters to take"
        )
        problems.append(Problem((law, "model.init_from", only), text))
    return problems


def _schedule_problems(recipe: Recipe) -> list[Problem]:
    dag = recipe.dag
    problems = []
    for tensor in DAG_TENSORS:
        kind, steps = getattr(dag, f"{tensor}_schedule"), getattr(dag, f"{tensor}_steps")
        keys = (f"dag.{tensor}_schedule", f"dag.{tensor}_steps")
        text, others = None, tuple[str, ...]()
        if kind == "constant":
            if steps is not None:
                text = f"{keys[1]}={show(steps)}: not used with {keys[0]}=constant; set a schedule, or null"
        elif steps is None:
            text = f"{keys[0]}={kind}: needs {keys[1]}, such as [0, 2000]; set it, or the schedule to constant"
        elif steps[0] >= steps[1]:
            text = f"{keys[1]}={show(steps)}: holds no step; the second number must be larger than the first"
        elif getattr(dag, tensor) == 0:
            others = (f"dag.{tensor}",)
            text = f"{keys[0]}={kind}: there is nothing to schedule with dag.{tensor}=0; set the coefficient it reaches"
        elif kind != "decay" and steps[0] >= recipe.trainer.max_steps:
            others = ("trainer.max_steps",)
            text = (
                f"{keys[1]}={show(steps)}: begins after trainer.max_steps={recipe.trainer.max_steps}, so that "
                f"dag.{tensor} is 0 in all of the run; let it begin earlier"
            )
        if text is not None:
            problems.append(Problem((*keys, *others), text))
    return problems


def _group_problems(recipe: Recipe) -> list[Problem]:
    """List what is wrong with optim.groups and optim.name whatever the model; what matches what is looked at later."""
    optim, parallel = recipe.optim, recipe.parallel
    problems, labels = [], set[str]()
    for number, (label, group) in enumerate(zip(group_labels(optim), optim.groups, strict=True)):
        key = f"optim.groups[{number}]"
        if label in (DEFAULT_GROUP, *labels):
            text = f"{key}.name={label}: taken, by the parameters in no group or by an earlier one; give another name"
            problems.append(Problem(("optim.groups",), text))
        labels.add(label)
        unused = [name for name in ("weight_decay", "betas", "eps") if getattr(group, name) is not None]
        unused += [] if group.lr_factor == 1 else ["lr_factor"]
        if group.freeze and unused:
            text = f"{key}.freeze=true: leaves {', '.join(unused)} without a use; remove them, or set freeze=false"
            problems.append(Problem(("optim.groups",), text))
        if group.freeze and parallel.weights == "bf16":
            text = (
                f"{key}.freeze=true: with parallel.weights=bf16 the only fp32 weights are the optimizer's, which has "
                "none of frozen ones; set parallel.weights=fp32"
            )
            problems.append(Problem(("optim.groups", "parallel.weights"), text))
    kind = OPTIMIZERS[optim.name]
    if kind.strategies is not None and parallel.strategy not in ("auto", *kind.strategies):
        text = (
            f"optim.name={optim.name}: not with parallel.strategy={parallel.strategy}, {kind.why_not}; use "
            f"{', '.join(kind.strategies)}"
        )
        problems.append(Problem(("optim.name", "parallel.strategy"), text))
    return problems


def _layer_factor_problems(recipe: Recipe) -> list[Problem]:
    factors, layers = recipe.dag.layer_factors, recipe.model.num_hidden_layers
    shown = f"dag.layer_factors={show(factors)}"
    if factors is None:
        return []
    if len(factors) != layers:
        text = f"{shown}: {len(factors)} factors for model.num_hidden_layers={layers}; give one for each layer, or null"
        return [Problem(("dag.layer_factors", "model.num_hidden_layers"), text)]
    if not any(factors):
        text = f"{shown}: no layer is left; set the coefficients to 0 to train without the DAG loss, or this to null"
        return [Problem(("dag.layer_factors",), text)]
    return []


def _data_problems(recipe: Recipe) -> list[Problem]:
    data = recipe.data
    problems = []
    if data.source in ("parquet", "jsonl", "text", "tokens") and data.path is None:
        what = "a folder of pldr-train data tokenize" if data.source == "tokens" else "the files to read"
        text = f"data.path: missing with data.source={data.source}; set it to {what}"
        problems.append(Problem(("data.path", "data.source"), text))
    for name in ("path", "tokenizer"):
        value, key = getattr(data, name), f"data.{name}"
        if data.source in ("quickstart", "hidden_class") and value is not None:
            text = (
                f"{key}={show(value)}: not used with data.source={data.source}, which builds its own; remove it or set "
                "data.source=parquet"
            )
            problems.append(Problem((key, "data.source"), text))
    if data.document_separator is not None and data.source not in ("text", "tokens"):
        text = (
            f"data.document_separator={show(data.document_separator)}: not used with data.source={data.source}; "
            "remove it, or set data.source=text"
        )
        problems.append(Problem(("data.document_separator", "data.source"), text))
    if data.document_mask and data.packing == "pad":
        text = "data.document_mask=true: with data.packing=pad a row holds one document already; set it to false"
        problems.append(Problem(("data.document_mask", "data.packing"), text))
    shortest, longest = data.min_document_tokens, data.max_document_tokens
    if shortest is not None and longest is not None and shortest > longest:
        text = (
            f"data.min_document_tokens={shortest}: exceeds data.max_document_tokens={longest}, so that no document is "
            "left; lower it"
        )
        problems.append(Problem(("data.min_document_tokens", "data.max_document_tokens"), text))
    return [*problems, *_interval_problems(recipe)]


def missing_data_files(recipe: Recipe) -> list[Problem]:
    """List what the section data names and is not there; looks at names alone, and at nothing that the Hub has."""
    data, problems = recipe.data, []
    path = data.path
    if path is not None and data.source == "tokens" and not Path(path).is_dir():
        text = f"data.path={path}: no such folder; name one that `pldr-train data tokenize` wrote"
        problems.append(Problem(("data.path",), text))
    elif path is not None and data.source in ("parquet", "jsonl", "text") and not Path(path).exists():
        text = f"data.path={path}: no such file or folder; give an existing file, folder or glob"
        if glob.has_magic(path):
            text = f"data.path={path}: the glob matches no file; check the pattern (quote it in a shell)"
        if not (glob.has_magic(path) and next(glob.iglob(path, recursive=True), None)):
            problems.append(Problem(("data.path",), text))
    if data.tokenizer is not None and not Path(data.tokenizer).is_file():
        text = (
            f"data.tokenizer={data.tokenizer}: no such file; give a SentencePiece .model, or train one with the "
            "papers' settings (pldr-train tokenizer train)"
        )
        problems.append(Problem(("data.tokenizer",), text))
    return problems


def missing_model_files(recipe: Recipe) -> list[Problem]:
    """List what the section model names and is not there; looks at names alone."""
    path, source = recipe.model.custom_G_path, recipe.model.init_from
    problems = []
    if path is not None and not Path(path).exists():
        text = f"model.custom_G_path={path}: no such file; give a file with G (pldr-train extract-g) or a run"
        problems.append(Problem(("model.custom_G_path",), text))
    if source is not None and not Path(source).is_dir():
        text = f"model.init_from={source}: no such folder; name a run, a checkpoint or a model's folder"
        problems.append(Problem(("model.init_from",), text))
    return problems


def _interval_problems(recipe: Recipe) -> list[Problem]:
    train, validation = recipe.data.train_documents, recipe.data.validation_documents
    problems = []
    for name, interval in (("train_documents", train), ("validation_documents", validation)):
        if interval is not None and interval[0] >= interval[1]:
            text = f"data.{name}={show(interval)}: holds no document; write [start, stop) with start < stop"
            problems.append(Problem((f"data.{name}",), text))
    keys = ("data.train_documents", "data.validation_documents")
    if validation is not None and train is None:
        text = (
            f"data.validation_documents={show(validation)}: would be trained on too, for data.train_documents is null "
            "(all documents); give both intervals, or leave validation to data.validation_fraction"
        )
        problems.append(Problem(keys, text))
    if train is not None and validation is not None and max(train[0], validation[0]) < min(train[1], validation[1]):
        text = (
            f"data.validation_documents={show(validation)}: overlaps data.train_documents={show(train)}; choose "
            "intervals apart from each other"
        )
        problems.append(Problem(keys, text))
    return problems


def _training_problems(recipe: Recipe) -> list[Problem]:
    optim, trainer = recipe.optim, recipe.trainer
    problems = _batch_problems(recipe)
    if optim.warmup_steps is not None and optim.warmup_steps > trainer.max_steps:
        text = (
            f"optim.warmup_steps={optim.warmup_steps}: exceeds trainer.max_steps={trainer.max_steps}; lower it or "
            "train longer"
        )
        problems.append(Problem(("optim.warmup_steps", "trainer.max_steps"), text))
    if optim.clip_value is not None and optim.clip_norm is not None:
        text = (
            f"optim.clip_norm={optim.clip_norm}: optim.clip_value={optim.clip_value} is set too and only one way of "
            "clipping can be used; set the other to null"
        )
        problems.append(Problem(("optim.clip_norm", "optim.clip_value"), text))
    return problems


def _batch_problems(recipe: Recipe) -> list[Problem]:
    trainer, data = recipe.trainer, recipe.data
    batch, processes, micro = trainer.batch_size, trainer.world_size, trainer.micro_batch_size
    keys: tuple[str, ...] = ("trainer.batch_size", "trainer.devices", "trainer.num_nodes", "trainer.micro_batch_size")
    at_once = processes * (micro or 1)
    if batch % at_once:
        nodes = f" * trainer.num_nodes={trainer.num_nodes}" if trainer.num_nodes > 1 else ""
        shape = f"trainer.devices={trainer.devices}{nodes}" + (f" * trainer.micro_batch_size={micro}" if micro else "")
        nearest = max(at_once, batch // at_once * at_once)
        text = f"trainer.batch_size={batch}: not divisible by {shape}; "
        if micro and batch % processes == 0:  # another batch size would be another experiment
            each = batch // processes
            fits = next(size for size in range(min(micro, each), 0, -1) if each % size == 0)
            text += f"set trainer.micro_batch_size={fits}, with which the training stays the same, or "
        text += f"use a multiple of {at_once}, such as {nearest}"
        return [Problem(keys, text)]
    micro = micro or batch // processes
    workers = max(1, data.num_workers)
    share = processes * micro * workers
    if processes * workers == 1 or data.num_lanes % share == 0:
        return []
    nearest = -(-data.num_lanes // share) * share
    text = (
        f"data.num_lanes={data.num_lanes}: not divisible by processes {processes} * micro-batch {micro} * loader "
        f"workers {workers} = {share}; use a multiple of {share}, such as {nearest} (it decides the data order: choose "
        "it once, for the most devices you will use), or lower data.num_workers or trainer.micro_batch_size"
    )
    return [Problem((*keys, "data.num_lanes", "data.num_workers"), text)]


def _judged_problems(recipe: Recipe) -> list[Problem]:
    judged = {"checkpoint.keep_best": recipe.checkpoint.keep_best, "trainer.early_stop": recipe.trainer.early_stop}
    layers, labels, tasks = recipe.model.num_hidden_layers, group_labels(recipe.optim), recipe.evaluate.tasks
    problems = []
    for key, section in judged.items():
        problem = None if section is None else why_not_of_validations(section.metric, layers, labels, tasks)
        if section is not None and problem is not None:
            problems.append(Problem((key,), f"{key}.metric={section.metric}: {problem}"))
    return problems


def _monitor_problems(recipe: Recipe) -> list[Problem]:
    monitor, context_length = recipe.monitor, recipe.data.context_length
    problems = []
    far = [position for position in monitor.positions or () if position > context_length]
    if far:
        text = (
            f"monitor.positions={show(monitor.positions)}: {far[0]} lies outside of a row, whose targets have the "
            f"positions 1 to data.context_length={context_length}; leave it out"
        )
        problems.append(Problem(("monitor.positions", "data.context_length"), text))
    if monitor.positions == ():
        problems.append(Problem(("monitor.positions",), "monitor.positions=[]: names no position; set it to null"))
    if monitor.prompts > monitor.rows:
        text = f"monitor.prompts={monitor.prompts}: exceeds monitor.rows={monitor.rows}, of which they are; lower it"
        problems.append(Problem(("monitor.prompts", "monitor.rows"), text))
    if monitor.leakage == "stop" and monitor.rows < 2:
        text = "monitor.leakage=stop: one row (monitor.rows=1) gives no interval to judge by; raise it"
        problems.append(Problem(("monitor.leakage", "monitor.rows"), text))
    if monitor.leakage == "stop" and monitor.targets == 0 and monitor.positions is None:
        text = "monitor.leakage=stop: leakage is not measured with monitor.targets=0; raise it"
        problems.append(Problem(("monitor.leakage", "monitor.targets", "monitor.positions"), text))
    return problems


def _parallel_problems(recipe: Recipe) -> list[Problem]:
    parallel, trainer = recipe.parallel, recipe.trainer
    problems = []

    def refuse(name: str, why: str, *others: str) -> None:
        value = show(getattr(parallel, name))
        problems.append(Problem((f"parallel.{name}", *others), f"parallel.{name}={value}: {why}"))

    processes = trainer.world_size
    if parallel.strategy == "single" and processes > 1:
        why = f"is for one process, but there are {processes}; use ddp, fsdp or deepspeed"
        refuse("strategy", why, "trainer.devices", "trainer.num_nodes")
    if parallel.strategy != "deepspeed":
        for name in (
            "offload_optimizer",
            "offload_parameters",
            "offload_path",
            "allgather_bucket_mib",
            "deepspeed_config",
        ):
            if getattr(parallel, name) is not None:
                refuse(name, "only deepspeed has it; set parallel.strategy=deepspeed or null", "parallel.strategy")
        if parallel.strategy == "fsdp" and parallel.reduce_bucket_mib is not None:
            refuse(
                "reduce_bucket_mib", "fsdp reduces layer by layer, without buckets; set it to null", "parallel.strategy"
            )
        if parallel.weights == "bf16":
            refuse("weights", "only deepspeed has it; set parallel.strategy=deepspeed or fp32", "parallel.strategy")
        return problems
    if parallel.weights == "bf16" and trainer.precision != "bf16":
        refuse("weights", "with trainer.precision=fp32 weights are fp32; set it to fp32", "trainer.precision")
    if recipe.trainer.compile == "always" and parallel.is_zero_3:
        why = "ZeRO-3 gathers weights inside the layers, which then are no graph; set never, or parallel.strategy=fsdp"
        problems.append(Problem(("trainer.compile", "parallel.zero_stage"), f"trainer.compile=always: {why}"))
    if parallel.offload_parameters is not None and parallel.zero_stage != 3:
        why = (
            f"with parallel.zero_stage={parallel.zero_stage} every process needs all weights; set zero_stage=3 or null"
        )
        refuse("offload_parameters", why, "parallel.zero_stage")
    if parallel.offload_optimizer == "nvme" and parallel.zero_stage != 3:
        why = "nvme needs parallel.zero_stage=3; set that, or use cpu"
        refuse("offload_optimizer", why, "parallel.zero_stage")
    uses_nvme = parallel.offload_optimizer == "nvme"
    if uses_nvme and parallel.offload_path is None:
        refuse("offload_path", "nvme needs a folder on a fast disk; name one")
    if not uses_nvme and parallel.offload_path is not None:
        refuse("offload_path", "nothing is offloaded to nvme; set it to null")
    return problems
