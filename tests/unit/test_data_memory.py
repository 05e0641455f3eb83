"""Memory of a loader that reads a million documents."""

import json
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.processes import ROOT
from tests.tiny import WORDS

DOCUMENTS, FILES = 1_000_000, 10

READ = """
import json, sys
import psutil
import torch
torch.set_num_threads(1)
from pldr_train.data.datamodule import PldrDataModule
from tests.tiny import data_recipe
recipe = data_recipe(
    source="parquet", path=sys.argv[1], text_column="content", train_documents=None, validation_documents=None,
    validation_fraction=0.001, tokenizer=sys.argv[2], cache_dir=sys.argv[1], context_length=256, num_lanes=64,
    shuffle=True, shuffle_window_documents=1000, num_workers=0, seed=1, vocab_size=320, batch_size=32,
    micro_batch_size=32, validation_rows=32,
)
module = PldrDataModule(recipe)
module.prepare_data()
module.setup()
readings = []
for batch in module.train_dataloader():
    module.lane_state.update(batch["cursors"])
    documents = module.lane_state.counts()["documents"]
    if documents >= 100_000 * (len(readings) + 1):
        readings.append(psutil.Process().memory_info().rss)
    if documents > 1_000_000:
        print(json.dumps(readings))
        break
"""


@pytest.mark.slow
def test_memory_stays_flat_over_a_million_documents(tiny_data, tmp_path):
    generator = random.Random(1)
    lines = [" ".join(generator.choices(WORDS, k=generator.randint(1, 6))) for _ in range(5000)]
    for index in range(FILES):
        column = generator.choices(lines, k=DOCUMENTS // FILES)
        pq.write_table(pa.table({"content": column}), tmp_path / f"{index}.parquet", row_group_size=1000)
    command = [sys.executable, "-c", READ, str(tmp_path), str(tiny_data / "tokenizer.model")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    readings = json.loads(result.stdout)
    assert len(readings) == 10
    settled = readings[1:]  # what the first blocks of all lanes take is there by then
    assert max(settled) <= 1.05 * min(settled), [round(reading / 1e6) for reading in readings]
