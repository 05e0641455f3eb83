"""What a training step launches: nothing that the host waits for, and weights cast together instead of one by one."""

from __future__ import annotations

from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch import Tensor

from benchmarks.bench_launches import Launches, counted_launches
from benchmarks.scheduled_kernels import counting_backend
from pldr_train.fit import fit
from pldr_train.model import PldrllmForCausalLM, casting
from pldr_train.model.casting import weights_cast_together
from pldr_train.model.power_law_attention import GatedLinearUnit
from pldr_train.optim import clamp_all
from pldr_train.recipe import recipe_from_dict
from pldr_train.training import nonfinite_policy
from pldr_train.training.weights import compile_layers
from tests.tiny import tiny_values
from tests.unit.model_cases import small_model, token_ids
from tests.unit.test_model_training import training_loss

LOG_STEPS = (4, 8)


class CountBetweenLogSteps(pl.Callback):
    """Counts from the start of one step to the start of the next, unless the first is a log step."""

    def __init__(self, launches: Launches) -> None:
        self.launches, self.steps = launches, 0
        launches.on = False

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        self.launches.on = trainer.global_step + 1 not in LOG_STEPS
        self.steps += self.launches.on

    def on_train_end(self, *_: Any) -> None:
        self.launches.on = False


def run_counted(data: Path, runs: Path, **sections: Any) -> tuple[Launches, int]:
    quiet = {
        "trainer": {"max_steps": 8, "validate_every_steps": 8, "precision": "bf16"},
        "checkpoint": {"every_steps": 8},
        "logging": {"every_steps": 4, "batch_digest": False},
    }
    parallel = sections.pop("parallel", {})
    values = tiny_values(data, runs, **(quiet | sections)) | {"parallel": parallel}
    with counted_launches() as launches:
        callback = CountBetweenLogSteps(launches)
        fit(recipe_from_dict(values), callbacks=[callback])
    return launches, callback.steps


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"custom_G_type": "identity"}, "dag": {"A_LM": 0.0, "A_P": 0.0, "G_LM": 0.0}},
        {"model": {"gram_chunk_size": 8}, "parallel": {"activation_checkpointing": True}},
        {"optim": {"clip_value": None, "clip_norm": 1.0, "groups": [{"match": "generator", "lr_factor": 0.1}]}},
    ],
    ids=["learned", "identity", "causal, checkpointed", "groups"],
)
def test_the_host_waits_for_nothing_between_two_log_steps(
    tiny_data: Path, tmp_path: Path, sections: dict[str, Any]
) -> None:
    launches, steps = run_counted(tiny_data, tmp_path, **sections)
    assert steps == 6
    assert launches.operations["native_layer_norm"] > steps
    assert dict(launches.waits) == {}


def test_the_count_sees_what_a_step_waits_for(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite_policy, "MOST_UNREAD_STEPS", 2)
    launches, _ = run_counted(tiny_data, tmp_path)
    (place,) = launches.waits
    assert "tolist, " in place
    assert "nonfinite_policy.py" in place
    assert launches.waits[place] == 2


def bf16_gradients(model: PldrllmForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = training_loss(model, ids)
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "checkpointed", "re-entrant"])
def test_weights_cast_together_give_the_same_gradients_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, checkpointing: bool | None
) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    model.decoder.layers[1].feed_forward.up.weight.requires_grad_(False)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    with counted_launches() as launches:
        together = bf16_gradients(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(casting, "CastsWeights", ())  # no module is one, so autocast casts each weight
        with counted_launches() as singly:
            expected = bf16_gradients(model, ids)
    assert together.keys() == expected.keys()
    assert "decoder.layers.1.feed_forward.up.weight" not in together
    for name, gradient in expected.items():
        assert together[name].dtype == torch.float32
        assert torch.equal(together[name], gradient), name
    assert launches.casts < singly.casts * (0.6 if checkpointing else 0.5)  # re-entrant, a pass has no gradient


def through_unit(unit: GatedLinearUnit, x: Tensor, stacked: bool) -> tuple[Tensor, Tensor, dict[str, Tensor | None]]:
    unit.zero_grad()
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16), weights_cast_together(unit, "cpu", compiled=stacked):
        assert (unit._cast is not None) == (stacked and isinstance(unit.up, casting.Linear))
        out = unit(leaf)
    out.float().sin().sum().backward()
    assert unit._cast is None
    assert leaf.grad is not None
    return out.detach(), leaf.grad, {name: parameter.grad for name, parameter in unit.named_parameters()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("frozen", [None, "up.weight", "gate.weight"])
def test_weights_in_one_matrix_give_the_same_outputs_and_gradients(bias: bool, frozen: str | None) -> None:
    unit, x = GatedLinearUnit(16, 24, bias), torch.randn(40, 16)
    if frozen is not None:
        unit.get_parameter(frozen).requires_grad_(False)
    (out, of_x, found), (expected_out, expected_of_x, expected) = (through_unit(unit, x, way) for way in (True, False))
    torch.testing.assert_close(out, expected_out, rtol=0.01, atol=0.01)
    torch.testing.assert_close(of_x, expected_of_x, rtol=0.02, atol=0.02)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        if name == frozen:
            assert found[name] is gradient is None
        else:
            torch.testing.assert_close(found[name], gradient, rtol=0.02, atol=0.02)


def test_a_replaced_part_of_a_stack_is_called_by_itself() -> None:
    unit, x = GatedLinearUnit(16, 24, bias=True), torch.randn(40, 16)
    adapter = torch.nn.Linear(16, 24)
    adapter.load_state_dict(unit.up.state_dict())
    unit.up = adapter  # type: ignore[assignment]
    (out, _, found), (expected_out, _, expected) = (through_unit(unit, x, way) for way in (True, False))
    assert torch.equal(out, expected_out)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())  # type: ignore[arg-type]


@pytest.mark.slow
def test_a_compiled_layer_launches_neither_a_cast_nor_a_product_for_each_weight() -> None:
    ran: dict[str, Counter[str]] = {}

    def note(part: str, launches: Counter[str]) -> AbstractContextManager[None]:
        ran[part] = launches
        return nullcontext()

    model, ids = small_model(num_hidden_layers=1, num_reslayerA=1).train(), token_ids(2, 10)
    torch._dynamo.reset()
    compile_layers(model, counting_backend(note))
    bf16_gradients(model, ids)
    # Query, key and value; the output; gate and up, and down, of the feed-forward and of two units of the learner.
    products = 2 + 3 * 2
    assert ran["forward"]["extern_kernels.addmm"] == products
    assert ran["backward"]["extern_kernels.mm"] == 2 * products
    num_weights_and_biases = 2 * (4 + 3 * 3)
    assert ran["forward"]["Triton kernel"] < num_weights_and_biases


def test_weights_are_cast_anew_after_a_step_and_not_kept() -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    before = bf16_gradients(model, ids)
    assert all(getattr(module, "_cast", None) is None for module in model.modules())
    with torch.no_grad():
        model.decoder.layers[0].attention.query.weight.mul_(2)
    after = bf16_gradients(model, ids)
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_clamping_together_is_clamping_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.tensor([-3.0, -1.0, 0.5, 1.5, torch.inf, -torch.inf, torch.nan])
    expected = [values.clone(), -values.view(7, 1)]
    together = [each.clone() for each in expected]
    clamp_all(expected, 1.0)
    monkeypatch.setattr("pldr_train.optim.one_by_one", lambda _device: False)
    clamp_all(together, 1.0)
    for left, right in zip(together, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)
