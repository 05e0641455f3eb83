"""The recipes in recipes/ are complete, right and the papers'."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pldr_train.data.sources.hidden_class import CLASS_WORDS, CONTEXT_LENGTH, FIXED_WORDS
from pldr_train.data.tokenizer.automatic import HIDDEN_CLASS_PIECES
from pldr_train.errors import RecipeError
from pldr_train.metrics.throughput import memory_estimate
from pldr_train.published import PUBLISHED_RUNS
from pldr_train.recipe import dump_recipe, load_recipe

FOLDER = Path(__file__).parents[2] / "recipes"
PATHS = sorted(FOLDER.glob("*.yaml"))


OURS = {"quickstart", "quickstart-causal", "quickstart-zero2", "leakage-demo", "row-study-cpu", "controlled-cpu"}


def test_the_recipes_are_ours_and_the_published_ones_and_the_readme_has_all() -> None:
    assert {path.stem for path in PATHS} == OURS | set(PUBLISHED_RUNS)
    readme = (FOLDER / "README.md").read_text()
    ranges = re.findall(r"`([a-z0-9-]+)-(\d)\.yaml` to `\1-(\d)\.yaml`", readme)
    listed = {f"{name}-{number}" for name, first, last in ranges for number in range(int(first), int(last) + 1)}
    listed |= set(re.findall(r"`([a-z0-9-]+)\.yaml`", readme))
    assert listed == {path.stem for path in PATHS}


def test_on_other_numbers_of_devices_the_micro_batch_is_what_to_change() -> None:
    with pytest.raises(RecipeError, match=r"trainer.devices=8 \* .*=16; set trainer.micro_batch_size=4, with which"):
        load_recipe(FOLDER / "soc-110m-2.yaml", ["trainer.devices=8"])
    assert load_recipe(FOLDER / "soc-110m-2.yaml", ["trainer.devices=8", "trainer.micro_batch_size=4"])


def test_every_recipe_that_a_text_names_is_there() -> None:
    root = FOLDER.parent
    texts = [
        *root.glob("*.md"),
        *root.glob("docs/*.md"),
        *root.glob("recipes/*.*"),
        *root.glob("recipes/sweeps/*"),
        *root.glob("launch/*"),
    ]
    texts += [*root.glob("benchmarks/*.py"), *root.glob("benchmarks/*.md"), *root.rglob("pldr_train/**/*.py")]
    named = {
        name for path in texts for name in re.findall(r"\brecipes/[\w.-]+\.yaml", path.read_text(encoding="utf-8"))
    }
    assert {"recipes/quickstart.yaml", "recipes/soc-110m-2.yaml"} <= named
    assert [name for name in sorted(named) if not (root / name).exists()] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_recipe_loads_is_named_after_its_file_and_its_resolved_form_runs_again(path: Path, tmp_path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.run.name == path.stem
    written = tmp_path / "recipe.yaml"
    written.write_text(dump_recipe(recipe.resolved()))
    assert load_recipe(written) == recipe.resolved()


@pytest.mark.parametrize("name", [name for name in PUBLISHED_RUNS if "110m" in name])
def test_the_papers_recipes_fit_the_papers_gpus(name: str) -> None:
    recipe = load_recipe(FOLDER / f"{name}.yaml").resolved()
    assert recipe.trainer.micro_batch_size is not None
    need = memory_estimate(recipe.model, recipe.data.context_length, recipe.trainer.micro_batch_size, dag_tensors=3)
    assert need.total < 20e9  # of 24 GB


def test_the_causal_quickstart_differs_by_its_gram_alone() -> None:
    plain, causal = (load_recipe(FOLDER / f"{name}.yaml") for name in ("quickstart", "quickstart-causal"))
    assert causal.model.gram_chunk_size == 32
    model = causal.model.model_copy(update={"gram_chunk_size": None})
    assert causal.model_copy(update={"model": model, "run": plain.run}) == plain


def test_the_quickstart_is_small_needs_no_file_and_trains_on_the_dag_loss() -> None:
    recipe = load_recipe(FOLDER / "quickstart.yaml")
    resolved = recipe.resolved()
    assert (resolved.model.hidden_size, resolved.model.A_dff) == (128, 8 * 32 // 3)
    assert (recipe.data.source, recipe.data.path, recipe.data.tokenizer) == ("quickstart", None, None)
    assert min(recipe.dag.A_LM, recipe.dag.A_P, recipe.dag.G_LM) > 0
    assert (recipe.trainer.accelerator, recipe.trainer.precision) == ("cpu", "fp32")
    tokens = recipe.trainer.max_steps * recipe.trainer.batch_size * recipe.data.context_length
    assert tokens < 1_000_000


def test_the_leakage_demo_measures_the_first_class_word_and_stops() -> None:
    path = FOLDER / "leakage-demo.yaml"
    recipe = load_recipe(path)
    data, monitor, trainer = recipe.data, recipe.monitor, recipe.trainer
    assert (data.source, data.packing, data.context_length) == ("hidden_class", "pad", CONTEXT_LENGTH)
    assert (monitor.positions, monitor.leakage) == ((len(FIXED_WORDS),), "stop")
    assert monitor.rows <= trainer.validation_rows
    assert monitor.rows % len(CLASS_WORDS) == 0
    assert recipe.model.vocab_size == HIDDEN_CLASS_PIECES
    for override in ("model.custom_G_type=identity", "model.gram_chunk_size=4"):  # as the file's head tells
        assert override in path.read_text()
        load_recipe(path, [override])
