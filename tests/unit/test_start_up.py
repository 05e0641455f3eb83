"""What the package and the command line import when they start, and that the model is registered all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pldr_train
from tests.tiny import tiny_values


def output_of(program: str) -> str:
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    return shown.stdout.strip()


def test_importing_the_package_or_the_command_line_loads_no_heavy_library() -> None:
    heavy = "{'torch', 'transformers', 'lightning', 'numpy', 'pydantic', 'wandb'}"
    program = f"import sys, pldr_train, pldr_train.cli, pldr_train.commands; print({heavy} & sys.modules.keys())"
    assert output_of(program) == "set()"


def test_the_parsers_of_all_commands_load_neither_torch_nor_other_heavy_libraries() -> None:
    heavy = "{'torch', 'transformers', 'lightning', 'datasets', 'huggingface_hub', 'wandb', 'deepspeed'}"
    program = (
        "import sys\nfrom pldr_train.commands import COMMANDS\n"
        "for command in COMMANDS.values(): command.load().build_parser()\n"
        f"print({heavy} & sys.modules.keys())"
    )
    assert output_of(program) == "set()"


IMPORTS = {
    "the package first": "import pldr_train",
    "transformers first": "import transformers, pldr_train",
    "its Auto classes first": "from transformers import AutoConfig\nimport pldr_train",
    "looked for in between": "import importlib.util, pldr_train\nassert importlib.util.find_spec('transformers')",
    "another model first": "import pldr_train, transformers.models.llama.modeling_llama",
    "a module of the model first": "import pldr_train.model.configuration_pldrllm",
}


AUTO_CLASSES = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING
sizes = dict(hidden_size=16, num_attention_heads=2, head_dim=8, num_hidden_layers=1, vocab_size=32, A_dff=8)
config = AutoConfig.for_model("pldrllm", **sizes)
print(type(AutoModelForCausalLM.from_config(config)), TOKENIZER_MAPPING[type(config)])
print([each for each in sys.meta_path if "pldr" in str(each)])
"""

RUN = """
import sys
from pldr_train.cli import main
assert main(["fit", {recipe!r}]) == 0
unused = {{"wandb", "pandas", "deepspeed", "datasets", "optuna", "lm_eval"}}
print(sorted(unused & sys.modules.keys()))
"""
"""Train a recipe that uses none of these libraries."""

FORKS = """
import json, os, sys
# What takes long, and knows nothing of the order of the others.
import torch, torch._dynamo, torch.distributed.tensor, accelerate, huggingface_hub, tokenizers

assert not {"transformers", "pldr_train"} & sys.modules.keys()
shown = {}
for name, program in json.load(sys.stdin).items():
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(writing, 1)
        os.dup2(writing, 2)
        os.close(writing)
        exec(program, {"__name__": "__main__"})
        sys.stdout.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        shown[name] = pipe.read().strip()
    os.waitpid(child, 0)
print(json.dumps(shown))
"""
"""Run programs, each in a process of its own that has imported nothing but torch, and print what they print."""


@pytest.fixture(scope="module")
def shown(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What `AUTO_CLASSES` prints after each of the imports, and what `RUN` prints."""
    folder = tmp_path_factory.mktemp("run")
    recipe = folder / "tiny.yaml"
    recipe.write_text(json.dumps(tiny_values(tiny_data, folder, trainer={"max_steps": 8})))
    programs = {name: f"{imports}\n{AUTO_CLASSES}" for name, imports in IMPORTS.items()}
    programs["a run"] = RUN.format(recipe=str(recipe))
    command = [sys.executable, "-c", FORKS]
    given = json.dumps(programs)
    ended = subprocess.run(command, input=given, capture_output=True, text=True, check=True, timeout=300)
    found: dict[str, str] = json.loads(ended.stdout)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", IMPORTS)
def test_the_auto_classes_know_the_model(name: str, shown: dict[str, str]) -> None:
    classes, finders = shown[name].splitlines()[-2:]
    assert "pldr_train.model.modeling_pldrllm.PldrllmForCausalLM" in classes
    assert "pldr_train.model.tokenization_pldrllm" in classes
    assert finders == "[]"


@pytest.mark.slow
def test_a_run_loads_no_library_that_it_does_not_use(shown: dict[str, str]) -> None:
    assert shown["a run"].splitlines()[-1] == "[]"


def test_the_model_is_an_attribute_of_the_package() -> None:
    assert pldr_train.model.PldrllmConfig.model_type == "pldrllm"
    with pytest.raises(AttributeError, match="no attribute 'modle'"):
        pldr_train.modle  # noqa: B018
