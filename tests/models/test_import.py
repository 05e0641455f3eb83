"""Files of the original code: checkpoints and pickled G come in, and nothing in them is ever executed."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from pldr_train.building import model_config
from pldr_train.cli import main
from pldr_train.curvature.files import read_curvature
from pldr_train.errors import CheckpointError, DataError, RecipeError, UserError
from pldr_train.fit import fit
from pldr_train.model import PldrllmForCausalLM
from pldr_train.models.extract_g import deductive_tensors, load_tokenizer_of
from pldr_train.models.importing import ImportOptions, import_model, is_model_checkpoint
from pldr_train.models.loading import load_model
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.weights import set_predefined_curvature
from tests.conftest import Golden
from tests.models.conftest import PROMPT, Trained
from tests.parity.golden_model import without_plga
from tests.parity.tolerances import assert_tensors_close
from tests.tiny import tiny_values
from tests.unit.model_cases import small_model, token_ids


def write_pth(path: Path, weights: dict[str, Tensor], prefix: str = "", **options: Any) -> Path:
    """A checkpoint as the original code writes it."""
    state = OrderedDict((prefix + name, tensor) for name, tensor in weights.items())
    torch.save({"model_state_dict": state, "loss": 3.5, "accuracy": 0.35}, path, **options)
    return path


def write_pkl(path: Path, curvature: Tensor, protocol: int = 4, tensors: int = 2) -> Path:
    """A predefined G (L, H, d, d) as the original code pickles it: bare, or with A_LM, or with A_LM and A_P."""
    layers: list[Any] = []
    for layer in curvature:
        entry = [layer[None] * 0.5, layer[None], layer[None] * 2][:tensors]
        layers.append(entry if tensors > 1 else layer[None])
    path.write_bytes(pickle.dumps(layers, protocol=protocol))
    return path


@pytest.mark.parametrize(
    ("prefix", "options"), [("", {}), ("module.", {}), ("_orig_mod.", {"_use_new_zipfile_serialization": False})]
)
def test_an_original_checkpoint_gives_the_golden_logits(
    golden: Golden, tmp_path: Path, prefix: str, options: dict[str, Any]
) -> None:
    source = write_pth(tmp_path / "model.pth", golden.group("weights"), prefix, **options)
    assert is_model_checkpoint(source)
    assert main(["import", str(source), str(tmp_path / "model"), "--context-length", "64"]) == 0
    model = load_model(tmp_path / "model")
    assert_tensors_close({"logits": model(golden["input_ids"][:, :-1]).logits}, {"logits": golden["logits"]})
    sizes = golden.sizes() | {"max_position_embeddings": 64}
    assert {name: getattr(model.config, name) for name in sizes} == sizes
    on_disk = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(on_disk[name], tensor) for name, tensor in golden.group("weights").items())


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_a_checkpoint_with_a_predefined_g_gives_the_golden_logits(golden: Golden, tmp_path: Path, kind: str) -> None:
    expected = golden.group(f"predefined_{kind}")
    source = write_pth(tmp_path / "model.pth", without_plga(golden.group("weights")))
    with pytest.raises(CheckpointError, match="has no metric learner and no G: give the predefined G .* --g FILE"):
        import_model(source, tmp_path / "model")
    pickled = write_pkl(tmp_path / "g.pkl", expected["G"], tensors=1 if kind == "random" else 3)
    assert main(["import", str(source), str(tmp_path / "model"), "--g", str(pickled)]) == 0
    model = load_model(tmp_path / "model")
    assert model.config.custom_G_type == "external"
    assert_tensors_close({"logits": model(golden["input_ids"][:, :-1]).logits}, {"logits": expected["logits"]})
    # The folder is itself a file of G for another model.
    assert torch.equal(read_curvature(tmp_path / "model")["G"], expected["G"])
    wrong = write_pkl(tmp_path / "wrong.pkl", torch.cat((expected["G"], expected["G"])))
    with pytest.raises(DataError, match=r"wrong.pkl: predefined G has shape .* this model needs"):
        import_model(source, tmp_path / "other", ImportOptions(curvature_file=wrong))
    wrong = write_pkl(tmp_path / "wrong.pkl", expected["G"][..., :4, :4])
    with pytest.raises(CheckpointError, match=r"model.pth: .*must equal num_attention_heads \* head_dim"):
        import_model(source, tmp_path / "other", ImportOptions(curvature_file=wrong))


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize(("tensors", "names"), [(1, {"G"}), (2, {"A_LM", "G"}), (3, {"A_LM", "G", "A_P"})])
def test_a_pickled_g_becomes_safetensors(tmp_path: Path, protocol: int, tensors: int, names: set[str]) -> None:
    curvature = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    source = write_pkl(tmp_path / "g.pkl", curvature, protocol, tensors)
    assert not is_model_checkpoint(source)
    assert main(["import", str(source), str(tmp_path / "G.safetensors")]) == 0
    found = load_file(tmp_path / "G.safetensors")
    expected = {"G": curvature, "A_LM": curvature * 0.5, "A_P": curvature * 2}
    assert found.keys() == names
    assert all(torch.equal(found[name], expected[name]) for name in names)


def test_a_pickled_g_whose_layers_differ_is_refused(tmp_path: Path) -> None:
    tensor = torch.ones(1, 2, 4, 4)
    for layers in ([tensor, [tensor, tensor]], [[tensor] * 4], [[]], [], [[[tensor]]]):
        (tmp_path / "g.pkl").write_bytes(pickle.dumps(layers))
        with pytest.raises(DataError, match=r"g.pkl: not a list over layers of G_LM, of \[A_LM, G_LM\] or of"):
            read_curvature(tmp_path / "g.pkl")
    (tmp_path / "g.pkl").write_bytes(pickle.dumps([tensor, torch.ones(1, 2, 6, 6)]))
    with pytest.raises(DataError, match=r"G has the shapes \[\(1, 2, 4, 4\), \(1, 2, 6, 6\)\]"):
        read_curvature(tmp_path / "g.pkl")


class Runs:
    """What pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_checkpoint_that_calls_is_refused_and_never_runs(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for options in ({}, {"_use_new_zipfile_serialization": False}):
        torch.save({"model_state_dict": Runs(os.system, f"touch {canary}")}, tmp_path / "evil.pth", **options)
        with pytest.raises(CheckpointError, match=r"evil.pth is refused: .*Nothing in it was executed"):
            import_model(tmp_path / "evil.pth", tmp_path / "model")
        assert not canary.exists()


def test_files_that_are_no_checkpoint_are_one_clear_error(tmp_path: Path, golden: Golden) -> None:
    weights = golden.group("weights")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="no model_state_dict of tensors"):
        import_model(tmp_path / "list.pth", tmp_path / "m")
    torch.save({"layer.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"no tensor 'decoder.embedding.weight'"):
        import_model(tmp_path / "other.pth", tmp_path / "m")
    missing = {name: tensor for name, tensor in weights.items() if "layernorm2" not in name}
    with pytest.raises(CheckpointError, match="its tensors do not fit a PLDR-LLM of the sizes they have"):
        import_model(write_pth(tmp_path / "missing.pth", missing), tmp_path / "m")
    whole = write_pth(tmp_path / "cut.pth", weights).read_bytes()
    (tmp_path / "cut.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"cut.pth"):
        main_raises(["import", str(tmp_path / "cut.pth"), str(tmp_path / "m")])
    with pytest.raises(DataError, match="no such file; name a .pth checkpoint, a DCP folder, "):
        is_model_checkpoint(tmp_path / "none.pth")
    assert not (tmp_path / "m").exists()


def main_raises(arguments: list[str]) -> None:
    from pldr_train.commands import import_

    import_.run(import_.build_parser().parse_args(arguments[1:]))


# G of a trained model, and back into a recipe.


def test_g_of_a_trained_model_on_a_text_drives_an_external_run(trained: Trained, tmp_path: Path) -> None:
    path = tmp_path / "G.safetensors"
    assert main(["extract-g", str(trained.run), str(path), "--text", PROMPT]) == 0
    tensors = load_file(path)
    model = load_model(trained.export)
    ids = torch.tensor([load_tokenizer_of(trained.export)(PROMPT)["input_ids"]])
    outputs = model(ids, output_deductive_outputs=True)
    assert torch.equal(tensors["G"], torch.cat([layer.curvature for layer in outputs.deductive_outputs]))
    assert torch.equal(tensors["A_P"], torch.cat([layer.potential for layer in outputs.deductive_outputs]))
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["tokens"] == str(ids.shape[1])

    # The same weights with that G as a constant give the same logits for that text.
    values = tiny_values(
        trained.folder, tmp_path / "runs", name="external", dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        model={"custom_G_type": "external", "custom_G_path": str(path)},
        trainer={"max_steps": 2}, optim={"warmup_steps": 1},
    )  # fmt: skip
    recipe = recipe_from_dict(values).resolved()
    constant = PldrllmForCausalLM(model_config(recipe)).eval()
    constant.load_state_dict(model.state_dict(), strict=False)
    set_predefined_curvature(constant, recipe)
    torch.testing.assert_close(constant(ids).logits, outputs.logits)
    outcome = fit(recipe)
    assert torch.equal(load_model(outcome.folder).decoder.predefined_curvature, tensors["G"])
    # Its own folder, exported, holds that G for the next run.
    assert main(["export", str(outcome.folder), str(tmp_path / "export")]) == 0
    assert torch.equal(read_curvature(tmp_path / "export")["G"], tensors["G"])


def test_g_with_a_causal_gram_is_that_of_the_last_chunk() -> None:
    model, ids = small_model(gram_chunk_size=4), token_ids(1, 10)
    tensors = deductive_tensors(model, ids[0].tolist())
    expected = model(ids, output_deductive_outputs=True).deductive_outputs
    assert torch.equal(tensors["G"], torch.stack([layer.curvature[0, -1] for layer in expected]))
    fixed = small_model(custom_G_type="random")
    assert torch.equal(deductive_tensors(fixed, [5, 6])["G"], fixed.decoder.predefined_curvature)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"H": torch.zeros(2, 2, 8, 8)}, r"holds \['H'\]; it must hold a tensor named 'G'"),
        ({"G": torch.zeros(3, 2, 8, 8)}, r"predefined G has shape \(3, 2, 8, 8\); this model needs .*\(2, 2, 8, 8\)"),
        ({"G": torch.zeros(2, 8, 8)}, r"G has shape \(2, 8, 8\); it must be \(layers, heads, d, d\)"),
        ({"G": torch.full((2, 2, 8, 8), torch.nan)}, "G holds values that are not finite"),
        (b"half a file", "is no whole safetensors file"),
        (None, "no such file"),
    ],
)
def test_a_g_that_does_not_fit_names_key_file_and_fix(
    trained: Trained, tmp_path: Path, content: Any, message: str
) -> None:
    path = tmp_path / "G.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        save_file(content, path)
    values = tiny_values(
        trained.folder, tmp_path, dag={"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0},
        model={"custom_G_type": "external", "custom_G_path": str(path)},
    )  # fmt: skip
    recipe = recipe_from_dict(values).resolved()
    with pytest.raises((DataError, RecipeError), match=rf"model.custom_G_path=.*G\.safetensors.*{message}"):
        set_predefined_curvature(PldrllmForCausalLM(model_config(recipe)), recipe)


def test_a_learned_models_folder_is_pointed_to_extract_g(trained: Trained) -> None:
    with pytest.raises(DataError, match=r"learns its G, .* pldr-train extract-g .*export G.safetensors --text TEXT"):
        read_curvature(trained.export)


def test_texts_that_cannot_be_read_are_one_clear_error(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "G.safetensors")
    assert main(["extract-g", str(trained.run), out, "--text", ""]) == 2
    assert "the text '' has no tokens" in capsys.readouterr().err
    assert main(["extract-g", str(trained.run), out, "--text", "the metric " * 100]) == 2
    assert "more than the context of 32" in capsys.readouterr().err
    assert main(["extract-g", str(trained.run), out, "--text-file", str(tmp_path / "none.txt")]) == 2
    assert "none.txt cannot be read" in capsys.readouterr().err
