"""What is damaged, does not fit or would be lost is refused with one clear error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pldr_train.building import empty_model, model_config
from pldr_train.cli import main
from pldr_train.curvature.files import read_curvature
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.errors import CheckpointError, DataError
from pldr_train.model import PldrllmForCausalLM, PldrllmTokenizer
from pldr_train.model.published_layout import to_published
from pldr_train.models.exporting import export_run
from pldr_train.models.extract_g import load_tokenizer_of, load_with_tokenizer
from pldr_train.models.importing import ImportOptions, import_curvature, import_model
from pldr_train.models.loading import find_checkpoint, load_model
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.weights import given_weights
from tests.models.conftest import PROMPT, Trained
from tests.tiny import WORDS, tiny_values
from tests.unit.model_cases import small_model

QUERY = "decoder.dec_layers.0.mha1.wq.weight"
METRIC = "decoder.dec_layers.0.mha1.plgatt_layer.Wlst"
PREDEFINED = "decoder.past_G_values"


def changed(folder: Path, target: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """A copy of a model's folder with other weights, or with other values in its config.json."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    values = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(values | config))
    return target


def error_of(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one message of a command that fails on wrong input."""
    assert main([str(argument) for argument in arguments]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def without_rows(count: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        for name in ("decoder.embedding.weight", "final_layer.weight", "final_layer.bias"):
            tensors[name] = tensors[name][:-count].clone()

    return change


def test_a_model_of_which_a_tensor_is_missing_is_refused_not_filled_up(trained: Trained, tmp_path: Path) -> None:
    folder = changed(trained.export, tmp_path / "model", lambda tensors: tensors.pop(QUERY))
    with pytest.raises(
        CheckpointError, match=r"1 tensors are missing, the first is decoder\.layers\.0\.attention\.query"
    ):
        load_model(folder)
    values = tiny_values(trained.folder, tmp_path, model={"init_from": str(folder)})
    recipe = recipe_from_dict(values).resolved()
    with pytest.raises(DataError, match=r"model\.init_from=.*1 tensors are missing"):
        given_weights(empty_model(model_config(recipe)), recipe)
    head = tmp_path / "decoder"
    load_model(trained.export).decoder.save_pretrained(head)
    with pytest.raises(
        CheckpointError, match=r"2 tensors are missing, the first is lm_head.*saved with its language head"
    ):
        load_model(head)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensor: tensor.int(), f"{QUERY} holds I32, and weights are floating-point"),
    (lambda tensor: tensor > 0, f"{QUERY} holds BOOL, and weights are floating-point"),
    (lambda tensor: tensor * float("nan"), "holds values that are not finite"),
])  # fmt: skip
def test_a_folder_of_other_numbers_is_not_imported(
    change: Callable[[Tensor], Tensor],
    message: str,
    trained: Trained,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def one(tensors: dict[str, Tensor]) -> None:
        tensors[QUERY] = change(tensors[QUERY]).contiguous()

    source = changed(trained.export, tmp_path / "source", one)
    assert message in error_of(capsys, "import", source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_other_sizes_than_the_configuration_are_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="other sizes than its config.json says"):
        load_model(changed(trained.export, tmp_path / "model", without_rows(20)))


def test_another_architecture_is_not_read_as_a_model_of_the_default_sizes(trained: Trained, tmp_path: Path) -> None:
    folder = changed(trained.export, tmp_path / "model", lambda _: None, model_type="llama")
    with pytest.raises(CheckpointError, match="model_type='llama', not 'pldrllm'; name a PLDR-LLM"):
        load_model(folder)
    for content in ("{", "[1]", ""):
        (folder / "config.json").write_text(content)
        with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
            load_model(folder)


@pytest.mark.parametrize("kind", ["identity", "random", "external"])
def test_a_predefined_g_that_is_missing_or_unset_is_refused_unless_it_is_the_identity(
    kind: str, tmp_path: Path
) -> None:
    model = small_model(custom_G_type=kind)
    model.save_pretrained(tmp_path / "unset")
    state = {name: tensor for name, tensor in model.state_dict().items() if "predefined" not in name}
    model.save_pretrained(tmp_path / "missing", state_dict=state)
    if kind == "identity":
        assert torch.equal(
            load_model(tmp_path / "missing").decoder.predefined_outputs, model.decoder.predefined_outputs
        )
        return
    with pytest.raises(CheckpointError, match=r"2 tensors are missing, the first is decoder\.predefined_is_set"):
        load_model(tmp_path / "missing")
    if kind == "external":
        with pytest.raises(CheckpointError, match=r"custom_G_type='external', but its G was never set"):
            load_model(tmp_path / "unset")


def test_a_tokenizer_with_more_pieces_than_the_model_is_refused(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(trained.export, tmp_path / "model", without_rows(20), vocab_size=300)
    message = error_of(capsys, "extract-g", folder, tmp_path / "G.safetensors", "--text", PROMPT)
    assert "the tokenizer has 320 pieces, the model's vocabulary only 300" in message
    message = error_of(capsys, "generate", folder, PROMPT)
    assert "the tokenizer has 320 pieces, the model's vocabulary only 300" in message


def test_ids_stand_for_a_text_and_must_be_in_the_vocabulary(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    by_text, by_ids = tmp_path / "text.safetensors", tmp_path / "ids.safetensors"
    assert main(["extract-g", str(trained.export), str(by_text), "--text", PROMPT]) == 0
    with safe_open(by_text, framework="pt") as file:
        metadata = file.metadata()
    bare = changed(trained.export, tmp_path / "bare", lambda _: None)
    for name in ("tokenizer.json", "tokenizer.model"):
        (bare / name).unlink()
    assert "has no tokenizer" in error_of(capsys, "extract-g", bare, by_ids, "--text", PROMPT)
    ids = [str(index) for index in load_tokenizer_of(trained.export)(PROMPT)["input_ids"]]
    assert main(["extract-g", str(bare), str(by_ids), "--ids", *ids]) == 0
    assert torch.equal(load_file(by_ids)["G"], load_file(by_text)["G"])
    with safe_open(by_ids, framework="pt") as file:
        assert file.metadata()["ids_sha256"] == metadata["ids_sha256"]
    message = error_of(capsys, "extract-g", bare, tmp_path / "c.safetensors", "--ids", "5", "320")
    assert "--ids: 320 is no id of this model's vocabulary; use 0 to 319" in message


def test_a_file_of_g_replaces_another_on_request_only(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = shutil.copyfile(trained.export / "tokenizer.model", tmp_path / "tokenizer.model")
    before = tokenizer.read_bytes()
    extract = ("extract-g", trained.export)
    assert "ends in .safetensors" in error_of(capsys, *extract, tokenizer, "--text", PROMPT, "--overwrite")
    assert tokenizer.read_bytes() == before
    assert "is a folder" in error_of(capsys, *extract, tmp_path, "--text", PROMPT)
    path = tmp_path / "G.safetensors"
    assert main([str(each) for each in (*extract, path, "--text", PROMPT)]) == 0
    before = path.read_bytes()
    assert "exists; name another file, or pass --overwrite" in error_of(capsys, *extract, path, "--text", "the")
    with pytest.raises(DataError, match="exists; name another file"):
        import_curvature(path, path)
    assert path.read_bytes() == before
    assert main([str(each) for each in (*extract, path, "--text", "the", "--overwrite")]) == 0
    assert path.read_bytes() != before


def test_a_folder_with_anything_beside_a_model_is_never_replaced(trained: Trained, tmp_path: Path) -> None:
    target = tmp_path / "model"
    shutil.copytree(trained.export, target)
    export_run(trained.run, target, overwrite=True)
    for name in (".git", "notes.txt", "figures"):
        mine = target / name
        mine.mkdir() if "." not in name[1:] else mine.write_text("mine")
        with pytest.raises(DataError, match=rf"holds {name} beside the model, so it is not replaced"):
            export_run(trained.run, target, overwrite=True)
        assert mine.exists()
        mine.rmdir() if mine.is_dir() else mine.unlink()


def test_an_empty_folder_is_filled(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    export_run(trained.run, tmp_path / "model")
    assert load_model(tmp_path / "model").config.vocab_size == 320
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_weights_beyond_half_precision_are_refused(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = find_checkpoint(trained.run)
    assert checkpoint is not None
    large = checkpoint.load_model()
    with torch.no_grad():
        large.lm_head.bias[3] = 70_000.0
    monkeypatch.setattr(type(checkpoint), "load_model", lambda _: large)
    with pytest.raises(
        DataError, match=r"--dtype fp16: lm_head\.bias holds values that are not finite in it; use fp32"
    ):
        export_run(trained.run, tmp_path / "half", dtype="fp16")
    assert not (tmp_path / "half").exists()


# Files of the original code.


def pth(path: Path, **changes: Tensor) -> Path:
    state = to_published(small_model().state_dict())
    assert changes.keys() <= {"query", "metric", "embedding", "other"}
    names = {"query": QUERY, "metric": METRIC, "embedding": "decoder.embedding.weight", "other": "no.such.part"}
    torch.save({"model_state_dict": state | {names[name]: tensor for name, tensor in changes.items()}}, path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": torch.zeros(4)}, r"Wlst has shape \(4,\), and it must have 3 axes"),
        ({"embedding": torch.zeros(4)}, r"embedding.weight has shape \(4,\), and it must have 2 axes"),
        ({"metric": torch.zeros(3, 8, 8)}, r"do not fit together: hidden_size=16 must equal .* 3 \* 8"),
        ({"query": torch.zeros(3, 3)}, r"do not fit a PLDR-LLM of the sizes they have: .*query.weight"),
        ({"other": torch.zeros(3)}, r'do not fit a PLDR-LLM .*"no.such.part"'),
    ],
)
def test_tensors_that_make_no_model_are_refused(tmp_path: Path, changes: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        import_model(pth(tmp_path / "model.pth", **changes), tmp_path / "model")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "model").exists()


def test_a_configuration_says_what_the_weights_do_not(tmp_path: Path) -> None:
    source, values = pth(tmp_path / "model.pth"), {"layer_norm_eps": 1e-5, "rope_theta": 500.0, "eos_token_id": 7}
    (tmp_path / "config.json").write_text(json.dumps(values | {"num_hidden_layers": 2, "max_position_embeddings": 64}))
    for given in (tmp_path, tmp_path / "config.json"):
        options = ImportOptions(config_file=given, reference_rope=False, overwrite=True)
        config = import_model(source, tmp_path / "model", options)
        assert (config.layer_norm_eps, config.rope_theta, config.eos_token_id) == (1e-5, 500.0, 7)
        assert (config.max_position_embeddings, config.reference_rope) == (64, False)
    loaded = load_model(tmp_path / "model").config
    assert (loaded.layer_norm_eps, loaded.rope_theta, loaded.max_position_embeddings) == (1e-5, 500.0, 64)
    plain = import_model(source, tmp_path / "plain")
    assert (plain.layer_norm_eps, plain.rope_theta, plain.eos_token_id) == (1e-6, 10_000.0, 3)
    assert (plain.max_position_embeddings, plain.reference_rope) == (1024, True)


def test_what_is_said_beside_the_weights_must_fit_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target, config = pth(tmp_path / "model.pth"), tmp_path / "model", tmp_path / "c.json"
    config.write_text(json.dumps({"vocab_size": 41, "num_hidden_layers": 3}))
    message = error_of(capsys, "import", source, target, "--config", config)
    assert "vocab_size=41 (the weights say 40), num_hidden_layers=3 (the weights say 2)" in message
    for content, expected in (("{", "cannot be read as JSON"), ("[]", "holds no configuration")):
        config.write_text(content)
        assert expected in error_of(capsys, "import", source, target, "--config", config)
    config.write_text('{"max_position_embeddings": 0}')
    assert "--context-length 0: must be at least 1" in error_of(capsys, "import", source, target, "--config", config)
    assert "is a folder without .metadata and config.json; name a .pth" in error_of(capsys, "import", tmp_path, target)
    (tmp_path / "text.pth").write_text("these are not the weights you are looking for")
    assert "text.pth is no whole safetensors file" in error_of(capsys, "import", tmp_path / "text.pth", target)
    assert not target.exists()


def test_a_folder_of_g_is_read_from_the_published_buffer_alone(tmp_path: Path) -> None:
    small_model(custom_G_type="random").save_pretrained(tmp_path / "random")
    model = PldrllmForCausalLM.from_pretrained(tmp_path / "random")
    assert torch.equal(read_curvature(tmp_path / "random")["G"], model.decoder.predefined_curvature)
    flat = changed(
        tmp_path / "random", tmp_path / "flat", lambda tensors: tensors.update({PREDEFINED: torch.zeros(2, 8, 8)})
    )
    with pytest.raises(
        DataError, match=r"past_G_values has shape \(2, 8, 8\); it must be \(layers, 3, 1, heads, d, d\)"
    ):
        read_curvature(flat)
    with pytest.raises(DataError, match="a folder without config.json; give a file with G, or a model's folder"):
        read_curvature(tmp_path)


# Tokenizers of other kinds than the papers'.


def test_generation_never_chooses_an_id_that_the_tokenizer_lacks(trained: Trained, tmp_path: Path) -> None:
    smaller = train_tokenizer([" ".join(WORDS)] * 50, tmp_path / "smaller.model", 300)
    export_run(trained.run, tmp_path / "model", tokenizer_file=smaller)
    model, tokenizer = load_with_tokenizer(tmp_path / "model")
    assert len(tokenizer) == 300
    with torch.no_grad():
        model.lm_head.bias[300:] = 100.0
    inputs = tokenizer([PROMPT], return_tensors="pt")
    for sampling in ({"do_sample": False}, {"do_sample": True}):
        generated = model.generate(**inputs, max_new_tokens=8, **sampling)
        assert int(generated.max()) < 300
        assert tokenizer.decode(generated[0], skip_special_tokens=True).startswith(PROMPT)
    assert model.generation_config.suppress_tokens == list(range(300, 320))
    assert load_with_tokenizer(trained.export)[0].generation_config.suppress_tokens is None


def test_a_tokenizer_that_is_no_unigram_model_is_exported_for_the_slow_class(trained: Trained, tmp_path: Path) -> None:
    specials = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[START]", "eos": "[END]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(WORDS)] * 50), model_prefix=str(tmp_path / "bpe"), vocab_size=320,
        model_type="bpe", byte_fallback=True, hard_vocab_limit=False, control_symbols=["[SEP]", "[CLS]"],
        minloglevel=2, **{f"{name}_id": index for index, name in enumerate(specials)},
        **{f"{name}_piece": piece for name, piece in specials.items()},
    )  # fmt: skip
    export_run(trained.run, tmp_path / "model", tokenizer_file=tmp_path / "bpe.model")
    _, tokenizer = load_with_tokenizer(tmp_path / "model")
    assert type(tokenizer) is PldrllmTokenizer
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "bpe.model"))
    assert tokenizer(PROMPT)["input_ids"] == reference.encode(PROMPT)
    config = json.loads((tmp_path / "model" / "tokenizer_config.json").read_text())
    assert config["auto_map"] == {"AutoTokenizer": ["tokenization_pldrllm.PldrllmTokenizer", None]}
