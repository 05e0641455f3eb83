"""Training: gradients under checkpointing and compilation, and a DAG loss where the plain formula overflows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch import Tensor
from transformers import Trainer, TrainingArguments

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM
from pldr_train.model.published_layout import to_published
from pldr_train.optim import build_adamw, clip_before_step
from pldr_train.training.weights import compile_layers, recompute
from tests.oracle import Oracle, OracleSizes, dag_terms
from tests.unit.model_cases import small_model, token_ids

COEFFICIENTS = DagCoefficients(0.05, 0.05, 0.05)


def training_loss(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """Cross-entropy and DAG loss, so that gradients flow through the deductive outputs too."""
    outputs = model(ids[:, :-1], output_deductive_outputs=True)
    cross_entropy = F.cross_entropy(outputs.logits.flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=0)
    return cross_entropy + dag_loss(outputs.deductive_outputs, COEFFICIENTS).total


def gradients_of(model: PldrllmForCausalLM, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    training_loss(model, ids).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_parameter_gets_a_gradient() -> None:
    model = small_model().train()
    gradients = gradients_of(model, token_ids(2, 10))
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    assert all(bool(gradient.any()) for gradient in gradients.values())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_runs_layers_again_and_gives_the_same_gradients(use_reentrant: bool) -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    plain = gradients_of(model, ids)
    runs: list[str] = []
    model.decoder.layers[0].attention.register_forward_hook(lambda *_: runs.append("run"))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    checkpointed = gradients_of(model, ids)
    assert len(runs) == 2
    assert sorted(checkpointed) == sorted(plain)
    assert all(torch.equal(checkpointed[name], plain[name]) for name in plain)


@pytest.mark.parametrize("gram_chunk_size", [None, 4])
def test_metric_learners_alone_can_run_again_with_the_same_gradients_and_keep_less(gram_chunk_size: int | None) -> None:
    model, ids = small_model(gram_chunk_size=gram_chunk_size).train(), token_ids(2, 12)
    plain, kept = gradients_of(model, ids), kept_bytes(model, ids)
    runs: list[str] = []
    model.decoder.layers[0].attention.metric_learner.residual_units[0].register_forward_hook(
        lambda *_: runs.append("run")
    )
    model.decoder.layers[0].attention.query.register_forward_hook(lambda *_: runs.append("query"))
    recompute(model, "metric_learner")
    again = gradients_of(model, ids)
    assert runs == ["query", "run", "run"]
    assert all(torch.equal(again[name], plain[name]) for name in plain)
    config = model.config
    rows = 2 * config.num_attention_heads * config.head_dim * (1 if gram_chunk_size is None else 3)
    glu = rows * (config.head_dim + 4 * config.A_dff) * 4
    unit = config.num_denseA * glu + rows * config.head_dim * 4
    saved = kept - kept_bytes(model, ids)
    assert saved == pytest.approx(config.num_hidden_layers * config.num_reslayerA * unit, rel=0.1)
    runs.clear()
    model.eval()(ids)
    assert runs == ["query", "run"]
    recompute(model.train(), "none")
    assert kept_bytes(model, ids) == kept


@pytest.mark.parametrize("what", ["metric_learner", "layers"])
def test_what_is_recomputed_under_autocast_has_the_same_gradients(what: Any) -> None:
    ids = token_ids(2, 13)

    def gradients(what: Any) -> dict[str, Tensor | None]:
        model = small_model().train()
        recompute(model, what)
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(ids[:, :-1], targets=ids[:, 1:], use_cache=False, output_deductive_outputs=True)
            loss = outputs.loss + dag_loss(outputs.deductive_outputs, COEFFICIENTS).total
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients("none")
    assert all(torch.equal(found, expected[name]) for name, found in gradients(what).items())


def kept_bytes(model: PldrllmForCausalLM, ids: Tensor) -> int:
    """Bytes that autograd keeps after the forward, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = model(ids)
    del outputs
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_model_compiles_to_one_graph_with_the_same_loss_and_gradients() -> None:
    model, ids = small_model().train(), token_ids(2, 10)
    expected_loss, expected = training_loss(model, ids).detach(), gradients_of(model, ids)
    torch._dynamo.reset()
    model.zero_grad()
    loss = torch.compile(training_loss, fullgraph=True, backend="eager")(model, ids)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected_loss)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert sorted(gradients) == sorted(expected)
    for name, reference in expected.items():
        torch.testing.assert_close(gradients[name], reference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("recomputed", ["none", "metric_learner", "layers"])
@pytest.mark.parametrize(
    ("kind", "precision"),
    [
        ({}, "fp32"),
        ({}, "bf16"),
        ({"custom_G_type": "identity"}, "fp32"),
        ({"custom_G_type": "random"}, "fp32"),
        ({"gram_chunk_size": 4}, "fp32"),
    ],
    ids=str,
)
def test_one_compilation_serves_all_layers_and_no_step_makes_another(
    kind: dict[str, Any], recomputed: Any, precision: str
) -> None:
    def step(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(ids, use_cache=False, output_deductive_outputs=True)
            loss: Tensor = outputs.logits.square().mean()
            if "custom_G_type" not in kind:
                loss = loss + dag_loss(outputs.deductive_outputs, COEFFICIENTS).total
        loss.backward()
        return loss.detach()

    model = small_model(num_hidden_layers=3, **kind).train()
    recompute(model, recomputed)
    expected = step(token_ids(2, 12))
    torch._dynamo.reset()
    compiled = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compile_layers(model, compiled)
    # In bf16 compiled layers take several products as one.
    torch.testing.assert_close(step(token_ids(2, 12)), expected, rtol=0.02 if precision == "bf16" else 0, atol=0)
    assert compiled.frame_count == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(3):
            step(token_ids(2, 12, seed))
    model.eval()
    for seed in range(2):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            model(token_ids(2, 12, seed), use_cache=False)
    assert compiled.frame_count == 2  # of a validation, which keeps nothing for a backward
    assert copy.deepcopy(model).decoder.layers[0]._compiled_forward is None


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wide_heads_train_with_dag_loss_where_the_plain_formula_overflows(precision: str) -> None:
    torch.manual_seed(0)
    config = PldrllmConfig(
        vocab_size=64, hidden_size=256, num_attention_heads=2, head_dim=128, num_hidden_layers=2, num_reslayerA=2
    )
    model, ids = PldrllmForCausalLM(config), torch.randint(4, 64, (2, 33))
    oracle = Oracle(OracleSizes(2, 2, 128, 64, num_reslayerA=2))
    oracle.load_state_dict(to_published(model.state_dict()))
    with torch.no_grad():
        plain_terms = dag_terms(oracle(ids[:, :-1]))
    assert bool(plain_terms["A_P"].isinf())

    optimizer = build_adamw(model.parameters(), lr=1e-3)
    clip_before_step(optimizer, clip_value=1.0)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            loss = training_loss(model, ids)
        loss.backward()
        assert all(bool(parameter.grad.isfinite().all()) for parameter in model.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(loss < 1e4 for loss in losses)
    assert losses[-1] < losses[0]
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def stock_trainer(folder: Path, **options: Any) -> Trainer:
    """transformers' own Trainer over eight rows, a checkpoint and an evaluation every second step."""
    rows = [{"input_ids": row, "labels": row} for row in token_ids(8, 10)]
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=2, per_device_eval_batch_size=4, learning_rate=1e-2, save_steps=2,
        eval_strategy="steps", eval_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        lr_scheduler_type="constant", **options,
    )  # fmt: skip
    return Trainer(small_model().train(), arguments, train_dataset=rows, eval_dataset=rows)


def test_the_stock_trainer_resumes_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    whole = stock_trainer(tmp_path / "whole", max_steps=4)
    whole.train()
    resumed = stock_trainer(tmp_path / "whole", max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in resumed.model.state_dict().items())


def test_the_stock_trainer_ends_with_its_best_model(tmp_path: Path) -> None:
    # The rows' likelihood only grows, so the worst of its checkpoints is the first one.
    trainer = stock_trainer(
        tmp_path, max_steps=4, load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    best = PldrllmForCausalLM.from_pretrained(tmp_path / "checkpoint-2").state_dict()
    last = PldrllmForCausalLM.from_pretrained(tmp_path / "checkpoint-4").state_dict()
    found = trainer.model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in best.items())
    assert not all(torch.equal(found[name], value) for name, value in last.items())
