"""`pldr-train evaluate`: its figures are the run's own and the definition's, and mistakes are one clear message."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from scipy import stats
from torch import Tensor

from pldr_train.cli import main
from pldr_train.commands.comparison import row_differences
from pldr_train.commands.evaluate import build_parser
from pldr_train.commands.evaluation import open_rows
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.fit import fit
from pldr_train.metrics.leakage import TargetScores
from pldr_train.model import PldrllmForCausalLM
from pldr_train.models.evaluating import (
    EvaluationSettings,
    RowScores,
    evaluate,
    measure_g_cache,
    measure_order_parameter,
    measure_padding,
    prompts_of,
    rows_of_texts,
)
from pldr_train.models.exporting import export_run
from pldr_train.models.loading import find_checkpoint, load_model
from pldr_train.recipe import recipe_from_dict
from tests.tiny import WORDS, metric_lines, tiny_values
from tests.unit.every_model import GRAMS, make
from tests.unit.model_cases import token_ids

EVERY_GRAM = pytest.mark.parametrize("gram", GRAMS.values(), ids=GRAMS)
SMALL = ("--device", "cpu", "--rows", "8", "--positions", "4", "--prompts", "2", "--new-tokens", "5")
VALIDATION_ROWS = 8
"""Of a tiny run: two batches of four."""


def train(folder: Path, runs: Path, name: str, **sections: dict[str, Any]) -> Path:
    trainer = {"max_steps": 8, "validate_every_steps": 8}
    values = tiny_values(folder, runs, name, **({"trainer": trainer} | sections))
    return fit(recipe_from_dict(values)).folder


@pytest.fixture(scope="module")
def run(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tiny_data, tmp_path_factory.mktemp("runs"), "plain")


@pytest.fixture(scope="module")
def export(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "model"
    export_run(run, folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(" ".join(WORDS * 12))
    return path


@pytest.fixture
def figures(capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, Any]]:
    """Evaluate and return the JSON that was printed."""

    def measure(*arguments: object) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments), "--json", "-"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return measure


def approximately(value: Any) -> Any:
    """The same figures but for rounding, at any depth."""
    if isinstance(value, dict):
        return {key: approximately(each) for key, each in value.items()}
    if isinstance(value, list):
        return [approximately(each) for each in value]
    return pytest.approx(value, rel=1e-3, abs=1e-5) if isinstance(value, float) else value


@pytest.mark.parametrize(
    "data",
    [{}, {"packing": "pad"}, {"document_mask": True}],
    ids=["packed", "padded", "documents apart"],
)
def test_the_block_likelihood_is_that_of_the_runs_last_validation(
    data: dict[str, Any], tiny_data: Path, tmp_path: Path, figures: Callable[..., dict[str, Any]]
) -> None:
    base = tiny_values(tiny_data, tmp_path)["data"]
    folder = train(tiny_data, tmp_path, "run", data=base | data)
    expected = [line for line in metric_lines(folder) if "val/cross_entropy" in line][-1]
    found = figures(folder, *SMALL, "--prompts", "0")
    assert found["rows"]["rows"] == VALIDATION_ROWS
    assert (found["rows"]["tokens"] < VALIDATION_ROWS * 33) == (data.get("packing") == "pad")
    assert found["block_all_tokens"]["nll"] == pytest.approx(expected["val/cross_entropy"], rel=1e-5)
    assert found["block_all_tokens"]["accuracy"] == pytest.approx(expected["val/accuracy"])
    assert found["block_all_tokens"]["perplexity"] == pytest.approx(math.exp(expected["val/cross_entropy"]), rel=1e-4)
    assert found["order_parameter"] is found["g_cache"] is found["padding"] is None
    # Scored at every position, the sampled targets are all of them.
    every = figures(folder, *SMALL, "--prompts", "0", "--positions", "99")
    assert every["gap"]["targets"] == found["block_all_tokens"]["tokens"]
    assert every["block"]["nll"] == pytest.approx(found["block_all_tokens"]["nll"], rel=1e-5)
    assert sum(each["targets"] for each in every["gap"]["by_position"]) == every["gap"]["targets"]


def test_run_checkpoint_recipe_and_export_give_the_same_figures(
    run: Path, export: Path, tmp_path: Path, text: Path, figures: Callable[..., dict[str, Any]]
) -> None:
    def measured(*arguments: object) -> dict[str, Any]:
        found = figures(*arguments, *SMALL)
        source = found.pop("source")
        assert source["path"] == str(arguments[0])
        return found

    from_run = measured(run)
    assert measured(run / "checkpoints" / "last") == from_run
    assert measured(run, "--data", run / "recipe.yaml") == from_run
    # Weights that another reader put elsewhere in memory give other last bits.
    assert measured(export, "--data", run / "recipe.yaml") == approximately(from_run)
    # A recipe that names no tokenizer is read with the model's own.
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"]["tokenizer"] = None
    (tmp_path / "none.yaml").write_text(yaml.safe_dump(values))
    assert measured(export, "--data", tmp_path / "none.yaml") == approximately(from_run)
    of_text = measured(run, "--text", text, text)
    assert of_text["block_all_tokens"] != from_run["block_all_tokens"]
    assert measured(export, "--text", text, text) == approximately(of_text)


def test_figures_depend_on_the_seed_alone_and_the_run_stays_as_it_is(
    run: Path, figures: Callable[..., dict[str, Any]]
) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    first, again, other = (figures(run, *SMALL, "--seed", seed) for seed in ("1", "1", "2"))
    assert first == again
    assert other["gap"]["mean"] != first["gap"]["mean"]
    assert other["order_parameter"]["tensors"] != first["order_parameter"]["tensors"]
    assert other["block_all_tokens"] == first["block_all_tokens"]
    batched = figures(run, *SMALL, "--seed", "1", "--batch-size", "3")
    assert batched["sequential"]["nll"] == pytest.approx(first["sequential"]["nll"], abs=1e-5)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_the_table_shows_every_figure_and_ends_with_the_verdict(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(run), *SMALL, "--json", str(tmp_path / "found.json")]) == 0
    out, err = capsys.readouterr()
    found = json.loads((tmp_path / "found.json").read_text())
    lines = {line[:22].strip(): line for line in out.splitlines()}
    for name, values in (
        ("block, all tokens", found["block_all_tokens"]),
        ("block, sampled", found["block"]),
        ("sequential, sampled", found["sequential"]),
    ):
        line = next(each for start, each in lines.items() if start.startswith(name))
        assert f"{values['nll']:.4f}" in line
        assert f"{values['perplexity']:,.2f}" in line
    for name in ("A ", "A_LM", "A_P", "G_LM"):
        values = found["order_parameter"]["tensors"][name.strip()]
        line = next(each for each in out.splitlines() if each.startswith(f"{name} "))
        assert f"{values['x1_x2']['bounded']:.3e}" in line
        assert f"{values['xc_x1']['relative_rmse']:.3e}" in line
    assert f"{found['g_cache']['largest_logit_difference']:.2e}" in out
    assert f"{found['padding']['largest_logit_difference']:.2e}" in out
    assert out.splitlines()[-1] == f"verdict  {found['gap']['verdict_text']}"
    assert "8 rows in one pass each, 32 targets" in err
    assert found["source"]["step"] == 8
    assert main(["evaluate", str(run), *SMALL, "--rows", "1", "--prompts", "0"]) == 0
    assert "one row gives no interval" in capsys.readouterr().out.splitlines()[-1]


@pytest.fixture(scope="module")
def others(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with a causal Gram and one that keeps documents apart, on the data of `run`."""
    runs = tmp_path_factory.mktemp("others")
    base = tiny_values(tiny_data, runs)
    return (
        train(tiny_data, runs, "causal", model=base["model"] | {"gram_chunk_size": 4}),
        train(tiny_data, runs, "apart", data=base["data"] | {"document_mask": True}),
    )


def paired_t(first: Tensor, second: Tensor) -> Any:
    """The mean of second - first over (R,) and Student's 95 % interval."""
    found = stats.ttest_rel(second.numpy(), first.numpy())
    low, high = found.confidence_interval(0.95)
    values = {"mean": float((second - first).mean()), "low": low, "high": high}
    return pytest.approx(values, rel=2e-3, abs=1e-6)


def test_compared_models_have_their_own_figures_and_intervals_paired_over_rows(
    run: Path, export: Path, others: tuple[Path, Path], figures: Callable[..., dict[str, Any]]
) -> None:
    sizes = SMALL[:6]
    found = figures(run, "--compare", *others, export, *sizes)
    recipe = run / "recipe.yaml"
    alone = [figures(each, *sizes, "--prompts", "0", "--data", recipe) for each in (run, *others, export)]
    for compared, own in zip(found["models"], alone, strict=True):
        compared["source"].pop("rows_of")
        own["source"].pop("rows_of")
        assert compared == own
    assert found["source"]["path"] == str(run)
    # The rows are full, so the interval is that of the means of rows.
    checkpoint = find_checkpoint(run)
    assert checkpoint is not None
    options = build_parser().parse_args([str(run), *sizes])
    rows = open_rows(options, None, checkpoint, checkpoint.load_model()).ids
    settings = EvaluationSettings(positions=4, prompts=0)
    first = evaluate(load_model(run), rows, settings).scores.targets
    second = evaluate(load_model(others[0]), rows, settings).scores.targets
    differences = found["comparisons"][0]["differences"]
    assert differences["block"] == paired_t(first.block_nll.mean(-1), second.block_nll.mean(-1))
    assert differences["sequential"] == paired_t(first.sequential_nll.mean(-1), second.sequential_nll.mean(-1))
    gaps = [(each.sequential_nll - each.block_nll).mean(-1) for each in (first, second)]
    assert differences["gap"] == paired_t(*gaps)
    nll = [row_nll(load_model(each), rows) for each in (run, others[0])]
    assert differences["block_all_tokens"] == paired_t(*nll)
    # The export is the run.
    assert all(abs(each["mean"]) < 1e-5 for each in found["comparisons"][2]["differences"].values())


@torch.no_grad()
def row_nll(model: PldrllmForCausalLM, rows: Tensor) -> Tensor:
    """(R, S + 1) full rows -> (R,) block NLL of each, in nat/token."""
    logits = model(rows[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.transpose(1, 2), rows[:, 1:], reduction="none").double().mean(-1)


def test_rows_of_unequal_length_weigh_by_their_targets() -> None:
    positions = torch.tensor([[1, 2, 3], [1, -1, -1], [2, 3, -1]])
    no = torch.zeros(3, 3, dtype=torch.bool)
    draws = torch.rand(4, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    first, second = (
        RowScores(
            torch.tensor(nll).double(), torch.tensor([3.0, 1.0, 2.0]).double(), TargetScores(positions, *own, no, no)
        )
        for nll, own in (([3.0, 2.0, 1.0], draws[:2]), ([2.5, 2.5, 1.5], draws[2:]))
    )
    found = row_differences(first, second)
    totals, counts = np.array([-0.5, 0.5, 0.5]), np.array([3, 1, 2])
    mean = totals.sum() / 6
    half = stats.t.ppf(0.975, 2) * math.sqrt(3 / 2 * ((totals - mean * counts) ** 2).sum()) / 6
    assert found["block_all_tokens"] == pytest.approx({"mean": mean, "low": mean - half, "high": mean + half})
    # The gap's is that of the gaps: the one estimator.
    kept = positions > 0
    gap = (second.targets.sequential_nll - second.targets.block_nll)[kept].mean() - (
        first.targets.sequential_nll - first.targets.block_nll
    )[kept].mean()
    assert found["gap"]["mean"] == pytest.approx(float(gap))


def test_a_comparison_is_a_table_with_a_column_for_each_model(
    run: Path, others: tuple[Path, Path], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "found.json"
    for _ in range(2):  # the second time over a file that the command wrote
        arguments = [run, "--text", text, "--compare", *others, *SMALL[:6], "--json", path]
        assert main(["evaluate", *map(str, arguments)]) == 0
    found = json.loads(path.read_text())
    lines = {line[:24].strip(): line for line in capsys.readouterr().out.splitlines()}
    line = lines["sequential NLL, sampled"]
    for model in found["models"]:
        assert f"{model['sequential']['nll']:.4f}" in line
    for other in found["comparisons"]:
        assert f"{other['differences']['sequential']['mean']:+.4f} (" in line
    assert any(each.startswith(f"C        {others[1]}, step 8:") for each in lines.values())
    assert main(["evaluate", str(run), "--compare", str(others[0]), "--device", "cpu", "--rows", "1"]) == 0
    assert "(no interval)" in capsys.readouterr().out


def test_mistakes_in_comparisons_are_one_message(
    run: Path, export: Path, tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare, other, short = (shutil.copytree(export, tmp_path / name) for name in ("bare", "other", "short"))
    for folder in (bare, other):
        for name in ("tokenizer.model", "tokenizer.json"):
            (folder / name).unlink(missing_ok=True)
    train_tokenizer([" ".join(sorted(WORDS)) + " zebra quagga"] * 50, other / "tokenizer.model", 320)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none"], "none"),
        ([bare], f"{bare} has no tokenizer"),
        ([other], f"--compare {other}: its tokenizer is not that of {run}"),
        ([export, short], f"--compare {short}: its context is 16 tokens, and the rows have 32; give --context 16"),
        ([export, "--prompts", "2"], "--prompts is for one model, and --compare measures likelihoods alone"),
        ([export] * 26, "--compare names 26 models; name 25 at most"),
    ]
    for arguments, message in cases:
        assert main(["evaluate", str(run), "--compare", *map(str, arguments)]) == 2, arguments
        out, err = capsys.readouterr()
        assert message in err
        assert err.count("error:") == 1
        assert out == ""


def test_texts_are_packed_with_an_end_after_each_and_rows_evenly_spaced() -> None:
    def tokenizer(text: str) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    stream = [*map(ord, "abcdefg"), 3, *map(ord, "hijklmnopqrs"), 3]
    rows, whole = rows_of_texts(tokenizer, ["abcdefg", "hijklmnopqrs"], 3, context_length=4, num_rows=99)
    assert (whole, rows.tolist()) == (5, [stream[start : start + 5] for start in (0, 4, 8, 12, 16)])
    rows, whole = rows_of_texts(tokenizer, ["abcdefg", "hijklmnopqrs"], 3, context_length=4, num_rows=2)
    assert (whole, rows.tolist()) == (5, [stream[start : start + 5] for start in (0, 8)])


@EVERY_GRAM
def test_a_cache_changes_logits_of_a_whole_sequence_g_alone(gram: dict[str, Any]) -> None:
    model, prompts = make(PldrllmForCausalLM, **gram).double(), [token_ids(1, 9)[0], token_ids(1, 5, seed=3)[0]]
    found = measure_g_cache(model, prompts, new_tokens=6)
    assert found["steps"] == 12
    if gram:
        assert found["largest_logit_difference"] < 1e-9
        assert found["same_choice"] == 1
    else:
        assert found["largest_logit_difference"] > 1e-3
        assert 0 < found["mean_logit_difference"] < found["largest_logit_difference"]
    with torch.no_grad():
        greedy = model.generate(prompts[0][None], do_sample=False, max_new_tokens=6, eos_token_id=-1)[0]
        cache = model(greedy[None, :9], use_cache=True).past_key_values
        differences = []
        for place in range(9, 15):
            cached = model(greedy[None, place, None], past_key_values=cache, use_cache=True).logits[0, -1]
            differences.append((cached - model(greedy[None, : place + 1], use_cache=False).logits[0, -1]).abs())
    alone = measure_g_cache(model, prompts[:1], new_tokens=6)
    assert alone["largest_logit_difference"] == pytest.approx(float(torch.stack(differences).max()), abs=1e-12)
    assert alone["mean_logit_difference"] == pytest.approx(float(torch.stack(differences).mean()), abs=1e-12)


@EVERY_GRAM
def test_the_order_parameter_is_that_of_the_definition(gram: dict[str, Any]) -> None:
    model, prompts = make(PldrllmForCausalLM, **gram), [token_ids(1, 9)[0], token_ids(1, 5, seed=3)[0]]
    state = torch.get_rng_state()
    found = measure_order_parameter(model, prompts, new_tokens=6, seed=5)["tensors"]
    assert torch.equal(torch.get_rng_state(), state)
    if "custom_G_type" in gram:
        zero = {"relative_rmse": 0, "bounded": 0}
        assert found == {"G_LM": {"x1_x2": zero, "xc_x1": zero}}
        return

    def curvature(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            layers = model(ids[None], use_cache=False, output_deductive_outputs=True).deductive_outputs
        return torch.stack([layer.curvature[0] if not gram else layer.curvature[0, -1] for layer in layers]).double()

    pairs = []
    for number, whole_prompt in enumerate(prompts):
        prompt, new_tokens = whole_prompt, 6
        if gram:  # the continuation ends with a chunk, and after it another one begins
            total = (len(prompt) + 6) // gram["gram_chunk_size"] * gram["gram_chunk_size"]
            new_tokens = min(6, total - gram["gram_chunk_size"])
            prompt = prompt[: total - new_tokens]
        continued = prompt
        generator = torch.Generator().manual_seed(5 + 2 * number)
        for _ in range(new_tokens):  # nucleus sampling, written out
            with torch.no_grad():
                likely = model(continued[None], use_cache=False).logits[0, -1].double().softmax(-1).tolist()
            order = sorted(range(len(likely)), key=lambda token, likely=likely: -likely[token])
            kept = 1 + next(n for n in range(len(order)) if sum(likely[token] for token in order[: n + 1]) >= 0.8)
            left = float(torch.rand((), generator=generator, dtype=torch.float64))
            left *= sum(likely[token] for token in order[:kept])
            chosen = next(n for n in range(kept) if left < sum(likely[token] for token in order[: n + 1]))
            continued = torch.cat((continued, torch.tensor([order[chosen]])))
        after = torch.cat((continued, torch.tensor([7]))) if gram else continued
        pairs.append((curvature(prompt), curvature(after)))
    cached, x1 = (torch.stack(each) for each in zip(*pairs, strict=True))
    rmse = float((cached - x1).square().mean().sqrt())
    expected = rmse / abs(float(cached.mean()))
    assert found["G_LM"]["xc_x1"]["relative_rmse"] == pytest.approx(expected, rel=1e-5)
    sizes = [float(each.square().mean().sqrt()) for each in (cached, x1)]
    assert found["G_LM"]["xc_x1"]["bounded"] == pytest.approx(2 * rmse / sum(sizes), rel=1e-5)
    assert set(found) == {"A", "A_LM", "A_P", "G_LM"}
    assert 0 < found["G_LM"]["x1_x2"]["bounded"] < 2


@EVERY_GRAM
def test_padding_changes_no_logits_and_a_model_that_sees_it_is_found(
    gram: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = make(PldrllmForCausalLM, **gram).double(), token_ids(3, 12)
    rows[1, 7:] = 0
    rows[2, 2:] = 0  # too short to be halved
    found = measure_padding(model, rows, count=9)
    assert found["rows"] == 2
    assert found["largest_logit_difference"] < 1e-9
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, attention_mask=None, **options: forward(ids, **options))
    assert measure_padding(model, rows, count=9)["largest_logit_difference"] > 1e-3


def test_prompts_are_the_first_halves_of_rows_without_padding() -> None:
    rows = torch.zeros(4, 600, dtype=torch.long)
    rows[0] = 5
    rows[1, -10:] = 6
    rows[2, :3] = 7
    rows[3, :5] = 8
    assert [each.tolist() for each in prompts_of(rows, 3)] == [[5] * 256, [6] * 5, [8] * 2]
    assert len(prompts_of(rows, 1)) == 1


def test_a_causal_model_is_said_to_be_one(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_values(tiny_data, tmp_path)["model"] | {"gram_chunk_size": 5}
    folder = train(tiny_data, tmp_path, "causal", model=model)
    assert main(["evaluate", str(folder), *SMALL]) == 0
    out = capsys.readouterr().out
    assert "causal Gram of chunks of 5 tokens" in out
    assert "no leakage" in out.splitlines()[-1]
    assert out.splitlines()[-1].endswith("(causal by its making)")


def test_figures_that_are_no_numbers_become_null() -> None:
    model, rows = make(PldrllmForCausalLM), token_ids(1, 12)
    with torch.no_grad():
        model.lm_head.bias[7] = 1e4  # a perplexity beyond all numbers, and one row without an interval
    found = evaluate(model, rows, EvaluationSettings(positions=2, prompts=1, new_tokens=2))
    assert found.block["perplexity"] == math.inf
    plain = found.as_json()
    assert plain["block"]["perplexity"] is plain["gap"]["low"] is None
    json.dumps(plain, allow_nan=False)
    with torch.no_grad():
        expected = F.cross_entropy(model(rows[:, :-1]).logits[0], rows[0, 1:])
    assert plain["block_all_tokens"]["nll"] == pytest.approx(float(expected))


def test_mistakes_are_one_message(
    run: Path, export: Path, tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short.txt").write_text("the metric")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    train_tokenizer([" ".join(sorted(WORDS)) + " zebra quagga"] * 50, tmp_path / "other.model", 320)
    values["data"]["tokenizer"] = str(tmp_path / "other.model")
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(values))
    values = yaml.safe_load((run / "recipe.yaml").read_text())
    values["data"]["context_length"] = 64
    (tmp_path / "long.yaml").write_text(yaml.safe_dump(values))
    bare = shutil.copytree(export, tmp_path / "bare")
    for name in ("tokenizer.model", "tokenizer.json"):
        (bare / name).unlink(missing_ok=True)
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "holds no model: name a run"),
        ([export], "is no run, so it has no validation rows of its own; give --text FILE or --data RECIPE"),
        ([run, "--text", tmp_path / "none.txt"], "--text " + str(tmp_path / "none.txt") + ": No such file"),
        ([run, "--text", tmp_path / "latin.txt"], "not a text in UTF-8"),
        ([run, "--text", tmp_path / "short.txt"], "do not fill one row of 32 + 1; give more text, or --context"),
        ([bare, "--text", text], "has no tokenizer"),
        ([run, "--context", "33"], "--context 33 is more than the context of"),
        ([run, "--data", tmp_path / "none.yaml"], "none.yaml"),
        ([run, "--data", tmp_path / "other.yaml"], "its tokenizer is not that of"),
        ([run, "--data", tmp_path / "long.yaml"], "data.context_length=64 is more than the context of"),
        ([run, "--device", "cuda:7"], "--device cuda:7"),
        ([run, "--json", tmp_path / "none" / "a.json"], "no folder"),
    ]
    for arguments, message in cases:
        assert main(["evaluate", *map(str, arguments)]) == 2, arguments
        out, err = capsys.readouterr()
        assert message in err
        assert err.count("error:") == 1
        assert out == ""
    for option, value in (("--rows", "0"), ("--context", "3"), ("--positions", "x"), ("--prompts", "-1")):
        with pytest.raises(SystemExit):
            main(["evaluate", str(run), option, value])
        assert f"argument {option}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["evaluate", str(run), "--text", str(text), "--data", "a.yaml"])
    assert "not allowed with" in capsys.readouterr().err
