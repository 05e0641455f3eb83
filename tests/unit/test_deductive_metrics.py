"""Deductive metrics against loops in NumPy's fp64, at initialisation, on degenerate tensors and over two processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pldr_train.metrics.deductive import (
    RANK_TOLERANCE,
    AttentionEntropy,
    DeductiveMetrics,
    attention_entropy,
    causal_visible_positions,
    spectra,
)
from pldr_train.metrics.layer_metrics import ATTENTION_METRICS, TENSORS, layer_infos
from pldr_train.metrics.tensor_metrics import CHEAP, COSTLY, TENSOR_METRICS, row_map_collapse
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from tests.processes import run_ranks
from tests.unit.model_cases import small_model, token_ids

BOTH = (CHEAP, COSTLY)
LAYERS, BATCH, HEADS, D = 3, 4, 3, 6
ALL = "deductive"
Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Outputs:
    metric: Tensor | None
    positive_metric: Tensor | None
    potential: Tensor | None
    curvature: Tensor

    def rows(self, start: int, end: int) -> Outputs:
        return self.map(lambda each: each[start:end])

    def map(self, change: Callable[[Tensor], Tensor]) -> Outputs:
        return Outputs(*[None if each is None else change(each) for each in vars(self).values()])  # type: ignore[arg-type]


def random_outputs(shape: tuple[int, ...] = (BATCH, HEADS, D, D), seed: int = 0) -> list[Outputs]:
    generator = torch.Generator().manual_seed(seed)

    def draw(layer: int) -> Tensor:
        return (layer + 1) * torch.randn(shape, generator=generator) + 0.5

    return [Outputs(draw(layer), draw(layer).square() + 1e-9, draw(layer), draw(layer)) for layer in range(LAYERS)]


def everywhere(tensor: Tensor) -> list[Outputs]:
    return [Outputs(tensor, tensor, tensor, tensor)] * LAYERS


def measure(
    *batches: Sequence[Outputs], sets: Sequence[str] = BOTH, heads: int = HEADS, d: int = D
) -> dict[str, float]:
    metrics = DeductiveMetrics(len(batches[0]), heads, d, sets=sets)
    for batch in batches:
        metrics.update(batch)
    return metrics.compute()


def samples(tensor: Tensor) -> Array:
    """(B, ..., H, d, d) -> (N, H, d, d) in fp64."""
    array: Array = tensor.double().numpy()
    return array.reshape(-1, *array.shape[-3:])


def matrices(tensor: Tensor) -> Iterator[Array]:
    for sample in samples(tensor):
        yield from sample


def collapse_in_numpy(matrix: Array) -> float:
    mean_row = np.array([math.fsum(column) / len(matrix) for column in matrix.T])
    mean = math.fsum(matrix.ravel()) / matrix.size
    between = math.fsum(((row - mean_row) ** 2).sum() for row in matrix)
    return between / math.fsum((matrix.ravel() - mean) ** 2)


def commutant_in_numpy(g: Array) -> float:
    """Of interleaved planes, by the definition: a basis in which every rotation is diagonal."""
    d = len(g)
    basis = np.zeros((d, d), dtype=complex)
    for plane in range(d // 2):
        for sign, column in ((-1, 2 * plane), (1, 2 * plane + 1)):
            basis[2 * plane, column], basis[2 * plane + 1, column] = 1 / math.sqrt(2), sign * 1j / math.sqrt(2)
    inside = basis.conj().T @ g @ basis
    return float(np.linalg.norm(inside - np.diag(np.diag(inside))) / np.linalg.norm(g))


def contrast_in_numpy(matrix: Array) -> float:
    return float(((matrix - matrix.mean(0)) ** 2).mean() / (matrix**2).mean())


def head_squares_in_numpy(sample: Array) -> tuple[float, float]:
    mean = sum(sample) / len(sample)
    return math.fsum(((head - mean) ** 2).sum() for head in sample), math.fsum((sample**2).ravel())


def expected_of(tensors: Sequence[Tensor]) -> dict[str, float]:
    """All metrics but the input's of one tensor in several layers, taken together."""
    elements = np.concatenate([samples(tensor).ravel() for tensor in tensors])
    every = [matrix for tensor in tensors for matrix in matrices(tensor)]
    heads = [head_squares_in_numpy(sample) for tensor in tensors for sample in samples(tensor)]
    singular = [np.linalg.svd(matrix, compute_uv=False) for matrix in every]
    return {
        "mean": float(elements.mean()),
        "spread": float(elements.std()),
        "min": float(elements.min()),
        "max": float(elements.max()),
        "abs_mean": float(np.abs(elements).mean()),
        "nonfinite_share": 0.0,
        "row_map_collapse": float(np.mean([collapse_in_numpy(matrix) for matrix in every])),
        "cross_head_rms": math.sqrt(sum(part for part, _ in heads) / sum(whole for _, whole in heads)),
        "spectral_norm": float(np.mean([values[0] for values in singular])),
        "log_abs_det": float(np.mean([math.log(abs(np.linalg.det(matrix))) for matrix in every])),
        "singular_share": 0.0,
        "rank": float(np.mean([np.linalg.matrix_rank(matrix, rtol=len(matrix) * 2**-23) for matrix in every])),
    }


def expected_sensitivity(tensors: Sequence[Tensor]) -> float:
    deviation = sum(((samples(each) - samples(each).mean(0)) ** 2).sum() for each in tensors)
    return math.sqrt(deviation / sum((samples(each) ** 2).sum() for each in tensors))


def expected(layers: Sequence[Outputs]) -> dict[str, float]:
    groups = {ALL: list(layers)} | {f"{ALL}/layer_{index}": [layer] for index, layer in enumerate(layers)}
    values: dict[str, float] = {}
    for group, members in groups.items():
        for name, attribute in TENSORS.items():
            of_tensor = expected_of([getattr(layer, attribute) for layer in members])
            values |= {f"{group}/{name}/{metric}": value for metric, value in of_tensor.items()}
        curvatures = [layer.curvature for layer in members]
        values[f"{group}/G_LM/input_sensitivity"] = expected_sensitivity(curvatures)
        residuals = [commutant_in_numpy(matrix) for each in curvatures for matrix in matrices(each)]
        values[f"{group}/G_LM/commutant_residual"] = float(np.mean(residuals))
        contrasts = [contrast_in_numpy(matrix) for layer in members for matrix in matrices(metric_of(layer))]
        values[f"{group}/A/row_contrast"] = float(np.mean(contrasts))
    return values


def metric_of(layer: Outputs) -> Tensor:
    assert layer.metric is not None
    return layer.metric


def test_rows_that_are_alike_have_no_contrast_and_a_matrix_of_zeros_has_none_and_no_commutant() -> None:
    alike = torch.arange(1.0, D + 1).expand(BATCH, HEADS, D, D)
    assert measure(everywhere(alike))["deductive/A/row_contrast"] == pytest.approx(0, abs=1e-30)
    values = measure(everywhere(torch.zeros(BATCH, HEADS, D, D)))
    assert values["deductive/A/row_contrast"] == 0
    assert "deductive/G_LM/commutant_residual" not in values
    assert measure(everywhere(torch.eye(D).expand(BATCH, HEADS, D, D)))["deductive/G_LM/commutant_residual"] == 0


def test_the_rotary_embeddings_planes_are_those_of_the_model() -> None:
    halves = torch.diag(torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0])).expand(BATCH, HEADS, D, D)
    for interleaved, expected_residual in ((True, math.sqrt(1 / 3)), (False, 1.0)):
        metrics = DeductiveMetrics(LAYERS, HEADS, D, sets=BOTH, interleaved=interleaved)
        metrics.update(everywhere(halves))
        assert metrics.compute()["deductive/G_LM/commutant_residual"] == pytest.approx(expected_residual)


@pytest.mark.parametrize("shape", [(BATCH, HEADS, D, D), (BATCH, 2, HEADS, D, D)], ids=["plain", "with-chunks"])
def test_every_metric_is_what_numpy_finds(shape: tuple[int, ...]) -> None:
    layers = random_outputs(shape)
    assert measure(layers) == pytest.approx(expected(layers), rel=1e-10, abs=1e-13)


def test_the_table_has_every_name_once_and_no_other() -> None:
    infos = layer_infos(TENSOR_METRICS, LAYERS)
    names = [info.name for info in infos]
    assert len(names) == len(set(names))
    assert set(names) == measure(random_outputs()).keys()
    for each, cadence in ((CHEAP, "log steps"), (COSTLY, "validations")):
        of_set = {info.name for info in infos if info.cadence == cadence}
        assert of_set == measure(random_outputs(), sets=[each]).keys()
    assert all("layer_" not in info.name for info in layer_infos(TENSOR_METRICS))


def test_bf16_and_fp64_tensors_are_measured_as_they_are() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        layers = [layer.map(lambda each, dtype=dtype: each.to(dtype)) for layer in random_outputs()]
        assert measure(layers) == pytest.approx(expected(layers), rel=1e-10, abs=1e-13)


def test_halves_of_a_batch_and_of_processes_combine_to_the_whole() -> None:
    layers = random_outputs()
    whole = measure(layers)
    halves = [layer.rows(0, 1) for layer in layers], [layer.rows(1, BATCH) for layer in layers]
    assert measure(*halves) == pytest.approx(whole, rel=1e-12)

    apart = [DeductiveMetrics(LAYERS, HEADS, D, sets=BOTH) for _ in halves]
    for metrics, half in zip(apart, halves, strict=True):
        metrics.update(half)
    first, second = apart
    for state, reduce in first._reductions.items():  # what torchmetrics does with the states of two processes
        setattr(first, state, reduce(torch.stack((getattr(first, state), getattr(second, state)))))
    assert first.compute() == pytest.approx(whole, rel=1e-12)


def process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    layers = random_outputs()
    start, end = ((0, 1), (1, BATCH))[rank]
    metrics = DeductiveMetrics(LAYERS, HEADS, D, sets=BOTH)
    metrics.update([layer.rows(start, end) for layer in layers])
    torch.save(metrics.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_real_processes_both_have_the_values_of_the_whole(tmp_path: Path) -> None:
    run_ranks(process, str(tmp_path))
    whole = measure(random_outputs())
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == pytest.approx(whole, rel=1e-12)


class NothingIsRead(TorchDispatchMode):
    """Refuses what makes the host wait for a device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "_to_cpu"}:
            raise AssertionError(f"update reads the device: {name}")
        return func(*args, **(kwargs or {}))


def test_an_update_reads_nothing_back_from_the_device() -> None:
    layers, weights = random_outputs(), [torch.rand(2, 2, 4, 4).softmax(-1)]
    with pytest.raises(AssertionError, match="reads the device"), NothingIsRead():
        layers[0].curvature.sum().item()
    with NothingIsRead():
        DeductiveMetrics(LAYERS, HEADS, D, sets=BOTH).update(layers)
        AttentionEntropy(1).update(weights)
    # Meta tensors hold no data that could be read.
    cheap = DeductiveMetrics(LAYERS, HEADS, D).to("meta")
    cheap.update([layer.map(lambda each: each.to("meta")) for layer in layers])
    AttentionEntropy(1).to("meta").update([weights[0].to("meta")])


def test_a_graph_is_not_kept() -> None:
    layers = [layer.map(lambda each: each.requires_grad_()) for layer in random_outputs()]
    metrics = DeductiveMetrics(LAYERS, HEADS, D, sets=BOTH)
    metrics.update(layers)
    assert not any(getattr(metrics, state).requires_grad for state in metrics._defaults)


def test_a_metric_of_rank_one_with_equal_rows_has_collapsed() -> None:
    row = torch.randn(1, 1, 1, D, generator=torch.Generator().manual_seed(3)).expand(BATCH, HEADS, D, D)
    values = measure(everywhere(row))
    for name, value in {
        "row_map_collapse": 0.0,
        "cross_head_rms": 0.0,
        "rank": 1.0,
        "spectral_norm": float(row[0, 0].double().norm()),
    }.items():
        assert values[f"{ALL}/G_LM/{name}"] == pytest.approx(value, abs=1e-12)
    assert values[f"{ALL}/G_LM/input_sensitivity"] == pytest.approx(0, abs=1e-7)


def test_collapse_is_measured_below_the_resolution_of_fp32_sums() -> None:
    generator = torch.Generator().manual_seed(4)
    row = torch.randn(1, 64, generator=generator)
    nearly = row * (1 + 1e-6 * torch.randn(64, 64, generator=generator))
    found = row_map_collapse(nearly.double()).item()
    assert found == pytest.approx(collapse_in_numpy(nearly.double().numpy()), rel=1e-9)
    assert 1e-13 < found < 1e-11


@pytest.mark.parametrize("value", [0.0, 0.1, -3e7])
def test_constant_tensors_have_no_spread_and_count_as_collapsed(value: float) -> None:
    values = measure(everywhere(torch.full((BATCH, HEADS, D, D), value)))
    entry = torch.tensor(value).item()
    assert values[f"{ALL}/A/mean"] == values[f"{ALL}/A/min"] == values[f"{ALL}/A/max"] == entry
    assert values[f"{ALL}/A/spread"] == pytest.approx(0, abs=2e-8 * abs(entry))
    assert values[f"{ALL}/A/row_map_collapse"] == 0
    assert values[f"{ALL}/A/rank"] == (value != 0)
    if value == 0:  # nothing to be relative to, and no determinant
        absent = ("cross_head_rms", "input_sensitivity", "log_abs_det")
        assert not any(f"{ALL}/G_LM/{name}" in values for name in absent)
        assert values[f"{ALL}/A/singular_share"] == 1
        assert values[f"{ALL}/A/spectral_norm"] == 0


def test_entries_that_are_not_finite_are_counted_and_left_out() -> None:
    layers = random_outputs()
    spoilt = [layer.map(torch.clone) for layer in layers]
    for name, value in (("metric", math.nan), ("potential", math.inf), ("curvature", -math.inf)):
        getattr(spoilt[0], name)[1, 2, 3, 4] = value
    values, clean = measure(spoilt), measure(layers)
    elements = BATCH * HEADS * D * D
    assert values[f"{ALL}/layer_0/A/nonfinite_share"] == pytest.approx(1 / elements)
    assert values[f"{ALL}/A/nonfinite_share"] == pytest.approx(1 / elements / LAYERS)
    assert values.keys() == clean.keys()

    metric = samples(spoilt[0].metric)  # type: ignore[arg-type]
    assert values[f"{ALL}/layer_0/A/mean"] == pytest.approx(np.nanmean(metric), rel=1e-12)
    assert values[f"{ALL}/layer_0/A/spread"] == pytest.approx(np.nanstd(metric), rel=1e-12)
    assert values[f"{ALL}/layer_0/A_P/max"] == np.ma.masked_invalid(samples(spoilt[0].potential)).max()  # type: ignore[arg-type]
    whole = [matrix for matrix in metric.reshape(-1, D, D) if np.isfinite(matrix).all()]
    assert len(whole) == BATCH * HEADS - 1
    assert values[f"{ALL}/layer_0/A/row_map_collapse"] == pytest.approx(np.mean([*map(collapse_in_numpy, whole)]))
    norms = [np.linalg.norm(matrix, 2) for matrix in whole]
    assert values[f"{ALL}/layer_0/A/spectral_norm"] == pytest.approx(np.mean(norms))
    # What compares heads or samples leaves out the whole sample.
    rest = [layer.map(lambda each: each[[0, 2, 3]]) for layer in layers]
    for name in ("A/cross_head_rms", "G_LM/input_sensitivity"):
        assert values[f"{ALL}/layer_0/{name}"] == pytest.approx(measure(rest)[f"{ALL}/layer_0/{name}"], rel=1e-12)


def test_without_a_finite_entry_only_their_share_is_given() -> None:
    values = measure(everywhere(torch.full((BATCH, HEADS, D, D), math.nan)))
    assert {name.rpartition("/")[2]: value for name, value in values.items()} == {"nonfinite_share": 1.0}


def test_one_sample_has_no_sensitivity_and_one_head_no_other() -> None:
    alone = measure([layer.rows(0, 1) for layer in random_outputs()])
    assert not [name for name in alone if name.endswith("input_sensitivity")]
    assert measure(random_outputs()).keys() > alone.keys()
    single = measure([layer.map(lambda each: each[:, :1]) for layer in random_outputs()], heads=1)
    assert not [name for name in single if name.endswith("cross_head_rms")]


def test_an_empty_batch_changes_nothing() -> None:
    layers = random_outputs()
    assert measure(layers, [layer.rows(0, 0) for layer in layers]) == measure(layers)


def test_of_a_predefined_g_only_the_curvature_is_measured() -> None:
    identity = torch.eye(D).expand(1, HEADS, D, D)
    predefined = [Outputs(None, None, None, identity)] * LAYERS
    values = measure(predefined, predefined)
    assert {name.split("/")[-2] for name in values} == {"G_LM"}
    assert values[f"{ALL}/G_LM/rank"] == D
    assert values[f"{ALL}/G_LM/log_abs_det"] == 0
    assert not [name for name in values if name.endswith("input_sensitivity")]


def test_the_rank_counts_what_fp32_can_tell_from_zero() -> None:
    edge = D * RANK_TOLERANCE
    values = torch.tensor([1, 1e-3, 1.01 * edge, 0.99 * edge, 1e-12, 0], dtype=torch.float64)
    assert spectra(torch.diag(values)).rank == 3


@pytest.mark.parametrize("sets", [[], ["cheep"]])
def test_unknown_sets_are_refused(sets: list[str]) -> None:
    with pytest.raises(ValueError, match="sets="):
        DeductiveMetrics(LAYERS, HEADS, D, sets=sets)


def test_other_shapes_are_refused() -> None:
    metrics = DeductiveMetrics(LAYERS, HEADS, D)
    with pytest.raises(ValueError, match="num_layers=3"):
        metrics.update(random_outputs()[:2])
    with pytest.raises(ValueError, match="A of layer 0 is"):
        metrics.update(everywhere(torch.zeros(BATCH, HEADS + 1, D, D)))


@pytest.fixture(scope="module")
def initial_110m() -> Sequence[Any]:
    """Deductive outputs of the papers' 110M model at initialisation, for prompts of 32 tokens."""
    torch.manual_seed(0)
    model = PldrllmForCausalLM(PldrllmConfig()).eval()
    ids = torch.randint(4, 32000, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model(ids, use_cache=False, output_deductive_outputs=True)
    outputs: Sequence[Any] = output.deductive_outputs
    return outputs


def test_at_initialisation_the_110m_model_has_the_known_figures(initial_110m: Sequence[Any]) -> None:
    values = measure(initial_110m, heads=14, d=64)
    assert all(0.95 < values[f"{ALL}/layer_{layer}/A/row_map_collapse"] < 0.996 for layer in range(5))
    # LayerNorm without a bias yet: the rows sum to 0, so one direction is missing.
    assert values[f"{ALL}/A/rank"] == 63
    # As the RMS of the difference of two heads, for which independent heads give the square root of 2.
    assert values[f"{ALL}/A/cross_head_rms"] * math.sqrt(2 * 14 / 13) == pytest.approx(1.19, abs=0.05)
    assert values[f"{ALL}/A_P/mean"] == pytest.approx(1, abs=0.05)
    assert values[f"{ALL}/A_LM/min"] >= 0
    assert values.keys() == {info.name for info in layer_infos(TENSOR_METRICS, 5)}


def entropies_in_numpy(weights: Array, seen: Array) -> tuple[float, float]:
    """Mean entropy of the rows that see something, and relative of those that see two positions or more."""
    entropies, relative = [], []
    for sample, counts in zip(weights, seen, strict=True):
        for head in sample:
            for row, count in zip(head, counts, strict=True):
                if count > 0:
                    entropies.append(-math.fsum(p * math.log(p) for p in row if p > 0))
                if count > 1:
                    relative.append(entropies[-1] / math.log(count))
    return float(np.mean(entropies)), float(np.mean(relative))


def masked_weights(token_mask: Tensor, seed: int = 0) -> Tensor:
    """Softmax rows (B, 2, S, S) under a causal mask and padding; rows of padding are spread over everything."""
    batch, length = token_mask.shape
    scores = torch.randn(batch, 2, length, length, generator=torch.Generator().manual_seed(seed))
    allowed = torch.ones(length, length, dtype=torch.bool).tril() & token_mask[:, None, None, :].bool()
    return scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1)


@pytest.mark.parametrize("padded", [False, True])
def test_attention_entropy_is_what_numpy_finds(padded: bool) -> None:
    mask = torch.ones(3, 7, dtype=torch.long)
    if padded:
        mask[1, 4:] = 0
        mask[2, :2] = 0
    layers = [masked_weights(mask, seed) for seed in range(2)]
    seen = (mask.cumsum(-1) * mask).numpy()
    metrics = AttentionEntropy(2)
    metrics.update(layers, causal_visible_positions(layers[0], mask) if padded else None)
    values = metrics.compute()
    for group, members in (("", layers), ("/layer_0", layers[:1]), ("/layer_1", layers[1:])):
        counts = np.concatenate([seen] * len(members))
        entropy, relative = entropies_in_numpy(torch.cat(members).double().numpy(), counts)
        assert values[f"deductive{group}/attention/entropy"] == pytest.approx(entropy, rel=1e-6)
        assert values[f"deductive{group}/attention/relative_entropy"] == pytest.approx(relative, rel=1e-6)
    assert values.keys() == {info.name for info in layer_infos(ATTENTION_METRICS, 2)}


def test_attention_entropy_has_its_bounds_and_halves_combine() -> None:
    uniform = torch.ones(2, 1, 5, 5).tril()
    uniform = uniform / uniform.sum(-1, keepdim=True)
    sharp = torch.eye(5).expand(2, 1, 5, 5)
    assert attention_entropy(uniform)[0, 0].tolist() == pytest.approx([math.log(count) for count in range(1, 6)])
    for weights, relative in ((uniform, 1.0), (sharp, 0.0)):
        metrics = AttentionEntropy(1)
        metrics.update([weights[:1]])
        metrics.update([weights[1:]])
        assert metrics.compute()["deductive/attention/relative_entropy"] == pytest.approx(relative, abs=1e-7)


def test_rows_of_nan_are_counted_and_left_out() -> None:
    weights = masked_weights(torch.ones(2, 4))
    spoilt = weights.clone()
    spoilt[0, 0, 3] = math.nan
    metrics = AttentionEntropy(1)
    metrics.update([spoilt])
    values = metrics.compute()
    assert values["deductive/attention/nonfinite_share"] == pytest.approx(1 / 16)
    rest = attention_entropy(weights).sum() - attention_entropy(weights)[0, 0, 3]
    assert values["deductive/attention/entropy"] == pytest.approx(rest.item() / 15)
    with pytest.raises(ValueError, match="num_layers=1"):
        metrics.update([weights, weights])


def test_the_last_queries_of_a_longer_sequence_see_its_beginning() -> None:
    assert causal_visible_positions(torch.zeros(1, 1, 2, 6)).tolist() == [[5, 6]]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    assert causal_visible_positions(torch.zeros(1, 1, 2, 6), mask).tolist() == [[3, 4]]


def test_the_models_own_outputs_are_taken_as_they_come() -> None:
    model = small_model(attention="eager")
    ids = token_ids(3, 9)
    with torch.no_grad():
        output = model(ids, use_cache=False, output_deductive_outputs=True, output_attentions=True)
    values = measure(output.deductive_outputs, heads=2, d=8)
    assert values.keys() == {info.name for info in layer_infos(TENSOR_METRICS, 2)}
    entropy = AttentionEntropy(2)
    entropy.update(output.attentions)
    assert 0 < entropy.compute()["deductive/attention/relative_entropy"] < 1
