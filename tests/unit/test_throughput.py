"""Counts of parameters, FLOPs and memory against enumerations made another way."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest

from pldr_train.metrics import throughput
from pldr_train.metrics.throughput import (
    DAG_MATMULS,
    count_parameters,
    flops_per_token,
    memory_estimate,
    model_flops_utilisation,
)
from pldr_train.recipe import ModelSection

TINY = ModelSection(
    vocab_size=11,
    num_hidden_layers=2,
    num_attention_heads=3,
    head_dim=4,
    intermediate_size=7,
    num_reslayerA=2,
    num_denseA=3,
    A_dff=5,
)
PAPER = ModelSection(vocab_size=32000, num_hidden_layers=5, num_attention_heads=14, head_dim=64, intermediate_size=2389)


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [
        ({}, 109_689_362),
        ({"A_dff": 180}, 109_844_562),
        ({"custom_G_type": "identity"}, 105_606_482),
        ({"num_hidden_layers": 7, "num_attention_heads": 12, "intermediate_size": 2048}, 104_237_120),
        ({"num_hidden_layers": 1, "num_attention_heads": 42, "intermediate_size": 7168}, 260_202_048),
    ],
)
def test_parameter_counts_are_those_of_the_released_models(changes: dict[str, int], parameters: int) -> None:
    assert count_parameters(PAPER.model_copy(update=changes)) == parameters


def tensors_of(shape: ModelSection) -> list[tuple[int, ...]]:
    """Every parameter tensor of the model, listed one by one."""
    d, heads, width = shape.head_dim, shape.num_attention_heads, shape.head_dim * shape.num_attention_heads
    norm, head_norm = [(width,), (width,)], [(d,), (d,)]

    def glu(outer: int, inner: int) -> list[tuple[int, ...]]:
        return [(inner, outer), (inner,), (inner, outer), (inner,), (outer, inner), (outer,)]

    tensors: list[tuple[int, ...]] = [(shape.vocab_size, width), *norm, (shape.vocab_size, width), (shape.vocab_size,)]
    for _ in range(shape.num_hidden_layers):
        for _ in "qkvo":
            tensors += [(width, width), (width,)]
        tensors += [*glu(width, shape.inner_width), *norm, *norm]
        if shape.learned_g:
            tensors += [*head_norm, *[(heads, d, d)] * 5]
            for _ in range(shape.num_reslayerA):
                tensors += head_norm
                for _ in range(shape.num_denseA):
                    tensors += glu(d, shape.A_dff)
    return tensors


def size(tensor: tuple[int, ...]) -> int:
    product = 1
    for axis in tensor:
        product *= axis
    return product


@pytest.mark.parametrize("learned_g", [True, False])
def test_parameter_count_equals_the_sum_over_all_tensors(learned_g: bool) -> None:
    shape = TINY.model_copy(update={"custom_G_type": "learned" if learned_g else "identity"})
    assert count_parameters(shape) == sum(size(tensor) for tensor in tensors_of(shape))


def products_of_a_sequence(shape: ModelSection, length: int) -> dict[str, int]:
    """FLOPs of one sequence's forward, from every matrix product (rows, inner, columns) of the computation."""
    d, heads, width = shape.head_dim, shape.num_attention_heads, shape.head_dim * shape.num_attention_heads
    counted = dict.fromkeys([field.name for field in dataclasses.fields(flops_per_token(shape, length))], 0)

    def product(part: str, rows: int, inner: int, columns: int) -> None:
        counted[part] += 2 * rows * inner * columns

    product("output_head", length, width, shape.vocab_size)
    for _ in range(shape.num_hidden_layers):
        for _ in "qkvo":
            product("projections", length, width, width)
        product("feed_forward", length, width, shape.inner_width)
        product("feed_forward", length, width, shape.inner_width)
        product("feed_forward", length, shape.inner_width, width)
        for _ in range(heads):
            product("attention", length, d, length)
            product("attention", length, length, d)
            product("query_times_g", length, d, d)
            if shape.learned_g:
                product("gram", d, length, d)
                product("power_stage", d, d, d)
                product("power_stage", d, d, d)
                for _ in range(shape.num_reslayerA * shape.num_denseA):
                    product("metric_learner", d, d, shape.A_dff)
                    product("metric_learner", d, d, shape.A_dff)
                    product("metric_learner", d, shape.A_dff, d)
    return counted


@pytest.mark.parametrize("learned_g", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_flops_equal_the_sum_over_all_products(learned_g: bool, training: bool) -> None:
    shape, length = TINY.model_copy(update={"custom_G_type": "learned" if learned_g else "identity"}), 6
    factor = 3 if training else 1
    expected = products_of_a_sequence(shape, length)
    flops = flops_per_token(shape, length, training=training)
    assert {name: value * length for name, value in dataclasses.asdict(flops).items()} == pytest.approx(
        {name: factor * value for name, value in expected.items()}
    )
    assert flops.total * length == pytest.approx(factor * sum(expected.values()))


def test_the_dag_loss_costs_its_products_once_for_each_tensor_it_is_taken_of() -> None:
    length = 6
    one_matrix = 2 * TINY.head_dim**3
    matrices = TINY.num_hidden_layers * TINY.num_attention_heads
    for training in (True, False):
        flops = flops_per_token(TINY, length, training=training, dag_tensors=3, dag_matmuls=10)
        assert flops.dag_loss * length == pytest.approx(3 * 10 * matrices * one_matrix)
    assert flops_per_token(TINY, length).dag_loss == 0
    assert flops_per_token(TINY, length, dag_tensors=1).dag_loss * length == pytest.approx(
        DAG_MATMULS * matrices * one_matrix
    )


def test_the_paper_models_training_flops_are_near_six_per_matrix_weight() -> None:
    flops = flops_per_token(PAPER, 1024)
    in_linears = 5 * (4 * 896**2 + 3 * 896 * 2389) + 896 * 32000
    assert flops.projections + flops.feed_forward + flops.output_head == 6 * in_linears
    assert flops.total == pytest.approx((96.34 + 192.65 + 55.05 + 1.72 + 13.71 + 0.22 + 1.72 + 172.03) * 1e6, rel=1e-4)


def test_memory_of_weights_and_adamw_is_16_bytes_a_parameter_and_2_more_under_autocast() -> None:
    parameters = count_parameters(TINY)
    for precision, cast in (("fp32", 0), ("bf16", 2 * parameters)):
        need = memory_estimate(TINY, 6, 2, precision=precision)
        assert (need.parameters, need.gradients, need.optimizer) == (4 * parameters, 4 * parameters, 8 * parameters)
        assert need.cast_weights == cast
        assert need.total == 16 * parameters + cast + need.activations + need.logits


def test_activations_grow_with_the_micro_batch_and_logits_up_to_a_chunk() -> None:
    one, four = memory_estimate(PAPER, 1024, 1), memory_estimate(PAPER, 1024, 4)
    assert four.activations == 4 * one.activations
    assert four.optimizer == one.optimizer
    assert one.logits == 12 * 1024 * 32000 + 896 * (1024 * 2 + 32000 * 4)
    assert four.logits == 12 * throughput.LOGITS_AT_ONCE + 896 * (
        4 * 1024 * 2 + 32000 * 4
    )  # a chunk is as large as it may be
    fp32 = memory_estimate(PAPER, 1024, 1, precision="fp32")
    assert one.activations < fp32.activations
    scores = 5 * 14 * 1024**2 * (4 + 4) - 5 * 14 * 1024 * 4
    eager = memory_estimate(PAPER, 1024, 1, precision="fp32", fused_attention=False)
    assert eager.activations - fp32.activations == scores
    fixed = memory_estimate(PAPER.model_copy(update={"custom_G_type": "identity"}), 1024, 1)
    assert fixed.activations < one.activations
    assert memory_estimate(PAPER, 1024, 1, dag_tensors=3).activations - one.activations == 5 * 3 * 14 * 64**2 * 4


@pytest.mark.parametrize("chunk", [None, 32])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_activation_estimate_is_within_a_tenth_of_what_autograd_keeps(precision: str, chunk: int | None) -> None:
    import torch

    from pldr_train.model import PldrllmConfig, PldrllmForCausalLM

    rows, length, vocab = 2, 128, 40
    config = PldrllmConfig(
        vocab_size=vocab, num_hidden_layers=1, num_attention_heads=4, hidden_size=256, gram_chunk_size=chunk
    )
    model = PldrllmForCausalLM(config)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    weight_shapes = {shape for weight in model.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        address = tensor.untyped_storage().data_ptr()
        is_cast_weight = tensor.dtype == torch.bfloat16 and tensor.shape in weight_shapes
        if address not in weights and not is_cast_weight:
            kept[address] = tensor
        return tensor

    ids = torch.randint(vocab, (rows, length), generator=torch.Generator().manual_seed(0))
    saved = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with saved, torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
        model(input_ids=ids, use_cache=False)
    measured = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    shape = ModelSection(
        vocab_size=vocab,
        num_hidden_layers=1,
        num_attention_heads=4,
        head_dim=64,
        intermediate_size=8 * 256 // 3,
        gram_chunk_size=chunk,
    )
    assert memory_estimate(shape, length, rows, precision=precision).activations == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_estimate_of_the_loss_is_within_a_tenth_of_what_it_allocates(
    monkeypatch: pytest.MonkeyPatch, precision: str, rows: int
) -> None:
    import torch

    from benchmarks.bench_loss_memory import peak_bytes
    from pldr_train.model import output_head

    assert output_head.MOST_LOGITS == throughput.LOGITS_AT_ONCE
    for module, name in ((output_head, "MOST_LOGITS"), (throughput, "LOGITS_AT_ONCE")):
        monkeypatch.setattr(module, name, 2**21)
    shape = TINY.model_copy(update={"vocab_size": 1024, "head_dim": 64})
    head, hidden = output_head.OutputHead(192, 1024), torch.randn(rows, 1024, 192, requires_grad=True)
    targets = torch.zeros(rows, 1024, dtype=torch.int64)

    def loss() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            head(hidden, targets)

    peak = peak_bytes(loss)
    cast = 2 * 192 * (1024 + rows * 1024) if precision == "bf16" else 0  # of weights and input, which count elsewhere
    assert memory_estimate(shape, 1024, rows, precision=precision).logits == pytest.approx(peak - cast, rel=0.1)


def test_a_causal_gram_runs_the_metric_learner_once_per_chunk() -> None:
    whole, causal = flops_per_token(PAPER, 1024, dag_tensors=3), PAPER.model_copy(update={"gram_chunk_size": 256})
    chunked = flops_per_token(causal, 1024, dag_tensors=3)
    for name in ("metric_learner", "power_stage", "dag_loss"):
        assert getattr(chunked, name) == pytest.approx(4 * getattr(whole, name))
    for name in ("gram", "query_times_g", "attention", "projections"):
        assert getattr(chunked, name) == getattr(whole, name)
    assert [causal.num_grams(length) for length in (1, 256, 257, 1024)] == [1, 1, 2, 4]
    assert count_parameters(causal) == count_parameters(PAPER)


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert model_flops_utilisation(tokens_per_s=1000.0, flops_per_token=5e8, peak_flops=1e12) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="peak_flops=0"):
        model_flops_utilisation(1.0, 1.0, 0)


def test_it_needs_no_torch() -> None:
    # As the command line does; a program that imports the package gets the models with it.
    code = "import sys, pldr_train.metrics.throughput; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
