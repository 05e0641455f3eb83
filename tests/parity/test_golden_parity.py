"""The model, the DAG loss and the optimizer agree with the golden figures of the author's original code.

Every model is loaded by `from_pretrained` from a folder in the published layout, as a user loads one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.model import PldrllmForCausalLM
from pldr_train.model.published_layout import to_published
from pldr_train.optim import build_adamw, clip_before_step, lr_at_step
from tests.conftest import Golden
from tests.oracle import total_loss as oracle_total_loss
from tests.parity.golden_model import exact_gradients, load_model, load_oracle
from tests.parity.tolerances import assert_gradients_close, assert_losses_close, assert_tensors_close

BACKENDS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
# How many parameters the golden models have: a comparison that skips some is no comparison.
PARAMETER_TENSORS = {"tiny": 139, "wide": 46}
DEDUCTIVE_FIELDS = {"A": "metric", "A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}


def losses_of(model: PldrllmForCausalLM, ids: Tensor, golden: Golden) -> dict[str, Tensor]:
    """All losses of ids (B, S + 1), named as in the goldens; `total` carries the graph."""
    outputs = model(input_ids=ids[:, :-1], output_deductive_outputs=True)
    cross_entropy = F.cross_entropy(outputs.logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=0)
    dag = dag_loss(outputs.deductive_outputs, DagCoefficients(*golden.dag_coefficients))
    per_tensor = {f"dag_{name}": value for name, value in dag.per_tensor.items()}
    return per_tensor | {"cross_entropy": cross_entropy, "total": cross_entropy + dag.total}


@BACKENDS
def test_forward_reproduces_logits_hidden_states_and_deductive_outputs(
    golden: Golden, tmp_path: Path, attention: str
) -> None:
    model = load_model(golden, tmp_path, attn_implementation=attention)
    outputs = model(input_ids=golden["input_ids"][:, :-1], output_deductive_outputs=True, output_hidden_states=True)
    assert_tensors_close({"logits": outputs.logits}, {"logits": golden["logits"]})
    assert_tensors_close({"decoder_output": outputs.hidden_states[-1]}, {"decoder_output": golden["decoder_output"]})
    assert len(outputs.deductive_outputs) == golden.settings["num_hidden_layers"]
    for index, layer in enumerate(outputs.deductive_outputs):
        actual = {name: getattr(layer, field) for name, field in DEDUCTIVE_FIELDS.items()}
        assert_tensors_close(actual, {name: golden[f"layer{index}/{name}"] for name in DEDUCTIVE_FIELDS})


def test_attention_weights_are_the_softmax_of_the_golden_scores(golden: Golden, tmp_path: Path) -> None:
    model = load_model(golden, tmp_path, attn_implementation="eager")
    attentions = model(input_ids=golden["input_ids"][:, :-1], output_attentions=True).attentions
    assert len(attentions) == golden.settings["num_hidden_layers"]
    for index, weights in enumerate(attentions):
        scores = golden[f"layer{index}/attention_scores_before_mask"]
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        expected = scores.masked_fill(future, -torch.inf).softmax(-1)
        assert_tensors_close({f"layer{index}": weights}, {f"layer{index}": expected})


@BACKENDS
def test_all_losses_and_all_gradients_agree(golden: Golden, tmp_path: Path, attention: str) -> None:
    model = load_model(golden, tmp_path, attn_implementation=attention)
    losses = losses_of(model, golden["input_ids"], golden)
    assert_losses_close(losses, golden.group("loss"))

    losses["total"].backward()
    gradients = to_published({name: parameter.grad for name, parameter in model.named_parameters()})
    assert len(gradients) == PARAMETER_TENSORS[golden.name]
    assert_gradients_close(gradients, golden.group("grads"), exact_gradients(golden))


def test_in_double_precision_gradients_equal_the_formulas_to_rounding(golden: Golden, tmp_path: Path) -> None:
    model = load_model(golden, tmp_path, dtype=torch.float64)
    losses = losses_of(model, golden["input_ids"], golden)
    losses["total"].backward()
    gradients = to_published({name: parameter.grad for name, parameter in model.named_parameters()})

    oracle = load_oracle(golden).double()
    expected = oracle_total_loss(
        oracle(golden["input_ids"][:, :-1]), golden["input_ids"][:, 1:], golden.dag_coefficients
    )
    expected.backward()
    torch.testing.assert_close(losses["total"], expected, rtol=1e-12, atol=0)
    references = {name: parameter.grad for name, parameter in oracle.named_parameters()}
    assert sorted(gradients) == sorted(references)
    for name, reference in references.items():
        assert float((gradients[name] - reference).norm() / reference.norm()) < 1e-10, name


@BACKENDS
def test_three_optimizer_steps_reach_the_golden_weights(golden: Golden, tmp_path: Path, attention: str) -> None:
    model = load_model(golden, tmp_path, attn_implementation=attention)
    settings = golden.settings
    optimizer = build_adamw(model.parameters(), lr=settings["lr"], betas=(0.9, 0.95), eps=1e-5, weight_decay=0.1)
    clip_before_step(optimizer, clip_value=1.0)
    learning_rates, losses = [], []
    for step, batch in enumerate(golden["train/batches"]):
        for group in optimizer.param_groups:
            group["lr"] = lr_at_step(
                step, settings["lr"], settings["warmup_steps"], settings["total_steps"], settings["lr_alpha"]
            )
            learning_rates.append(group["lr"])
        optimizer.zero_grad()
        loss = losses_of(model, batch, golden)["total"]
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())

    torch.testing.assert_close(
        torch.tensor(learning_rates, dtype=torch.float64), golden["train/lrs"], rtol=1e-12, atol=0
    )
    torch.testing.assert_close(torch.stack(losses).double(), golden["train/losses"], rtol=1e-5, atol=0)
    weights = to_published(dict(model.state_dict()))
    assert len(weights) == PARAMETER_TENSORS[golden.name]
    before, after = golden.group("weights"), golden.group("train/weights_after")
    assert_tensors_close(weights, after, atol=1e-2 * settings["lr"])
    # The weights barely move in three steps, so what must agree is the movement itself.
    for name, reference in after.items():
        movement, expected = weights[name] - before[name], reference - before[name]
        assert float((movement - expected).norm()) <= 1e-2 * float(expected.norm()), name


@pytest.mark.parametrize("kind", ["identity", "random"])
@BACKENDS
def test_predefined_g_is_read_from_the_checkpoint(golden: Golden, tmp_path: Path, kind: str, attention: str) -> None:
    model = load_model(golden, tmp_path, kind, attn_implementation=attention)
    outputs = model(input_ids=golden["input_ids"][:, :-1], output_deductive_outputs=True)
    expected = golden.group(f"predefined_{kind}")
    assert_tensors_close({"logits": outputs.logits}, {"logits": expected["logits"]})
    curvature = torch.cat([layer.curvature for layer in outputs.deductive_outputs])
    torch.testing.assert_close(curvature, expected["G"], rtol=0, atol=0)


@BACKENDS
@pytest.mark.parametrize(
    ("golden_run", "options"),
    [
        ("generate_nocache", {"use_cache": False}),
        ("generate_kvg", {}),
        ("generate_kvg", {"cache_implementation": "static"}),
        ("generate_kvg", {"past_key_values": DynamicCache}),
    ],
    ids=["no cache", "default cache", "static cache", "given cache"],
)
def test_greedy_generation_gives_the_golden_tokens_and_logits(
    golden: Golden, tmp_path: Path, attention: str, golden_run: str, options: dict[str, Any]
) -> None:
    model = load_model(golden, tmp_path, attn_implementation=attention)
    expected = golden.group(golden_run)
    prompt = golden["input_ids"][:1, :5]
    new_tokens = len(expected["tokens"]) - prompt.shape[1]
    assert new_tokens == 8
    if "past_key_values" in options:
        options = {"past_key_values": options["past_key_values"]()}
    generated = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        eos_token_id=-1,  # an end-of-text token does not stop the golden run
        max_new_tokens=new_tokens,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    assert generated.sequences[0].tolist() == expected["tokens"].tolist()
    assert_tensors_close({"logits": torch.cat(generated.logits)}, {"logits": expected["step_logits"]})
