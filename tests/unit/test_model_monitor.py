"""The monitor of a model in training: what it measures equals loops over single rows, however the rows are shared."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.metrics.deductive import DeductiveMetrics
from pldr_train.metrics.tensor_metrics import CHEAP, COSTLY
from pldr_train.model import PldrllmForCausalLM
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.training import monitor
from pldr_train.training.continuations import continue_rows, draw_top_p, fit_to_chunks
from pldr_train.training.monitor import ModelMonitor
from tests.unit.model_cases import VOCAB_SIZE, small_model, token_ids
from tests.unit.test_deductive_metrics import commutant_in_numpy

S, ROWS = 20, 5
ALL = torch.ones(ROWS, dtype=torch.bool)
ROWS_OF_S = token_ids(ROWS, S + 1)


def recipe(settings: dict[str, Any] | None = None, **sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        "run": {"name": "unit", "seed": 3},
        "model": {
            "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "A_dff": 21, "num_reslayerA": 2,
            "vocab_size": 300,
        },
        "data": {"source": "quickstart", "context_length": S},
        "optim": {"warmup_steps": 0},
        "trainer": {"max_steps": 2, "batch_size": 2},
        "monitor": {"rows": ROWS, "targets": 4, "prompts": 3, "new_tokens": 5} | (settings or {}),
    }  # fmt: skip
    for section, changes in sections.items():
        values[section] = values[section] | changes
    return recipe_from_dict(values).resolved()


def strong_model(**overrides: Any) -> PldrllmForCausalLM:
    """A model whose G moves much with its input, and its logits with G."""
    model = small_model(A_dff=21, **overrides)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "power_law" in name or "metric_learner" in name or "query" in name:
                parameter.mul_(3.0)
        model.lm_head.weight.mul_(8.0)
    return model.double()  # the power stage would blow the rounding of fp32 up to what is compared


def measured(chosen: Recipe, model: PldrllmForCausalLM, rows: Tensor, is_row: Tensor | None = None) -> dict[str, float]:
    watched = ModelMonitor(chosen)
    watched.begin_validation()
    for part in range(0, len(rows), 2):  # as validation batches come
        kept = torch.ones(len(rows), dtype=torch.bool) if is_row is None else is_row
        watched.add_validation_rows(rows[part : part + 2], kept[part : part + 2])
    return watched.measure(model)


def nll(model: PldrllmForCausalLM, ids: Tensor, target: Tensor, at: int = -1) -> tuple[float, bool]:
    logits = model(input_ids=ids[None], use_cache=False).logits[0, at].double()
    return float(F.cross_entropy(logits, target)), int(logits.argmax()) == int(target)


def test_leakage_is_that_of_loops_over_rows_and_prefixes() -> None:
    model, rows = strong_model(), token_ids(ROWS + 2, S + 1)
    chosen = recipe({"positions": [3, 9, 20]})
    values = measured(chosen, model, rows)
    gaps, block, sequential, right = [], [], [], [0, 0]
    with torch.no_grad():
        for row in rows[:ROWS]:
            for position in (3, 9, 20):
                whole, hit = nll(model, row[:-1], row[position], position - 1)
                alone, lone_hit = nll(model, row[:position], row[position])
                block.append(whole)
                sequential.append(alone)
                right = [right[0] + hit, right[1] + lone_hit]
            gaps.append(sum(sequential[-3:]) / 3 - sum(block[-3:]) / 3)
    student = 2.7764451051977987  # of 4 degrees of freedom
    half = student * float(torch.tensor(gaps, dtype=torch.float64).std()) / math.sqrt(ROWS)
    gap = sum(gaps) / ROWS
    assert abs(gap) > 0.01  # else the comparison would show nothing
    assert values["leakage/targets"] == 15
    assert values["leakage/block_nll"] == pytest.approx(sum(block) / 15, rel=1e-5)
    assert values["leakage/sequential_nll"] == pytest.approx(sum(sequential) / 15, rel=1e-5)
    assert values["leakage/gap"] == pytest.approx(gap, abs=1e-5)
    assert values["leakage/gap_low"] == pytest.approx(gap - half, abs=1e-4)
    assert values["leakage/gap_high"] == pytest.approx(gap + half, abs=1e-4)
    assert [values["leakage/block_accuracy"] * 15, values["leakage/sequential_accuracy"] * 15] == pytest.approx(right)


@pytest.mark.parametrize("causal", [{"custom_G_type": "identity"}, {"custom_G_type": "random"}, {"gram_chunk_size": 4}])
def test_a_model_that_cannot_see_ahead_has_no_gap_but_rounding(causal: dict[str, Any]) -> None:
    rows = token_ids(ROWS, S + 1)
    values = measured(recipe({"targets": S}, model=causal), strong_model(**causal), rows)
    assert abs(values["leakage/gap"]) < 1e-5
    assert values["leakage/gap_high"] - values["leakage/gap_low"] < 1e-4
    learned = measured(recipe({"targets": S}), strong_model(), rows)
    assert abs(learned["leakage/gap"]) > 0.01


def test_costly_metrics_and_entropy_are_those_of_the_rows() -> None:
    model, rows = strong_model(attention="eager"), token_ids(ROWS + 1, S + 1)
    values = measured(recipe(), model, rows)
    with torch.no_grad():
        output = model(
            input_ids=rows[:ROWS, :-1], use_cache=False, output_deductive_outputs=True, output_attentions=True
        )
    expected = DeductiveMetrics(2, 2, 8, sets=(COSTLY,))
    expected.update(output.deductive_outputs)
    of_g = {name: value for name, value in expected.compute().items() if "/A/log_abs_det" not in name}
    for name, value in of_g.items():  # untrained, A is singular and its determinant rounding
        assert values[name] == pytest.approx(value, rel=1e-4), name
    residual = [commutant_in_numpy(matrix.numpy()) for matrix in output.deductive_outputs[1].curvature.flatten(0, 1)]
    assert values["deductive/layer_1/G_LM/commutant_residual"] == pytest.approx(np.mean(residual), rel=1e-9)
    weights = output.attentions[1].double()
    entropy = float(-torch.where(weights > 0, weights * weights.log(), 0.0).sum(-1).mean())
    assert values["deductive/layer_1/attention/entropy"] == pytest.approx(entropy, rel=1e-5)


@pytest.mark.parametrize("chunk", [None, 8])
def test_the_row_maps_jacobian_is_that_at_rows_of_each_texts_gram(chunk: int | None) -> None:
    shape = {} if chunk is None else {"gram_chunk_size": chunk}
    model, texts = strong_model(**shape), token_ids(ROWS, S + 1)
    values = measured(recipe(model=shape), model, texts)
    medians = []
    for layer in model.decoder.layers:
        learner, grams = layer.attention.metric_learner, []
        hook = learner.gram_norm.register_forward_hook(lambda _module, _inputs, output, to=grams: to.append(output))
        with torch.no_grad():
            model(input_ids=texts[:, :-1], use_cache=False)
        hook.remove()
        norms = []
        for gram in grams[0].reshape(ROWS, -1, 2, 8, 8)[:, -1].flatten(1, 2):  # of the last chunk, (2 * 8, 8)
            for row in gram[torch.linspace(0, 15, 7).long()]:  # ceil(32 / 5) of each text
                jacobian = torch.autograd.functional.jacobian(torch.nn.Sequential(*learner.residual_units), row)
                norms.append(float(np.linalg.norm(jacobian.numpy(), 2)))
        medians.append(float(np.median(norms)))
    for index, expected in enumerate(medians):
        assert values[f"deductive/layer_{index}/A/row_map_jacobian"] == pytest.approx(expected, rel=1e-9)
    assert values["deductive/A/row_map_jacobian"] == pytest.approx(min(medians), rel=1e-9)


def test_the_order_parameter_compares_two_continuations_and_the_prompt() -> None:
    model, rows = strong_model(), token_ids(ROWS, S + 1)
    chosen = recipe()
    values = measured(chosen, model, rows)
    with torch.no_grad():
        after = []
        for which in (0, 1):
            ids = [
                continue_rows(model, row[None, : S // 2], 5, [3 + 2 * n + which], top_p=0.8, num_pieces=300)[0]
                for n, row in enumerate(rows[:3])
            ]
            after.append([model.decoder(each, use_cache=False, output_deductive_outputs=True) for each in ids])
        prompts = [
            model.decoder(row[None, : S // 2], use_cache=False, output_deductive_outputs=True) for row in rows[:3]
        ]
    pooled = {
        key: torch.cat([layer.curvature.flatten() for output in outputs for layer in output.deductive_outputs])
        for key, outputs in (("x1", after[0]), ("x2", after[1]), ("xc", prompts))
    }

    def bounded(first: str, second: str) -> float:
        rms = [
            float(each.double().square().mean().sqrt())
            for each in (pooled[first] - pooled[second], pooled[first], pooled[second])
        ]
        return 2 * rms[0] / (rms[1] + rms[2])

    name = "order_parameter/G_LM/bounded"
    assert values[f"deductive/{name}"] == pytest.approx(bounded("x1", "x2"), rel=1e-3)
    assert values[f"deductive/cached_{name}"] == pytest.approx(bounded("xc", "x1"), rel=1e-3)
    assert values[f"deductive/{name}"] > 0.001


@pytest.mark.parametrize("context", [S, 16])
def test_with_a_causal_gram_the_continuations_reach_the_g_that_is_compared(context: int) -> None:
    chosen = recipe({"new_tokens": 3}, model={"gram_chunk_size": 4}, data={"context_length": context})
    values = measured(chosen, strong_model(gram_chunk_size=4), token_ids(ROWS, context + 1))
    assert values["deductive/order_parameter/G_LM/bounded"] > 0.001
    assert values["deductive/cached_order_parameter/G_LM/bounded"] > 0.001
    # What depends on no input has none.
    identity = measured(recipe(model={"custom_G_type": "identity"}), strong_model(custom_G_type="identity"), ROWS_OF_S)
    assert not [name for name in identity if "order_parameter" in name]


def test_where_two_chunks_have_no_room_there_is_no_order_parameter() -> None:
    chosen = recipe(model={"gram_chunk_size": 10})
    values = measured(chosen, strong_model(gram_chunk_size=10), ROWS_OF_S)
    assert "deductive/G_LM/rank" in values
    assert not [name for name in values if "order_parameter" in name]


@pytest.mark.parametrize(
    ("prompt", "new", "chunk", "context", "expected"),
    [
        (64, 16, None, 128, (64, 16)),
        (100, 64, None, 128, (100, 28)),
        (64, 4, 32, 128, (60, 4)),
        (64, 100, 32, 128, (32, 64)),  # three chunks, for one more token must fit
        (64, 16, 64, 128, None),
        (70, 60, 64, 130, (68, 60)),
        (8, 16, 4, 17, (4, 12)),
        (3, 1, 4, 100, None),
        (9, 1, None, 9, None),
    ],
)
def test_prompts_are_cut_so_that_continuations_end_with_a_chunk(
    prompt: int, new: int, chunk: int | None, context: int, expected: tuple[int, int] | None
) -> None:
    assert fit_to_chunks(prompt, new, chunk, context) == expected


def test_rows_whose_logits_are_not_finite_are_left_out_of_the_order_parameter() -> None:
    model, rows = strong_model(), ROWS_OF_S.clone()
    fine = measured(recipe({"prompts": 2}), model, rows)
    with torch.no_grad():
        model.decoder.embed_tokens.weight[39] = math.nan
    rows[rows == 39] = 38
    rows[1, 2] = 39
    values = measured(recipe({"prompts": 3}), model, rows[:2].repeat(2, 1)[:3])
    assert math.isfinite(values["deductive/order_parameter/G_LM/bounded"])
    assert "leakage/gap" not in values
    assert "deductive/order_parameter/G_LM/bounded" in fine
    rows[:, 2] = 39
    assert not [name for name in measured(recipe(), model, rows) if "order_parameter" in name]


def test_a_model_with_too_many_attention_weights_does_without_their_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measured(recipe(), strong_model(), ROWS_OF_S)
    monkeypatch.setattr(monitor, "MOST_ATTENTION_WEIGHTS", 2 * 2 * S**2 - 1)
    without = measured(recipe(), strong_model(), ROWS_OF_S)
    left_out = {name for name in whole if "/attention/" in name}
    assert len(left_out) == 9
    assert without.keys() == whole.keys() - left_out
    # A has the rank 1 here: whether rounding leaves it a determinant depends on the processor.
    rounding = {name for name in whole if name.endswith(("A/log_abs_det", "A/singular_share"))}
    for name in without.keys() - rounding:
        assert without[name] == pytest.approx(whole[name], rel=1e-6), name


def test_a_watchdog_hears_of_every_pass() -> None:
    chosen, model = recipe(), strong_model()
    watched, passes, beats = ModelMonitor(chosen), [], []
    watched.beat = lambda: beats.append(1)
    watched.begin_validation()
    watched.add_validation_rows(ROWS_OF_S, ALL)
    handle = model.decoder.register_forward_pre_hook(lambda *_: passes.append(1))
    watched.measure(model)
    handle.remove()
    assert len(beats) == len(passes) > 10
    model(input_ids=ROWS_OF_S)
    assert len(beats) == len(passes)


def test_a_step_that_is_left_out_leaves_nothing() -> None:
    model, watched = strong_model(), ModelMonitor(recipe())
    layers = model(input_ids=ROWS_OF_S, use_cache=False, output_deductive_outputs=True).deductive_outputs
    watched.add_step(layers, dag_loss(layers, DagCoefficients(0.1, 0.1, 0.1)), ROWS)
    watched.forget_step()
    assert watched.step_values() == {}


def test_rows_that_only_fill_up_do_not_count() -> None:
    model, rows = strong_model(), token_ids(ROWS, S + 1)
    filled = torch.cat((rows[:4], rows[:1]))
    some = measured(recipe(), model, filled, torch.tensor([True] * 4 + [False]))
    plain = measured(recipe(), model, rows[:4])
    assert some == pytest.approx(plain, rel=1e-6)


class Shared:
    """Two ranks' sums, added as processes would."""

    def __init__(self) -> None:
        self.given: list[Tensor] = []

    def keep(self, tensor: Tensor) -> Tensor:
        self.given.append(tensor)
        return tensor


def test_rows_are_shared_over_processes_with_equally_many_passes() -> None:
    model, rows = strong_model(), token_ids(6, S + 1)
    whole = measured(recipe(), model, rows)
    sums, passes = [], []
    for rank in (0, 1):
        watched, calls = ModelMonitor(recipe(), rank, 2), []
        handle = model.decoder.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        watched.begin_validation()
        watched.add_validation_rows(rows[rank::2], torch.ones(3, dtype=torch.bool))
        shared = Shared()
        watched.measure(model, shared.keep, nullcontext)
        handle.remove()
        sums.append(shared.given[0])
        passes.append(len(calls))
    assert passes[0] == passes[1]
    total = sums[0] + sums[1]
    assert float(total[0]) == whole["leakage/targets"] == ROWS * 4
    assert float(total[5] / total[0]) == pytest.approx(whole["leakage/gap"], abs=1e-6)


@pytest.mark.parametrize("section", [{"packing": "pad"}, {"document_mask": True}])
def test_padding_and_kept_apart_documents_are_respected(section: dict[str, Any]) -> None:
    model, rows = strong_model(), token_ids(ROWS, S + 1)
    if "packing" in section:
        rows[:, 15:] = 0  # padding
        rows[1, 8:] = 0
    else:
        rows[:, 7] = 3  # EOS
    values = measured(recipe({"targets": S}, data=section), model, rows)
    assert values["leakage/targets"] == (4 * 14 + 7 if "packing" in section else ROWS * S)
    if "packing" in section:
        trimmed = measured(recipe({"targets": 7}), model, rows[[1], :8])
        assert trimmed["leakage/targets"] == 7
        # Row 1 is too short for the prompts of half a row.
        assert "deductive/order_parameter/G_LM/bounded" in values


@pytest.mark.parametrize("section", [{"packing": "pad"}, {"document_mask": True}])
def test_the_entropy_is_relative_to_the_positions_that_are_seen(section: dict[str, Any]) -> None:
    model, rows = strong_model(attention="eager"), token_ids(ROWS, S + 1)
    if "packing" in section:
        lengths = [S, 8, 15, 3, 2]
        for row, length in zip(rows, lengths, strict=True):
            row[length:] = 0
        passes = [(row[None, :length], None) for row, length in zip(rows, lengths, strict=True)]
    else:
        rows[:, 7] = 3  # EOS: another document begins after it
        passes = [(rows[:, :S], torch.tensor([*range(8), *range(S - 8)]).expand(ROWS, -1))]
    found = []
    for ids, positions in passes:
        with torch.no_grad():
            output = model(input_ids=ids, position_ids=positions, use_cache=False, output_attentions=True)
        weights = output.attentions[1].numpy()
        seen = range(1, ids.shape[1] + 1) if positions is None else (positions[0] + 1).tolist()
        for row, head, place in np.ndindex(weights.shape[:3]):
            if seen[place] > 1:
                found.append(scipy.stats.entropy(weights[row, head, place]) / math.log(seen[place]))
    values = measured(recipe(data=section), model, rows)
    assert values["deductive/layer_1/attention/relative_entropy"] == pytest.approx(np.mean(found), rel=1e-6)


def test_nothing_is_measured_that_is_switched_off() -> None:
    model, rows = strong_model(), token_ids(ROWS, S + 1)
    values = measured(recipe({"deductive": False, "targets": 0, "prompts": 0}), model, rows)
    assert values == {}
    some = measured(recipe({"prompts": 0}), model, rows)
    assert not [name for name in some if "order_parameter" in name]
    assert "deductive/G_LM/rank" in some


def test_one_row_gives_a_gap_without_an_interval() -> None:
    values = measured(recipe({"rows": 1, "prompts": 1}), strong_model(), token_ids(3, S + 1))
    assert values["leakage/targets"] == 4
    assert "leakage/gap" in values
    assert "leakage/gap_low" not in values


def test_a_logged_steps_metrics_are_those_of_its_micro_batches() -> None:
    model, rows = strong_model(), token_ids(6, S)
    watched, whole = ModelMonitor(recipe()), DeductiveMetrics(2, 2, 8, sets=(CHEAP,))
    with torch.no_grad():
        for part in rows.split(2):  # type: ignore[no-untyped-call]
            layers = model(input_ids=part, use_cache=False, output_deductive_outputs=True).deductive_outputs
            watched.add_step(layers, dag_loss(layers, DagCoefficients(0.1, 0.1, 0.1)), len(part))
            whole.update(layers)
        all_layers = model(input_ids=rows, use_cache=False, output_deductive_outputs=True).deductive_outputs
        dag = dag_loss(all_layers, DagCoefficients(0.1, 0.1, 0.1))
    values = watched.step_values()
    expected = whole.compute() | {
        f"train/dag/layer_{layer}/{name}": float(value)
        for name, each in dag.per_layer.items()
        for layer, value in enumerate(each)
    }
    assert values == pytest.approx(expected, rel=1e-5)
    assert len([name for name in values if "/dag/" in name]) == 6
    # The next step begins anew.
    watched.add_step(layers, dag_loss(layers, DagCoefficients(0.1, 0.1, 0.1)), 2)
    assert watched.step_values() != pytest.approx(expected, rel=1e-5)


def test_a_text_does_not_depend_on_its_neighbours() -> None:
    model, prompts = strong_model(), token_ids(3, 6)
    together, good = continue_rows(model, prompts, 7, [5, 6, 7], top_p=0.9, num_pieces=30)
    alone, _ = continue_rows(model, prompts[1:2], 7, [6], top_p=0.9, num_pieces=30)
    assert good.tolist() == [True] * 3
    assert together.shape == (3, 13)
    assert torch.equal(together[1:2], alone)
    assert int(together[:, 6:].max()) < 30 < VOCAB_SIZE
    assert not torch.equal(alone, continue_rows(model, prompts[1:2], 7, [8], top_p=0.9, num_pieces=30)[0])


def test_draws_follow_the_probabilities_of_the_likeliest() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.15, 0.25]], dtype=torch.float64).expand(4000, -1)
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    counts = draw_top_p(probabilities, draws, 0.8).bincount(minlength=4) / 4000
    # 0.5 + 0.25 < 0.8, so 0.15 is the last that is taken; the rest is cut off.
    assert counts.tolist() == pytest.approx([0.0, 0.5 / 0.9, 0.15 / 0.9, 0.25 / 0.9], abs=1e-3)
    assert draw_top_p(probabilities[:1], torch.tensor([1 - 1e-17]), 1.0).tolist() == [0]
    assert draw_top_p(probabilities[:1], torch.tensor([0.999]), 0.1).tolist() == [1]
