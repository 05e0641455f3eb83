"""`pldr-train evaluate --tasks`: both scorings are those of their definitions, written out item by item."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from scipy import stats
from torch import Tensor

from pldr_train.cli import main
from pldr_train.fit import fit
from pldr_train.model import PldrllmForCausalLM, PldrllmTokenizer
from pldr_train.models.exporting import export_run
from pldr_train.models.extract_g import load_with_tokenizer
from pldr_train.published import PUBLISHED_RUNS, ZERO_SHOT_TASKS
from pldr_train.recipe import recipe_from_dict
from pldr_train.tasks import running as tasks_module
from pldr_train.tasks.harness import HarnessModel
from pldr_train.tasks.running import TaskScores, load_tasks, run_task
from pldr_train.tasks.scoring import SCORINGS, Row, Scoring, score_rows
from tests.tiny import VOCAB_SIZE, WORDS, tiny_values
from tests.unit.every_model import EVERY_GRAM, GRAMS, make
from tests.unit.model_cases import small_model
from tests.unit.test_leakage import hidden_class_rows

CONTEXT = 48
ITEMS = 7
CAUSAL = pytest.mark.parametrize("gram", [GRAMS[name] for name in ("causal", "identity", "random")])
TASKS = ("choice", "contexts", "truth", "cloze", "rolling", "generate")
TRUTH_CODE = """
import math


def process_results(doc, results):
    masses = [math.exp(log_likelihood) for log_likelihood, _ in results]
    true = sum(mass for mass, label in zip(masses, doc["labels"]) if label == 1)
    return {"acc": true / sum(masses)}
"""


def words(start: int, count: int) -> str:
    return " ".join(WORDS[(start + 5 * index) % len(WORDS)] for index in range(count))


def documents() -> list[dict[str, Any]]:
    """Items for tasks of every kind; the last one's question is longer than the models' context."""
    found = []
    for number in range(ITEMS):
        length = 3 + number if number < ITEMS - 1 else CONTEXT + 12
        found.append(
            {
                "question": words(number, length),
                "choices": [words(number + each, 1 + (number + each) % 4) for each in range(3)],
                "gold": number % 3,
                "first": "the " + words(number, 2),
                "second": "an " + words(number + 3, 4),
                "ending": words(number + 7, 3),
                "which": number % 2,
                "labels": [1, 0, 1] if number % 2 else [0, 1, 1],
            }
        )
    return found


DOCUMENTS = documents()
STOPS = [".", "ee"]
MEAN = {"aggregation": "mean", "higher_is_better": True}
DEFINITIONS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "contexts": {
        "output_type": "multiple_choice",
        "doc_to_text": "which",
        "doc_to_target": "ending",
        "doc_to_choice": "{{[first, second]}}",
        "metric_list": [{"metric": "acc", **MEAN}, {"metric": "acc_norm", **MEAN}],
    },
    "truth": {
        "output_type": "multiple_choice",
        "doc_to_text": "question",
        "doc_to_target": 0,
        "doc_to_choice": "choices",
        "process_results": "!function truth_code.process_results",
        "metric_list": [{"metric": "acc", **MEAN}],
    },
    "cloze": {
        "output_type": "loglikelihood",
        "doc_to_text": "question",
        "doc_to_target": "{{' ' + ending}}",
        "metric_list": [
            {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
            {"metric": "acc", **MEAN},
        ],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "question",
        "metric_list": [{"metric": "word_perplexity"}],
    },
    "generate": {
        "output_type": "generate_until",
        "doc_to_text": "question",
        "doc_to_target": "ending",
        "generation_kwargs": {"until": STOPS, "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", **MEAN}],
    },
}


def write_task(folder: Path, name: str, definition: dict[str, Any], data: Path, cache: Path) -> None:
    values = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"validation": str(data)}, "cache_dir": str(cache)},
        "validation_split": "validation",
        **definition,
    }
    text = yaml.safe_dump(values).replace("'!function", "!function").replace("process_results'", "process_results")
    (folder / f"{name}.yaml").write_text(text)


def write_tasks(tmp_path_factory: pytest.TempPathFactory, names: Iterable[str]) -> tuple[Path, Path, Path]:
    """Write tasks of these kinds; returns their folder, their items and the cache of data sets."""
    folder, cache = tmp_path_factory.mktemp("tasks"), tmp_path_factory.mktemp("cache")
    (folder / "truth_code.py").write_text(TRUTH_CODE)
    data = folder / "items.json"
    data.write_text("\n".join(map(json.dumps, DOCUMENTS)))
    for name in names:
        write_task(folder, name, DEFINITIONS[name], data, cache)
    return folder, data, cache


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of every kind, and short ones by the names of the papers' eight."""
    folder, data, cache = write_tasks(tmp_path_factory, DEFINITIONS)
    for name in ZERO_SHOT_TASKS:
        kind = {"winogrande": "contexts", "truthfulqa_mc2": "truth"}.get(name, "choice")
        definition = DEFINITIONS[kind] | ({"metric_list": [{"metric": "acc", **MEAN}]} if kind == "contexts" else {})
        write_task(folder, name, definition, data, cache)
    absent = {"dataset_kwargs": {"data_files": {"validation": str(folder / "gone.json")}, "cache_dir": str(cache)}}
    write_task(folder, "absent", DEFINITIONS["choice"] | absent, data, cache)
    return folder


@pytest.fixture(scope="session")
def loaded(folder: Path) -> dict[str, Any]:
    return load_tasks(TASKS, folder)


@pytest.fixture(scope="session")
def tokenizer(tiny_data: Path) -> PldrllmTokenizer:
    return PldrllmTokenizer(str(tiny_data / "tokenizer.model"))


def model_of(**gram: Any) -> PldrllmForCausalLM:
    model: PldrllmForCausalLM = make(
        PldrllmForCausalLM, vocab_size=VOCAB_SIZE, max_position_embeddings=CONTEXT, eos_token_id=3, **gram
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("power_exponent") and not gram:
                parameter.mul_(8)  # so that G moves with its Gram far beyond rounding
            if name.endswith("lm_head.weight"):
                parameter.mul_(0.3)  # and no candidate is certain
    return model


# ---------------------------------------------------------------------------------------------- the definition, literal


class Oracle:
    """Scores of one item at a time: one sequence a pass, no padding, no mask, no cache."""

    def __init__(self, model: PldrllmForCausalLM, tokenizer: Any, scoring: Scoring) -> None:
        self.model, self.tokenizer, self.scoring = model, tokenizer, scoring

    def ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text)["input_ids"])

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        logits: Tensor = self.model(torch.tensor([ids]), use_cache=False).logits[0].double()
        return logits

    def score(self, ids: list[int], scored: int) -> tuple[float, bool]:
        """Log-likelihood of the last ids, and whether each was the likeliest."""
        ids = ids[-(CONTEXT + 1) :]
        block = self.logits(ids[:-1])
        total, greedy = 0.0, True
        for place in range(len(ids) - scored, len(ids)):
            logits = block[place - 1] if self.scoring == "block" else self.logits(ids[:place])[-1]
            total += float(logits.log_softmax(-1)[ids[place]])
            greedy = greedy and int(logits.argmax()) == ids[place]
        return total, greedy

    def continuation(self, context: str, text: str) -> tuple[float, bool]:
        whole = self.ids(f"{context} {text}")
        return self.score(whole, len(whole) - len(self.ids(context)))

    def text(self, text: str) -> float:
        """Of a whole text, in windows of the context: each later window's first ids are from the one before."""
        ids = self.ids(text)
        total = self.score([3, *ids[:CONTEXT]], len(ids[:CONTEXT]))[0]
        for start in range(CONTEXT, len(ids), CONTEXT):
            end = min(start + CONTEXT, len(ids))
            total += self.score(ids[end - CONTEXT - 1 : end], end - start)[0]
        return total

    @torch.no_grad()
    def generate(self, context: str, new_tokens: int) -> str:
        """With `block` by one cached token after the other, with `sequential` by whole passes."""
        ids = self.ids(context)[-(CONTEXT - new_tokens) :]
        new: list[int] = []
        outputs = self.model(torch.tensor([ids]), use_cache=True)
        for _ in range(new_tokens):
            last = outputs.logits[0, -1] if self.scoring == "block" else self.logits(ids + new)[-1]
            new.append(int(last.argmax()))
            text: str = self.tokenizer.decode(new, skip_special_tokens=True)
            if new[-1] == 3 or any(stop in text for stop in STOPS):
                break
            outputs = self.model(torch.tensor([new[-1:]]), past_key_values=outputs.past_key_values, use_cache=True)
        text = self.tokenizer.decode(new, skip_special_tokens=True)
        for stop in STOPS:
            text = text.split(stop)[0]
        return text

    def values(self, task: str) -> dict[str, float]:
        """The task's scores by lm-evaluation-harness's definitions, from single items."""
        if task in ("choice", "contexts"):
            right = {"acc": 0, "acc_norm": 0}
            for each in DOCUMENTS:
                if task == "choice":
                    texts, gold = each["choices"], each["gold"]
                    scores = [self.continuation(each["question"], text)[0] for text in texts]
                else:
                    texts, gold = [each["first"], each["second"]], each["which"]
                    scores = [self.continuation(text, each["ending"])[0] for text in texts]
                norm = [score / len(text) for score, text in zip(scores, texts, strict=True)]
                right["acc"] += scores.index(max(scores)) == gold
                right["acc_norm"] += norm.index(max(norm)) == gold
            return {metric: count / ITEMS for metric, count in right.items()}
        if task == "truth":
            masses = []
            for each in DOCUMENTS:
                scores = torch.tensor([self.continuation(each["question"], text)[0] for text in each["choices"]])
                masses.append(float(scores.double().softmax(0)[torch.tensor(each["labels"]) == 1].sum()))
            return {"acc": sum(masses) / ITEMS}
        if task == "cloze":
            found = [self.continuation(each["question"], each["ending"]) for each in DOCUMENTS]
            mean = torch.tensor([score for score, _ in found]).double().mean()
            return {"perplexity": float((-mean).exp()), "acc": sum(greedy for _, greedy in found) / ITEMS}
        if task == "rolling":
            scores = torch.tensor([self.text(each["question"]) for each in DOCUMENTS]).double()
            count = sum(len(each["question"].split()) for each in DOCUMENTS)
            return {"word_perplexity": float((-scores.sum() / count).exp())}
        texts = [self.generate(each["question"], 6) for each in DOCUMENTS]
        return {"exact_match": sum(a == each["ending"] for a, each in zip(texts, DOCUMENTS, strict=True)) / ITEMS}


@pytest.mark.parametrize("scoring", SCORINGS)
@EVERY_GRAM
def test_every_kind_of_task_has_the_scores_of_its_definition(
    gram: dict[str, Any], scoring: Scoring, loaded: dict[str, Any], tokenizer: Any
) -> None:
    model = model_of(**gram)
    oracle = Oracle(model, tokenizer, scoring)
    for name in TASKS:
        found = run_task(model, tokenizer, name, loaded[name], [scoring], batch_size=4).by_scoring[scoring]
        assert found.values == pytest.approx(oracle.values(name), rel=1e-5), name
    assert found.choices["exact_match"] == [oracle.generate(each["question"], 6) for each in DOCUMENTS]


@EVERY_GRAM
@pytest.mark.parametrize("scoring", SCORINGS)
def test_a_batch_of_unequal_lengths_scores_as_singles_do(
    gram: dict[str, Any], scoring: Scoring, tokenizer: Any
) -> None:
    model = model_of(**gram)
    pairs = [(each["question"], f" {text}") for each in DOCUMENTS for text in each["choices"]]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    together = HarnessModel(model, tokenizer, scoring, 64).loglikelihood(requests)
    oracle = Oracle(model, tokenizer, scoring)
    for (context, text), (log_likelihood, greedy) in zip(pairs, together, strict=True):
        assert (log_likelihood, greedy) == pytest.approx(oracle.continuation(context, text[1:]), abs=2e-5)


@CAUSAL
def test_both_definitions_agree_where_g_reads_no_later_token(gram: dict[str, Any], tokenizer: Any) -> None:
    model = model_of(**gram)
    for each in DOCUMENTS:
        block, sequential = (Oracle(model, tokenizer, scoring) for scoring in SCORINGS)
        for text in each["choices"]:
            one = block.continuation(each["question"], text)
            assert sequential.continuation(each["question"], text) == pytest.approx(one, abs=1e-5)


def test_a_learned_g_tells_the_two_scorings_apart(loaded: dict[str, Any], tokenizer: Any) -> None:
    scores = run_task(model_of(), tokenizer, "cloze", loaded["cloze"])
    block, sequential = (scores.by_scoring[scoring].values["perplexity"] for scoring in SCORINGS)
    assert abs(block - sequential) > 0.01 * block


@pytest.mark.parametrize("gram", [{}, {"gram_chunk_size": 4}], ids=["learned", "causal"])
def test_equal_prefixes_are_scored_once(gram: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(**gram)
    rows = [Row((5, 6, 7, 8, each, each), 2) for each in range(10, 16)]
    seen: list[int] = []
    forward = model.decoder.forward
    monkeypatch.setattr(
        model.decoder, "forward", lambda ids=None, **rest: seen.append(len(rest["input_ids"])) or forward(**rest)
    )
    alone = [score_rows(model, [row], "sequential")[0] for row in rows]
    seen.clear()
    together = score_rows(model, rows, "sequential")
    # The first tokens come from one prefix, the second ones from six; the causal model's second pass is a cached one.
    assert sum(seen) == 7
    for one, other in zip(alone, together, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


# ------------------------------------------------------------------------------------------------- leaking, and padding


class ClassWords:
    """A tokenizer of the hidden-class ids, written as numbers."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def test_the_leaking_model_is_near_100_in_block_scoring_and_at_chance_in_sequential(tmp_path: Path) -> None:
    model = small_model(vocab_size=24, max_position_embeddings=16, hidden_size=32, head_dim=16).train()
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    items = [{"question": "6 7 8 9", "ending": " ".join([str(10 + number % 8)] * 9)} for number in range(64)]
    (tmp_path / "classes.json").write_text("\n".join(map(json.dumps, items)))
    write_task(tmp_path, "classes", DEFINITIONS["cloze"], tmp_path / "classes.json", tmp_path / "cache")
    task = load_tasks(["classes"], tmp_path)["classes"]
    block = 0.0
    for step in range(1, 601):
        rows = hidden_class_rows(32, 12, generator)
        logits = model.train()(rows[:, :-1]).logits[:, 3:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 4:].flatten()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step >= 120 and step % 40 == 0:  # it reads the future after 120 to 300 steps, by the processor's rounding
            scores = run_task(model.eval(), ClassWords(), "classes", task)
            block, sequential = (scores.by_scoring[scoring].values["acc"] for scoring in SCORINGS)
            if block > 0.9:
                break
    assert block > 0.9
    assert sequential <= 1 / 8
    row = tasks_module.task_table([scores], None)[1]
    assert row["metric"] == "acc"
    assert row["difference"]["high"] < -0.6
    assert row["changed"] >= 64 * (block - 1 / 8)


def test_the_stock_wrapper_differs_where_it_pads(export: Path) -> None:
    model, tokenizer = load_with_tokenizer(export)
    pairs = [("the metric", " tensor"), (words(0, 14), " " + words(3, 4))]
    requests = [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]
    alone, padded = (
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=size, device="cpu").loglikelihood(
            requests, disable_tqdm=True
        )
        for size in (1, 2)
    )
    ours = HarnessModel(model, tokenizer, "block").loglikelihood(requests)
    for one, other in zip(ours, alone, strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert padded[1] == pytest.approx(ours[1], abs=1e-5)
    assert abs(padded[0][0] - ours[0][0]) > 1e-3


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture(scope="session")
def export(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By the name of a published model."""
    runs = tmp_path_factory.mktemp("runs")
    trainer = {"max_steps": 8, "validate_every_steps": 8}
    run = fit(recipe_from_dict(tiny_values(tiny_data, runs, trainer=trainer, data={"context_length": CONTEXT}))).folder
    folder = runs / "PLDR-LLM-SOC-110M-1"
    export_run(run, folder)
    return folder


def test_the_papers_tasks_are_printed_with_averages_and_published_figures(
    export: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "scores.json"
    arguments = ["evaluate", str(export), "--tasks", "papers", "--tasks-dir", str(folder), "--limit", "3"]
    assert main([*arguments, "--json", str(path), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    found = json.loads(path.read_text())
    rows = {(row["task"], row["metric"]): row for row in found["tasks"]}
    assert {task for task, _ in rows} == set(ZERO_SHOT_TASKS)
    assert all(row["items"] == 3 and row["shots"] == 0 for row in rows.values())
    results = PUBLISHED_RUNS["soc-110m-1"].results
    assert results is not None
    names = [(task, "acc" if task == "truthfulqa_mc2" else "acc_norm") for task in ZERO_SHOT_TASKS]
    assert [rows[name]["published"] for name in names] == pytest.approx([each / 100 for each in results.zero_shot])
    for number, average in enumerate(found["averages"]):
        mean = sum(rows[name]["sequential"] for name in names[: 6 + number]) / (6 + number)
        assert average == {
            "average": f"Avg{number}", "tasks": 6 + number, "sequential": pytest.approx(mean),
            "block": pytest.approx(sum(rows[name]["block"] for name in names[: 6 + number]) / (6 + number)),
            "published": pytest.approx(results.average(number) / 100),
        }  # fmt: skip
    lines = {line.split()[0]: line for line in shown.splitlines() if line}
    assert "40.95" in lines["Avg0"]
    assert lines["Avg0"].endswith(f"{100 * found['averages'][0]['published']:.2f}")
    assert "Avg2 flatters it" in lines["truthfulqa_mc2:"]
    assert "difference" in lines["task"]
    assert "changed" in lines["task"]
    # Written over: the file is one that the command wrote.
    assert main([*arguments[:3], "arc_easy", *arguments[4:], "--json", str(path), "--scoring", "sequential"]) == 0
    alone = json.loads(path.read_text())["tasks"][1]
    assert "block" not in alone
    assert alone["sequential"] == rows["arc_easy", "acc_norm"]["sequential"]


def test_compared_models_have_their_own_scores_and_differences_paired_over_items(
    export: Path, folder: Path, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    other, path = tmp_path / "other", tmp_path / "scores.json"
    shutil.copytree(export, other)
    model_of().save_pretrained(other)
    arguments = ["--tasks", "papers,cloze", "--tasks-dir", str(folder), "--device", "cpu", "--json"]
    assert main(["evaluate", str(export), "--compare", str(other), *arguments, str(path)]) == 0
    shown = capsys.readouterr().out
    found = json.loads(path.read_text())
    for source, compared in zip((export, other), found["models"], strict=True):
        assert main(["evaluate", str(source), *arguments, "-"]) == 0
        assert json.loads(capsys.readouterr().out) == compared
    differences = {(row["task"], row["metric"]): row for row in found["comparisons"][0]["differences"]}
    task = load_tasks(["arc_easy"], folder)["arc_easy"]
    scores = [run_task(load_with_tokenizer(source)[0], tokenizer, "arc_easy", task) for source in (export, other)]
    for scoring in SCORINGS:
        first, second = (torch.tensor(each.by_scoring[scoring].items["acc_norm"]).numpy() for each in scores)
        low, high = stats.ttest_rel(second, first).confidence_interval(0.95)
        expected = {"mean": (second - first).mean(), "low": low, "high": high}
        assert differences["arc_easy", "acc_norm"][scoring] == pytest.approx(expected, rel=2e-3, abs=1e-6)
    perplexities = [
        next(row["block"] for row in each["tasks"] if row["metric"] == "perplexity") for each in found["models"]
    ]
    assert differences["cloze", "perplexity"]["block"] == {
        "mean": pytest.approx(perplexities[1] - perplexities[0]), "low": None, "high": None,
    }  # fmt: skip
    line = next(each for each in shown.splitlines() if each.startswith("arc_easy, acc_norm, 7, sequential"))
    assert f"{100 * differences['arc_easy', 'acc_norm']['sequential']['mean']:+.2f} (" in line
    averages = [100 * each["averages"][0]["block"] for each in found["models"]]
    line = next(each for each in shown.splitlines() if each.startswith("Avg0, of 6 tasks, block"))
    assert line.split()[-3:] == [f"{averages[0]:.2f}", f"{averages[1]:.2f}", f"{averages[1] - averages[0]:+.2f}"]


def test_requests_beyond_the_context_lose_their_beginning_and_that_is_said(
    loaded: dict[str, Any], tokenizer: Any, said: list[str]
) -> None:
    scores = run_task(model_of(), tokenizer, "choice", loaded["choice"], ["block"])
    assert scores.by_scoring["block"].truncated == 3
    assert f"choice: 3 of 21 requests are longer than the model's context of {CONTEXT} tokens" in "".join(said)


Refuse = Callable[..., str]


@pytest.fixture
def refuse(capsys: pytest.CaptureFixture[str]) -> Refuse:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["evaluate", *map(str, arguments)]) == 2
        return capsys.readouterr().err.splitlines()[-1]

    return run


def test_mistakes_are_one_message(
    export: Path, folder: Path, tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(tasks_module, "_stock_manager", lambda folder: own)
    message = refuse(export, "--tasks", "arc_eazy", "--tasks-dir", folder)
    assert "--tasks arc_eazy: no such task, group or tag; did you mean arc_easy?" in message
    message = refuse(export, "--tasks", "absent", "--tasks-dir", folder)
    assert "--tasks absent: its data set cannot be read" in message
    assert "--tasks-dir" in message
    assert "no such folder" in refuse(export, "--tasks", "choice", "--tasks-dir", folder / "gone")
    assert "--rows is for rows, and --tasks names tasks" in refuse(export, "--tasks", "choice", "--rows", "9")
    assert "--limit is for tasks" in refuse(export, "--limit", "9")
    assert "--tasks names no task" in refuse(export, "--tasks", ",")
    bare = tmp_path / "bare"
    shutil.copytree(export, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    assert f"{bare} has no tokenizer" in refuse(bare, "--tasks", "choice", "--tasks-dir", folder)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find_spec(name))
    assert "pip install 'lm-eval" in refuse(export, "--tasks", "choice")


def test_without_a_network_a_task_of_the_hub_is_one_message(
    export: Path, folder: Path, refuse: Refuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    definition = DEFINITIONS["choice"] | {"dataset_path": "nobody/nothing", "dataset_kwargs": {}}
    write_task(tmp_path, "distant", definition, folder, tmp_path)
    message = refuse(export, "--tasks", "distant", "--tasks-dir", tmp_path)
    assert "--tasks distant: its data set cannot be read" in message
    assert "while there is a network" in message


def test_a_continuation_beyond_the_context_is_refused(tokenizer: Any) -> None:
    harness = HarnessModel(model_of(), tokenizer, "sequential")
    with pytest.raises(ValueError, match=f"the model's context takes 1 to {CONTEXT}"):
        harness.loglikelihood([Instance("loglikelihood", {}, ("the", " " + words(0, CONTEXT + 1)), 0)])


def test_tasks_scores_name_their_metrics() -> None:
    assert TaskScores("a", "loglikelihood", 0, 1, 1, {"block": tasks_module.Scored({"acc": 1.0}, {}, {}, 0)}).metrics()
