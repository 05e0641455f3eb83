"""The Lightning datamodule: builds and resolves what the recipe's data section names, and hands out the loaders."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sentencepiece
import torch

from pldr_train.data.corpus import build_quickstart_corpus
from pldr_train.data.intervals import Interval, resolve_intervals
from pldr_train.data.lanes import lane_layout
from pldr_train.data.loader import LaneState, RowSpec, Topology, TrainLoader
from pldr_train.data.sources import ParquetSource
from pldr_train.data.tokenizer_training import check_vocabulary, load_tokenizer, quickstart_tokenizer
from pldr_train.data.validation import ValidationLoader, build_validation_loader
from pldr_train.errors import DataError

_VALIDATION_READ_DOCUMENTS = 128


@dataclass(frozen=True)
class DataSettings:
    """What the datamodule needs of a recipe; fields are named and mean as the recipe's, lengths in tokens or rows."""

    source: str
    """"quickstart" or "parquet" """
    path: str | None
    text_column: str
    train_documents: Interval | None
    validation_documents: Interval | None
    validation_fraction: float
    tokenizer: str | None
    cache_dir: str
    context_length: int
    num_lanes: int
    shuffle: bool
    shuffle_window_documents: int
    num_workers: int
    seed: int
    vocab_size: int
    batch_size: int
    micro_batch_size: int
    validation_batches: int


class PldrDataModule(pl.LightningDataModule):
    """Training batches from lanes and fixed validation rows, for this process' rank.

    `lane_state` is where training stands: the trainer updates it with the cursors of each batch it has trained on,
    saves it, and sets it before `train_dataloader` to resume. Rank and world size come from the attached trainer
    unless given. What the user can mend is raised as DataError, before the first batch where it can be known then.
    """

    def __init__(self, settings: DataSettings, *, rank: int | None = None, world_size: int | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.lane_state = LaneState(settings.num_lanes)
        self._rank, self._world_size = rank, world_size
        self._validation_loader: ValidationLoader | None = None
        self._tokenizer: sentencepiece.SentencePieceProcessor | None = None

    def prepare_data(self) -> None:
        """Build the quickstart corpus and its tokenizer where the recipe asks for them; one process of a machine."""
        if self.settings.source == "quickstart":
            self._locate()

    def setup(self, stage: str | None = None) -> None:
        """Open source and tokenizer, resolve the intervals, lay out the lanes. Idempotent; reads no documents."""
        if self._tokenizer is not None:
            return
        settings = self.settings
        self.source, self.train_documents, self.validation_documents, self.tokenizer_path = self._locate()
        tokenizer = load_tokenizer(self.tokenizer_path)
        check_vocabulary(tokenizer, settings.vocab_size)
        layout = lane_layout(
            *self.train_documents,
            num_lanes=settings.num_lanes,
            window=settings.shuffle_window_documents,
            seed=settings.seed,
            shuffle=settings.shuffle,
        )
        self._train_rows = RowSpec(self.source, tokenizer, layout, settings.context_length)
        self._tokenizer = tokenizer

    def _locate(self) -> tuple[ParquetSource, Interval, Interval, Path]:
        """Source, training documents, validation documents, tokenizer; builds the quickstart's if they are missing."""
        settings = self.settings
        if settings.source == "quickstart":
            source = ParquetSource(build_quickstart_corpus(settings.cache_dir), settings.text_column)
        elif settings.path is None:
            raise DataError("data.path is not set; data.source=parquet needs a Parquet file, a folder or a glob")
        else:
            source = ParquetSource(settings.path, settings.text_column)
        train, validation = resolve_intervals(
            source.num_documents, settings.train_documents, settings.validation_documents, settings.validation_fraction
        )
        if settings.tokenizer is not None:
            tokenizer_path = Path(settings.tokenizer)
        elif settings.source == "quickstart":
            tokenizer_path = quickstart_tokenizer(settings.cache_dir, settings.vocab_size, train)
        else:
            raise DataError("data.tokenizer is not set; data.source=parquet needs the path of a SentencePiece .model")
        return source, train, validation, tokenizer_path

    @property
    def tokenizer(self) -> sentencepiece.SentencePieceProcessor:
        """The run's tokenizer, after `setup`."""
        assert self._tokenizer is not None, "call setup() first"
        return self._tokenizer

    @property
    def rank(self) -> int:
        """This process' number, as given or the trainer's."""
        return self._rank if self._rank is not None else (self.trainer.global_rank if self.trainer else 0)

    @property
    def world_size(self) -> int:
        """Number of processes, as given or the trainer's."""
        return self._world_size if self._world_size is not None else (self.trainer.world_size if self.trainer else 1)

    def train_source_fingerprint(self) -> dict[str, Any]:
        """What the training rows depend on beside the recipe, in plain types: files, documents, tokenizer's bytes."""
        digest = hashlib.blake2b(self.tokenizer.serialized_model_proto(), digest_size=16).hexdigest()
        return {
            "source": self.source.fingerprint(),
            "train_documents": list(self.train_documents),
            "tokenizer_blake2b": digest,
        }

    def train_dataloader(self) -> TrainLoader:
        """Endless optimizer-step batches of this process, from `lane_state` on."""
        settings = self.settings
        topology = Topology(self.rank, self.world_size, settings.batch_size, settings.micro_batch_size)
        return TrainLoader(self._train_rows, topology, self.lane_state, settings.num_workers)

    def val_dataloader(self) -> ValidationLoader:
        """The fixed validation rows of this process, packed at the first call."""
        if self._validation_loader is None:
            settings, rows = self.settings, self._train_rows
            layout = lane_layout(
                *self.validation_documents, num_lanes=1, window=_VALIDATION_READ_DOCUMENTS, seed=0, shuffle=False
            )
            self._validation_loader = build_validation_loader(
                RowSpec(rows.source, rows.tokenizer, layout, rows.context_length),
                max_rows=settings.validation_batches * settings.micro_batch_size,
                micro_batch_size=settings.micro_batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )
        return self._validation_loader

    def transfer_batch_to_device(
        self, batch: dict[str, torch.Tensor], device: torch.device, dataloader_idx: int
    ) -> dict[str, torch.Tensor]:
        """Move a batch to the device but for its cursors, which only the host reads."""
        return {key: value if key == "cursors" else value.to(device, non_blocking=True) for key, value in batch.items()}
