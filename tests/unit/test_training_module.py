"""The LightningModule by itself: what one optimizer step does to the weights and what it reports."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from pldr_train.dag import log_trace_exp
from pldr_train.data.rows.loader import ValidationLoader
from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe, recipe_from_dict
from pldr_train.runs.nonfinite import check_finite
from pldr_train.training.module import PldrllmModule
from pldr_train.training.objective import choose_targets, draw_targets, token_loss
from pldr_train.training.quiet import quiet_libraries

VOCAB = 50
NAMES = {"A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}


def recipe(**sections: dict[str, Any]) -> Recipe:
    values: dict[str, Any] = {
        # Initial weights at which the power stage amplifies rounding little; with others sums in another order show.
        "run": {"name": "unit", "seed": 11},
        "model": {"num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8, "A_dff": 21, "vocab_size": 300},
        "dag": {"A_LM": 0.02, "A_P": 0.01, "G_LM": 0.03},
        "data": {"source": "quickstart", "context_length": 12, "num_lanes": 8},
        "optim": {"lr": 1e-2, "warmup_steps": 0},
        "trainer": {"max_steps": 2, "batch_size": 8, "precision": "fp32", "accelerator": "cpu"},
        "logging": {"every_steps": 1},
    }
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return recipe_from_dict(values)


def batches(steps: int = 2, rows: int = 8) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(6, VOCAB, (steps, rows, 13), generator=generator)
    # Padding of different length in each row, so that an average of averages would differ from the average.
    for row in range(rows):
        ids[:, row, 13 - row :] = 0
    return [{"input_ids": one, "cursors": torch.zeros(rows, 5, dtype=torch.int64)} for one in ids]


class Collect(pl.Callback):
    def __init__(self) -> None:
        self.values: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step % pl_module.recipe.logging.every_steps == 0:
            self.values.append(pl_module.training_values())


def train(chosen: Recipe, data: list[dict[str, Tensor]]) -> tuple[PldrllmModule, list[dict[str, float]]]:
    quiet_libraries()
    pl.seed_everything(1, verbose=False)
    module, collect = PldrllmModule(chosen), Collect()
    trainer = pl.Trainer(
        max_steps=chosen.trainer.max_steps, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[collect], limit_val_batches=0,
        precision="32-true",
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module, collect.values


def weights(module: PldrllmModule) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in module.model.parameters()])


def test_the_step_is_that_of_the_loss_written_out() -> None:
    chosen = recipe()
    data = batches()
    module, values = train(chosen, data)
    pl.seed_everything(1, verbose=False)
    plain = PldrllmModule(chosen)
    plain.configure_model()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    for step, (batch, logged) in enumerate(zip(data, values, strict=True)):
        # What the first step rounds, the power law of the second amplifies.
        tolerance = 1e-5 if step == 0 else 1e-4
        ids = batch["input_ids"]
        output = plain(ids[:, :-1], output_deductive_outputs=True)
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
        dag = {
            name: torch.stack([log_trace_exp(getattr(layer, field)) for layer in output.deductive_outputs]).mean()
            for name, field in NAMES.items()
        }
        loss = cross_entropy + 0.02 * dag["A_LM"] + 0.01 * dag["A_P"] + 0.03 * dag["G_LM"]
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_value_(plain.parameters(), 1.0)
        clipped = torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None])
        assert clipped < 0.95 * norm
        optimizer.step()
        # The second and last step of a schedule of two is at half the cosine.
        optimizer.param_groups[0]["lr"] = 1e-2 * (0.1 + 0.9 * 0.5)
        assert logged["train/loss"] == pytest.approx(loss.item(), rel=tolerance)
        assert logged["train/cross_entropy"] == pytest.approx(cross_entropy.item(), rel=tolerance)
        assert logged["train/grad_norm"] == pytest.approx(norm.item(), rel=10 * tolerance)
        assert logged["train/grad_norm_clipped"] == pytest.approx(clipped.item(), rel=10 * tolerance)
        for name, value in dag.items():
            assert logged[f"train/dag/{name}"] == pytest.approx(value.item(), rel=10 * tolerance)
    assert (weights(module) - weights(plain)).abs().max() < 1e-4
    assert [logged["train/lr"] for logged in values] == pytest.approx([1e-2, 5.5e-3])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_micro_batches_give_the_step_of_the_whole_batch(micro_batch_size: int, precision: str) -> None:
    one_step = {"precision": precision, "max_steps": 1}
    whole, (left,) = train(recipe(trainer=one_step), batches(1))
    split, (right,) = train(recipe(trainer=one_step | {"micro_batch_size": micro_batch_size}), batches(1))
    assert left.keys() == right.keys()
    for name, value in left.items():
        # The deductive means are sums of both signs, whose last digits are the rounding of other kernels.
        tolerance = {"rel": 1e-4, "abs": 1e-6} if name.startswith("deductive/") else {"rel": 1e-6}
        assert value == pytest.approx(right[name], **({"rel": 2e-4} if "grad_norm" in name else tolerance)), name
    # AdamW's first step has the size of the learning rate, 0.01, in the direction of even the smallest gradient, whose
    # sign bf16 does not always know.
    differing = (weights(whole) - weights(split)).abs() > 1e-3
    assert differing.float().mean() <= (0 if precision == "fp32" else 0.01)


def test_bf16_rounds_the_arithmetic_and_leaves_the_weights_in_fp32() -> None:
    exact, (left,) = train(recipe(trainer={"max_steps": 1}), batches(1))
    rounded, (right,) = train(recipe(trainer={"max_steps": 1, "precision": "bf16"}), batches(1))
    assert weights(exact).dtype == weights(rounded).dtype == torch.float32
    difference = abs(left["train/cross_entropy"] - right["train/cross_entropy"]) / left["train/cross_entropy"]
    assert 1e-6 < difference < 1e-2


def test_all_zero_coefficients_measure_and_do_not_train_on_it() -> None:
    zero = {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}
    module, values = train(recipe(dag=zero), batches())
    for logged in values:
        assert logged["train/loss"] == logged["train/cross_entropy"]
        assert logged["train/dag/A_P"] > 0
    seldom, values = train(recipe(dag=zero | {"every_steps": 2}), batches())
    assert "train/dag/A_P" not in values[0]
    assert "train/dag/A_P" in values[1]
    assert torch.equal(weights(module), weights(seldom))


SCHEDULED = {
    "A_LM": 2.0, "A_LM_schedule": "warmup", "A_LM_steps": [0, 2],
    "A_P": 1.0, "A_P_schedule": "decay", "A_P_steps": [0, 2],
    "G_LM": 0.5, "G_LM_schedule": "window", "G_LM_steps": [1, 2],
}  # fmt: skip


def test_the_loss_holds_the_coefficients_of_each_step_of_a_window() -> None:
    def logged(every_steps: int) -> list[dict[str, float]]:
        chosen = recipe(optim={"lr": 1e-9}, logging={"every_steps": every_steps}, dag=SCHEDULED)
        return train(chosen, batches())[1]

    first, second = logged(1)
    names = [f"train/dag/coefficient/{name}" for name in NAMES]
    assert [[values[name] for name in names] for values in (first, second)] == [[0.0, 1.0, 0.0], [1.0, 0.5, 0.5]]
    window = logged(2)[-1]
    weighted = (
        first["train/dag/A_P"]
        + second["train/dag/A_LM"] + 0.5 * second["train/dag/A_P"] + 0.5 * second["train/dag/G_LM"]
    ) / 2  # fmt: skip
    assert window["train/loss"] - window["train/cross_entropy"] == pytest.approx(weighted, rel=1e-5)


def test_the_loss_of_a_run_is_reduced_and_weighed_as_the_recipe_says() -> None:
    """The values to log stay unweighted means over heads; micro-batches change nothing."""
    weighed = {"reduce": "max", "layer_factors": [0.25, 1.5]}
    chosen = recipe(dag=weighed, trainer={"max_steps": 1})
    _, (logged,) = train(chosen, batches(1))
    _, (usual,) = train(recipe(trainer={"max_steps": 1}), batches(1))
    _, (split,) = train(recipe(dag=weighed, trainer={"max_steps": 1, "micro_batch_size": 2}), batches(1))
    plain = PldrllmModule(chosen)
    plain.configure_model()
    with torch.no_grad():
        layers = plain(batches(1)[0]["input_ids"][:, :-1], output_deductive_outputs=True).deductive_outputs
        expected = 0.0
        for name, coefficient in (("A_LM", 0.02), ("A_P", 0.01), ("G_LM", 0.03)):
            first, second = (float(log_trace_exp(getattr(layer, NAMES[name])).amax(1).mean()) for layer in layers)
            expected += coefficient * (0.25 * first + 1.5 * second) / 2
    assert logged["train/loss"] - logged["train/cross_entropy"] == pytest.approx(expected, rel=1e-4)
    assert split["train/loss"] == pytest.approx(logged["train/loss"], rel=1e-6)
    for name in NAMES:
        assert logged[f"train/dag/{name}"] == usual[f"train/dag/{name}"]
    rows = batches(1, 3)[0]["input_ids"]
    doubled, once = (validated(rows, 3, step=1, dag={"layer_factors": [each, each]}) for each in (2.0, 1.0))
    assert doubled["dag/weighted"] == pytest.approx(2 * once["dag/weighted"], rel=1e-6)
    assert doubled["dag/A_P"] == once["dag/A_P"]


def test_a_coefficient_that_is_scheduled_to_0_does_not_train() -> None:
    without = {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}
    not_yet = without | {"A_LM": 0.5, "A_LM_schedule": "warmup", "A_LM_steps": [0, 1]}
    scheduled, _ = train(recipe(dag=not_yet, trainer={"max_steps": 1}), batches())
    plain, _ = train(recipe(dag=without, trainer={"max_steps": 1}), batches())
    assert torch.equal(weights(scheduled), weights(plain))


def test_a_window_of_an_earlier_version_gets_its_weighted_losses_from_the_coefficients() -> None:
    module = PldrllmModule(recipe(dag={"A_LM": 0.5, "A_P": 0.0, "G_LM": 0.25}))
    sums, counts = [30.0, 5.0, 8.0, 6.0, 4.0], [10.0, 10.0, 2.0, 2.0, 2.0]
    window = {"sums": torch.tensor(sums, dtype=torch.float64), "weights": torch.tensor(counts, dtype=torch.float64)}
    module.load_training_window(window)
    assert module.peek_training_values()["train/loss"] == 3.0 + 0.5 * 4.0 + 0.25 * 2.0


def test_a_predefined_operator_trains_without_metric_and_potential() -> None:
    zero = {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}
    for kind in ("identity", "random"):
        _, values = train(recipe(dag=zero, model={"custom_G_type": kind}), batches())
        assert "train/dag/A_LM" not in values[0]
        assert values[0]["train/dag/G_LM"] > 0


def test_clipping_by_norm_is_what_the_recipe_says() -> None:
    by_value, _ = train(recipe(optim={"clip_value": 1e-4}), batches())
    by_norm, _ = train(recipe(optim={"clip_value": None, "clip_norm": 1e-4}), batches())
    unclipped, _ = train(recipe(optim={"clip_value": None}), batches())
    assert not torch.allclose(weights(by_value), weights(unclipped))
    assert not torch.allclose(weights(by_norm), weights(unclipped))
    assert not torch.allclose(weights(by_norm), weights(by_value))


def test_token_loss_is_a_sum_and_a_count_without_padding() -> None:
    logits = torch.randn(2, 3, 7)
    targets = torch.tensor([[1, 0, 3], [4, 5, 0]])
    loss = token_loss(logits, targets)
    kept = [(0, 0), (0, 2), (1, 0), (1, 1)]
    expected = -sum(logits[b, s].log_softmax(-1)[targets[b, s]] for b, s in kept)
    assert loss.cross_entropy_sum.item() == pytest.approx(float(expected), rel=1e-5)
    assert loss.tokens.item() == 4
    assert loss.correct.item() == sum(bool(logits[b, s].argmax() == targets[b, s]) for b, s in kept)
    assert token_loss(logits, torch.zeros_like(targets)).cross_entropy_sum.item() == 0


PADDED = torch.tensor([[7, 8, 9, 10], [11, 12, 0, 0], [13, 0, 0, 0], [0, 0, 0, 0]])
"""Targets of four rows; id 0 is padding."""


def test_the_last_target_of_a_row_is_that_before_its_padding() -> None:
    expected = [[0, 0, 0, 10], [0, 12, 0, 0], [13, 0, 0, 0], [0, 0, 0, 0]]
    assert choose_targets(PADDED, "last").tolist() == expected
    assert choose_targets(PADDED, "all").equal(PADDED)


def test_one_random_target_is_the_share_of_a_row_that_its_draw_names() -> None:
    """A draw of 2**31 parts: a quarter names the second of four targets, the first of two."""
    for draw, expected in (
        (0, [7, 11, 13, 0]),
        (2**29, [8, 11, 13, 0]),
        (2**30, [9, 12, 13, 0]),
        (2**31 - 1, [10, 12, 13, 0]),
    ):
        chosen = choose_targets(PADDED, "random_one", torch.full((4,), draw))
        assert chosen.count_nonzero(-1).tolist() == [1, 1, 1, 0]
        assert chosen.sum(-1).tolist() == expected
        assert bool(((chosen == PADDED) | (chosen == 0)).all())


def test_draws_depend_on_the_seed_and_the_row_s_number_and_are_even() -> None:
    draws = draw_targets(5, torch.arange(4000))
    assert torch.equal(draw_targets(5, torch.tensor([17, 3])), draws[[17, 3]])
    assert not torch.equal(draw_targets(6, torch.arange(4000)), draws)
    assert 0 <= int(draws.min()) < int(draws.max()) < 2**31
    chosen = choose_targets(torch.arange(1, 9).expand(4000, 8), "random_one", draws)
    counts = torch.bincount(chosen[chosen > 0], minlength=9)[1:]
    assert int(counts.sum()) == 4000
    # Each of 8 targets 500 times, with a standard deviation of 21.
    assert int((counts - 500).abs().max()) < 5 * 21
    # Rows of consecutive numbers draw independently of each other.
    assert abs(float(torch.corrcoef(torch.stack((draws[:-1], draws[1:])).double())[0, 1])) < 5 / 4000**0.5


def numbered(steps: int = 2, rows: int = 8) -> list[dict[str, Tensor]]:
    """Batches whose rows have their numbers in the run."""
    found = batches(steps, rows)
    for step, batch in enumerate(found):
        batch["cursors"][:, 0] = torch.arange(rows) + step * rows
    return found


@pytest.mark.parametrize("which", ["last", "random_one"])
def test_the_loss_scores_the_chosen_target_of_each_row_alone(which: str) -> None:
    """Against log-softmax at places found by hand; the rows have 12, 12, 11, 10, ... targets."""
    chosen, data = recipe(trainer={"targets": which, "max_steps": 1}), numbered(1)
    _, (logged,) = train(chosen, data)
    plain = PldrllmModule(chosen)
    plain.configure_model()
    ids = data[0]["input_ids"]
    with torch.no_grad():
        scores = plain(ids[:, :-1]).logits.log_softmax(-1)
    losses, hits = [], 0
    for row in range(8):
        targets = [place for place in range(12) if ids[row, place + 1] != 0]
        place = targets[-1]
        if which == "random_one":
            digest = hashlib.blake2b(f"11/target/{row}".encode(), digest_size=8).digest()
            place = targets[(int.from_bytes(digest, "little") >> 33) * len(targets) >> 31]
        target = int(ids[row, place + 1])
        losses.append(-float(scores[row, place, target]))
        hits += int(scores[row, place].argmax()) == target
    assert logged["train/cross_entropy"] == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert logged["train/accuracy"] == hits / 8


@pytest.mark.parametrize("which", ["last", "random_one"])
def test_the_chosen_targets_do_not_depend_on_the_micro_batch(which: str) -> None:
    whole, (left,) = train(recipe(trainer={"targets": which, "max_steps": 1}), numbered(1))
    for micro_batch_size in (1, 2, 4):
        trainer = {"targets": which, "max_steps": 1, "micro_batch_size": micro_batch_size}
        split, (right,) = train(recipe(trainer=trainer), numbered(1))
        for name in ("train/loss", "train/cross_entropy", "train/accuracy", "train/dag/A_P"):
            assert left[name] == pytest.approx(right[name], rel=1e-6), name
        assert left["train/grad_norm"] == pytest.approx(right["train/grad_norm"], rel=2e-4)
        assert not bool(((weights(whole) - weights(split)).abs() > 1e-3).any())


def test_a_validation_scores_all_targets() -> None:
    rows = batches(1, 4)[0]["input_ids"]
    everything = validated(rows, 4)
    for which in ("last", "random_one"):
        assert validated(rows, 4, trainer={"micro_batch_size": 1, "targets": which}) == everything


def test_a_loss_that_is_no_number_stops_the_run_with_advice() -> None:
    check_finite({"train/loss": 1.0}, 3)
    with pytest.raises(RecipeError, match=r"step 3: train/loss=nan.*lower optim\.lr"):
        check_finite({"train/loss": float("nan"), "train/accuracy": 0.1}, 3)


def test_same_seed_same_weights_another_seed_others() -> None:
    first, _ = train(recipe(), batches())
    again, _ = train(recipe(), batches())
    assert torch.equal(weights(first), weights(again))
    other, _ = train(recipe(run={"seed": 12}), batches())
    assert not torch.allclose(weights(first), weights(other))


def test_initial_weights_depend_on_the_runs_seed_and_on_nothing_that_was_drawn_before() -> None:
    built = []
    for drawn, seed in ((1, 11), (2, 11), (1, 12)):
        torch.manual_seed(drawn)
        module = PldrllmModule(recipe(run={"seed": seed}))
        module.configure_model()
        assert torch.initial_seed() == drawn
        built.append(dict(module.model.named_parameters()))
    first, again, other = built
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn_ones = [name for name in first if first[name].std() > 0]
    assert {name for name in first if first[name].dim() == 2 and name.endswith("weight")} <= set(drawn_ones)
    assert not any(torch.equal(first[name], other[name]) for name in drawn_ones)
    query = "decoder.layers.{}.attention.query.weight"
    assert not torch.equal(first[query.format(0)], first[query.format(1)])


def validated(
    rows: Tensor, micro_batch_size: int, world_size: int = 1, step: int = 0, **sections: Any
) -> dict[str, float]:
    """Means over validation rows, of processes that are simulated one after the other."""
    module = PldrllmModule(recipe(**{"trainer": {"micro_batch_size": 1}} | sections))
    torch.manual_seed(1)
    module.configure_model()
    module.eval()
    module._trainer = SimpleNamespace(world_size=world_size, global_step=step)  # type: ignore[assignment]
    module.on_validation_epoch_start()
    for rank in range(world_size):
        own = rows[rank::world_size]
        filled = torch.cat((own, rows[:1].expand(-(-len(rows) // world_size) - len(own), -1)))
        with torch.no_grad():
            for batch in ValidationLoader(filled, len(own), micro_batch_size):
                module.validation_step(dict(batch), 0)
    return module.validation_means.compute()


def test_validation_depends_neither_on_the_micro_batch_nor_on_the_number_of_processes() -> None:
    rows = batches(1, 7)[0]["input_ids"]
    whole = validated(rows, 7)
    assert set(whole) >= {"cross_entropy", "accuracy", "dag/A_LM", "dag/A_P", "dag/G_LM"}
    for micro_batch_size in (1, 2, 3, 5, 16):
        assert validated(rows, micro_batch_size) == pytest.approx(whole, rel=1e-6), micro_batch_size
    for world_size in (2, 3, 4):
        assert validated(rows, 2, world_size) == pytest.approx(whole, rel=1e-6), world_size
    assert validated(rows[:6], 3)["cross_entropy"] != pytest.approx(whole["cross_entropy"], rel=1e-4)


@pytest.mark.parametrize(("step", "factor"), [(0, 0.0), (1, 0.0), (2, 0.25), (3, 0.5), (9, 1.0)])
def test_a_validation_weighs_by_the_coefficients_of_the_last_step(step: int, factor: float) -> None:
    dag = {"A_LM": 0.0, "A_P": 2.0, "G_LM": 0.0, "A_P_schedule": "warmup", "A_P_steps": [0, 4]}
    means = validated(batches(1, 3)[0]["input_ids"], 3, step=step, dag=dag, trainer={"max_steps": 10})
    assert means["dag/weighted"] == pytest.approx(2.0 * factor * means["dag/A_P"], rel=1e-6)


@pytest.mark.parametrize(("schedule", "second"), [("cosine", 0.55e-2), ("linear", 0.55e-2), ("constant", 1e-2)])
def test_the_steps_are_taken_with_the_recipes_schedule(schedule: str, second: float) -> None:
    _, values = train(recipe(optim={"schedule": schedule}), batches())
    assert [each["train/lr"] for each in values] == pytest.approx([1e-2, second])
