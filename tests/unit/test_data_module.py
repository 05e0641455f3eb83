"""Intervals, validation rows and the datamodule over local Parquet files."""

import os
import threading
import time
from multiprocessing.reduction import ForkingPickler
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pldr_train.data.datamodule import PldrDataModule
from pldr_train.data.rows.loader import LaneState, Topology, _MicroBatches
from pldr_train.data.rows.reading_ahead import ReadingAhead
from pldr_train.data.rows.split import resolve_intervals
from pldr_train.data.tokenizer.training import train_tokenizer
from pldr_train.errors import DataError
from tests.tiny import changed, data_recipe


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Settings over 300 real paragraphs in two files, with a tokenizer of 500 pieces."""
    folder = tmp_path_factory.mktemp("data")
    paragraphs = [part for name in sorted(topics) for part in topics[name].split("\n\n") if part.strip()][:300]
    for index in range(2):
        table = pa.table({"content": paragraphs[index * 150 : (index + 1) * 150]})
        pq.write_table(table, folder / f"part{index}.parquet", row_group_size=40)
    tokenizer = train_tokenizer(paragraphs, folder / "t.model", 500)
    return data_recipe(
        source="parquet",
        path=str(folder),
        text_column="content",
        train_documents=None,
        validation_documents=None,
        validation_fraction=0.1,
        tokenizer=str(tokenizer),
        cache_dir=str(folder / "cache"),
        context_length=32,
        num_lanes=8,
        shuffle=True,
        shuffle_window_documents=10,
        num_workers=0,
        seed=5,
        vocab_size=500,
        batch_size=8,
        micro_batch_size=4,
        validation_rows=12,
    )


def module(settings, rank=None, world_size=None, **changes):
    data = PldrDataModule(changed(settings, **changes), rank=rank, world_size=world_size)
    data.prepare_data()
    data.setup()
    return data


def validation_rows(data):
    return torch.cat([batch["input_ids"][batch["row_mask"]] for batch in data.val_dataloader()])


def expected_validation_rows(data, count):
    """The validation documents end to end with EOS, cut by the definition."""
    start, stop = data.validation_documents
    texts = data.reader.source.read(start, stop).texts()
    tokens = torch.tensor([token for text in texts for token in [*data.tokenizer.encode(text), 3]])
    length = data.recipe.data.context_length
    return tokens.unfold(0, length + 1, length)[:count]


def test_validation_rows_are_the_first_of_the_held_out_documents_and_fixed(base):
    data = module(base)
    assert (data.train_documents, data.validation_documents) == ((0, 270), (270, 300))
    rows = validation_rows(data)
    assert rows.shape == (12, 33)
    assert torch.equal(rows, expected_validation_rows(data, 12))
    assert torch.equal(rows, validation_rows(data))
    assert torch.equal(rows, validation_rows(module(base, seed=99, num_lanes=4, num_workers=1)))


def test_validation_rows_are_the_same_for_every_micro_batch(base):
    rows = validation_rows(module(base))
    for micro_batch_size in (1, 2, 8):
        assert torch.equal(rows, validation_rows(module(base, micro_batch_size=micro_batch_size)))
    for count in (1, 5, 7, 11):  # of which the micro-batch of 4 is no divisor
        some = module(base, validation_rows=count)
        assert torch.equal(rows[:count], validation_rows(some))
        assert len(some.val_dataloader()) == -(-count // 4)


def test_validation_takes_the_rows_there_are_in_one_pass(base):
    data = module(base, validation_documents=(290, 300), train_documents=(0, 100), validation_rows=10**6)
    rows = validation_rows(data)
    assert torch.equal(rows, expected_validation_rows(data, 10**6))
    assert len(data.val_dataloader()) == -(-len(rows) // 4)


def test_validation_without_a_whole_row_is_an_error(base):
    with pytest.raises(DataError, match=r"data\.validation_documents=\[299, 300\] .*data\.context_length"):
        module(base, validation_documents=(299, 300), context_length=20000).val_dataloader()


@pytest.mark.parametrize("world_size", [2, 3, 5, 16])
def test_ranks_share_the_validation_rows_in_equally_many_batches(base, world_size):
    whole = validation_rows(module(base))
    ranks = [module(base, rank, world_size) for rank in range(world_size)]
    assert len({len(data.val_dataloader()) for data in ranks}) == 1
    assert len({tuple(len(b["input_ids"]) for b in data.val_dataloader()) for data in ranks}) == 1
    shares = [validation_rows(data) for data in ranks]
    for rank, share in enumerate(shares):
        assert torch.equal(share, whole[rank::world_size])


def test_training_never_sees_a_validation_document(base, tmp_path):
    texts = [f"{'abcdefghij'[i % 10]} train" for i in range(40)] + ["7 7 7 7 7 7"] * 10
    pq.write_table(pa.table({"content": texts}), tmp_path / "x.parquet")
    data = module(base, path=str(tmp_path), validation_fraction=0.2, context_length=8)
    seven = data.tokenizer.piece_to_id("7") if data.tokenizer.piece_to_id("7") != 1 else 6 + ord("7")
    batches = [batch["input_ids"] for batch, _ in zip(data.train_dataloader(), range(40), strict=False)]
    assert not (torch.cat(batches) == seven).any()
    assert (validation_rows(data) == seven).any()


def test_one_row_group_serves_more_lanes_than_there_are_files_and_groups(base, tmp_path):
    texts = [f"document {chr(97 + i % 26)} {i}" for i in range(40)]
    pq.write_table(pa.table({"content": texts}), tmp_path / "one.parquet")
    data = module(base, path=str(tmp_path), num_lanes=32, batch_size=32, micro_batch_size=4, validation_fraction=0.2)
    layout = data._train_rows.layout
    assert layout.window == 1
    dealt = [layout.block(lane, 0, 0).tolist() for lane in range(32)]
    assert sorted(ordinal for ordinals in dealt for ordinal in ordinals) == list(range(32))
    batch = next(iter(data.train_dataloader()))
    assert batch["cursors"][:, 1].tolist() == list(range(32))


def test_training_continues_from_the_lane_state_that_was_set(base):
    data = module(base)
    batches = [batch for batch, _ in zip(data.train_dataloader(), range(9), strict=False)]
    for batch in batches[:6]:
        data.lane_state.update(batch["cursors"])
    resumed = module(base)
    resumed.lane_state = LaneState.from_state_dict(data.lane_state.state_dict(), base.data.num_lanes)
    for expected, got in zip(batches[6:], resumed.train_dataloader(), strict=False):
        assert torch.equal(expected["input_ids"], got["input_ids"])


def test_real_documents_in_workers_match_those_in_process(base):
    def first(data, steps=6):
        return torch.cat([batch["input_ids"] for batch, _ in zip(data.train_dataloader(), range(steps), strict=False)])

    assert torch.equal(first(module(base)), first(module(base, num_workers=2)))


def test_fingerprint_is_plain_and_tells_documents_and_tokenizer(base):
    data = module(base)
    fingerprint = data.train_source_fingerprint()
    assert torch.load(save(fingerprint, base), weights_only=True) == fingerprint
    assert module(base).train_source_fingerprint() == fingerprint
    assert module(base, train_documents=(0, 200)).train_source_fingerprint() != fingerprint
    assert [file["rows"] for file in fingerprint["source"]["files"]] == [150, 150]


def save(value, settings):
    path = f"{settings.data.path}/value.pt"
    torch.save(value, path)
    return path


def test_cursors_stay_on_the_host(base):
    batch = {"input_ids": torch.zeros(1, 2), "cursors": torch.zeros(1, 5), "unreadable": []}
    moved = module(base).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["input_ids"].is_meta
    assert moved["cursors"].device.type == "cpu"


def test_missing_or_unfit_inputs_are_named(base, tmp_path):
    for pattern, changes in [
        (r"data\.path=/nowhere: no such file", {"path": "/nowhere"}),
        (r"data\.path is not set", {"path": None}),
        (r"data\.tokenizer=/nowhere\.model: no such file", {"tokenizer": "/nowhere.model"}),
        (r"no column 'text' \(data\.text_column\)", {"text_column": "text"}),
        (r"model\.vocab_size=400 is less than the tokenizer's 500 pieces", {"vocab_size": 400}),
        (r"data\.num_lanes=1024 exceeds the 270 training documents", {"num_lanes": 1024}),
        (r"data\.train_documents=\[0, 301\] exceeds the source's 300 documents", {"train_documents": (0, 301)}),
    ]:
        with pytest.raises(DataError, match=pattern):
            module(base, **changes)


def test_intervals_resolve_as_documented():
    assert resolve_intervals(1000, None, None, 0.01) == ((0, 990), (990, 1000))
    assert resolve_intervals(1000, (100, 300), None, 0.1) == ((100, 280), (280, 300))
    assert resolve_intervals(10, None, None, 0.001) == ((0, 9), (9, 10))
    assert resolve_intervals(1000, (0, 600), (600, 1000), 0.5) == ((0, 600), (600, 1000))
    assert resolve_intervals(1000, None, (0, 200), 0.5) == ((200, 1000), (0, 200))
    assert resolve_intervals(1000, None, (900, 1000), 0.5) == ((0, 900), (900, 1000))


@pytest.mark.parametrize(
    ("train", "validation", "fraction", "pattern"),
    [
        ((0, 500), (499, 600), 0.1, r"train_documents=\[0, 500\] and .*\[499, 600\] overlap"),
        ((0, 1001), None, 0.1, r"data\.train_documents=\[0, 1001\] exceeds"),
        (None, (900, 1001), 0.1, r"data\.validation_documents=\[900, 1001\] exceeds"),
        ((5, 5), None, 0.1, r"data\.train_documents=\[5, 5\] is no interval"),
        ((-1, 5), None, 0.1, r"data\.train_documents=\[-1, 5\] is no interval"),
        (None, (300, 400), 0.1, r"lies in the midst"),
        (None, (0, 1000), 0.1, r"takes all 1000 documents"),
        ((7, 8), None, 0.1, r"data\.validation_fraction=0\.1 leaves no training documents"),
    ],
)
def test_impossible_intervals_are_named(train, validation, fraction, pattern):
    with pytest.raises(DataError, match=pattern):
        resolve_intervals(1000, train, validation, fraction)


def test_batches_need_no_shared_memory(base, monkeypatch):
    """In containers it is often smaller than a batch; what is sent through it is then lost and waited for."""

    def no_room(tensor):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>")

    reducers = {**ForkingPickler._extra_reducers, torch.Tensor: no_room}
    monkeypatch.setattr(ForkingPickler, "_extra_reducers", reducers)
    with pytest.raises(RuntimeError, match="unable to allocate"):
        ForkingPickler.dumps(torch.zeros(3))
    data = module(base, num_workers=2)
    topology = Topology(0, 1, base.trainer.batch_size, base.trainer.micro_batch_size)
    ForkingPickler.dumps(next(iter(_MicroBatches(data._train_rows, topology, data.lane_state))))  # as a worker does
    batches = [batch["input_ids"] for batch, _ in zip(data.train_dataloader(), range(5), strict=False)]
    monkeypatch.undo()
    expected = [batch["input_ids"] for batch, _ in zip(module(base).train_dataloader(), range(5), strict=False)]
    assert torch.equal(torch.cat(batches), torch.cat(expected))


def test_a_fork_waits_for_what_is_being_read():
    """A lock that a reading thread holds would stay locked in the forked process, which would wait for ever."""
    lock, begun = threading.Lock(), threading.Event()

    def read():
        with lock:
            begun.set()
            time.sleep(0.3)

    ahead = ReadingAhead(2)
    ahead.fetch(read)
    begun.wait()
    pid = os.fork()
    if pid == 0:
        os._exit(0 if lock.acquire(blocking=False) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ahead.fetch(lambda: "read on").result() == "read on"


def test_loader_processes_that_cannot_start_are_reported(base, monkeypatch):
    def no_semaphores(*_, **__):
        raise FileNotFoundError(2, "No such file or directory")

    data = module(base, num_workers=1)
    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", no_semaphores)
    with pytest.raises(DataError, match=r"data\.num_workers=1: the loader processes cannot be started .*/dev/shm"):
        next(iter(data.train_dataloader()))
