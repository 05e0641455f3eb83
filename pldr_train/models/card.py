"""The model card of an export: Markdown with a head that the Hub reads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pldr_train import __version__
from pldr_train.metrics import catalog
from pldr_train.model import PldrllmConfig
from pldr_train.models.loading import RunCheckpoint
from pldr_train.recipe import dump_recipe
from pldr_train.runs.layout import ENVIRONMENT_FILE, METRICS_FILE
from pldr_train.runs.lines import read_file
from pldr_train.untrusted import read_json

_FIRST_METRICS = (
    catalog.VAL_CROSS_ENTROPY,
    catalog.VAL_PERPLEXITY,
    catalog.SEQUENTIAL_NLL,
    catalog.GAP,
    catalog.TRAIN_CROSS_ENTROPY,
)
"""What compares between models; the losses with the DAG terms depend on their coefficients."""
_FRONT_MATTER = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- pldr-llm
- power-law-graph-attention
- pldr_train
---
"""
_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

folder = "{name}"  # this folder
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
) -> str:
    """Return the text of the card, Markdown with a YAML head.

    Args:
        name: the folder's name.
        config: of the model.
        parameters: their number.
        checkpoint: the run's checkpoint that the weights are from; `None` for an imported model.
        averaged_steps: of the checkpoints whose mean the weights are; that of `checkpoint` is the last.
    """
    parts = [_FRONT_MATTER, f"# {name}\n", _model_section(config, parameters)]
    if checkpoint is not None:
        measured = _averaged_section(checkpoint, averaged_steps) if averaged_steps else _metrics_section(checkpoint)
        parts += [measured, _recipe_section(checkpoint)]
    parts += [_USE.format(name=name, prompt=_prompt(checkpoint)), _versions(checkpoint)]
    return "\n".join(parts)


def metrics_at(checkpoint: RunCheckpoint) -> dict[str, float | int]:
    """Return the last value of every metric up to the checkpoint's step, without timings and digests."""
    path = checkpoint.run / METRICS_FILE
    if not path.is_file():
        return {}
    known = {info.name for info in catalog.METRICS} - catalog.TIMINGS - {catalog.STEP}
    values: dict[str, float | int] = {}
    for line in read_file(path):
        if line.problem is None and line.step <= checkpoint.step:
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


def _metrics_section(checkpoint: RunCheckpoint) -> str:
    infos = {info.name: info for info in catalog.METRICS}
    values = metrics_at(checkpoint)
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


def _recipe_section(checkpoint: RunCheckpoint) -> str:
    return f"## Recipe\n\n```yaml\n{dump_recipe(checkpoint.recipe).rstrip()}\n```\n"


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
