"""The order parameter by the paper's protocol, against a literal implementation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from torch import Tensor

from pldr_train.cli import main
from pldr_train.commands import evaluation
from pldr_train.fit import fit
from pldr_train.models import evaluating
from pldr_train.models.evaluating import measure_published_order_parameter
from pldr_train.published import ORDER_PARAMETERS
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.continuations import continue_until_end, draw_top_p
from tests.tiny import WORDS, tiny_values
from tests.unit.model_cases import small_model, token_ids

TENSORS = {"A": "metric", "A_LM": "positive_metric", "A_P": "potential", "G_LM": "curvature"}


def test_the_papers_top_p_leaves_out_the_token_that_crosses_it() -> None:
    probabilities = torch.tensor([[0.2, 0.5, 0.05, 0.25]], dtype=torch.float64)
    quantiles = torch.linspace(0, 0.999, 200, dtype=torch.float64)

    def drawn(top_p: float, within: bool) -> set[int]:
        rows = probabilities.expand(len(quantiles), -1)
        return set(draw_top_p(rows, quantiles, top_p, within=within).tolist())

    assert drawn(0.8, within=False) == {1, 3, 0}
    assert drawn(0.8, within=True) == {1, 3}
    assert drawn(0.4, within=True) == {1}  # one at least
    # The quantiles are those of the tokens that are left: 0.5 of 0.75.
    rows = draw_top_p(probabilities.expand(200, -1), quantiles, 0.8, within=True)
    assert float((rows == 1).double().mean()) == pytest.approx(2 / 3, abs=0.01)


def test_a_continuation_ends_with_the_end_of_a_document_or_of_the_context() -> None:
    model, prompt = small_model(), token_ids(1, 6)[0]
    options = {"top_p": 0.8, "num_pieces": model.config.vocab_size}
    free = continue_until_end(model, prompt, 12, 3, end_id=-1, **options)
    assert free is not None
    assert len(free) == 6 + 12
    end = int(free[9])
    ended = continue_until_end(model, prompt, 12, 3, end_id=end, **options)
    assert ended is not None
    first = 6 + free[6:].tolist().index(end)
    assert ended.tolist() == free[: first + 1].tolist()
    context = model.config.max_position_embeddings
    long = continue_until_end(model, token_ids(1, context - 2)[0], 12, 3, end_id=-1, **options)
    assert long is not None
    assert len(long) == context
    assert continue_until_end(model, token_ids(1, context)[0], 12, 3, end_id=-1, **options) is None


def literal(model: Any, prompts: list[Tensor], seed: int, end_id: int, most: int) -> dict[str, tuple[float, float]]:
    """RMSE(x1, x2) / |mean x1| and RMSE(x1, xc) / |mean xc| over everything, token by token."""
    gathered: dict[str, list[list[np.ndarray]]] = {name: [[], [], []] for name in TENSORS}
    for number, prompt in enumerate(prompts):
        sequences = []
        for which in (0, 1):
            ids, generator = prompt.tolist(), torch.Generator().manual_seed(seed + 2 * number + which)
            for _ in range(most):
                logits = model(torch.tensor([ids]), use_cache=False).logits[0, -1].detach().double().numpy()
                probabilities = np.exp(logits - logits.max())
                probabilities /= probabilities.sum()
                order = np.argsort(-probabilities, kind="stable")
                kept = max(1, int((np.cumsum(probabilities[order]) <= 0.8).sum()))
                mass = np.cumsum(probabilities[order][:kept])
                draw = float(torch.rand((1,), generator=generator, dtype=torch.float64))
                ids = [*ids, int(order[min(int(np.searchsorted(mass, draw * mass[-1], side="right")), kept - 1)])]
                if ids[-1] == end_id:
                    break
            sequences.append(ids)
        for place, ids in enumerate([*sequences, prompt.tolist()]):
            output = model.decoder(torch.tensor([ids]), use_cache=False, output_deductive_outputs=True)
            for layer in output.deductive_outputs:
                for name, attribute in TENSORS.items():
                    gathered[name][place].append(getattr(layer, attribute).detach().double().numpy().ravel())
    found = {}
    for name, parts in gathered.items():
        x1, x2, xc = (np.concatenate(part) for part in parts)
        rmse = [float(np.sqrt(np.mean((x1 - other) ** 2))) for other in (x2, xc)]
        found[name] = rmse[0] / abs(float(x1.mean())), rmse[1] / abs(float(xc.mean()))
    return found


def test_it_is_that_of_the_literal_protocol(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "PUBLISHED_TOKENS", 5)
    model = small_model(num_hidden_layers=2)
    with torch.no_grad():  # LayerNorms with biases, so that A has a mean
        for name, parameter in model.named_parameters():
            if "unit_norm.bias" in name:
                parameter.add_(0.5)
    prompts = [token_ids(1, length, seed=length)[0] for length in (5, 9, 7)]
    found = measure_published_order_parameter(model, prompts, seed=11, end_id=3)
    assert found is not None
    assert (found["protocol"], found["prompts"]) == ("published", 3)
    expected = literal(model, prompts, 11, 3, 5)
    for name, (twelve, cached) in expected.items():
        assert found["tensors"][name]["x1_x2"]["relative_rmse"] == pytest.approx(twelve, rel=1e-6), name
        assert found["tensors"][name]["xc_x1"]["relative_rmse"] == pytest.approx(cached, rel=1e-6), name


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    fit(recipe_from_dict(tiny_values(tiny_data, folder, "sub-110m-2-tiny", trainer={"max_steps": 4})))
    return folder / "sub-110m-2-tiny"


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(evaluating, "PUBLISHED_TOKENS", 2)
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"{' '.join(WORDS[number % 20 : number % 20 + 5])}\n" for number in range(100)))
    return path


def test_the_command_shows_it_beside_the_published_one(
    run: Path, prompts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = [
        "evaluate",
        str(run),
        "--rows",
        "2",
        "--positions",
        "1",
        "--prompts",
        "0",
        "--order-parameter",
        "published",
    ]
    assert main([*words, "--prompt-file", str(prompts), "--json", str(tmp_path / "found.json")]) == 0
    text = capsys.readouterr().out
    assert "order parameter of 100 prompts, by the published protocol, 2 new tokens on average" in text
    assert "published of sub-110m-2" in text
    assert f"G_LM     {ORDER_PARAMETERS['sub-110m-2'][3][0]:>14.3e}" in text
    found = json.loads((tmp_path / "found.json").read_text())["order_parameter"]
    assert found["tensors"]["G_LM"]["x1_x2"]["relative_rmse"] > 0


def test_what_the_protocol_lacks_is_said(
    run: Path, prompts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["evaluate", str(run), "--rows", "1", "--positions", "1", "--prompts", "0"]

    def refused(*more: object) -> str:
        assert main([*words, *map(str, more)]) == 2
        return capsys.readouterr().err

    assert "--prompt-file" in refused("--prompt-file", prompts)
    published = ("--order-parameter", "published")
    few = tmp_path / "few.txt"
    few.write_text("one two three four\n" * 7)
    assert "7 prompts, and the protocol takes 100" in refused(*published, "--prompt-file", few)
    few.write_text("one\n" * 100)
    assert "prompt 1 has fewer than 4 words" in refused(*published, "--prompt-file", few)
    few.write_text(f"{' '.join(WORDS * 3)}\n" * 100)
    assert "leaves no room in the model's context of 32" in refused(*published, "--prompt-file", few)

    def no_network(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    assert "cannot be read from the Hub (no route to host); give the prompts with --prompt-file" in refused(*published)
    assert evaluation.PUBLISHED_PROMPTS == 100
