"""Tokens per second into packed batches on one core, the start on thousands of files, memory over a million documents.

The corpus is real English: docstrings of the packages installed beside this one, four to a document, which makes
documents as long as RefinedWeb's (some 600 tokens), in Parquet with row groups of 1,000 documents; the tokenizer is a
SentencePiece unigram of 32,000 pieces trained on the docstrings; both are kept in --cache. Every side makes batches of
32 rows of 1,024 tokens as torch tensors, in one process on one core:

    live      PldrDataModule on the Parquet files, shuffled; 8 lanes, so that blocks are about as large as those of a
              corpus of millions of documents (781 documents; 1,000 is the largest)
    tokens    PldrDataModule on what `pldr-train data tokenize` made of them
    plain     datasets in streaming mode: map(tokenise, batched), map(group, batched), batches to torch; once with the
              same SentencePiece model and once with the fast tokenizer of transformers, as such pipelines mostly have
    eager     the same maps over a data set in memory mode, which writes all tokens to the disk before the first batch

The sides alternate within one run, so that a busy machine slows all of them.

    python benchmarks/bench_data.py [--repeats 5] [--cache data/cache/bench] [--json FILE] [--only speed,start,memory]
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
import tokenize
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import datasets
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import sentencepiece
import torch

from pldr_train.cli import main as pldr_train
from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.model import PldrllmTokenizerFast
from pldr_train.recipe import Recipe, recipe_from_dict

CONTEXT, BATCH, LANES = 1024, 32, 8
DOCUMENTS, FILES = 100_000, 4
SIDES = ("live", "tokens", "plain sentencepiece", "plain fast tokenizer", "eager sentencepiece")


def docstrings(limit_chars: int) -> list[str]:
    found: dict[str, None] = {}
    chars = 0
    for path in sorted(Path(sysconfig.get_path("purelib")).rglob("*.py")):
        try:
            with tokenize.open(path) as file, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                tree = ast.parse(file.read())
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError, RecursionError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and len(text) >= 80 and text not in found:
                    found[text] = None
                    chars += len(text)
        if chars > limit_chars:
            break
    texts = list(found)
    random.Random(0).shuffle(texts)
    return texts


def prepare(cache: Path, tokens: bool) -> None:
    """Corpus, tokenizer and, if they are wanted, tokens, unless they are there."""
    cache.mkdir(parents=True, exist_ok=True)
    if not (cache / "docstrings.parquet").exists():
        building = cache / "docstrings.part"
        pq.write_table(pa.table({"content": docstrings(60_000_000)}), building)
        building.rename(cache / "docstrings.parquet")
    texts = pq.read_table(cache / "docstrings.parquet")["content"].to_pylist()
    if not (cache / "corpus").is_dir():
        generator = random.Random(0)
        building = cache / "corpus.part"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for index in range(FILES):
            column = ["\n\n".join(generator.choices(texts, k=4)) for _ in range(DOCUMENTS // FILES)]
            pq.write_table(pa.table({"content": column}), building / f"{index}.parquet", row_group_size=1000)
        building.rename(cache / "corpus")
    if not (cache / "t32k.model").exists():
        train_tokenizer(texts, cache / "t32k.model", 32_000)
    if tokens and not (cache / "tokens" / "manifest.json").exists():
        recipe = cache / "recipe.json"
        recipe.write_text(json.dumps(recipe_values(cache)))
        assert pldr_train(["data", "tokenize", str(recipe), "--output", str(cache / "tokens"), "--workers", "1"]) == 0


def recipe_values(cache: Path) -> dict[str, Any]:
    return {
        "run": {"name": "bench"},
        "data": {"source": "parquet", "path": str(cache / "corpus"), "tokenizer": str(cache / "t32k.model")},
    }


def recipe(source: str, path: Path, tokenizer: Path | None, num_workers: int = 0) -> Recipe:
    return recipe_from_dict({
        "run": {"name": "bench", "seed": 1},
        "data": {
            "source": source, "path": str(path), "tokenizer": None if tokenizer is None else str(tokenizer),
            "context_length": CONTEXT, "num_lanes": LANES, "num_workers": num_workers, "validation_choice": "last",
        },
        "trainer": {"batch_size": BATCH, "validation_rows": BATCH},
    })  # fmt: skip


def ours(source: str, path: Path, tokenizer: Path | None) -> Iterator[torch.Tensor]:
    module = PldrDataModule(recipe(source, path, tokenizer))
    module.prepare_data()
    module.setup()
    for batch in module.train_dataloader():
        yield batch["input_ids"]


def group(batch: dict[str, Any]) -> dict[str, Any]:
    flat = list(itertools.chain.from_iterable(batch["input_ids"]))
    return {"input_ids": [flat[i : i + CONTEXT] for i in range(0, len(flat) - CONTEXT, CONTEXT)]}


def plain(cache: Path, encode: Callable[[list[str]], list[list[int]]], streaming: bool) -> Iterator[torch.Tensor]:
    files = [str(path) for path in sorted((cache / "corpus").glob("*.parquet"))]
    files = files if streaming else files[:1]  # it would tokenise all of them before the first batch
    scratch, anew = cache / "datasets", {} if streaming else {"load_from_cache_file": False}
    data = datasets.load_dataset(
        "parquet", data_files=files, split="train", streaming=streaming, cache_dir=str(scratch)
    )
    data = data.map(
        lambda batch: {"input_ids": [[*ids, 3] for ids in encode(batch["content"])]},
        batched=True, batch_size=1000, remove_columns=["content"], **anew,
    )  # fmt: skip
    data = data.map(group, batched=True, batch_size=1000, **anew)
    for batch in data.iter(batch_size=BATCH):
        yield torch.tensor(batch["input_ids"])


def side(name: str, cache: Path) -> Iterator[torch.Tensor]:
    if name == "live":
        return ours("parquet", cache / "corpus", cache / "t32k.model")
    if name == "tokens":
        return ours("tokens", cache / "tokens", None)
    if "fast" in name:
        fast = PldrllmTokenizerFast(vocab_file=str(cache / "t32k.model"))
        return plain(cache, lambda texts: fast(texts, add_special_tokens=False)["input_ids"], streaming=True)
    model = sentencepiece.SentencePieceProcessor(model_file=str(cache / "t32k.model"))
    return plain(cache, lambda texts: model.encode(texts, num_threads=1), streaming=name.startswith("plain"))


def tokens_per_s(batches: Iterator[torch.Tensor], at_least_s: float, warm: bool) -> float:
    """Rate over at least `at_least_s` seconds; `warm`: after the first batch, otherwise with all that precedes it."""
    if warm:
        next(batches)
    begun, tokens = time.perf_counter(), 0
    for batch in batches:
        tokens += batch.shape[0] * CONTEXT
        if time.perf_counter() - begun > at_least_s:
            break
    return tokens / (time.perf_counter() - begun)


def measure_speed(cache: Path, repeats: int) -> dict[str, list[float]]:
    readings: dict[str, list[float]] = {name: [] for name in SIDES}
    for _ in range(repeats):
        for name in SIDES:
            # The eager pipeline does nearly all of its work before its first batch, so that is counted.
            eager = name.startswith("eager")
            readings[name].append(tokens_per_s(side(name, cache), 1e9 if eager else 4.0, warm=not eager))
    return readings


START = """
import sys, time
sys.path.insert(0, {folder!r})
from bench_data import recipe, PldrDataModule, Path
begun = time.perf_counter()
module = PldrDataModule(recipe("parquet", Path({files!r}), Path({tokenizer!r}), num_workers=1))
module.prepare_data(); module.setup()
next(iter(module.train_dataloader()))
print(time.perf_counter() - begun)
"""


def measure_start(cache: Path, num_files: int = 5534) -> float:
    """Seconds from opening so many files to the first batch, in a fresh process whose imports are done."""
    folder = cache / "many"
    if not folder.is_dir():
        texts = pq.read_table(cache / "corpus" / "0.parquet")["content"].to_pylist()
        building = cache / "many.part"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for index in range(num_files):
            table = pa.table({"content": [texts[(20 * index + row) % len(texts)] for row in range(20)]})
            pq.write_table(table, building / f"train-{index:05d}-of-{num_files:05d}.parquet")
        building.rename(folder)
    code = START.format(folder=str(Path(__file__).parent), files=str(folder), tokenizer=str(cache / "t32k.model"))
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def measure_memory(cache: Path) -> list[tuple[int, float]]:
    """(documents, MB resident) along a million documents read live."""
    folder = cache / "million"
    if not folder.is_dir():
        words = " ".join(pq.read_table(cache / "corpus" / "0.parquet")["content"].to_pylist()[:3000]).split()
        generator = random.Random(0)
        lines = [" ".join(generator.choices(words, k=generator.randint(5, 40))) for _ in range(20_000)]
        building = cache / "million.part"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for index in range(20):
            table = pa.table({"content": generator.choices(lines, k=50_000)})
            pq.write_table(table, building / f"{index:02d}.parquet", row_group_size=1000)
        building.rename(folder)
    module = PldrDataModule(recipe("parquet", folder, cache / "t32k.model"))
    module.prepare_data()
    module.setup()
    readings: list[tuple[int, float]] = []
    for batch in module.train_dataloader():
        module.lane_state.update(batch["cursors"])
        documents = module.lane_state.counts()["documents"]
        if documents >= 100_000 * (len(readings) + 1):
            readings.append((documents, psutil.Process().memory_info().rss / 1e6))
        if documents > 1_000_000:
            return readings
    raise AssertionError("the loader is endless")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--cache", type=Path, default=Path("data/cache/bench"))
    parser.add_argument("--only", default="speed,start,memory")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    options = parse()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    prepare(options.cache, "speed" in options.only)
    cores = sorted(os.sched_getaffinity(0))
    result: dict[str, Any] = {"machine": f"{platform.processor() or platform.machine()}, {len(cores)} cores"}
    if "start" in options.only:
        result["first_batch_of_5534_files_s"] = [measure_start(options.cache) for _ in range(3)]
        print(f"first batch of 5,534 files: {statistics.median(result['first_batch_of_5534_files_s']):.2f} s (of 3)")
    os.sched_setaffinity(0, {cores[-1]})
    if "memory" in options.only:
        result["rss_mb"] = measure_memory(options.cache)
        after = [size for _, size in result["rss_mb"]]
        print("resident MB per 100,000 documents: " + " ".join(f"{size:.0f}" for size in after))
        print(f"from the second reading on within {max(after[1:]) / min(after[1:]) - 1:.1%}")
    if "speed" in options.only:
        result["tokens_per_s"] = measure_speed(options.cache, options.repeats)
        for name, rates in result["tokens_per_s"].items():
            low, middle, high = min(rates), statistics.median(rates), max(rates)
            print(f"{name:22} {middle / 1e6:8.2f} M tokens/s ({low / 1e6:.2f} to {high / 1e6:.2f})")
        live = statistics.median(result["tokens_per_s"]["live"])
        for name in SIDES[2:]:
            print(f"live / {name}: {live / statistics.median(result['tokens_per_s'][name]):.2f}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
