"""What transformers' common tests ask of every model, of all classes with learned, causal and predefined G.

Loading, resizing, outputs, precision, copies, compilation. What other files of this folder test more closely is not
repeated.
"""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pldr_train.model import (
    PldrllmConfig,
    PldrllmForCausalLM,
    PldrllmForQuestionAnswering,
    PldrllmForSequenceClassification,
    PldrllmModel,
)
from tests.unit.every_model import CLASSES, EVERY_CLASS, EVERY_GRAM, GRAMS, greedy, main_output, make, run
from tests.unit.model_cases import VOCAB_SIZE, small_config, token_ids

# Saving and loading


@EVERY_CLASS
@EVERY_GRAM
def test_a_model_saved_in_shards_loads_with_the_same_bits(
    model_class: type, gram: dict[str, Any], tmp_path: Path
) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    model.save_pretrained(tmp_path, max_shard_size="8KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: shard.name for shard in shards for name in load_file(shard)} == index
    assert not [name for name in index if "embed_tokens" in name or ".layers." in name or "lm_head" in name]

    torch.manual_seed(99)
    for options in ({}, {"device_map": "cpu"}, {"device_map": "auto"}, {"device_map": {"": "cpu"}}):
        loaded, report = model_class.from_pretrained(tmp_path, output_loading_info=True, **options)
        assert not any(report.values()), report
        assert not loaded.training
        expected = model.state_dict()
        assert list(loaded.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(run(loaded, ids), run(model, ids))


@EVERY_GRAM
def test_a_layer_may_be_left_on_the_disk(gram: dict[str, Any], tmp_path: Path) -> None:
    model, ids = make(PldrllmForCausalLM, **gram), token_ids(1, 6)
    model.save_pretrained(tmp_path / "model")
    places = {name: "cpu" for name, _ in model.decoder.named_children() if name != "layers"}
    places |= {name: "cpu" for name, _ in model.decoder.named_buffers()} | {"layers.0": "cpu", "layers.1": "disk"}
    device_map = {f"decoder.{name}": place for name, place in places.items()} | {"lm_head": "cpu"}
    loaded = PldrllmForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offloaded"
    )
    assert loaded.decoder.layers[1].attention.query.weight.is_meta
    assert torch.equal(run(loaded, ids), run(model, ids))
    assert torch.equal(greedy(loaded, ids), greedy(model, ids))


@EVERY_CLASS
@EVERY_GRAM
def test_initialisation_fills_every_parameter_and_buffer_of_a_model_made_on_meta(
    model_class: type, gram: dict[str, Any]
) -> None:
    with torch.device("meta"):
        model = model_class(small_config(num_labels=3, **gram))
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.detach().fill_(1e9)
    torch.manual_seed(0)
    for module in model.modules():
        model._init_weights(module)
    torch.manual_seed(0)
    reference = model_class(small_config(num_labels=3, **gram))
    for name, tensor in model.state_dict().items():
        assert float(tensor.float().abs().max()) < 10, name
        expected = reference.state_dict()[name]
        assert tensor.dtype == expected.dtype
        assert float((tensor.float().std() - expected.float().std()).abs()) < 0.3, name


@EVERY_GRAM
def test_missing_weights_are_reported_and_initialised_and_others_are_loaded(
    gram: dict[str, Any], tmp_path: Path
) -> None:
    model = make(PldrllmForCausalLM, **gram)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(50.0)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    dropped = {
        "final_layer.weight": "lm_head.weight",
        "final_layer.bias": "lm_head.bias",
        "decoder.embedding.weight": "decoder.embed_tokens.weight",
        "decoder.dec_layers.1.layernorm2.weight": "decoder.layers.1.feed_forward_norm.weight",
        "decoder.dec_layers.0.ffn.gluw2.weight": "decoder.layers.0.feed_forward.up.weight",
    }
    if "custom_G_type" not in gram:
        dropped |= {
            "decoder.dec_layers.1.mha1.plgatt_layer.pwlst": "decoder.layers.1.attention.power_law.power_exponent",
            "decoder.dec_layers.1.mha1.plgatt_layer.balst": "decoder.layers.1.attention.power_law.coupling_bias",
        }
    for name in dropped:
        del on_disk[name]
    on_disk["decoder.unheard_of"] = torch.zeros(2)
    save_file(on_disk, tmp_path / "model.safetensors", metadata={"format": "pt"})

    loaded, report = PldrllmForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["missing_keys"]) == set(dropped.values())
    assert set(report["unexpected_keys"]) == {"decoder.unheard_of"}
    for name, tensor in loaded.state_dict().items():
        if name not in dropped.values():
            assert torch.equal(tensor, model.state_dict()[name]), name
        elif name.endswith("bias"):
            assert not tensor.any(), name
        elif name.endswith("norm.weight"):
            assert bool((tensor == 1).all()), name
        else:
            assert 0 < float(tensor.abs().max()) < 10, name


def test_another_vocabulary_is_refused_unless_asked_for(tmp_path: Path) -> None:
    model = make(PldrllmForCausalLM)
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PldrllmForCausalLM.from_pretrained(tmp_path, vocab_size=50)
    loaded, report = PldrllmForCausalLM.from_pretrained(
        tmp_path, vocab_size=50, ignore_mismatched_sizes=True, output_loading_info=True
    )
    changed = {"decoder.embed_tokens.weight", "lm_head.weight", "lm_head.bias"}
    assert {name for name, *_ in report["mismatched_keys"]} == changed
    assert run(loaded, token_ids(2, 9)).shape == (2, 9, 50)
    kept = model.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items() if name not in changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@EVERY_CLASS
@EVERY_GRAM
def test_weights_load_in_any_precision(
    model_class: type, gram: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    model.save_pretrained(tmp_path)
    loaded = model_class.from_pretrained(tmp_path, dtype=dtype)
    floating = [tensor for tensor in (*loaded.parameters(), *loaded.buffers()) if tensor.is_floating_point()]
    assert {tensor.dtype for tensor in floating} == {dtype} == {loaded.dtype}
    assert torch.get_default_dtype() == torch.float32
    cast = copy.deepcopy(model).to(dtype)
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), cast.state_dict().values(), strict=True))
    output = run(loaded, ids)
    assert output.dtype == dtype
    torch.testing.assert_close(output, run(cast, ids))
    bound = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float64: 1e-3}[dtype]
    assert float((output.float() - run(model, ids)).abs().mean()) < bound

    loaded.save_pretrained(tmp_path / "again")
    again = model_class.from_pretrained(tmp_path / "again", dtype="auto")
    assert again.dtype == dtype
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), loaded.parameters(), strict=True))


@EVERY_CLASS
@EVERY_GRAM
def test_a_configuration_loads_as_it_was_saved(model_class: type, gram: dict[str, Any], tmp_path: Path) -> None:
    model = make(model_class, rope_theta=500.0, pad_token_id=1, use_cache=False, **gram)
    model.save_pretrained(tmp_path)
    loaded = PldrllmConfig.from_pretrained(tmp_path)
    written = model.config.to_dict()
    assert loaded.to_dict() == written
    assert PldrllmConfig.from_dict(written).to_dict() == written
    assert (loaded.num_labels, loaded.rope_theta, loaded.pad_token_id) == (3, 500.0, 1)
    assert loaded.architectures == [model_class.__name__]
    assert PldrllmConfig.from_pretrained(tmp_path, use_cache=True).use_cache is True
    assert copy.deepcopy(loaded).to_diff_dict() == pickle.loads(pickle.dumps(loaded)).to_diff_dict()


@EVERY_CLASS
@EVERY_GRAM
def test_copies_and_pickles_compute_the_same_and_share_nothing(model_class: type, gram: dict[str, Any]) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    expected = run(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other, ids), expected)
        with torch.no_grad():
            other.get_input_embeddings().weight.zero_()
        assert torch.equal(run(model, ids), expected)


# Embeddings


@EVERY_CLASS
def test_embeddings_are_found_and_replaced(model_class: type) -> None:
    model = make(model_class)
    decoder = model if model_class is PldrllmModel else model.decoder
    assert model.base_model is decoder
    assert model.get_input_embeddings() is decoder.embed_tokens
    other = nn.Embedding(VOCAB_SIZE, 16)
    model.set_input_embeddings(other)
    assert decoder.embed_tokens is other
    if model_class is PldrllmForCausalLM:
        head = nn.Linear(16, VOCAB_SIZE)
        assert model.get_decoder() is decoder
        model.set_output_embeddings(head)
        assert model.get_output_embeddings() is model.lm_head is head


@pytest.mark.parametrize(("size", "options"), [(52, {}), (24, {}), (None, {"pad_to_multiple_of": 32})])
@pytest.mark.parametrize("final_bias", [True, False])
@EVERY_CLASS
def test_a_resized_vocabulary_leaves_the_old_tokens_alone(
    model_class: type, final_bias: bool, size: int | None, options: dict[str, int], tmp_path: Path
) -> None:
    model = make(model_class, final_bias=final_bias)
    ids = token_ids(2, 9) % 24
    before, expected_size = run(model, ids), size or 64
    embedding = model.resize_token_embeddings(size, **options)
    assert embedding is model.get_input_embeddings()
    assert embedding.weight.shape == (expected_size, 16)
    assert model.config.vocab_size == model.get_input_embeddings().num_embeddings == expected_size
    after = run(model, ids)
    kept = min(expected_size, VOCAB_SIZE)
    if model_class is PldrllmForCausalLM:
        assert after.shape[-1] == expected_size
        assert (model.lm_head.bias is not None) == final_bias
        assert model.lm_head.weight.data_ptr() != embedding.weight.data_ptr()
        torch.testing.assert_close(after[..., :kept], before[..., :kept], rtol=0, atol=1e-6)
        assert bool(model(ids, labels=ids).loss.isfinite())
    else:
        assert torch.equal(after, before)
    newest = torch.full((1, 4), expected_size - 1)
    assert bool(run(model, newest).isfinite().all())
    model.save_pretrained(tmp_path)
    assert torch.equal(run(model_class.from_pretrained(tmp_path), newest), run(model, newest))


@EVERY_CLASS
@EVERY_GRAM
def test_embeddings_given_instead_of_ids_change_nothing(model_class: type, gram: dict[str, Any]) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    with torch.no_grad():
        embeds = model.get_input_embeddings()(ids)
        assert torch.equal(
            main_output(model(inputs_embeds=embeds, attention_mask=mask)), run(model, ids, attention_mask=mask)
        )


# Outputs


OPTIONAL = ("hidden_states", "attentions", "pldr_attentions", "deductive_outputs")


@EVERY_CLASS
@EVERY_GRAM
def test_outputs_have_their_shapes_and_are_the_same_as_a_tuple(model_class: type, gram: dict[str, Any]) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    names = ("use_cache", *(f"output_{name}" for name in OPTIONAL))
    wanted = dict.fromkeys(names, True)
    with torch.no_grad():
        outputs, as_tuple = model(ids, **wanted), model(ids, **wanted, return_dict=False)
        plain = model(ids, use_cache=False)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 9, 16)] * 3
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 2, 9, 9)] * 2
    assert [len(layer) for layer in outputs.pldr_attentions] == [7, 7]
    assert len(outputs.deductive_outputs) == 2
    assert len(outputs.past_key_values.layers) == 2
    assert isinstance(as_tuple, tuple)
    named = dict(zip(outputs.keys(), as_tuple, strict=True))
    for name in outputs:
        if name != "past_key_values":
            assert_equal(named[name], outputs[name])
    # What is not asked for is not there.
    scores = {"last_hidden_state"} if model_class is PldrllmModel else {"logits"}
    assert set(plain) == ({"start_logits", "end_logits"} if model_class is PldrllmForQuestionAnswering else scores)
    if model_class is PldrllmModel:
        assert torch.equal(outputs.hidden_states[-1], outputs.last_hidden_state)
        embedded = model.embed_norm(model.embed_tokens(ids) * 4.0)
        assert torch.equal(outputs.hidden_states[0], embedded)

    model.set_attn_implementation("eager")  # transformers lets no other backend ask for weights by configuration
    model.config.output_hidden_states = model.config.output_attentions = model.config.output_pldr_attentions = True
    with torch.no_grad():
        by_config = model(ids)
    for name in OPTIONAL[:3]:
        assert_equal(by_config[name], outputs[name])


def assert_equal(actual: Any, expected: Any) -> None:
    """The same structure with the same values."""
    assert type(actual) is type(expected)
    if isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-6)
    elif is_dataclass(actual):
        for field in fields(actual):
            assert_equal(getattr(actual, field.name), getattr(expected, field.name))
    elif isinstance(actual, (list, tuple)):
        for one, other in zip(actual, expected, strict=True):
            assert_equal(one, other)
    else:
        assert actual is None


@EVERY_CLASS
def test_the_configuration_may_ask_for_tuples(model_class: type) -> None:
    model, ids = make(model_class, return_dict=False), token_ids(2, 9)
    with torch.no_grad():
        assert torch.equal(model(ids)[0], main_output(model(ids, return_dict=True)))


@EVERY_CLASS
@EVERY_GRAM
def test_hidden_states_and_attention_weights_retain_gradients(model_class: type, gram: dict[str, Any]) -> None:
    outputs = make(model_class, **gram)(token_ids(2, 9), output_hidden_states=True, output_attentions=True)
    kept = (outputs.hidden_states[0], outputs.attentions[0])
    for tensor in kept:
        tensor.retain_grad()
    main_output(outputs).square().sum().backward()
    assert all(tensor.grad is not None and bool(tensor.grad.any()) for tensor in kept)


@EVERY_CLASS
@EVERY_GRAM
def test_a_pass_repeats_itself_and_a_mask_of_ones_is_no_mask(model_class: type, gram: dict[str, Any]) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    expected = run(model, ids)
    assert torch.equal(run(model, ids), expected)
    assert torch.equal(run(model.train(), ids), expected)  # nothing is dropped out by default
    assert torch.equal(run(model.eval(), ids, attention_mask=torch.ones_like(ids)), expected)
    assert torch.equal(run(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@EVERY_GRAM
def test_attention_is_dropped_out_in_training_only(gram: dict[str, Any], attention: str) -> None:
    model, ids = make(PldrllmForCausalLM, attention_dropout=0.5, **gram), token_ids(2, 9)
    model.set_attn_implementation(attention)
    assert torch.equal(run(model, ids), run(model, ids))
    model.train()
    assert not torch.allclose(run(model, ids), run(model, ids), atol=1e-3)


@pytest.mark.slow
@EVERY_GRAM
def test_attention_backends_agree_and_are_chosen_on_loading(gram: dict[str, Any], tmp_path: Path) -> None:
    model, ids = make(PldrllmForCausalLM, **gram), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    model.save_pretrained(tmp_path)
    logits = []
    for attention in ("eager", "sdpa", "flex_attention"):
        loaded = PldrllmForCausalLM.from_pretrained(tmp_path, attn_implementation=attention)
        assert loaded.config._attn_implementation == loaded.decoder.config._attn_implementation == attention
        logits.append(run(loaded, ids, attention_mask=mask)[mask.bool()])
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-4)


# Training


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("gram", [GRAMS[name] for name in ("causal", "identity", "random")])
def test_checkpointing_is_switched_on_and_off_and_changes_no_gradient(
    gram: dict[str, Any], use_reentrant: bool
) -> None:
    model, ids = make(PldrllmForCausalLM, **gram).train(), token_ids(2, 9)
    results = []
    for checkpointed in (False, True, False):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        else:
            model.gradient_checkpointing_disable()
        assert model.is_gradient_checkpointing is checkpointed
        model.zero_grad()
        outputs = model(ids, labels=ids, use_cache=True)
        assert (outputs.past_key_values is None) == checkpointed
        outputs.loss.backward()
        results.append([outputs.loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=1e-5, atol=1e-6)


def test_adapters_get_gradients_through_frozen_checkpointed_layers() -> None:
    model, ids = make(PldrllmForCausalLM).train(), token_ids(2, 9)
    model.requires_grad_(False)
    model.decoder.layers[0].attention.query.weight.requires_grad_(True)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(ids, labels=ids).loss.backward()
    assert bool(model.decoder.layers[0].attention.query.weight.grad.any())


@pytest.mark.parametrize(
    ("model_class", "gram"),
    [(model_class, GRAMS["learned"]) for model_class in CLASSES.values()]
    + [(PldrllmForCausalLM, GRAMS[name]) for name in ("causal", "identity", "random")],
)
def test_a_pass_compiles_to_one_graph(model_class: type, gram: dict[str, Any]) -> None:
    model, ids = make(model_class, **gram), token_ids(2, 9)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(compiled, ids), run(model, ids), rtol=0, atol=1e-5)


@pytest.mark.slow
def test_compiled_code_gives_the_same_scores() -> None:
    small = {"num_hidden_layers": 1, "num_reslayerA": 1}
    model, ids = make(PldrllmForSequenceClassification, **small), token_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    torch._dynamo.reset()
    compiled = run(torch.compile(model, fullgraph=True), ids, attention_mask=mask)
    torch.testing.assert_close(compiled, run(model, ids, attention_mask=mask), rtol=0, atol=1e-4)
