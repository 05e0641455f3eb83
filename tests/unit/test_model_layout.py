"""Checkpoints: published names on disk, exact round trips, and every tensor rebuilt after loading."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from accelerate import load_checkpoint_and_dispatch
from safetensors.torch import load_file

from pldr_train.model import PldrllmForCausalLM, PldrllmModel
from pldr_train.model.published_layout import from_published, to_published
from tests.oracle import Oracle, OracleSizes
from tests.unit.model_cases import small_config, small_model, token_ids

PREDEFINED = ["identity", "random", "external"]
PREDEFINED_BUFFERS = {"decoder.past_G_values", "decoder.past_G_values_status"}


def published_names(kind: str | None) -> set[str]:
    """Names of the small model's tensors in the published layout, from the literal implementation."""
    curvature = None if kind is None else torch.zeros(2, 2, 8, 8)
    sizes = OracleSizes(2, 2, 8, 40, num_reslayerA=2, num_denseA=2, curvature=curvature)
    return set(Oracle(sizes).state_dict()) | (set() if kind is None else PREDEFINED_BUFFERS)


def saved_names(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


@pytest.mark.parametrize("kind", [None, *PREDEFINED])
def test_saved_checkpoint_has_exactly_the_published_names(tmp_path: Path, kind: str | None) -> None:
    small_model(custom_G_type=kind).save_pretrained(tmp_path)
    assert saved_names(tmp_path) == published_names(kind)


@pytest.mark.parametrize("kind", [None, "identity", "random"])
def test_loading_a_saved_model_gives_the_same_bits(tmp_path: Path, kind: str | None) -> None:
    model = small_model(custom_G_type=kind)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded, info = PldrllmForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    state, expected = loaded.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], expected[name]) for name in expected)
    ids = token_ids(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", [None, *PREDEFINED])
def test_every_buffer_is_in_the_checkpoint(kind: str | None) -> None:
    model = small_model(custom_G_type=kind)
    buffers = {name for name, _ in model.named_buffers()}
    assert buffers <= set(model.state_dict())
    assert len(buffers) == (0 if kind is None else 2)


@pytest.mark.parametrize("kind", [None, "identity"])
def test_a_model_built_on_meta_works_once_materialised(kind: str | None) -> None:
    model = small_model(custom_G_type=kind)
    with torch.device("meta"):
        empty = PldrllmForCausalLM(small_config(custom_G_type=kind))
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    ids = token_ids(2, 9)
    assert torch.equal(empty.eval()(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", PREDEFINED)
def test_weights_published_without_the_predefined_buffers_get_them_rebuilt(tmp_path: Path, kind: str) -> None:
    model = small_model(custom_G_type=kind)
    state = {name: tensor for name, tensor in model.state_dict().items() if "predefined" not in name}
    assert len(state) == len(model.state_dict()) - 2
    model.save_pretrained(tmp_path, state_dict=state)
    curvature = PldrllmForCausalLM.from_pretrained(tmp_path).decoder.predefined_curvature
    assert curvature.shape == (2, 2, 8, 8)
    if kind == "identity":
        assert torch.equal(curvature, torch.eye(8).expand_as(curvature))
    elif kind == "random":
        assert bool(((curvature >= 0) & (curvature < 1)).all())
        assert 0.4 < float(curvature.mean()) < 0.6
    else:
        assert bool(curvature.isnan().all())


def test_bare_decoder_round_trips_and_exchanges_weights_with_the_language_model(tmp_path: Path) -> None:
    model, ids = small_model(), token_ids(2, 9)
    hidden = model(ids, output_hidden_states=True).hidden_states[-1]

    model.save_pretrained(tmp_path / "with_head")
    bare = PldrllmModel.from_pretrained(tmp_path / "with_head")
    assert torch.equal(bare(ids).last_hidden_state, hidden)

    bare.save_pretrained(tmp_path / "bare")
    assert saved_names(tmp_path / "bare") == {
        name.removeprefix("decoder.") for name in published_names(None) if name.startswith("decoder.")
    }
    again = PldrllmModel.from_pretrained(tmp_path / "bare")
    assert torch.equal(again(ids).last_hidden_state, hidden)

    with_new_head, info = PldrllmForCausalLM.from_pretrained(tmp_path / "bare", output_loading_info=True)
    assert set(info["missing_keys"]) == {"lm_head.weight", "lm_head.bias"}
    assert torch.equal(with_new_head(ids, output_hidden_states=True).hidden_states[-1], hidden)


@pytest.mark.parametrize("kind", [None, "random"])
def test_renaming_plain_state_dicts_is_its_own_inverse_on_every_key(kind: str | None) -> None:
    ours = small_model(custom_G_type=kind).state_dict()
    published = to_published(ours)
    assert set(published) == published_names(kind)
    assert list(from_published(published)) == list(ours)
    bare = {name.removeprefix("decoder."): tensor for name, tensor in ours.items() if name.startswith("decoder.")}
    assert list(from_published(to_published(bare))) == list(bare)


def test_renaming_loses_no_tensor_when_layers_reach_two_digits() -> None:
    with torch.device("meta"):
        ours = PldrllmForCausalLM(small_config(num_hidden_layers=12, num_reslayerA=11)).state_dict()
    published = to_published(ours)
    assert len(published) == len(ours)
    assert list(from_published(published)) == list(ours)
    layers = {int(match[1]) for name in published if (match := re.match(r"decoder\.dec_layers\.(\d+)\.", name))}
    assert layers == set(range(12))


def differing(model: torch.nn.Module, expected: torch.nn.Module) -> list[str]:
    state = model.state_dict()
    return [name for name, value in expected.state_dict().items() if not torch.equal(state[name], value)]


@pytest.mark.parametrize("kind", [None, "random"])
def test_load_state_dict_takes_published_names_and_ours_strictly(kind: str | None) -> None:
    model = small_model(custom_G_type=kind)
    for weights in (to_published(model.state_dict()), model.state_dict()):
        loaded = small_model(seed=5, custom_G_type=kind)
        assert differing(loaded, model)
        loaded.load_state_dict(weights)
        assert differing(loaded, model) == []
        # Within another module, as in a LightningModule.
        outer = torch.nn.ModuleDict({"model": small_model(seed=5, custom_G_type=kind), "other": torch.nn.Linear(1, 1)})
        prefixed = {f"model.{name}": value for name, value in weights.items()}
        outer.load_state_dict(prefixed | {"other.weight": torch.ones(1, 1), "other.bias": torch.ones(1)})
        assert differing(outer["model"], model) == []
    incomplete = to_published(model.state_dict())
    incomplete["decoder.dec_layers.0.ffn.gluw9.weight"] = incomplete.pop("decoder.dec_layers.0.ffn.gluw1.weight")
    with pytest.raises(RuntimeError, match=r"Missing.*layers.0.feed_forward.gate.weight(?s:.*)Unexpected.*gluw9"):
        small_model().load_state_dict(incomplete)


def test_accelerate_loads_a_saved_folder_into_a_model(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    loaded = small_model(seed=5)
    load_checkpoint_and_dispatch(loaded, str(tmp_path), strict=True)
    assert differing(loaded, model) == []
    placed = PldrllmForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"})
    assert differing(placed, model) == []
