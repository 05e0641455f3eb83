"""What `pldr-train data` shows while it works."""

import io

from pldr_train.commands.data_actions import DataProgress, inspection_text
from tests.terminal import terminal


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def test_a_log_file_gets_a_line_every_few_seconds_with_rate_and_time_left():
    stream, clock = io.StringIO(), Clock()
    progress = DataProgress("tokenised", stream, clock)
    progress.begin(1_000, 400)
    for _ in range(20):
        clock.now += 1
        progress.advance(10, 5_000)
    progress.end()
    assert stream.getvalue().splitlines() == [
        "tokenised   450 of 1,000 documents, 25,000 tokens, 5,000 tokens/s, ETA 00:55",
        "tokenised   500 of 1,000 documents, 50,000 tokens, 5,000 tokens/s, ETA 00:50",
        "tokenised   550 of 1,000 documents, 75,000 tokens, 5,000 tokens/s, ETA 00:45",
        "tokenised   600 of 1,000 documents, 100,000 tokens, 5,000 tokens/s, ETA 00:40",
    ]


def test_a_terminal_gets_a_moving_bar():
    with terminal() as opened:
        progress = DataProgress("tokenised", opened.stream)
        progress.begin(1_000, 400)
        progress.advance(100, 5_000)
        progress.end()
    assert "400/1000" in opened.shown


def test_a_sample_is_called_an_estimate_and_long_rows_are_shortened():
    found = {
        "source": "parquet", "files": 5534, "counted_files": 184, "documents": [0, 32_000_000],
        "train_documents": [16_000_000, 31_840_000], "validation_documents": [31_840_000, 32_000_000],
        "num_train_documents": 15_840_000, "num_validation_documents": 160_000,
        "interval": [16_000_000, 31_840_000],
        "sample": {"documents": 2000, "bytes": 5_000_000, "characters": 4_900_000, "tokens": 1_200_000,
                   "null": 1, "empty": 2, "invalid_utf8": 3, "unreadable": 4},
        "estimate": {"is_exact": False, "documents": 15_840_000, "bytes": 39_600_000_000, "characters": 1,
                     "tokens": 9_504_000_000, "tokens_with_eos": 9_519_840_000},
        "document_tokens": {"mean": 600.0, "min": 1.0, "p50": 400.0, "max": 9000.0},
        "histogram": [{"first": 0, "last": 0, "documents": 2}, {"first": 1, "last": 1, "documents": 0},
                      {"first": 2, "last": 3, "documents": 80}],
        "bytes_per_token": 4.1667, "characters_per_token": 4.0833, "documents_kept": 0.9, "padding_with_pad": 0.25,
        "rows_per_document_with_pad": 1.2, "epochs": 0.86, "rows": ["a" * 2000],
    }  # fmt: skip
    text = inspection_text(found, 250_000)
    for part in (
        "files       5,534, 184 of them counted",
        "documents   [0, 32,000,000), 32,000,000 documents known so far",
        "looked at   2,000 documents, evenly spaced, of [16,000,000, 31,840,000)",
        "the interval about 39.60 GB; 4.17 bytes, 4.08 characters a token",
        "tokens      1,200,000; the interval about 9.50 B; with EOS about 9.52 B",
        "1 null, 2 empty, 3 invalid UTF-8, 4 unreadable",
        "mean 600.0, median 400 tokens;  min 1  max 9,000",
        "25.0% of the tokens of rows would be padding",
        "epochs      0.86 of the training interval in trainer.max_steps=250,000",
        "kept        90.0% of the documents",
        "2 - 3  ########################################  80",
        "row 0, in the documents' order: " + "a" * 400 + " ... " + "a" * 400,
    ):
        assert part in text, text
    exact = inspection_text(found | {"estimate": found["estimate"] | {"is_exact": True}}, 1)
    assert "all documents of [16,000,000" in exact
    assert "about" not in exact
