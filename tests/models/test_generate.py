"""`pldr-train generate`: what it prints is what the model says, alone, streamed, piped and in a terminal."""

from __future__ import annotations

import io
import os
import pty
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pldr_train.cli import main
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.fit import fit
from pldr_train.models.generating import Generator, Settings, summarise_curvature
from pldr_train.recipe import recipe_from_dict
from tests.models.conftest import PROMPT, Trained
from tests.tiny import WORDS, metric_lines, tiny_values

SUMMARY = re.compile(r"\[(\d+) prompt tokens, (\d+) new in [\d.]+ s, [\d.]+ tokens/s\]")
GREEDY = ("--temperature", "0", "--device", "cpu")


def expected_text(trained: Trained, prompt: str, new_tokens: int, **options: object) -> str:
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(trained.export),
        AutoTokenizer.from_pretrained(trained.export),
    )
    ids = tokenizer([prompt], return_tensors="pt")
    generated = model.generate(**ids, max_new_tokens=new_tokens, **({"do_sample": False} | options))
    return str(tokenizer.decode(generated[0], skip_special_tokens=True))


@pytest.mark.parametrize("source", ["run", "export"])
def test_it_prints_the_greedy_continuation(trained: Trained, source: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(getattr(trained, source))
    assert main(["generate", folder, PROMPT, "the", "--max-new-tokens", "7", *GREEDY]) == 0
    captured = capsys.readouterr()
    texts = [expected_text(trained, prompt, 7) for prompt in (PROMPT, "the")]
    assert captured.out == "".join(text + "\n" for text in texts)
    assert [int(new) for _, new in SUMMARY.findall(captured.err)] == [7, 7]


def test_options_reach_the_generation(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(trained.run), PROMPT, "--max-new-tokens", "6", "--device", "cpu"]
    sampled = []
    for seed in ("1", "1", "2"):
        assert main([*command, "--seed", seed, "--top-p", "1"]) == 0
        sampled.append(capsys.readouterr().out)
    assert sampled[0] == sampled[1] != sampled[2]
    assert main([*command, "--temperature", "0", "--num-beams", "3", "--num-return-sequences", "2"]) == 0
    out, err = capsys.readouterr()
    first, second = out.split("\n---\n")
    assert first == expected_text(trained, PROMPT, 6, num_beams=3)
    assert second != first
    assert SUMMARY.search(err) is not None
    assert main([*command, *GREEDY, "--no-cache"]) == 0
    assert capsys.readouterr().out.strip() == expected_text(trained, PROMPT, 6, use_cache=False)


def test_the_summary_of_g_has_a_row_a_layer(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(trained.run), PROMPT, "--max-new-tokens", "2", "--show-deductive", *GREEDY]) == 0
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("G_LM of the prompt")
    assert [line.split()[0] for line in lines[start + 1 : start + 4]] == ["layer", "0", "1"]

    identity = torch.eye(8).expand(1, 2, 8, 8)
    row = summarise_curvature([identity]).splitlines()[2].split()
    assert [float(value) for value in row] == pytest.approx([0, 1 / 8, float(identity.std()), 0, 1, 0, 0], abs=1e-4)
    row = summarise_curvature([10 * identity]).splitlines()[2].split()
    assert float(row[5]) == pytest.approx(8)  # log10 of 10 ** 8
    assert float(row[6]) == pytest.approx(9)


def test_piped_lines_are_continued_one_by_one(
    trained: Trained, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{PROMPT}\n\nthe\n"))
    assert main(["generate", str(trained.run), "--max-new-tokens", "5", *GREEDY]) == 0
    texts = [expected_text(trained, prompt, 5) for prompt in (PROMPT, "the")]
    assert capsys.readouterr().out == "".join(text + "\n" for text in texts)


@pytest.mark.slow
def test_in_a_terminal_it_asks_again_until_an_empty_line(trained: Trained) -> None:
    """A real terminal: a mistake in one prompt does not end the conversation."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "pldr_train", "generate", str(trained.run), "--max-new-tokens", "5", *GREEDY],
        stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    os.close(theirs)
    for line in ("the metric " * 30, PROMPT, ""):
        os.write(ours, f"{line}\n".encode())
        time.sleep(0.1)
    output = process.communicate(timeout=120)[0].decode()
    os.close(ours)
    assert process.returncode == 0, output
    assert "Type a prompt; an empty line ends." in output
    assert "this model's context is 32; shorten it to at most 31" in output
    assert expected_text(trained, PROMPT, 5) in output


def test_generation_ends_at_the_context(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(trained.run), PROMPT, "--max-new-tokens", "500", *GREEDY]) == 0
    prompt, new = map(int, SUMMARY.findall(capsys.readouterr().err)[0])
    assert prompt + new <= 32


def test_bad_input_is_one_clear_error(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        ("generate", str(tmp_path / "none"), "a"): "no such folder",
        ("generate", str(tmp_path), "a"): "holds no model: name a run",
        ("generate", str(trained.run), "the metric " * 40): "this model's context is 32; shorten it to at most 31",
        ("generate", str(trained.run), "a", "--device", "cuda:7"): "--device cuda:7",
        (
            "generate",
            str(trained.run),
            "a",
            "--temperature",
            "0",
            "--num-return-sequences",
            "2",
        ): "greedy decoding has one",
    }
    for arguments, message in cases.items():
        assert main(list(arguments)) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("error:") == 1
    shutil.copytree(trained.export, tmp_path / "export")
    train_tokenizer([" ".join(WORDS)] * 50, tmp_path / "larger.model", 322)
    shutil.copy(tmp_path / "larger.model", tmp_path / "export" / "tokenizer.model")
    (tmp_path / "export" / "tokenizer.json").unlink()
    assert main(["generate", str(tmp_path / "export"), "a"]) == 2
    assert "the tokenizer has 322 pieces, the model's vocabulary only 320" in capsys.readouterr().err
    for option, value in (("--top-p", "0"), ("--temperature", "-1"), ("--max-new-tokens", "0")):
        with pytest.raises(SystemExit):
            main(["generate", str(trained.run), "a", option, value])
        assert f"argument {option}" in capsys.readouterr().err


def test_a_run_with_a_causal_gram_trains_exports_and_generates_alike_with_and_without_a_cache(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(
        trained.folder, tmp_path / "runs", name="causal", model={"gram_chunk_size": 5}, trainer={"max_steps": 6}
    )
    outcome = fit(recipe_from_dict(values))
    line = metric_lines(outcome.folder)[-1]
    assert all(np.isfinite(line[f"val/{name}"]) for name in ("cross_entropy", "dag/A_LM", "dag/A_P", "dag/G_LM"))
    assert main(["export", str(outcome.folder), str(tmp_path / "causal")]) == 0
    assert "causal Gram, chunks of 5 tokens" in (tmp_path / "causal" / "README.md").read_text()
    capsys.readouterr()
    texts = []
    for options in ([], ["--no-cache"]):
        assert main(["generate", str(tmp_path / "causal"), PROMPT, "--max-new-tokens", "20", *GREEDY, *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]
    assert len(texts[0]) > len(PROMPT)


def test_a_vocabulary_larger_than_the_tokenizer_never_yields_ids_without_a_piece(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    values = tiny_values(
        trained.folder, tmp_path / "runs", name="larger", model={"vocab_size": 2000}, trainer={"max_steps": 4},
        optim={"warmup_steps": 1}, sample={"temperature": 5.0, "max_new_tokens": 20},
    )  # fmt: skip
    outcome = fit(recipe_from_dict(values))
    assert outcome.samples[0].startswith("the metric")
    assert main(["generate", str(outcome.folder), PROMPT, "--temperature", "9", "--top-p", "1", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith(PROMPT)


def test_an_empty_prompt_begins_after_the_end_of_a_document(trained: Trained) -> None:
    generator = Generator(trained.run, "cpu")
    given = generator.tokenizer([generator.tokenizer.eos_token], return_tensors="pt")
    assert given["input_ids"].tolist() == [[3]]
    expected = generator.model.generate(**given, max_new_tokens=5, do_sample=False)
    found = generator.continue_prompt("", Settings(max_new_tokens=5, temperature=0))
    assert found.prompt_tokens == 1
    assert found.texts == (generator.tokenizer.decode(expected[0], skip_special_tokens=True),)
