"""Updates and norms of weights from the moments, against the weights before and after real steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pldr_train.checkpoint.live_state import WholeState
from pldr_train.distributed.world import World
from pldr_train.metrics.catalog import WEIGHT_GROUPS
from pldr_train.metrics.layer_metrics import PARAMETER_METRICS, layer_infos
from pldr_train.model import PldrllmForCausalLM
from pldr_train.optim import adamw_of_groups, freeze, trained_groups
from pldr_train.recipe import OptimSection, recipe_from_dict
from pldr_train.training.observing import group_of, power_law_norms, update_ratios
from tests.unit.model_cases import small_model, token_ids

SETTINGS = OptimSection(lr=3e-3, weight_decay=0.2)


def ratios(model: PldrllmForCausalLM, optimizer: torch.optim.Optimizer, settings: OptimSection) -> dict[str, float]:
    names = [name for name, _ in model.named_parameters()]
    return update_ratios(WholeState(model, optimizer), settings, lambda factor: settings.lr * factor, names, World())


def trained(steps: int) -> tuple[PldrllmForCausalLM, torch.optim.AdamW, dict[str, torch.Tensor]]:
    """A model after some steps of AdamW, and its weights before the last of them."""
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), SETTINGS.lr, SETTINGS.betas, SETTINGS.eps, SETTINGS.weight_decay)
    before: dict[str, torch.Tensor] = {}
    for step in range(steps):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        ids = token_ids(2, 10, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer, before


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_the_ratio_is_that_of_the_weights_before_and_after_the_step(steps: int) -> None:
    model, optimizer, before = trained(steps)
    values = ratios(model, optimizer, SETTINGS)
    assert values.keys() == {f"train/update_ratio/{group}" for group in WEIGHT_GROUPS}
    for group in WEIGHT_GROUPS:
        pairs = [
            (parameter.detach().double() - before[name].double(), before[name].double())
            for name, parameter in model.named_parameters()
            if group_of(name) == group
        ]
        update, size = (sum(float(each.square().sum()) for each in column) for column in zip(*pairs, strict=True))
        assert values[f"train/update_ratio/{group}"] == pytest.approx((update / size) ** 0.5, rel=1e-3), group


def test_the_ratios_of_groups_have_rates_and_decays_of_their_own_and_frozen_weights_do_not_count() -> None:
    settings = recipe_from_dict({"run": {"name": "x"}, "data": {"path": "x"}, "optim": {
        "lr": 3e-3, "weight_decay": 0.2,
        "groups": [
            {"match": "generator", "lr_factor": 5.0, "weight_decay": 0.0, "betas": [0.7, 0.8], "eps": 1e-3},
            {"match": ["*.attention_norm.*", "*.query.*"], "name": "others", "lr_factor": 0.5},
            {"match": "output_head", "freeze": True},
        ],
    }}).optim  # fmt: skip
    model = small_model().train()
    freeze(settings, model)
    groups = trained_groups(settings, model)
    assert [group.label for group, _ in groups] == ["default", "generator", "others"]
    optimizer = adamw_of_groups(groups, settings)
    before: dict[str, torch.Tensor] = {}
    for step in range(3):
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        ids = token_ids(2, 10, seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    values = ratios(model, optimizer, settings)
    after = dict(model.named_parameters())
    members = {f"train/group/{group.label}/update_ratio": dict(named) for group, named in groups}
    members |= {
        f"train/update_ratio/{part}": {name for name in after if group_of(name) == part and after[name].requires_grad}
        for part in WEIGHT_GROUPS
    }
    assert values.keys() == {name for name, names in members.items() if names}
    assert "train/update_ratio/output_head" not in values
    for metric, value in values.items():
        update, size = (
            sum(float(each.double().square().sum()) for each in column)
            for column in zip(
                *((after[name].detach() - before[name], before[name]) for name in members[metric]), strict=True
            )
        )
        assert value == pytest.approx((update / size) ** 0.5, rel=1e-3), metric


def test_before_the_first_step_there_is_no_update() -> None:
    model, optimizer, _ = trained(0)
    assert ratios(model, optimizer, SETTINGS) == {}


def test_every_weight_has_a_group_and_a_predefined_g_lacks_two() -> None:
    groups = {group_of(name) for name, _ in small_model().named_parameters()}
    assert groups == set(WEIGHT_GROUPS)
    groups = {group_of(name) for name, _ in small_model(custom_G_type="identity").named_parameters()}
    assert groups == set(WEIGHT_GROUPS) - {"metric_learner", "power_law"}


def test_the_norms_are_those_of_the_parameters_themselves() -> None:
    model, optimizer, _ = trained(2)
    values = power_law_norms(WholeState(model, optimizer), 2, World())
    laws = [layer.attention.power_law for layer in model.base_model.layers]
    for parameter, attribute in {"W": "metric_weight", "P": "power_exponent", "a": "coupling"}.items():
        arrays = [getattr(law, attribute).detach().double().numpy().ravel() for law in laws]
        groups = {"deductive": np.concatenate(arrays)}
        groups |= {f"deductive/layer_{index}": array for index, array in enumerate(arrays)}
        for group, array in groups.items():
            assert values[f"{group}/{parameter}/norm"] == pytest.approx(np.linalg.norm(array), rel=1e-6)
            assert values[f"{group}/{parameter}/rms"] == pytest.approx(np.sqrt(np.mean(array**2)), rel=1e-6)
    assert values.keys() == {info.name for info in layer_infos(PARAMETER_METRICS, len(laws))}


def test_a_predefined_g_has_no_norms() -> None:
    model = small_model(custom_G_type="random")
    optimizer = torch.optim.AdamW(model.parameters())
    assert power_law_norms(WholeState(model, optimizer), 2, World()) == {}
