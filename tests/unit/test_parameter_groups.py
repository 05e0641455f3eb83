"""optim.groups: which parameter is trained how, what that costs, and what is refused."""

from __future__ import annotations

import copy
import math
import re

import lightning.pytorch as pl
import pytest
import torch

from pldr_train.building import empty_model, model_config
from pldr_train.checkpoint.converting import convert
from pldr_train.checkpoint.shards import OPTIMIZER, ShardReader, read_weights
from pldr_train.checkpoint.verifying import find_problems, open_checkpoint
from pldr_train.errors import CheckpointError, RecipeError
from pldr_train.fit import fit
from pldr_train.optim import MuonWithAdamW, muon_of_groups, trained_groups
from pldr_train.optimizers import group_parameters
from pldr_train.plan import describe
from pldr_train.recipe import compare_for_resume, dump_recipe, recipe_from_dict
from pldr_train.recipe.yaml_text import parse_yaml
from pldr_train.report.charts import charts_of
from pldr_train.runs.layout import CHECKPOINTS_FOLDER, linked_last
from tests.tiny import metric_lines, tiny_values
from tests.unit.model_cases import small_model

NO_DECAY = {"match": ["norms", "biases"], "weight_decay": 0.0}
NUM_HEADS = 2
MONOGRAPH = {"lr": 6e-4 / NUM_HEADS, "groups": [{"match": "generator", "lr_factor": NUM_HEADS / 2}]}
"""Its generator's 3e-4 beside its body's 6e-4 / N."""


def names_of(recipe):
    return [name for name, _ in empty_model(model_config(recipe)).named_parameters()]


def recipe_with(groups, **sections):
    model = {"num_hidden_layers": 2, "num_attention_heads": NUM_HEADS, "head_dim": 8, "vocab_size": 300}
    values = {"run": {"name": "x"}, "data": {"path": "x"}, "model": model, "optim": {"groups": groups}}
    for section, changes in sections.items():
        values[section] = values.get(section, {}) | changes
    return recipe_from_dict(values)


def groups_of(groups, **sections):
    recipe = recipe_with(groups, **sections)
    return group_parameters(recipe.optim, names_of(recipe))


class Rates(pl.Callback):
    """The learning rate, decay and moments' decays of every parameter, step by step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_start(self, trainer, module, *_):
        names = {id(parameter): name for name, parameter in module.model.named_parameters()}
        self.steps.append({
            names[id(parameter)]: (group["lr"], group["weight_decay"], group["betas"], group["eps"])
            for group in trainer.optimizers[0].param_groups
            for parameter in group["params"]
        })  # fmt: skip


def test_every_tensor_has_its_rate_at_the_first_step_at_warm_ups_end_in_the_middle_and_at_the_end(tiny_data, tmp_path):
    groups = [
        {"match": "generator", "lr_factor": 4.0, "betas": [0.8, 0.9], "eps": 1e-8, "weight_decay": 0.01},
        {"match": ["*attention_norm*", "*embed_norm*"], "weight_decay": 0.0},
        {"match": "output_head", "lr_factor": 0.0},
        {"match": "embedding", "freeze": True},
    ]
    values = tiny_values(tiny_data, tmp_path, optim={"lr": 2e-3, "warmup_steps": 4, "groups": groups})
    rates = Rates()
    fit(recipe_from_dict(values), callbacks=[rates])
    assert len(rates.steps) == 24
    for step in (0, 1, 4, 14, 23):
        peak = 2e-3 * (step / 4 if step < 4 else 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * (step - 4) / 20)))
        found = rates.steps[step]
        assert not any("embed_tokens" in name for name in found)
        assert len(found) == len(names_of(recipe_from_dict(values))) - 1
        for name, (lr, decay, betas, eps) in found.items():
            expected = (1.0, 0.1, (0.9, 0.95), 1e-5)
            if "residual_units" in name or "power_law" in name:
                expected = (4.0, 0.01, (0.8, 0.9), 1e-8)
            elif ".attention_norm." in name or ".embed_norm." in name:
                expected = (1.0, 0.0, (0.9, 0.95), 1e-5)
            elif name.startswith("lm_head"):
                expected = (0.0, 0.1, (0.9, 0.95), 1e-5)
            assert lr == pytest.approx(peak * expected[0], rel=1e-12, abs=1e-18), (step, name)
            assert (decay, betas, eps) == expected[1:], (step, name)
    lines = metric_lines(tmp_path / "tiny")[1:]
    for step, line in enumerate(lines):
        of_generator = next(lr for name, (lr, *_) in rates.steps[step].items() if "power_law" in name)
        assert line["train/group/generator/lr"] == of_generator
        assert line["train/group/output_head/lr"] == 0.0
        assert line["train/group/default/lr"] == line["train/lr"]
    assert not any("embedding" in name for line in lines for name in line if name.startswith("train/group"))


def test_frozen_parameters_do_not_change_and_cost_no_state(tiny_data, tmp_path):
    def run(name, groups):
        fit(recipe_from_dict(tiny_values(tiny_data, tmp_path, name, optim={"lr": 2e-3, "groups": groups})))
        return linked_last(tmp_path / name / CHECKPOINTS_FOLDER)

    everything = run("all", [])
    frozen = run("frozen", [{"match": ["embedding", "metric_learner"], "freeze": True}])
    assert find_problems(frozen) == []
    weights, first = read_weights(frozen), read_weights(frozen.parent / "step-00000020")
    still = {name for name in weights if "embed_tokens" in name or "residual_units" in name}
    assert all(torch.equal(weights[name], first[name]) for name in still)
    moved = {name for name in weights if not torch.equal(weights[name], first[name])}
    assert moved == {name for name in weights if "inv_freq" not in name} - still
    moments = ShardReader(frozen, OPTIMIZER)
    assert {name.partition("/")[2] for name in moments.names} == moved
    saved = sum(2 * 4 * weights[name].numel() for name in still)
    file = "optimizer-00000-of-00001.safetensors"
    # The rest of the difference is the header's.
    difference = (everything / file).stat().st_size - (frozen / file).stat().st_size
    assert saved < difference < saved + 30_000
    convert(open_checkpoint(frozen), tmp_path / "one.pt", "torch", replace=False)
    content = torch.load(tmp_path / "one.pt", weights_only=True)
    assert content["optimizer"]["exp_avg"].keys() == moved
    assert content["model"].keys() == weights.keys()
    with pytest.raises(CheckpointError, match="DeepSpeed reads universal checkpoints of AdamW with one group alone"):
        convert(open_checkpoint(frozen), tmp_path / "universal", "universal", replace=False)


def test_the_monographs_generator_and_body():
    generator, body = (
        next(group for group in groups_of(MONOGRAPH["groups"], optim={"lr": MONOGRAPH["lr"]}) if group.label == label)
        for label in ("generator", "default")
    )
    assert generator.lr_factor * MONOGRAPH["lr"] == pytest.approx(3e-4)
    # 2 layers of 8 residual units of 2 GLUs of 6 tensors and a norm of 2, and the power law's 5.
    assert len(generator.names) == 2 * (8 * (2 * 6 + 2) + 5)
    assert any("gram_norm" in name for name in body.names)
    assert not set(generator.names) & set(body.names)


def test_no_decay_for_norms_and_biases_is_one_entry():
    default, without = groups_of([NO_DECAY])
    assert without.label == "norms_biases"
    assert without.weight_decay == 0.0
    assert all(name.endswith(("norm.weight", ".bias")) for name in without.names)
    assert not any(name.endswith((".bias", "norm.weight")) for name in default.names)


def test_a_pattern_and_names_of_groups():
    groups = groups_of([{"match": "decoder.layers.1.*"}, {"match": "lm_head.weight", "name": "head"}])
    assert [group.label for group in groups] == ["default", "group_1", "head"]
    assert all(name.startswith("decoder.layers.1.") for name in groups[1].names)
    assert groups[2].names == ("lm_head.weight",)


def test_groups_survive_being_written_and_decide_the_run():
    recipe = recipe_with([NO_DECAY, {"match": "embedding", "freeze": True}])
    again = recipe_from_dict(parse_yaml(dump_recipe(recipe)))
    assert again == recipe
    (problem,) = compare_for_resume(recipe, recipe_with([NO_DECAY]))
    assert problem.startswith("optim.groups=")


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"match": "metric_lerner"}], r"optim\.groups\[0\]\.match=metric_lerner: no parameter's name fits; remove it"),
        (
            [{"match": "norms"}, {"match": "generator"}],
            r"groups\[1\]\.match=\[generator\]: matches decoder\.layers\.0\.\S+ and \d+ more as optim\.groups\[0\]",
        ),
        ([{"match": "*", "freeze": True}], "freezes every parameter"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(groups, message):
    with pytest.raises(RecipeError, match=message):
        groups_of(groups)
    with pytest.raises(RecipeError, match=message):
        describe(recipe_with(groups))


def test_a_predefined_g_has_no_generator():
    with pytest.raises(RecipeError, match=r"match=generator: no parameter of this model is in the set"):
        groups_of([{"match": "generator"}], model={"custom_G_type": "identity"})


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([{"lr_factor": 2.0}], r"optim\.groups\[0\]\.match: missing; each entry needs it"),
        ([{"match": "norms", "lr_facto": 2.0}], r"groups\[0\]\.lr_facto=2\.0: unknown key; did you mean lr_factor"),
        (["norms"], r"optim\.groups\[0\]=norms: must be a mapping; write it as \{match: norms\}"),
        ([{"match": []}], r"optim\.groups\[0\]\.match=\[\]: holds nothing"),
        ([{"match": "norms", "betas": [0.9]}], r"optim\.groups\[0\]\.betas"),
        ([{"match": "norms", "lr_factor": -1}], r"optim\.groups\[0\]\.lr_factor=-1: must be at least 0"),
        ([{"match": "norms", "freeze": True, "betas": [0.9, 0.9]}], "freeze=true: leaves betas without a use"),
        ([{"match": "norms"}, {"match": "biases", "name": "norms"}], r"groups\[1\]\.name=norms: taken"),
        ([{"match": "norms", "name": "default"}], r"groups\[0\]\.name=default: taken"),
        ([{"match": "norms"}] * 101, r"optim\.groups: holds more than 100 entries"),
    ],
)  # fmt: skip
def test_wrong_entries_are_named(groups, message):
    with pytest.raises(RecipeError, match=message):
        recipe_with(groups)


def test_frozen_weights_need_fp32():
    parallel = {"strategy": "deepspeed", "weights": "bf16"}
    with pytest.raises(RecipeError, match=r"freeze=true: with parallel\.weights=bf16"):
        recipe_with([{"match": "norms", "freeze": True}], parallel=parallel)


def test_muon_is_refused_where_matrices_are_cut():
    with pytest.raises(
        RecipeError, match=r"optim\.name=muon: not with parallel\.strategy=deepspeed.*single, ddp, fsdp"
    ):
        recipe_with([], optim={"name": "muon"}, parallel={"strategy": "deepspeed"})


def test_the_description_names_each_group_and_counts_its_state():
    recipe = recipe_with([NO_DECAY, {"match": "embedding", "freeze": True}], model={"vocab_size": 1_000_000})
    text = describe(recipe).text
    assert "group default" in text
    assert re.search(r"group norms_biases .*weight decay 0, betas", text)
    assert re.search(r"group embedding +16,000,000 parameters in 1 tensors; frozen\n", text)
    total = int(re.search(r"\nparameters +([\d,]+)\n", text)[1].replace(",", ""))
    trained = total - 16_000_000
    assert f"gradients {4 * trained / 2**30:.2f}, optimizer {8 * trained / 2**30:.2f}" in text
    assert "optimizer 0.13" in text
    # Muon keeps one number of a matrix' element, AdamW two.
    text = describe(recipe_with([], optim={"name": "muon"}, model={"head_dim": 512, "num_denseA": 1})).text
    adamw = describe(recipe_with([], model={"head_dim": 512, "num_denseA": 1})).text
    sizes = [float(re.search(r"optimizer ([\d.]+)", each)[1]) for each in (text, adamw)]
    assert sizes[0] < 0.7 * sizes[1]


def test_the_report_draws_the_groups_together():
    names = [f"train/group/{label}/{what}" for label in ("default", "group_1") for what in ("lr", "grad_norm")]
    charts = {chart["title"]: [line["label"] for line in chart["lines"]] for chart in charts_of(names)}
    assert charts == {
        "Learning rate by group": ["default", "group_1"],
        "Gradient norm by group": ["default", "group_1"],
    }


# ----------------------------------------------------------------------------------------------------------- muon


def muon_and_model(**settings):
    recipe = recipe_with([], optim={"name": "muon", "lr": 1e-2, "weight_decay": 0.2, "momentum": 0.9} | settings)
    model = small_model().train()
    return muon_of_groups(trained_groups(recipe.optim, model), recipe.optim), model


def set_gradients(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_muon_takes_matrices_by_torchs_muon_and_the_rest_by_adamw():
    optimizer, model = muon_and_model()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    is_matrix = {
        name: p.ndim == 2 and "embed" not in name and "lm_head" not in name for name, p in model.named_parameters()
    }
    matrices = [torch.nn.Parameter(before[name].clone()) for name, muon in is_matrix.items() if muon]
    others = [torch.nn.Parameter(before[name].clone()) for name, muon in is_matrix.items() if not muon]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.2, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(others, lr=1e-2, betas=(0.9, 0.95), eps=1e-5, weight_decay=0.2, fused=True)
    twins = dict(
        zip(
            [n for n, m in is_matrix.items() if m] + [n for n, m in is_matrix.items() if not m],
            matrices + others,
            strict=True,
        )
    )
    for seed in range(3):
        set_gradients(model, seed)
        for name, parameter in model.named_parameters():
            twins[name].grad = parameter.grad.clone()
        optimizer.step()
        muon.step()
        adamw.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, twins[name]), name
        state = optimizer.state[parameter]
        assert ("momentum_buffer" in state) is is_matrix[name]
    # An update of a matrix is about as large as AdamW's: 0.2 of the rate in its root mean square, as Moonshot's.
    optimizer, model = muon_and_model(weight_decay=0.0)
    name, weight = next((n, p) for n, p in model.named_parameters() if is_matrix[n])
    set_gradients(model, 0)
    optimizer.step()
    rms = (weight.detach() - before[name]).square().mean().sqrt() / 1e-2
    assert 0.1 < float(rms) < 0.3


def test_muons_state_is_restored_as_that_of_any_optimizer():
    optimizer, model = muon_and_model()
    set_gradients(model, 0)
    optimizer.step()
    saved, weights = optimizer.state_dict(), {n: p.detach().clone() for n, p in model.named_parameters()}
    again, other = muon_and_model()
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(saved))
    for each, its in ((optimizer, model), (again, other)):
        set_gradients(its, 1)
        each.step()
    assert isinstance(again, MuonWithAdamW)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert not any(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())
