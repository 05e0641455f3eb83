"""Recipe files: YAML 1.2, overrides, what is written reads back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pldr_train.errors import RecipeError
from pldr_train.recipe import (
    PATH_KEYS,
    Recipe,
    dump_recipe,
    load_recipe,
    recipe_from_dict,
    recipe_json_schema,
    recipe_keys,
    recipe_to_dict,
)
from pldr_train.recipe.yaml_text import parse_yaml, to_yaml

TEXT = """\
run: {name: small}
data: {source: quickstart}
optim:
  warmup_steps: 10
  lr: 1e-3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(TEXT)
    return path


def refused(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    return str(caught.value)


def test_files_are_read_as_yaml_1_2(file: Path) -> None:
    file.write_text(TEXT + "  eps: 1e-6\ntrainer: {max_steps: 16_000}\nsample: {prompts: [no, on, 1:30, 'yes']}\n")
    recipe = load_recipe(file)
    assert (recipe.optim.lr, recipe.optim.eps, recipe.trainer.max_steps) == (0.001, 1e-6, 16_000)
    assert recipe.sample.prompts == ("no", "on", "1:30", "yes")


def test_overrides_are_yaml_values(file: Path) -> None:
    recipe = load_recipe(
        str(file),
        [
            "optim.lr=2e-3",
            "optim.clip_value=null",
            "trainer.compile=true",
            "monitor.deductive=false",
            "sample.prompts=[a, 'x=y: z']",
            "run.dir=a=b",
            "optim.betas=[0.8, 0.9]",
            'run.name="1"',
            "data.text_column=''",
        ],
    )
    assert recipe.optim.lr == 0.002
    assert recipe.optim.clip_value is None
    assert recipe.trainer.compile == "always"
    assert recipe.monitor.deductive is False
    assert recipe.sample.prompts == ("a", "x=y: z")
    assert (recipe.run.dir, recipe.run.name, recipe.data.text_column) == ("a=b", "1", "")
    assert recipe.optim.betas == (0.8, 0.9)
    assert recipe.optim.warmup_steps == 10


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optim.lr", "optim.lr: not an override; write it as key=value, such as optim.lr=..."),
        ("optim.rl=3", "optim.rl=3: unknown key; did you mean optim.lr?"),
        ("--optim.lr=3", "--optim.lr=3: unknown key; did you mean optim.lr?"),
        ("lr=3", "lr=3: unknown key; did you mean optim.lr?"),
        ("max_stepz=3", "max_stepz=3: unknown key; did you mean trainer.max_steps?"),
        ("=3", "=3: unknown"),
        ("optim={lr: 3}", "optim={lr: 3}: a section, not a key; set one of its keys, such as optim.lr"),
        ("optim.lr.x=3", "optim.lr.x=3: unknown key"),
        ("optim.lr=", "optim.lr=: no value; write optim.lr=null for none"),
        ("optim.betas=[1", "optim.betas=[1: not a YAML value ("),
        ("optim.lr=3 000", "optim.lr=3 000: must be a number, not text"),
        ("trainer.max_steps=1e3", "trainer.max_steps=1000.0: must be a whole number, not a decimal number; write 1000"),
    ],
)
def test_a_wrong_override_is_answered_with_the_fix(file: Path, override: str, line: str) -> None:
    head, shown = refused(file, override).splitlines()
    assert head == f"{file}: 1 problem in the recipe:"
    assert shown.strip().startswith(line)


def test_problems_of_file_and_overrides_come_together(file: Path) -> None:
    file.write_text(TEXT + "  ebs: 1\n")
    text = refused(file, "optim.l=1", "trainer.max_steps=5", "model.head_dim=a")
    assert [line.strip().split("=")[0] for line in text.splitlines()[1:]] == [
        "optim.l",
        "model.head_dim",
        "optim.ebs",
        "optim.warmup_steps",
    ]


def test_overriding_a_key_mends_the_file(file: Path) -> None:
    file.write_text(TEXT + "  clip_norm: -3\n")
    assert "optim.clip_norm=-3" in refused(file)
    assert load_recipe(file, ["optim.clip_norm=null"]).optim.clip_norm is None


def test_overrides_do_not_leak_through_yaml_aliases(file: Path) -> None:
    file.write_text(TEXT + "logging: &same {every_steps: 7}\ncheckpoint: *same\n")
    recipe = load_recipe(file, ["logging.every_steps=3"])
    assert (recipe.logging.every_steps, recipe.checkpoint.every_steps) == (3, 7)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", ["is empty", "run.name"]),
        ("# only a comment\n", ["is empty"]),
        ("- a\n- b\n", ["a list, not a mapping"]),
        ("just words", ["text, not a mapping"]),
        ("run:\n  name: x\n  name: y\n", ["line 3", "duplicate key", "keep one"]),
        ("run:\n  name: 'x\n", ["begun in line 2", "quotes"]),
        ("run:\n\tname: x\n", ["line 2", "\\t"]),
        ("run: {name: x\n", ["line"]),
        ("run: {name: x}\n---\nrun: {name: y}\n", ["line 2"]),
        ("run: !!python/object/apply:os.system [ls]\n", ["line 1", "tag"]),
        ("run: {name: 2024-99-99}\n", ["in quotes"]),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_with_its_line(file: Path, content: str, words: list[str]) -> None:
    file.write_text(content)
    text = refused(file)
    assert text.startswith(str(file))
    assert "\n" not in text
    for word in words:
        assert word in text


def test_a_byte_order_mark_is_no_part_of_a_file(file: Path) -> None:
    file.write_text("\ufeff" + TEXT, encoding="utf-8")
    assert load_recipe(file).run.name == "small"


def test_a_file_that_is_no_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    assert "not a UTF-8 text file" in refused(file)


def test_a_missing_file_is_answered_with_the_recipes_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    for name in ("quickstart", "other"):
        (tmp_path / "recipes" / f"{name}.yaml").write_text(TEXT)
    text = refused("recipes/quikstart.yaml")
    assert "no such recipe file; did you mean recipes/quickstart.yaml?" in text
    assert "recipes/other.yaml" in text
    assert "did you mean recipes/quickstart.yaml?" in refused("quikstart")
    assert "did you mean" not in refused("zzzzzz.yaml")
    assert "is a folder" in refused("recipes")


def test_a_shipped_recipe_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_recipe(Path(__file__).parents[2] / "recipes" / "soc-110m-2.yaml")
    assert load_recipe("soc-110m-2") == load_recipe("recipes/soc-110m-2.yaml") == shipped
    assert "soc-110m-2: 1 problem in the recipe:" in refused("soc-110m-2", "optim.lr=-1")
    for name in ("sco-110m-2", "recipes/sco-110m-2.yaml"):
        text = refused(name)
        assert f"{name}: no such recipe file; did you mean soc-110m-2?" in text
        assert "(there are: abl-110m-1, abl-110m-2," in text
    for name in ("other/soc-110m-2", "soc-110m-2.yaml", "recipes/soc-110m-2", "/soc-110m-2"):
        assert "no such recipe file" in refused(name)


def test_a_recipe_of_the_working_directory_comes_before_the_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").write_text(TEXT)
    assert load_recipe("quickstart") == load_recipe("recipes/quickstart.yaml")
    assert load_recipe("quickstart").run.name == "small"
    (tmp_path / "quickstart").write_text(TEXT.replace("small", "here"))
    assert load_recipe("quickstart").run.name == "here"


def test_a_dump_lists_every_key_and_loads_back_equal(file: Path, tmp_path: Path) -> None:
    recipe = load_recipe(file, ["optim.lr=1.2345678901234567e-05", "data.train_documents=[0, 5]"]).resolved()
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe
    written = parse_yaml(again.read_text())
    assert [f"{section}.{key}" for section, keys in written.items() for key in keys] == recipe_keys()
    assert recipe_from_dict(recipe_to_dict(recipe)) == recipe


@example(floats=[5e-324, 1.7976931348623157e308], texts=["a:\x85b\u2028", "\ufeffx", "ÿ€😀", "null"])
@example(floats=[1.0], texts=["?0", "a b", "-", "x: y", *["000\x1f0 0\x7f 0"] * 12])
@settings(max_examples=50)
@given(
    floats=st.lists(st.floats(min_value=0, exclude_min=True, allow_infinity=False, allow_nan=False), min_size=1),
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]))),
)
def test_any_number_and_text_survives_writing(floats: list[float], texts: list[str]) -> None:
    recipe = Recipe.model_validate(
        {
            "run": {"name": "x"},
            "data": {"source": "quickstart"},
            "optim": {"lr": min(floats[0], 100.0), "eps": min(floats[-1], 1000.0)},
            "sample": {"prompts": texts},
        }
    )
    assert recipe_from_dict(parse_yaml(dump_recipe(recipe))) == recipe
    assert parse_yaml(to_yaml({"floats": floats})) == {"floats": floats}


def test_text_that_looks_like_another_type_is_written_as_text() -> None:
    values = {"a": ["1", "1e-3", "null", "~", "true", "2024-01-01", "", " x", "- y", "#", "0x1F", "*a", "."]}
    assert parse_yaml(to_yaml(values)) == values


def accepts(schema: dict[str, Any], value: Any, root: dict[str, Any]) -> bool:  # noqa: PLR0911
    """A small JSON Schema validator: the keywords that the recipe's schema uses, others fail."""
    known = {"$ref", "$defs", "anyOf", "enum", "const", "type", "properties", "required", "additionalProperties"}
    known |= {"prefixItems", "items", "minItems", "maxItems", "minimum", "maximum", "exclusiveMinimum"}
    known |= {"exclusiveMaximum", "pattern", "minLength", "maxLength", "title", "description", "default"}
    assert schema.keys() <= known, schema.keys() - known
    if "$ref" in schema:
        return accepts(root["$defs"][schema["$ref"].rpartition("/")[2]], value, root)
    if "anyOf" in schema:
        return any(accepts(each, value, root) for each in schema["anyOf"])
    types = {"string": str, "boolean": bool, "null": type(None), "array": list, "object": dict, "integer": int}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    kind = schema["type"]
    fits = number if kind == "number" else isinstance(value, types[kind]) and (kind != "integer" or number)
    if not fits or ("enum" in schema and value not in schema["enum"]):
        return False
    if number:
        return bool(
            schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
            and schema.get("exclusiveMinimum", -math.inf) < value < schema.get("exclusiveMaximum", math.inf)
        )
    if isinstance(value, list):
        items = schema.get("prefixItems", [schema.get("items", {})] * len(value))
        length = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", math.inf)
        return length and all(accepts(each, entry, root) for each, entry in zip(items, value, strict=False))
    if isinstance(value, dict):
        known_keys = set(value) <= set(schema["properties"]) and set(schema.get("required", [])) <= set(value)
        return known_keys and all(accepts(schema["properties"][key], entry, root) for key, entry in value.items())
    return True


def test_the_json_schema_accepts_every_shipped_recipe_and_refuses_mistakes() -> None:
    schema = recipe_json_schema()
    recipes = sorted(Path(__file__).parents[2].glob("recipes/*.yaml"))
    assert recipes
    for path in recipes:
        values = parse_yaml(path.read_text())
        assert accepts(schema, values, schema), path
        assert accepts(schema, recipe_to_dict(load_recipe(path).resolved()), schema)
        assert not accepts(schema, {**values, "optimizer": {}}, schema)
        assert not accepts(schema, {**values, "optim": {"lr": "1e-3"}}, schema)
        assert not accepts(schema, {**values, "trainer": {"max_steps": 0}}, schema)
        assert not accepts(schema, {**values, "trainer": {"precision": "fp16"}}, schema)
        assert accepts(schema, {**values, "model": {"custom_G_type": None}}, schema)


def test_the_json_schema_describes_the_sections_and_their_less_obvious_keys() -> None:
    definitions = recipe_json_schema()["$defs"]
    assert all(definition["description"] for definition in definitions.values())
    assert "Peak learning rate" in definitions["OptimSection"]["properties"]["lr"]["description"]


@pytest.mark.parametrize(
    ("section", "overrides", "rows"),
    [
        ("{batch_size: 16, validation_batches: 8}", [], 128),
        ("{batch_size: 16, devices: 2, validation_batches: 8}", [], 64),
        ("{batch_size: 16, micro_batch_size: 2, validation_batches: 8}", [], 16),
        # The file's key keeps its meaning, whatever micro-batch and number of devices a start chooses.
        ("{batch_size: 16, validation_batches: 8}", ["trainer.micro_batch_size=2"], 128),
        ("{batch_size: 16, validation_batches: 8}", ["trainer.devices=2", "data.num_workers=0"], 128),
        ("{batch_size: 16, validation_batches: 8}", ["trainer.validation_rows=5"], 5),
        ("{batch_size: 16, validation_rows: 8}", ["trainer.validation_batches=3", "trainer.micro_batch_size=4"], 12),
        ("{validation_batches: 2}", [], 64),
    ],
)
def test_validation_batches_are_read_as_rows_and_said(
    file: Path, section: str, overrides: list[str], rows: int
) -> None:
    file.write_text(TEXT + f"trainer: {section}\n")
    notices: list[str] = []
    recipe = load_recipe(file, overrides, notices.append)
    assert recipe.trainer.validation_rows == rows
    assert len(notices) == 1
    if overrides != ["trainer.validation_rows=5"]:
        assert f"read as trainer.validation_rows={rows}" in notices[0]
    assert load_recipe(file, ["trainer.validation_rows=5"], notices.append).trainer.validation_rows == 5


def test_a_saved_recipe_with_validation_batches_is_read(file: Path) -> None:
    values = recipe_to_dict(load_recipe(file).resolved())
    assert (values["trainer"].pop("validation_rows"), values["trainer"]["micro_batch_size"]) == (32_000, 32)
    values["trainer"]["validation_batches"] = 10
    assert recipe_from_dict(values).trainer.validation_rows == 320


def test_wrong_validation_batches_are_refused(file: Path) -> None:
    file.write_text(TEXT + "trainer: {validation_batches: 8, validation_rows: 9}\n")
    assert "trainer.validation_batches=8: replaced by trainer.validation_rows=9, which is set too" in refused(file)
    for wrong in ("0", "true", "1.5", "x", "null"):
        file.write_text(TEXT + f"trainer: {{validation_batches: {wrong}}}\n")
        assert "must be a whole number of at least 1" in refused(file)
    file.write_text(TEXT + "trainer: {validation_batches: 8, batch_size: none}\n")
    assert "trainer.batch_size=none: must be a whole number" in refused(file)


def test_the_home_in_paths_is_the_users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        "run: {name: x, dir: ~/runs}\ndata: {source: parquet, path: '~/corpus/*.parquet', cache_dir: a~b}\n"
    )
    recipe = load_recipe(path, ["data.tokenizer=~/t.model"])
    assert (recipe.run.dir, recipe.data.path) == (f"{tmp_path}/runs", f"{tmp_path}/corpus/*.parquet")
    assert (recipe.data.tokenizer, recipe.data.cache_dir) == (f"{tmp_path}/t.model", "a~b")
    assert all(key in recipe_keys() for key in PATH_KEYS)


@pytest.mark.parametrize(("override", "message"), [
    ("optim.lr=1e308", "optim.lr=1e+308: must be at most 100.0"),
    ("trainer.threads=100000", "trainer.threads=100000: must be at most 4,096"),
    ("parallel.timeout_s=1e300", "must be at most 2,592,000"),
    ("model.num_denseA=1000000000000", "must be at most 1,000"),
    ("model.num_hidden_layers=10000", "model.num_hidden_layers * model.num_reslayerA * model.num_denseA"),
    ("model.head_dim=1000000", "more than 1,048,576, the widest model"),
    ("trainer.max_steps=9223372036854775808", "must be at most 1,000,000,000"),
    ("optim.lr=1" + "0" * 400, "optim.lr=1000"),
    ("sample.temperature=1e-40", "must be 0 (the likeliest token), or 1e-06 and more"),
    ("sample.prompts=[" + "x" * 100_001 + "]", "has 100,001 characters; shorten it to 100,000 at most"),
    ('run.dir="a\\0b"', "holds a NUL character"),
    ('sample.prompts="\\ud83d"', "half of a character"),
])  # fmt: skip
def test_extreme_values_are_refused_in_words(override: str, message: str, file: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        load_recipe(str(file), [override])
    assert message in str(raised.value)
    assert len(str(raised.value)) < 1000


def test_halves_of_characters_are_refused_wherever_a_recipe_comes_from(file: Path) -> None:
    assert load_recipe(str(file), ['sample.prompts=["\\ud83d\\ude00"]']).sample.prompts == ("\U0001f600",)
    values = recipe_to_dict(load_recipe(str(file)))
    with pytest.raises(RecipeError, match="holds half of a character"):
        recipe_from_dict({**values, "sample": {"prompts": ["\ud83d"]}})
