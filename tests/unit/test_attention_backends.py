"""Attention backends of training: what each needs, documents kept apart, and what runs where they do not.

FlashAttention runs on GPUs only. Here all of transformers' code around it runs, over stand-ins for its two functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.utils import run_and_get_code
from torch.nn.attention import flex_attention as torch_flex
from transformers import modeling_flash_attention_utils as flash_utils

from pldr_train.building import model_config
from pldr_train.doctor.recipes import check_attention as doctor_check
from pldr_train.errors import RecipeError
from pldr_train.fit import fit
from pldr_train.model import PldrllmForCausalLM, modeling_pldrllm
from pldr_train.models.loading import find_checkpoint
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.recipe.attention import FLASH_PACKAGES, FLEX, is_installed, missing_for_attention
from pldr_train.training import attention as training_attention
from pldr_train.training.attention import check_attention, set_attention, uncompiled
from pldr_train.training.objective import document_positions
from pldr_train.training.weights import compile_layers, load_model_folder, recompute, saved_model
from tests.tiny import tiny_values
from tests.unit.model_cases import small_model, token_ids

FLASH = "flash_attention_2"
END = 3
KINDS = pytest.mark.parametrize("kind", [{}, {"custom_G_type": "identity"}, {"gram_chunk_size": 4}], ids=str)


def packed_rows(*ends: tuple[int, ...], length: int = 12) -> Tensor:
    """A row for each tuple, with the end of a document at these places."""
    rows = token_ids(len(ends), length)
    for row, places in zip(rows, ends, strict=True):
        row[list(places)] = END
    return rows


TWO_ROWS = packed_rows((3, 4, 8), (6,))
BOUNDS = [0, 4, 5, 9, 12, 19, 24]
"""Where the documents of these rows begin, end to end."""


def logits_and_gradients(model: PldrllmForCausalLM, ids: Tensor, **options: Any) -> list[Tensor]:
    model.zero_grad()
    logits = model(ids, use_cache=False, **options).logits
    logits.square().mean().backward()
    return [logits.detach(), *(each.grad for each in model.parameters() if each.grad is not None)]


# FlashAttention, with stand-ins for its functions.


@dataclass
class FlashStandIn:
    """What was asked of the functions that the package would bring."""

    dense_calls: int = 0
    bounds: list[list[int]] = field(default_factory=list)
    dtypes: set[torch.dtype] = field(default_factory=set)


def by_segment(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float) -> Tensor:
    """Causal attention of each segment by itself: (tokens, heads, d)."""
    parts = []
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        here = [each[start:stop].transpose(0, 1) for each in (q, k, v)]
        parts.append(F.scaled_dot_product_attention(*here, is_causal=True, scale=scale).transpose(0, 1))
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> FlashStandIn:
    asked = FlashStandIn()

    def dense(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, deterministic=False):  # type: ignore[no-untyped-def]
        asked.dense_calls += 1
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)

    def varlen(  # type: ignore[no-untyped-def]
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False
    ):
        assert causal
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert torch.equal(cu_seqlens_q, cu_seqlens_k)
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q == max_seqlen_k
        asked.bounds.append(cu_seqlens_q.tolist())
        asked.dtypes |= {q.dtype, k.dtype, v.dtype}
        return by_segment(q, k, v, cu_seqlens_q, softmax_scale)

    pretend_installed(monkeypatch, dense, torch.compiler.disable(varlen))
    return asked


def pretend_installed(monkeypatch: pytest.MonkeyPatch, dense: Any, varlen: Any) -> None:
    functions = (dense, varlen, None, flash_utils._pad_input, flash_utils._unpad_input)
    monkeypatch.setattr(flash_utils, "_lazy_imports", lambda *_, **__: functions)
    monkeypatch.setattr(flash_utils, "_loaded_implementation", None)
    flash_utils.lazy_import_flash_attention(FLASH)


def through_flash(**overrides: Any) -> tuple[PldrllmForCausalLM, PldrllmForCausalLM]:
    """The same model in fp64 through the stand-in and through sdpa."""
    models = [small_model(**overrides).double().train() for _ in range(2)]
    models[0].config._attn_implementation = FLASH
    return models[0], models[1]


@KINDS
@pytest.mark.parametrize("ids", [TWO_ROWS, TWO_ROWS[:1]], ids=["two rows", "one row"])
def test_flash_keeps_documents_apart_as_sdpa_does(flash: FlashStandIn, kind: dict[str, Any], ids: Tensor) -> None:
    ours, reference = through_flash(**kind)
    positions = document_positions(ids)
    found, expected = (logits_and_gradients(model, ids, position_ids=positions) for model in (ours, reference))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert flash.bounds == [[each for each in BOUNDS if each <= ids.numel()]] * 2  # two layers
    assert flash.dense_calls == 0
    apart, mixed = found[0], logits_and_gradients(ours, ids)[0]
    assert flash.dense_calls == 2
    assert not torch.allclose(apart, mixed, atol=1e-3)


def test_flash_takes_positions_of_one_row_for_all(flash: FlashStandIn) -> None:
    ours, reference = through_flash(custom_G_type="identity")
    positions = document_positions(TWO_ROWS)[:1]
    found, expected = (model(TWO_ROWS, position_ids=positions, use_cache=False).logits for model in (ours, reference))
    torch.testing.assert_close(found, expected)
    assert flash.bounds[0] == [0, 4, 5, 9, 12, 16, 17, 21, 24]


def test_flash_leaves_bounds_that_it_is_given_as_they_are(flash: FlashStandIn) -> None:
    ours, _ = through_flash(custom_G_type="identity")
    bounds = torch.tensor([0, 12, 24], dtype=torch.int32)
    lengths = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 12, "max_length_k": 12}
    ours(TWO_ROWS, position_ids=document_positions(TWO_ROWS), use_cache=False, **lengths)
    assert flash.bounds[0] == [0, 12, 24]


@KINDS
@pytest.mark.parametrize("side", ["left", "right"])
def test_flash_leaves_padding_out_as_sdpa_does(flash: FlashStandIn, kind: dict[str, Any], side: str) -> None:
    ours, reference = through_flash(**kind)
    ids, mask = token_ids(2, 12), torch.ones(2, 12, dtype=torch.long)
    mask[1, slice(0, 5) if side == "left" else slice(7, 12)] = 0
    found, expected = (model(ids, attention_mask=mask, use_cache=False).logits for model in (ours, reference))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()])
    assert flash.bounds[0] == [0, 12, 19]


def test_flash_computes_in_the_type_of_autocast(flash: FlashStandIn) -> None:
    model = small_model().train()
    model.config._attn_implementation = FLASH
    with torch.autocast("cpu", torch.bfloat16):
        model(TWO_ROWS, position_ids=document_positions(TWO_ROWS), use_cache=False).logits.sum().backward()
    assert flash.dtypes == {torch.bfloat16}


def test_attention_weights_are_written_out_under_flash(flash: FlashStandIn) -> None:
    ours, _ = through_flash()
    positions = document_positions(TWO_ROWS)
    weights = ours(TWO_ROWS, position_ids=positions, use_cache=False, output_attentions=True).attentions[0]
    assert (flash.bounds, flash.dense_calls) == ([], 0)
    assert float(weights[0, :, 4:, :4].detach().abs().max()) == 0


def registered_op() -> Callable[..., Tensor]:
    """`by_segment` as an operation that no compiler looks into, as the package registers its own."""
    name = "pldr_train_tests::by_segment"
    op = torch.library.custom_op(name, by_segment, mutates_args=())
    backward = torch.library.custom_op(f"{name}_backward", _by_segment_backward, mutates_args=())
    op.register_fake(lambda q, *_: torch.empty_like(q))
    backward.register_fake(lambda _, q, k, v, *__: [torch.empty_like(each) for each in (q, k, v)])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:4])
        ctx.scale = inputs[4]

    op.register_autograd(lambda ctx, up: (*backward(up, *ctx.saved_tensors, ctx.scale), None, None), setup_context=keep)
    return op


def _by_segment_backward(
    upstream: Tensor, q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, scale: float
) -> list[Tensor]:
    """Written out, for autograd is off inside a registered operation."""
    gradients = [torch.empty_like(each) for each in (q, k, v)]
    for start, stop in zip(bounds.tolist(), bounds.tolist()[1:], strict=False):
        up, query, key, value = (each[start:stop].transpose(0, 1) for each in (upstream, q, k, v))
        future = torch.ones(stop - start, stop - start, dtype=torch.bool).triu(1)
        weights = (query @ key.mT * scale).masked_fill(future, -torch.inf).softmax(-1)
        of_weights = up @ value.mT
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True)) * scale
        for gradient, found in zip(gradients, (of_scores @ key, of_scores.mT @ query, weights.mT @ up), strict=True):
            gradient[start:stop] = found.transpose(0, 1)
    return gradients


@pytest.mark.slow
@pytest.mark.parametrize("opaque", [True, False], ids=["registered operation", "graph break"])
def test_compiled_layers_attend_through_flash(
    flash: FlashStandIn, monkeypatch: pytest.MonkeyPatch, opaque: bool
) -> None:
    if opaque:
        op = registered_op()

        def varlen(  # type: ignore[no-untyped-def]
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, causal=False
        ):
            return op(q, k, v, cu_seqlens_q, softmax_scale)

        pretend_installed(monkeypatch, flash_utils._flash_fn, varlen)
    ours, reference = through_flash(num_reslayerA=1)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(ours, counter)
    # The number of documents becomes a variable of the code when it is another one for the first time.
    batches = [packed_rows((3, 8), (6,)), TWO_ROWS, packed_rows((), (1, 2, 3, 5))]
    for number, ids in enumerate(batches):
        with torch._dynamo.config.patch(error_on_recompile=number > 1):
            positions = document_positions(ids)
            found, expected = (logits_and_gradients(model, ids, position_ids=positions) for model in (ours, reference))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    if opaque:
        assert counter.frame_count == 2


# torch's flex_attention.


@pytest.mark.slow
@torch.no_grad()
def test_flex_keeps_documents_apart_as_sdpa_does() -> None:
    found, expected = (
        small_model(attention=backend)(TWO_ROWS, position_ids=document_positions(TWO_ROWS), use_cache=False).logits
        for backend in ("flex_attention", "sdpa")
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-4)


def flex_mask(length: int) -> Any:
    model = small_model(attention="flex_attention", num_hidden_layers=1, max_position_embeddings=length)
    positions = document_positions(packed_rows((5, 300), (77,), length=length))
    return modeling_pldrllm.create_causal_mask(
        config=model.config, inputs_embeds=torch.zeros(2, length, 16), attention_mask=None, past_key_values=None,
        position_ids=positions,
    )  # fmt: skip


@pytest.mark.slow
def test_flex_has_no_matrix_of_all_positions() -> None:
    length = 512
    torch._dynamo.reset()
    mask, codes = run_and_get_code(flex_mask, length)
    assert isinstance(mask, torch_flex.BlockMask)
    sizes = [
        line.split("((")[1].split(")")[0] for code in codes for line in code.splitlines() if "_strided_cpu((" in line
    ]
    assert sizes
    for size in sizes:
        product = 1
        for number in filter(None, size.replace(" ", "").split(",")):
            product *= int(number)
        assert product < length, size
    expected = flex_attended(length)
    assert torch.equal(mask.to_dense()[:, 0].bool(), expected.view(2, 4, 128, 4, 128).any(4).any(2))


def flex_attended(length: int) -> Tensor:
    """(2, S, S): whether a position attends to another one."""
    documents = (document_positions(packed_rows((5, 300), (77,), length=length)) == 0).cumsum(-1)
    same = documents[:, :, None] == documents[:, None]
    return same & torch.ones(length, length, dtype=torch.bool).tril()


@pytest.fixture
def differentiable_flex(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch refuses flex's gradient on a CPU although its own reference of the operation has one."""
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("recomputed", ["none", "layers"])
def test_layers_that_attend_through_flex_compile_once_and_have_the_gradients_of_sdpa(
    differentiable_flex: None, monkeypatch: pytest.MonkeyPatch, recomputed: Any
) -> None:
    masks: list[Any] = []
    make = modeling_pldrllm.create_causal_mask
    monkeypatch.setattr(
        modeling_pldrllm, "create_causal_mask", lambda **given: masks.append(make(**given)) or masks[-1]
    )
    ours, reference = (small_model(num_reslayerA=1).double().train() for _ in range(2))
    ours.config._attn_implementation = "flex_attention"
    recompute(ours, recomputed)
    counter = CompileCounterWithBackend("aot_eager")
    compile_layers(ours, counter)
    for number, ids in enumerate((TWO_ROWS, packed_rows((), (1, 2, 5)), packed_rows((4,), (7,)))):
        positions = document_positions(ids)
        with torch._dynamo.config.patch(error_on_recompile=number > 0):
            found, expected = (logits_and_gradients(model, ids, position_ids=positions) for model in (ours, reference))
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)
    assert counter.frame_count == 1
    # One of the batch, not one of each layer.
    assert [isinstance(each, torch_flex.BlockMask) for each in masks] == [True, False] * 3


def test_torch_still_refuses_to_train_through_flex_on_a_cpu() -> None:
    model = small_model(attention="flex_attention", num_hidden_layers=1).train()
    with pytest.raises(NotImplementedError, match="does not support backward on CPU"):
        model(token_ids(2, 12), use_cache=False)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("backend", [FLEX, *FLASH_PACKAGES])
def test_a_gpu_keeps_documents_apart_through_every_backend(backend: str, compiled: bool) -> None:
    if backend in FLASH_PACKAGES and not is_installed(FLASH_PACKAGES[backend]):
        pytest.skip(f"needs {FLASH_PACKAGES[backend]}")
    ids = packed_rows((3, 100, 300), (250,), length=512).cuda()
    results = []
    for attention in ("sdpa", backend):
        model = small_model(custom_G_type="identity", hidden_size=128, head_dim=64).cuda().train()
        model.set_attn_implementation(attention)
        if compiled:
            torch._dynamo.reset()
            compile_layers(model)
        with torch.autocast("cuda", torch.bfloat16):
            results.append(logits_and_gradients(model, ids, position_ids=document_positions(ids)))
    expected, found = results
    for one, other in zip(found, expected, strict=True):
        assert float((one - other).norm() / other.norm().clamp(min=1e-6)) < 0.05


# What recipes may ask for, and where.


def recipe_of(backend: str, folder: Path = Path("x"), **sections: Any) -> Recipe:
    values = tiny_values(folder, folder / "runs")
    values["model"] |= {"attn_implementation": backend, "head_dim": 16} | sections.get("model", {})
    values["trainer"] |= {"precision": "bf16", "accelerator": "auto"} | sections.get("trainer", {})
    return recipe_from_dict(values)


@pytest.mark.parametrize(
    ("backend", "sections", "message"),
    [
        (
            "flex_attention",
            {"trainer": {"accelerator": "cpu"}},
            "model.attn_implementation=flex_attention: trains on a GPU only, but trainer.accelerator=cpu; set sdpa, or "
            "auto or cuda there",
        ),
        (
            FLASH,
            {"trainer": {"precision": "fp32"}},
            "model.attn_implementation=flash_attention_2: computes in bf16 only, but trainer.precision=fp32; set sdpa",
        ),
        (FLASH, {"model": {"head_dim": 512}}, "needs a head_dim of at most 256, not model.head_dim=512; set sdpa"),
        (
            "flex_attention",
            {"model": {"head_dim": 8}},
            "needs a head_dim of at least 16, not model.head_dim=8; set sdpa",
        ),
        ("flash", {}, "model.attn_implementation=flash: must be sdpa, eager, flex_attention, flash_attention_2"),
    ],
)
def test_a_recipe_that_contradicts_its_backend_is_refused(backend: str, sections: Any, message: str) -> None:
    with pytest.raises(RecipeError) as refused:
        recipe_of(backend, **sections)
    assert message in str(refused.value)


def test_what_a_machine_lacks_is_one_message() -> None:
    nothing, everything = (lambda _: False), (lambda _: True)
    assert missing_for_attention(recipe_of("sdpa"), 0, nothing) is None
    assert missing_for_attention(recipe_of("eager"), 0, nothing) is None
    assert missing_for_attention(recipe_of("flex_attention"), 1, nothing) is None
    assert missing_for_attention(recipe_of("flex_attention"), 0, everything) == (
        "model.attn_implementation=flex_attention: trains on a GPU only, and torch sees none here; set sdpa"
    )
    for backend, package in (("2", "flash-attn"), ("3", "flash-attn-3"), ("4", "flash-attn-4")):
        recipe = recipe_of(f"flash_attention_{backend}")
        assert missing_for_attention(recipe, 1, everything) is None
        assert missing_for_attention(recipe, 1, lambda name, wanted=package: name != wanted) == (
            f"model.attn_implementation=flash_attention_{backend}: needs the package {package}, which is not "
            "installed; install it, or set sdpa"
        )


def test_doctor_looks_for_what_the_backend_needs() -> None:
    (found,) = doctor_check(recipe_of(FLASH), 0)
    assert (found.level, found.name, found.advice) == ("fail", "attention", "set sdpa")
    assert list(doctor_check(recipe_of("sdpa"), 0)) == []


def test_a_run_that_cannot_attend_as_asked_ends_before_it_reads_data(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine may train through it")
    with pytest.raises(RecipeError, match="flex_attention: trains on a GPU only, and torch sees none here; set sdpa"):
        fit(recipe_of("flex_attention", tmp_path))  # of a corpus that is not there


def test_a_package_that_does_not_work_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_attention, "missing_for_attention", lambda *_: None)
    with pytest.raises(RecipeError, match=r"model.attn_implementation=flash_attention_2: .*; repair that, or set sdpa"):
        set_attention(small_model(), recipe_of(FLASH))


def test_the_model_attends_as_the_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    set_attention(model, recipe_of("sdpa"))
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(training_attention, "missing_for_attention", lambda *_: None)
    set_attention(model, recipe_of("flex_attention"))
    assert model.decoder.layers[0].attention.config._attn_implementation == "flex_attention"
    check_attention(recipe_of("flex_attention"))


@pytest.mark.parametrize(("backend", "expected"), [("sdpa", "sdpa"), ("eager", "eager"), (FLASH, "sdpa")])
def test_passes_beside_training_take_a_backend_of_every_length_and_precision(backend: str, expected: str) -> None:
    model = small_model()
    model.config._attn_implementation = backend
    inside = []

    def fail() -> None:
        with uncompiled(model):
            inside.append(model.config._attn_implementation)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert inside == [expected]
    assert model.config._attn_implementation == backend


# What was trained through such a backend loads everywhere.


@pytest.mark.parametrize("backend", ["flex_attention", FLASH])
def test_a_checkpoint_loads_where_its_backend_does_not_run(
    tiny_data: Path, tmp_path: Path, backend: str, said: list[str]
) -> None:
    fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, trainer={"max_steps": 4, "validate_every_steps": 4})))
    found = find_checkpoint(tmp_path / "tiny")
    assert found is not None
    trained = found.recipe.replaced({"model.attn_implementation": backend})
    checkpoint = type(found)(found.folder, found.run, found.step, trained)
    said.clear()
    model = checkpoint.load_model()
    assert said == [f"{found.folder}: trained with model.attn_implementation={backend}; it attends through sdpa here"]
    assert model.config._attn_implementation == "sdpa"
    assert model_config(trained)._attn_implementation == "sdpa"
    assert saved_model(trained, found.folder).config._attn_implementation == "sdpa"
    ids = token_ids(1, 8)
    assert torch.equal(model(ids).logits, found.load_model()(ids).logits)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_a_folder_whose_configuration_names_flash_loads(tmp_path: Path, key: str, said: list[str]) -> None:
    import json

    model = small_model()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    assert key not in values
    file.write_text(json.dumps(values | {key: FLASH}))
    loaded = load_model_folder(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert said == [f"{tmp_path}: its config.json says attn_implementation={FLASH}; it attends through sdpa here"]
    assert torch.equal(loaded(token_ids(1, 8)).logits, model(token_ids(1, 8)).logits)
