"""Global batches are a function of the recipe alone: however they are made, live or from tokens, interrupted or not."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.loader import LaneState
from pldr_train.data.rows.packing import batch_digest
from pldr_train.errors import RecipeError
from pldr_train.fit import fit
from pldr_train.recipe import Recipe, recipe_from_dict
from tests.processes import SERVER, as_a_fresh_process, run_cli
from tests.resume.test_kill_and_resume import assert_same_run
from tests.tiny import VOCAB_SIZE, WORDS, changed, data_recipe, metric_lines, tiny_values

STEPS, BATCH, LANES = 40, 16, 16
INTERRUPTIONS = 200
SOURCES = ("live", "tokens")


@pytest.fixture(scope="module")
def settings(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Recipe]:
    """The same documents live and tokenised ahead: short ones, long ones, nulls, empty ones, invalid ones."""
    folder = tmp_path_factory.mktemp("exact")
    generator = random.Random(3)
    texts: list[bytes | None] = [
        " ".join(generator.choices(WORDS, k=generator.choice((1, 5, 30, 200)))).encode() for _ in range(400)
    ]
    texts[17], texts[18], texts[200], texts[399] = None, b"", b"not \xff utf-8", None
    for index in range(3):
        column = pa.array(texts[index::3], pa.binary()).cast(pa.string(), safe=False)
        pq.write_table(pa.table({"content": column}), folder / f"part-{index}.parquet", row_group_size=37)
    live = data_recipe(
        source="parquet", path=str(folder), text_column="content", train_documents=(10, 390),
        validation_documents=(390, 400), validation_fraction=0.1, tokenizer=str(tiny_data / "tokenizer.model"),
        cache_dir=str(folder / "cache"), context_length=48, num_lanes=LANES, shuffle=True, shuffle_window_documents=50,
        num_workers=0, seed=11, vocab_size=VOCAB_SIZE, batch_size=BATCH, micro_batch_size=BATCH,
        validation_rows=2 * BATCH,
    )  # fmt: skip
    recipe = folder / "recipe.json"
    data = {"path": str(folder), "train_documents": [10, 390], "validation_documents": [390, 400]}
    recipe.write_text(json.dumps(tiny_values(tiny_data, folder / "runs", data=data)))
    result = run_cli("data", "tokenize", recipe, "--output", folder / "tokens", "--workers", "2",
                     "--documents-per-shard", "100")  # fmt: skip
    assert result.returncode == 0, result.stderr
    return {"live": live, "tokens": changed(live, source="tokens", path=str(folder / "tokens"), tokenizer=None)}


Shares = list[tuple[torch.Tensor, torch.Tensor]]


def share_of(settings: Recipe, rank: int, ranks: int, steps: int, state: LaneState | None) -> Shares:
    """Rows and cursors of one rank, step by step."""
    module = PldrDataModule(settings, rank=rank, world_size=ranks)
    module.prepare_data()
    module.setup()
    if state is not None:
        module.lane_state = state.clone()
    batches = itertools.islice(iter(module.train_dataloader()), steps)
    return [(batch["input_ids"], batch["cursors"]) for batch in batches]


def together(shares: list[Shares]) -> Iterator[tuple[str, torch.Tensor]]:
    """Digest and cursors of the global batches."""
    for parts in zip(*shares, strict=True):
        ids, cursors = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        order = cursors[:, 0].argsort()
        yield batch_digest(ids[order]), cursors[order]


def play(
    settings: Recipe, ranks: int = 1, workers: int = 0, steps: int = STEPS, state: LaneState | None = None
) -> list[tuple[str, torch.Tensor]]:
    """The global batches of all ranks, one after the other in this process (their workers are processes)."""
    micro = BATCH // ranks // max(1, workers)
    chosen = changed(settings, num_workers=workers, micro_batch_size=micro)
    return list(together([share_of(chosen, rank, ranks, steps, state) for rank in range(ranks)]))


def assert_same(left: list[tuple[str, torch.Tensor]], right: list[tuple[str, torch.Tensor]]) -> None:
    assert [digest for digest, _ in left] == [digest for digest, _ in right]
    assert all(torch.equal(ours, theirs) for (_, ours), (_, theirs) in zip(left, right, strict=True))


@pytest.fixture(scope="module")
def reference(settings: dict[str, Recipe]) -> list[tuple[str, torch.Tensor]]:
    batches = play(settings["live"])
    assert len({digest for digest, _ in batches}) == STEPS
    assert int(batches[-1][1][:, 2].max()) >= 1  # into the second epoch
    return batches


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("workers", [0, 1, 2, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_batches_are_the_same_for_every_source_number_of_workers_and_of_ranks(
    settings: dict[str, Recipe], reference: list[tuple[str, torch.Tensor]], source: str, workers: int, ranks: int
) -> None:
    steps = STEPS if workers == 0 else 12
    assert_same(play(settings[source], ranks, workers, steps), reference[:steps])


def _real_rank(settings: Recipe, rank: int, path: str) -> None:
    as_a_fresh_process()
    torch.save(share_of(settings, rank, 2, 10, None), path)


@pytest.mark.parametrize("source", SOURCES)
def test_two_real_processes_with_two_workers_each_make_the_same_batches(
    settings: dict[str, Recipe], reference: list[tuple[str, torch.Tensor]], source: str, tmp_path: Path
) -> None:
    chosen = changed(settings[source], num_workers=2, micro_batch_size=4)
    ranks = [SERVER.Process(target=_real_rank, args=(chosen, rank, str(tmp_path / str(rank)))) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        assert process.exitcode == 0
    shares = [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(2)]
    assert_same(list(together(shares)), reference[:10])


@pytest.mark.slow
def test_two_hundred_random_interruptions_leave_no_trace(
    settings: dict[str, Recipe], reference: list[tuple[str, torch.Tensor]]
) -> None:
    states = [LaneState(LANES)]
    for _, cursors in reference:
        states.append(states[-1].clone())
        states[-1].update(cursors)
    generator = random.Random(7)
    for number in range(INTERRUPTIONS):
        step = generator.randrange(STEPS - 1)
        ranks, source = generator.choice((1, 2, 4)), generator.choice(SOURCES)
        workers = generator.choice((1, 2)) if number % 20 == 0 else 0
        state = LaneState.from_state_dict(states[step].state_dict(), LANES)
        steps = min(generator.randint(1, 4), STEPS - step)
        assert_same(play(settings[source], ranks, workers, steps, state), reference[step : step + steps])


def test_validation_rows_are_the_same_live_and_from_tokens(settings: dict[str, Recipe]) -> None:
    rows: dict[str, Any] = {}
    for source in SOURCES:
        module = PldrDataModule(settings[source], rank=0, world_size=1)
        module.prepare_data()
        module.setup()
        rows[source] = torch.cat([batch["input_ids"] for batch in module.val_dataloader()])
    assert torch.equal(rows["live"], rows["tokens"])


def test_a_run_may_go_on_from_tokens_and_back_and_is_the_run_that_was_never_moved(
    tiny_data: Path, tmp_path: Path
) -> None:
    def recipe(name: str) -> Path:
        path = tmp_path / f"{name}.json"
        checkpoint, trainer = {"every_steps": 4, "keep_last": 20}, {"max_steps": 12}
        values = tiny_values(tiny_data, tmp_path / "runs", name, checkpoint=checkpoint, trainer=trainer)
        path.write_text(json.dumps(values))
        return path

    straight, moved, tokens = recipe("straight"), recipe("moved"), tmp_path / "tokens"
    assert run_cli("fit", straight).returncode == 0
    assert run_cli("data", "tokenize", straight, "--output", tokens).returncode == 0
    from_tokens = ["data.source=tokens", f"data.path={tokens}", "data.tokenizer=null"]
    # Taken back to its checkpoints of step 4 and 8, as if it had been killed there.
    for stop, overrides in ((4, []), (8, from_tokens), (12, [])):
        result = run_cli("fit", moved, *overrides)
        assert result.returncode == 0, result.stderr
        if stop < 12:
            for folder in (tmp_path / "runs" / "moved" / "checkpoints").glob("step-*"):
                if int(folder.name.removeprefix("step-")) > stop:
                    folder.rename(folder.with_name(f"gone-{folder.name}-{stop}"))
    assert_same_run(tmp_path / "runs" / "straight", tmp_path / "runs" / "moved")
    assert metric_lines(tmp_path / "runs" / "moved")[-1]["step"] == 12
    other = run_cli("fit", moved, *from_tokens, "trainer.max_steps=30", f"data.tokenizer={tiny_data / 'corpus'}")
    assert other.returncode == 2
    assert "data.tokenizer=" in other.stderr


@pytest.mark.parametrize("packing", ["pack", "pad"])
def test_a_run_that_goes_on_scores_the_targets_that_it_would_have_scored(
    packing: str, tiny_data: Path, tmp_path: Path
) -> None:
    def values(name: str) -> dict[str, Any]:
        trainer = {"targets": "random_one", "max_steps": 6, "validate_every_steps": 6}
        return tiny_values(
            tiny_data, tmp_path, name, trainer=trainer, data={"packing": packing}, checkpoint={"every_steps": 3}
        )

    fit(recipe_from_dict(values("straight")))
    fit(recipe_from_dict(values("going-on")), str(tmp_path / "straight" / "checkpoints" / "step-00000003"))
    straight, going_on = (
        [line for line in metric_lines(tmp_path / name) if line["step"] > 3] for name in ("straight", "going-on")
    )
    assert [line["step"] for line in straight] == [4, 5, 6]
    assert straight == going_on
    other = values("going-on")
    other["trainer"]["targets"] = "last"
    with pytest.raises(RecipeError, match=r"trainer\.targets=last: the saved run has random_one"):
        fit(recipe_from_dict(other))
