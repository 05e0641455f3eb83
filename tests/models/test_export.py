"""An exported model: bit for bit the run's, loadable by transformers alone, whole or not there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, pipeline

from pldr_train.checkpoint.manifest import STATE_FILE
from pldr_train.checkpoint.shards import WEIGHTS, file_name
from pldr_train.cli import main
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.errors import CheckpointError, DataError, RecipeError, UserError
from pldr_train.fit import fit
from pldr_train.model import PldrllmForCausalLM, PldrllmModel, PldrllmTokenizerFast
from pldr_train.models import exporting
from pldr_train.models.exporting import export_run
from pldr_train.models.loading import find_checkpoint, load_model
from pldr_train.parameter_sets import matches
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.module import PldrllmModule
from tests.models.conftest import PROMPT, Trained
from tests.tiny import WORDS, tiny_values, write_corpus, write_tokenizer


def trained_weights(trained: Trained) -> dict[str, torch.Tensor]:
    # Not through our own reader, which the export uses.
    return load_file(trained.run / "checkpoints" / "last" / file_name(WEIGHTS, 0, 1))


def test_the_exported_weights_are_the_trained_ones_bit_for_bit(trained: Trained) -> None:
    expected = trained_weights(trained)
    loaded = AutoModelForCausalLM.from_pretrained(trained.export)
    assert type(loaded) is PldrllmForCausalLM
    assert loaded.state_dict().keys() == expected.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    on_disk = load_file(trained.export / "model.safetensors")
    assert "decoder.dec_layers.1.mha1.plgatt_layer.pwlst" in on_disk
    assert "final_layer.weight" in on_disk
    assert type(AutoModel.from_pretrained(trained.export)) is PldrllmModel


@pytest.mark.parametrize("kind", ["model", "run", "checkpoint"])
def test_a_run_with_init_from_begins_with_exactly_those_weights(trained: Trained, tmp_path: Path, kind: str) -> None:
    source = {"model": trained.export, "run": trained.run, "checkpoint": trained.run / "checkpoints" / "last"}[kind]
    values = tiny_values(trained.folder, tmp_path, model={"init_from": str(source)})
    module = PldrllmModule(recipe_from_dict(values))
    module.configure_model()
    expected = trained_weights(trained)
    state = module.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
    assert module.model.training
    assert all(parameter.requires_grad for parameter in module.model.parameters())


def built_from(trained: Trained, tmp_path: Path, **model: object) -> dict[str, torch.Tensor]:
    values = tiny_values(trained.folder, tmp_path, model={"init_from": str(trained.export), "init": "legacy"} | model)
    module = PldrllmModule(recipe_from_dict(values))
    module.configure_model()
    return dict(module.model.named_parameters())


@pytest.mark.parametrize("only", ["generator", ["body"], ["embedding", "*.layers.0.attention.value.*"]])
def test_a_run_takes_the_named_parts_and_draws_the_others(trained: Trained, tmp_path: Path, only: object) -> None:
    whole, state = trained_weights(trained), built_from(trained, tmp_path, init_from_only=only)
    fresh = PldrllmModule(recipe_from_dict(tiny_values(trained.folder, tmp_path, model={"init": "legacy"})))
    fresh.configure_model()
    patterns = [only] if isinstance(only, str) else only
    taken = {name for name in state if matches(name, patterns)}  # type: ignore[arg-type]
    assert 0 < len(taken) < len(state)
    for name, tensor in state.items():
        expected = whole[name] if name in taken else fresh.model.get_parameter(name)
        assert torch.equal(tensor, expected), name


def test_only_the_parts_that_are_taken_must_have_the_same_sizes(trained: Trained, tmp_path: Path) -> None:
    """The metric learner does not depend on the number of heads; the power law does."""
    whole = trained_weights(trained)
    state = built_from(trained, tmp_path, num_attention_heads=3, init_from_only="metric_learner")
    learner = [name for name in state if matches(name, ["metric_learner"])]
    assert len(learner) == 2 * 2 * (2 * 6 + 2)
    assert all(torch.equal(state[name], whole[name]) for name in learner)
    with pytest.raises(
        RecipeError, match=r'in what model\.init_from_only=\["generator"\] takes of it \(10 tensors differ.*power_law'
    ):
        built_from(trained, tmp_path, num_attention_heads=3, init_from_only="generator")


def test_a_model_with_a_predefined_g_takes_the_body_of_one_with_a_learned_g(trained: Trained, tmp_path: Path) -> None:
    values = tiny_values(
        trained.folder, tmp_path, dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        model={"init_from": str(trained.export), "init_from_only": "body", "custom_G_type": "identity"},
    )  # fmt: skip
    module = PldrllmModule(recipe_from_dict(values))
    module.configure_model()
    whole = trained_weights(trained)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in module.model.named_parameters())
    assert torch.equal(module.model.decoder.predefined_curvature, torch.eye(8).expand(2, 2, 8, 8))


def test_a_part_that_names_no_parameter_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model\.init_from_only: 'generators' matches no parameter.*generator, body"):
        built_from(trained, tmp_path, init_from_only=["body", "generators"])


def test_a_pipeline_continues_a_prompt_as_the_documentation_shows(trained: Trained) -> None:
    generate = pipeline(task="text-generation", model=str(trained.export), device="cpu")
    options = {"top_p": 0.6, "top_k": 0, "temperature": 1, "do_sample": True, "max_new_tokens": 10}
    output = generate(PROMPT, **options)
    assert output[0]["generated_text"].startswith(PROMPT)

    model = AutoModelForCausalLM.from_pretrained(
        pretrained_model_name_or_path=str(trained.export), device_map="cpu", trust_remote_code=True
    )
    tokenizer = AutoTokenizer.from_pretrained(
        pretrained_model_name_or_path=str(trained.export), add_eos_token=False, Legacy=False, trust_remote_code=True
    )
    assert type(model) is PldrllmForCausalLM
    assert type(tokenizer).__name__ == "PldrllmTokenizerFast"
    assert type(AutoTokenizer.from_pretrained(trained.export)) is PldrllmTokenizerFast
    inputs = tokenizer([PROMPT], return_tensors="pt").to(device="cpu")
    generated_ids = model.generate(**inputs, **options, use_cache=True)
    assert tokenizer.decode(generated_ids[0], skip_special_tokens=True).startswith(PROMPT)
    batched = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
    greedy = {"do_sample": False, "max_new_tokens": 6}
    together = [each[0]["generated_text"] for each in batched([PROMPT, "the"], **greedy)]
    alone = [batched(text, **greedy)[0]["generated_text"] for text in (PROMPT, "the")]
    assert together == alone
    assert pipeline("text-generation", model=str(trained.export), device_map="auto")(PROMPT, **greedy)


def test_the_folder_holds_everything(trained: Trained) -> None:
    config = json.loads((trained.export / "config.json").read_text())
    assert config["auto_map"]["AutoModelForTokenClassification"] == "modeling_heads.PldrllmForTokenClassification"
    for reference in config["auto_map"].values():
        assert (trained.export / f"{reference.split('.')[0]}.py").is_file()
    generation = json.loads((trained.export / "generation_config.json").read_text())
    assert (generation["bos_token_id"], generation["eos_token_id"], generation["pad_token_id"]) == (3, 3, 0)
    assert json.loads((trained.export / "config.json").read_text())["bos_token_id"] == 2
    assert generation["use_cache"] is True
    assert AutoTokenizer.from_pretrained(trained.export).model_max_length == 32
    assert AutoConfig.from_pretrained(trained.export).max_position_embeddings == 32
    assert {path.stat().st_mode & 0o777 for path in trained.export.iterdir()} == {0o644}


def test_generation_without_a_prompt_begins_after_the_end_of_a_document(trained: Trained) -> None:
    model = AutoModelForCausalLM.from_pretrained(trained.export)
    found = model.generate(max_new_tokens=5, do_sample=False)
    assert found[0, 0] == 3
    assert torch.equal(found, model.generate(torch.tensor([[3]]), max_new_tokens=5, do_sample=False))


def test_a_run_keeps_the_tokenizer_it_was_trained_with(trained: Trained, tmp_path: Path) -> None:
    own = write_tokenizer(tmp_path / "tokenizer.model", write_corpus(tmp_path / "corpus"))
    values = tiny_values(tmp_path, tmp_path / "runs", trainer={"max_steps": 4}, optim={"warmup_steps": 1})
    outcome = fit(recipe_from_dict(values))
    before = own.read_bytes()
    assert (outcome.folder / "tokenizer.model").read_bytes() == before
    train_tokenizer([" ".join(WORDS)] * 50, own, 310)
    longer = tiny_values(tmp_path, tmp_path / "runs", trainer={"max_steps": 6}, optim={"warmup_steps": 1})
    with pytest.raises(UserError, match="tokenizer"):
        fit(recipe_from_dict(longer))
    assert (outcome.folder / "tokenizer.model").read_bytes() == before
    export_run(outcome.folder, tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == before


def test_the_card_holds_recipe_and_metrics(trained: Trained) -> None:
    card = (trained.export / "README.md").read_text()
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["pipeline_tag"] == "text-generation"
    recipe = yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])
    assert recipe["optim"]["lr"] == 2e-3
    lines = [json.loads(line) for line in (trained.run / "metrics.jsonl").read_text().splitlines()]
    last = next(line["val/cross_entropy"] for line in reversed(lines) if "val/cross_entropy" in line)
    assert (
        f"meaning |\n|---|---|---|---|\n| `val/cross_entropy` | {last:,.6g} | nat/token | block cross-entropy" in card
    )
    assert "At step 12 of run `tiny`" in card
    assert "tokens_per_s" not in card


def test_an_earlier_checkpoint_has_the_metrics_of_its_time(trained: Trained, tmp_path: Path) -> None:
    earlier = find_checkpoint(trained.run / "checkpoints" / "step-00000006")
    assert earlier is not None
    export_run(earlier.folder, tmp_path / "early")
    card = (tmp_path / "early" / "README.md").read_text()
    assert "At step 6 of run" in card
    first, second = (load_file(path / "model.safetensors") for path in (tmp_path / "early", trained.export))
    assert any(not torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_weights_can_be_rounded(trained: Trained, tmp_path: Path, dtype: str, expected: torch.dtype) -> None:
    assert main(["export", str(trained.run), str(tmp_path / dtype), "--dtype", dtype]) == 0
    weights, full = load_file(tmp_path / dtype / "model.safetensors"), load_file(trained.export / "model.safetensors")
    assert all(torch.equal(tensor, full[name].to(expected)) for name, tensor in weights.items())


def test_importing_the_package_registers_every_auto_class(trained: Trained) -> None:
    code = """
import sys, pldr_train, transformers
for name in ("", "ForCausalLM", "ForSequenceClassification", "ForQuestionAnswering", "ForTokenClassification"):
    print(type(getattr(transformers, f"AutoModel{name}").from_pretrained(sys.argv[1])).__module__)
print(type(transformers.AutoConfig.from_pretrained(sys.argv[1])).__module__)
print(type(transformers.AutoTokenizer.from_pretrained(sys.argv[1])).__module__)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code, trained.export], capture_output=True, text=True, check=True, cwd=trained.folder
    )
    modules = shown.stdout.split()
    assert len(modules) == 7
    assert all(module.startswith("pldr_train.model.") for module in modules)


SCRIPT = """
import json, sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer, pipeline
import importlib.util, torch
for name in ("pldr_train", "sentencepiece", "lightning", "datasets", "accelerate"):
    assert importlib.util.find_spec(name) is None, name
folder, again, prompt = sys.argv[1:]
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer([prompt], return_tensors="pt")
with torch.no_grad():
    logits = model(**ids).logits
generated = model.generate(**ids, max_new_tokens=8, do_sample=False)
text = pipeline("text-generation", model=folder, trust_remote_code=True)(prompt, max_new_tokens=8, do_sample=False)
head = AutoModelForTokenClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
model.save_pretrained(again)
print(json.dumps({
    "class": type(model).__module__, "tokenizer": type(tokenizer).__name__, "ids": ids["input_ids"].tolist(),
    "logits": logits.tolist(), "generated": generated.tolist(), "text": text[0]["generated_text"],
    "head": list(head(**ids).logits.shape),
}))
"""
ONLY = ("pldr_train", "__editable__", "sentencepiece", "lightning", "pytorch_lightning", "datasets", "accelerate")


@pytest.mark.slow
def test_it_loads_where_only_torch_and_transformers_are_installed(trained: Trained, tmp_path: Path) -> None:
    """In an environment of its own, into which everything but the named packages is linked."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    target = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    for package in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not package.name.startswith(ONLY) and package.suffix != ".pth":
            (target / package.name).symlink_to(package)
    environment = {
        "PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    shown = subprocess.run(
        [tmp_path / "env" / "bin" / "python", "-c", SCRIPT, trained.export, tmp_path / "again", PROMPT],
        capture_output=True, text=True, cwd=tmp_path, env=environment, check=False,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    found = json.loads(shown.stdout.strip().splitlines()[-1])

    assert found["class"].startswith("transformers_modules.")
    assert found["tokenizer"] == "PldrllmTokenizerFast"
    model, tokenizer = load_model(trained.run), AutoTokenizer.from_pretrained(trained.export)
    ids = tokenizer([PROMPT], return_tensors="pt")
    assert found["ids"] == ids["input_ids"].tolist()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.no_grad():
        logits = model(**ids).logits
    torch.set_num_threads(threads)
    assert torch.equal(torch.tensor(found["logits"]), logits)
    generated = model.generate(**ids, max_new_tokens=8, do_sample=False)
    assert found["generated"] == generated.tolist()
    assert found["text"] == tokenizer.decode(generated[0], skip_special_tokens=True)
    assert found["head"] == [1, ids["input_ids"].shape[1], 3]
    # Saved again from there, the weights have the published names and the same values.
    again, first = (load_file(path / "model.safetensors") for path in (tmp_path / "again", trained.export))
    assert again.keys() == first.keys()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())


def test_a_folder_is_replaced_on_request_only_and_never_half(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "export"
    shutil.copytree(trained.export, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    with pytest.raises(DataError, match=r"export exists and is not empty; .* --overwrite"):
        export_run(trained.run, target)

    def fail(*_: object) -> str:
        raise RuntimeError("the power is off")

    with monkeypatch.context() as broken:
        broken.setattr(exporting, "model_card", fail)
        with pytest.raises(RuntimeError, match="the power is off"):
            export_run(trained.run, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    export_run(trained.run, target, dtype="bf16", overwrite=True)
    assert (target / "model.safetensors").stat().st_size < len(before["model.safetensors"])
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"meow")
    with pytest.raises(DataError, match="holds no model"):
        export_run(trained.run, tmp_path / "photos", overwrite=True)


def test_bad_input_is_one_clear_error(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "holds no run and no checkpoint; name a folder like" in capsys.readouterr().err
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="the run has no checkpoint yet"):
        export_run(tmp_path / "run", tmp_path / "out")
    train_tokenizer([" ".join(WORDS)] * 50, tmp_path / "larger.model", 322)
    with pytest.raises(DataError, match=r"model.vocab_size=320 is less than the tokenizer's 322 pieces"):
        export_run(trained.run, tmp_path / "out", tokenizer_file=tmp_path / "larger.model")
    shutil.copytree(trained.run, tmp_path / "copy", symlinks=True)
    (tmp_path / "copy" / "tokenizer.model").rename(tmp_path / "elsewhere.model")
    hidden = trained.folder / "tokenizer.model"
    hidden.rename(hidden.with_suffix(".hidden"))
    try:
        with pytest.raises(CheckpointError, match=r"has no tokenizer.model; name .* --tokenizer FILE"):
            export_run(tmp_path / "copy", tmp_path / "out")
    finally:
        hidden.with_suffix(".hidden").rename(hidden)
    for name in (STATE_FILE, file_name(WEIGHTS, 0, 1)):
        file = tmp_path / "copy" / "checkpoints" / "step-00000012" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-100])
        with pytest.raises(CheckpointError, match=f"the checkpoint is damaged: {name}"):
            export_run(file.parent, tmp_path / "out")
        file.write_bytes(whole)
    assert not (tmp_path / "out").exists()


def test_a_corrupt_export_is_one_clear_error(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained.export, tmp_path / "export")
    weights = tmp_path / "export" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(DataError, match="its weights file is corrupt"):
        load_model(tmp_path / "export")
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    (tmp_path / "export" / "config.json").write_text(json.dumps(config | {"custom_G_type": "indentity"}))
    with pytest.raises(CheckpointError, match=r"custom_G_type='indentity' is unknown; use None .*'identity'"):
        load_model(tmp_path / "export")
    with pytest.raises(CheckpointError, match="no such folder"):
        load_model(tmp_path / "none")
