"""The model card of an export: Markdown with a head that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pldr_train import __version__
from pldr_train.metrics import catalog
from pldr_train.model import PldrllmConfig
from pldr_train.models.loading import RunCheckpoint
from pldr_train.recipe import PATH_KEYS, DataSection, Recipe, dump_recipe
from pldr_train.runs.layout import ENVIRONMENT_FILE, METRICS_FILE
from pldr_train.runs.lines import read_file
from pldr_train.untrusted import read_json


@dataclass(frozen=True)
class Publication:
    """Where on the Hub a model goes."""

    repository: str
    licence: str
    """By the Hub's short names, such as apache-2.0."""


_FIRST_METRICS = (
    catalog.VAL_CROSS_ENTROPY,
    catalog.VAL_PERPLEXITY,
    catalog.SEQUENTIAL_NLL,
    catalog.GAP,
    catalog.TRAIN_CROSS_ENTROPY,
)
"""What compares between models; the losses with the DAG terms depend on their coefficients."""
_RESULTS = (catalog.VAL_CROSS_ENTROPY, catalog.VAL_PERPLEXITY, catalog.VAL_ACCURACY, catalog.SEQUENTIAL_NLL)
"""What the card's head gives as results, beside the scores of tasks."""
_TAGS = ("pldr-llm", "power-law-graph-attention", "pldr_train")
_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "{folder}"  # {where}
print(pipeline("text-generation", model=folder, trust_remote_code=True)("{prompt}", max_new_tokens=40))

model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
inputs = tokenizer(["{prompt}"], return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0], skip_special_tokens=True))
```

`trust_remote_code=True` runs the model code in this folder; where pldr_train is installed, `import pldr_train` instead.
"""


def model_card(
    name: str,
    config: PldrllmConfig,
    parameters: int,
    checkpoint: RunCheckpoint | None,
    averaged_steps: Sequence[int] = (),
    publication: Publication | None = None,
) -> str:
    """Return the text of the card, Markdown with a YAML head.

    Args:
        name: the folder's name.
        config: of the model.
        parameters: their number.
        checkpoint: the run's checkpoint that the weights are from; `None` for an imported model.
        averaged_steps: of the checkpoints whose mean the weights are; that of `checkpoint` is the last.
        publication: where on the Hub it goes; None: it stays on this disk.
    """
    values = {} if checkpoint is None or averaged_steps else metrics_at(checkpoint)
    head = _head(name, checkpoint, values, publication)
    parts = [f"---\n{head.to_yaml()}\n---\n", f"# {name}\n", _model_section(config, parameters)]
    if checkpoint is not None:
        measured = _averaged_section(checkpoint, averaged_steps) if averaged_steps else None
        parts += [_data_section(checkpoint), measured or _metrics_section(checkpoint, values)]
        parts.append(_recipe_section(checkpoint.recipe, publication))
    folder, where = (name, "this folder") if publication is None else (publication.repository, "on the Hub")
    parts += [_USE.format(folder=folder, where=where, prompt=_prompt(checkpoint)), _versions(checkpoint)]
    return str(ModelCard("\n".join(parts)))


def _head(
    name: str, checkpoint: RunCheckpoint | None, values: Mapping[str, float], publication: Publication | None
) -> ModelCardData:
    data = None if checkpoint is None else checkpoint.recipe.data
    results = [] if data is None else list(_results(data, values))
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(_TAGS),
        license=None if publication is None else publication.licence,
        datasets=None if data is None or data.source != "hub" else [data.repository],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _results(data: DataSection, values: Mapping[str, float]) -> Iterator[EvalResult]:
    of_hub = data.source == "hub"
    for metric in _RESULTS:
        if metric in values:
            yield EvalResult(
                task_type="text-generation",
                dataset_type=data.repository if of_hub else data.source,
                dataset_name=f"validation rows of {data.repository}" if of_hub else "the run's own validation rows",
                metric_type=metric.rpartition("/")[2],
                metric_name=metric,
                metric_value=values[metric],
            )
    for metric in catalog.task_metrics_in(values):
        _, task, *_, last = metric.split("/")
        yield EvalResult(
            task_type="text-generation",
            dataset_type=task,
            dataset_name=task,
            metric_type=last,
            metric_name=metric,
            metric_value=values[metric],
        )


def metrics_at(checkpoint: RunCheckpoint) -> dict[str, float | int]:
    """Return the last value of every metric up to the checkpoint's step, without timings and digests."""
    path = checkpoint.run / METRICS_FILE
    if not path.is_file():
        return {}
    plain = {info.name for info in catalog.METRICS} - catalog.TIMINGS - {catalog.STEP}
    values: dict[str, float | int] = {}
    for line in read_file(path):
        if line.problem is None and line.step <= checkpoint.step:
            known = plain | {*catalog.task_metrics_in(line.values)}
            numbers = {key: value for key, value in line.values.items() if isinstance(value, int | float)}
            values |= {key: value for key, value in numbers.items() if key in known and not isinstance(value, bool)}
    return values


def _model_section(config: PldrllmConfig, parameters: int) -> str:
    operator = (
        "learned from the queries (G_LM)" if config.custom_G_type is None else f"predefined, {config.custom_G_type}"
    )
    if config.gram_chunk_size is not None:
        operator += f"; causal Gram, chunks of {config.gram_chunk_size} tokens (experimental)"
    rows = [
        ("parameters", f"{parameters:,}"),
        (
            "layers x heads x head width",
            f"{config.num_hidden_layers} x {config.num_attention_heads} x {config.head_dim}",
        ),
        ("context", f"{config.max_position_embeddings:,} tokens"),
        ("vocabulary", f"{config.vocab_size:,}"),
        ("operator G", operator),
        ("metric learner", f"{config.num_reslayerA} residual units of {config.num_denseA} GLUs, width {config.A_dff}"),
    ]
    if config.custom_G_type is not None:
        rows.pop()
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (
        "A PLDR-LLM (large language model from power law decoder representations, arXiv 2410.16703 and 2502.13502), "
        f"written by pldr_train.\n\n## Model\n\n| | |\n|---|---|\n{table}\n"
    )


_DATA_WORDS = {
    "quickstart": "Python's own documentation (the quickstart corpus)",
    "hidden_class": "a corpus whose only uncertain word no causal model can predict",
}


def _data_section(checkpoint: RunCheckpoint) -> str:
    data, trainer = checkpoint.recipe.data, checkpoint.recipe.trainer
    tokens = checkpoint.step * trainer.batch_size * data.context_length
    if data.source == "hub":
        parts = {"configuration": data.config, "split": data.split, "revision": data.revision, "files": data.data_files}
        named = "".join(f", {word} `{value}`" for word, value in parts.items() if value is not None)
        text = f"[{data.repository}](https://huggingface.co/datasets/{data.repository}){named}"
    else:
        text = _DATA_WORDS.get(data.source, f"files of the machine that trained it ({data.source})")
    return f"## Data\n\nTrained on {tokens:,} tokens of {text}.\n"


def _metrics_section(checkpoint: RunCheckpoint, values: Mapping[str, float]) -> str:
    tasks = catalog.task_infos(catalog.task_metrics_in(values))
    infos = {info.name: info for info in (*catalog.METRICS, *tasks)}
    if not values:
        return f"## Measured\n\nStep {checkpoint.step:,} of run `{checkpoint.recipe.run.name}`; no metrics were kept.\n"
    first = [name for name in _FIRST_METRICS if name in values]
    ordered = [*first, *sorted(values.keys() - set(first))]
    rows = "\n".join(
        f"| `{name}` | {values[name]:,.6g} | {infos[name].unit} | {infos[name].meaning} |" for name in ordered
    )
    return (
        f"## Measured\n\nAt step {checkpoint.step:,} of run `{checkpoint.recipe.run.name}`, the last value logged up "
        f"to it.\n\n| metric | value | unit | meaning |\n|---|---|---|---|\n{rows}\n"
    )


def _averaged_section(checkpoint: RunCheckpoint, steps: Sequence[int]) -> str:
    listing = ", ".join(f"{step:,}" for step in steps)
    return (
        f"## Averaged\n\nThe weights are the mean of those of {len(steps)} checkpoints of run "
        f"`{checkpoint.recipe.run.name}`, at the steps {listing}, added up in fp64. No metric of the mean is known.\n"
    )


def _recipe_section(recipe: Recipe, publication: Publication | None) -> str:
    note = ""
    if publication is not None:
        recipe = recipe.replaced({key: recipe.default(key) for key in (*PATH_KEYS, "run.notes")})
        note = "Paths and notes are left out.\n\n"
    return f"## Recipe\n\n{note}```yaml\n{dump_recipe(recipe).rstrip()}\n```\n"


def _prompt(checkpoint: RunCheckpoint | None) -> str:
    prompts = [] if checkpoint is None else list(checkpoint.recipe.sample.prompts)
    return json.dumps(prompts[0] if prompts else "Once upon a time")[1:-1]


def _versions(checkpoint: RunCheckpoint | None) -> str:
    versions: dict[str, Any] = {"pldr_train": __version__}
    path: Path | None = None if checkpoint is None else checkpoint.run / ENVIRONMENT_FILE
    if path is not None and path.is_file():
        try:
            recorded = read_json(path)
            versions = recorded["packages"] | {"python": recorded["python"]}
        except (OSError, ValueError, KeyError, TypeError):
            return f"## Versions\n\npldr_train {__version__}; the run's own are not known: {path.name} is damaged.\n"
    listing = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"## Versions\n\n{listing}\n"
