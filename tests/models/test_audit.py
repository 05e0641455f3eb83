"""The audit of a model: each measure against an independent computation, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pldr_train.cli import main
from pldr_train.errors import DataError
from pldr_train.fit import fit
from pldr_train.metrics.deductive import commutant_residual
from pldr_train.metrics.row_map import jacobian_norms
from pldr_train.model.rotary import rotary_cos_sin, rotate
from pldr_train.models.auditing import MEASURES, AuditSettings, audit
from pldr_train.recipe import recipe_from_dict
from tests.conftest import Golden
from tests.parity.golden_model import load_model
from tests.tiny import WORDS, tiny_values
from tests.unit.model_cases import small_model, token_ids
from tests.unit.test_deductive_metrics import commutant_in_numpy

SETTINGS = AuditSettings(prompts=3, new_tokens=4, jacobian_rows=5, positions=4, candidate_tokens=3)


def rows(count: int = 3, length: int = 25) -> Tensor:
    return token_ids(count, length)


# --------------------------------------------------------------------------------------------------- single measures


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotations_commute_and_what_mixes_their_planes_does_not(interleaved: bool) -> None:
    d = 16
    assert float(commutant_residual(torch.eye(d), interleaved)) == 0
    cos, sin = rotary_cos_sin(torch.tensor([[5]]), d, 1e4, interleaved)
    rotation = rotate(torch.eye(d)[None, None], cos, sin, interleaved)[0, 0]
    assert float(commutant_residual(rotation, interleaved)) < 1e-6
    assert float(commutant_residual(rotation, not interleaved)) > 0.1
    signs = torch.ones(d)
    signs[1::2] = -1
    if not interleaved:
        signs = torch.cat((torch.ones(d // 2), -torch.ones(d // 2)))
    assert float(commutant_residual(torch.diag(signs), interleaved)) == 1
    normal = torch.randn(4000, d, d, generator=torch.Generator().manual_seed(0))
    assert float(commutant_residual(normal, interleaved).square().mean()) == pytest.approx(1 - 1 / d, abs=1e-3)


def test_the_jacobian_of_the_row_map_is_the_product_of_its_units_jacobians() -> None:
    model = small_model()
    units = [unit.double() for unit in model.decoder.layers[0].attention.metric_learner.residual_units]
    at = torch.randn(3, model.config.head_dim, generator=torch.Generator().manual_seed(0)).double()
    whole, singles = jacobian_norms(units, at)

    def row_map(row: Tensor) -> Tensor:
        for unit in units:
            row = unit(row)
        return row

    for index, row in enumerate(at):
        expected = torch.autograd.functional.jacobian(row_map, row)
        assert float(whole[index]) == pytest.approx(float(np.linalg.norm(expected.numpy(), 2)), rel=1e-9)
        for number, unit in enumerate(units):
            own = torch.autograd.functional.jacobian(unit, row)
            assert float(singles[number, index]) == pytest.approx(float(np.linalg.norm(own.numpy(), 2)), rel=1e-9)
            row = unit(row).detach()  # noqa: PLW2901


# -------------------------------------------------------------------------------------------------------- whole audits


def test_the_golden_models_audit_is_that_of_an_independent_computation(golden: Golden, tmp_path: Path) -> None:
    model = load_model(golden, tmp_path).eval()
    ids = rows(2, min(25, model.config.max_position_embeddings + 1)) % model.config.vocab_size
    ids[ids == 0] = 4
    found = audit(model, ids, AuditSettings(prompts=2, new_tokens=2, jacobian_rows=3, positions=2, candidate_tokens=2))
    values: dict[str, list[float]] = {name: [] for name in MEASURES}
    with torch.no_grad():
        for row in ids:
            text = row[:-1]
            output = model.decoder(text[None, : len(text) // 2], use_cache=False, output_deductive_outputs=True)
            for layer in output.deductive_outputs:
                tensors = (layer.metric, layer.positive_metric, layer.potential, layer.curvature)
                for a, a_lm, a_p, g in zip(*(each[0].double().numpy() for each in tensors), strict=True):
                    singular = np.linalg.svd(a, compute_uv=False)
                    values["A_rank"].append(int((singular > len(a) * np.finfo(np.float32).eps * singular[0]).sum()))
                    values["A_second"].append(singular[1] / singular[0])
                    of_a_lm = np.linalg.svd(a_lm, compute_uv=False)
                    values["A_LM_rank"].append(int((of_a_lm > len(a) * np.finfo(np.float32).eps * of_a_lm[0]).sum()))
                    values["commutant"].append(commutant_in_numpy(g))
                    for name, matrix in (("A_LM", a_lm), ("A_P", a_p), ("G_LM", g)):
                        squares = matrix * matrix
                        # ln tr exp of a matrix without negative entries, its largest row sum taken out first.
                        shift = float(np.abs(np.linalg.eigvals(squares)).max())
                        exponential = scipy.linalg.expm(squares - shift * np.eye(len(squares)))
                        values[f"dag_{name}"].append(shift + math.log(np.trace(exponential) / len(squares)))
    for name, expected in values.items():
        if expected:
            spread = found["spreads"][name]
            assert spread["count"] == len(expected)
            for key, value in (("min", min(expected)), ("median", np.median(expected)), ("max", max(expected))):
                assert spread[key] == pytest.approx(float(value), rel=2e-6, abs=1e-9), (name, key)
    assert found["row_map"]["collapsed"] is False
    assert len(found["spreads"]["A_rank"]["layers"]) == model.config.num_hidden_layers


@pytest.mark.parametrize("kind", ["identity", "random"])
def test_a_predefined_g_moves_nowhere_and_reads_no_future(kind: str) -> None:
    found = audit(small_model(custom_G_type=kind), rows(), SETTINGS)
    assert found["decoding"]["g_moved"] == found["suffix"]["g_moved"] == 0
    assert found["decoding"]["same_choice"] == found["decoding"]["safe"] == 1
    assert found["suffix"]["logits_moved"] < 1e-5
    assert found["gap"]["largest"] < 1e-5
    assert found["candidates"]["largest_per_token"] < 1e-5
    assert found["row_map"] is None
    assert [name for name, spread in found["spreads"].items() if spread is not None] == ["commutant"]
    if kind == "identity":
        assert found["spreads"]["commutant"]["max"] == 0


def test_a_causal_gram_reads_no_future_and_a_learned_g_does() -> None:
    causal = audit(small_model(gram_chunk_size=4), rows(), SETTINGS)
    assert causal["suffix"]["logits_moved"] < 1e-4
    assert causal["gap"]["largest"] < 1e-4
    assert causal["candidates"]["largest_per_token"] < 1e-4
    assert causal["suffix"]["g_moved"] > 0.01  # that of the last chunk, which follows the suffix
    learned = audit(small_model(), rows(), SETTINGS)
    assert learned["suffix"]["logits_moved"] > 1e-2
    assert learned["decoding"]["g_moved"] > 1e-2
    assert learned["decoding"]["steps"] == 3 * 4
    assert learned["candidates"]["tokens"] == 3 * 3


def test_the_candidates_score_is_the_sum_of_both_ways() -> None:
    model, ids = small_model(), rows(1)
    found = audit(model, ids, SETTINGS)["candidates"]
    text, half = ids[0, :-1], 12
    with torch.no_grad():
        block = model(text[None, : half + 2]).logits[0].double().log_softmax(-1)
        differences = []
        for index in range(3):
            alone = model(text[None, : half + index]).logits[0, -1].double().log_softmax(-1)
            token = int(text[half + index])
            differences.append(float(block[half - 1 + index, token] - alone[token]))
    assert found["mean_per_token"] == pytest.approx(np.mean(differences), rel=1e-6)
    assert found["largest_per_token"] == pytest.approx(np.abs(differences).max(), rel=1e-6)


def test_texts_that_are_too_short_and_foreign_ids_are_refused() -> None:
    with pytest.raises(DataError, match="no row has 4 tokens"):
        audit(small_model(), torch.tensor([[5, 6, 7, 0, 0]]), SETTINGS)
    with pytest.raises(DataError, match="the rows hold token id 1000"):
        audit(small_model(), torch.full((1, 20), 1000), SETTINGS)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    fit(recipe_from_dict(tiny_values(tiny_data, folder, "soc-110m-5-tiny", trainer={"max_steps": 4})))
    return folder / "soc-110m-5-tiny"


def audited(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["audit", *map(str, arguments), "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_audited_on_its_own_rows(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    options = [run, "--rows", 2, "--context", 16, "--new-tokens", 2, "--html", tmp_path / "audit.html"]
    found = audited(capsys, *options)
    assert found["prompts"] == 2
    assert found["prompt_tokens"] == [8, 8]
    assert found["source"]["step"] == 4
    assert found["published"]["of"] == "soc-110m-5"  # the folder's name
    page = (tmp_path / "audit.html").read_text()
    assert page.count("<table>") == 1 + len(MEASURES)
    assert "0.421 / 0.807 / 0.993" in page
    assert main(["audit", *map(str, options), "--json", str(tmp_path / "audit.json")]) == 0
    text = capsys.readouterr().out
    assert "published of soc-110m-5: 1 everywhere" in text
    assert "row map    not collapsed" in text
    assert json.loads((tmp_path / "audit.json").read_text()) == found


def test_texts_of_ones_own_are_audited(run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(" ".join(WORDS * 12))
    found = audited(capsys, run, "--text", tmp_path / "text.txt", "--rows", 1, "--context", 12, "--new-tokens", 1)
    assert "1 text file" in found["source"]["rows_of"]
    assert main(["audit", str(run), "--text", str(tmp_path / "no.txt")]) == 2
    assert "no.txt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--html", "nowhere/a.html"], "--html nowhere/a.html: no folder nowhere"),
        (["--json", "nowhere/a.json"], "--json nowhere/a.json: no folder nowhere"),
        (["--html", "letter.txt"], "letter.txt exists and is not a page of an audit"),
        (["--published", "soc-110m-2"], "invalid choice"),
        (["--html", "new", "--json", "new"], "--html and --json both name new"),
    ],
)
def test_what_cannot_be_written_is_refused(
    options: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("letter.txt").write_text("Dear")
    try:
        code = main(["audit", str(run), *options])
    except SystemExit as leave:
        code = leave.code
    assert code == 2
    assert message in capsys.readouterr().err
