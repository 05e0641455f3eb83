"""The Lightning datamodule: open the documents of a recipe, and make its loaders."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import sentencepiece
import torch

from pldr_train.data.documents import DocumentSource, LiveReader
from pldr_train.data.rows.lanes import lane_layout
from pldr_train.data.rows.loader import (
    LaneState,
    RowSpec,
    Topology,
    TrainLoader,
    ValidationLoader,
    build_validation_loader,
)
from pldr_train.data.rows.packing import RowRules
from pldr_train.data.rows.split import Split, needed_documents, split_documents
from pldr_train.data.sources.manifest import Manifest
from pldr_train.data.sources.opening import open_source
from pldr_train.data.tokenizer.automatic import recipe_tokenizer
from pldr_train.data.tokenizer.training import check_vocabulary, load_tokenizer
from pldr_train.data.tokens.shards import tokenizer_digest
from pldr_train.data.tokens.store import TokenStore
from pldr_train.errors import DataError
from pldr_train.recipe import DataSection, Recipe

_log = logging.getLogger(__name__)

_VALIDATION_READ_DOCUMENTS = 128


class PldrDataModule(pl.LightningDataModule):
    """Training batches from lanes and fixed validation rows, for this process' rank.

    `lane_state` is how far training is: the trainer updates it with the cursors of each batch it has trained on,
    saves it, and sets it before `train_dataloader` to resume. User errors are raised as DataError, before the first
    batch where it can be known then.

    Args:
        recipe: of the run; what it leaves open (null) is filled in.
        manifest_path: where the run keeps the list of its files; None: nowhere.
        rank: of this process; None: the attached trainer's.
        world_size: number of processes; None: the attached trainer's.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        manifest_path: Path | None = None,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__()
        self.recipe = recipe.resolved()
        assert self.recipe.trainer.micro_batch_size is not None
        self._micro_batch_size = self.recipe.trainer.micro_batch_size
        self._manifest_path = manifest_path
        self.lane_state = LaneState(recipe.data.num_lanes)
        self._rank, self._world_size = rank, world_size
        self._validation_loader: ValidationLoader | None = None
        self._tokenizer: sentencepiece.SentencePieceProcessor | None = None
        self._opened: _Opened | None = None

    def prepare_data(self) -> None:
        """List the files, count what the intervals need and build what is missing, in one process of each machine.

        With `manifest_path` the list is written there. If there is one already, it is used as it is.
        """
        if self._opened is None:
            self._opened = self._open()

    def setup(self, stage: str | None = None) -> None:
        """Open source and tokenizer, resolve the intervals and lay out the lanes. Idempotent; no document is read."""
        if self._tokenizer is not None:
            return
        data, seed = self.recipe.data, self.recipe.run.seed
        self._opened = opened = self._opened or self._open()
        self.split = opened.split
        self.train_documents, self.validation_documents = self.split.train, self.split.validation
        self.tokenizer_path = opened.tokenizer_path
        tokenizer = load_tokenizer(self.tokenizer_path)
        check_vocabulary(tokenizer, self.recipe.model.vocab_size)
        documents = opened.documents
        self.reader = documents if isinstance(documents, TokenStore) else LiveReader(documents, tokenizer)
        layout = lane_layout(
            *self.train_documents,
            num_lanes=data.num_lanes,
            window=data.shuffle_window_documents,
            seed=seed,
            shuffle=data.shuffle,
            numbering=self.split.training_part,
        )
        rules = RowRules(data.context_length, data.packing, data.min_document_tokens, data.max_document_tokens)
        self._train_rows = RowSpec(self.reader, layout, rules)
        self._tokenizer = tokenizer
        warning = self.split.few_documents_warning()
        if warning is not None:
            _log.warning(warning)

    def _open(self) -> _Opened:
        data, manifest_path = self.recipe.data, self._manifest_path
        if data.tokenizer is not None:
            load_tokenizer(data.tokenizer)  # report its faults before files are listed
        if data.source == "tokens":
            if data.path is None:
                raise DataError("data.path is not set; data.source=tokens needs a folder of `pldr-train data tokenize`")
            store = TokenStore(data.path)
            first, stop = store.documents
            return _Opened(store, split_documents(data, stop, first), _tokenizer_of_store(store, data))
        kept = Manifest.load(manifest_path) if manifest_path is not None and manifest_path.exists() else None
        if kept is not None and kept.origin.get("kind") != data.source:
            kept = None  # another kind of source; the fingerprint decides whether its documents are the same
        needed = needed_documents(data.train_documents, data.validation_documents)
        source = open_source(data, needed, kept)
        if manifest_path is not None and source.manifest != kept:
            source.manifest.save(manifest_path)
        split = split_documents(data, source.num_documents)
        return _Opened(source, split, recipe_tokenizer(self.recipe, source, split.train, split.spread))

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
        """Return what the training rows depend on beside the recipe, in plain types: files, documents, tokenizer.

        It is the same for documents that are tokenised during training and ahead of it.
        """
        spread = self.split.spread
        return {
            "source": self.reader.fingerprint(*self.train_documents),
            "train_documents": list(self.train_documents),
            "tokenizer_blake2b": tokenizer_digest(self.tokenizer.serialized_model_proto()),
            **({} if spread is None else {"held_out_documents": spread.held_out}),
        }

    def train_dataloader(self) -> TrainLoader:
        """Return an endless loader of this process' batches, one for each optimizer step, from `lane_state` on.

        If a trainer is attached, a user error is not raised but yielded as a last batch {"error": text}. Otherwise
        the other processes would wait for the one that failed.
        """
        batch_size = self.recipe.trainer.batch_size
        topology = Topology(self.rank, self.world_size, batch_size, self._micro_batch_size)
        loader = TrainLoader(self._train_rows, topology, self.lane_state, self.recipe.data.num_workers)
        return loader if self.trainer is None else _ErrorsAsBatches(loader)  # type: ignore[return-value]

    def val_dataloader(self) -> ValidationLoader:
        """Return the fixed validation rows of this process. They are packed at the first call."""
        if self._validation_loader is None:
            rows = self._train_rows
            layout = lane_layout(
                *self.validation_documents,
                num_lanes=1,
                window=_VALIDATION_READ_DOCUMENTS,
                seed=0,
                shuffle=False,
                numbering=self.split.validation_part,
            )
            self._validation_loader = build_validation_loader(
                RowSpec(rows.reader, layout, rows.rules),
                max_rows=self.recipe.trainer.validation_rows,
                micro_batch_size=self._micro_batch_size,
                rank=self.rank,
                world_size=self.world_size,
            )
        return self._validation_loader

    def transfer_batch_to_device(
        self, batch: dict[str, Any], device: torch.device, dataloader_idx: int
    ) -> dict[str, Any]:
        """Move a batch to the device, except what only the host reads."""
        return {
            key: value if key in ("cursors", "unreadable", "error") else value.to(device, non_blocking=True)
            for key, value in batch.items()
        }


class _ErrorsAsBatches:
    def __init__(self, loader: TrainLoader) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._loader
        except DataError as error:
            yield {"error": str(error)}


@dataclass(frozen=True)
class _Opened:
    """What a recipe's data section names, opened."""

    documents: DocumentSource | TokenStore
    """Documents of a source are tokenised during training."""
    split: Split
    tokenizer_path: Path


def _tokenizer_of_store(store: TokenStore, data: DataSection) -> Path:
    if data.tokenizer is None:
        return store.tokenizer_path
    given = Path(data.tokenizer)
    if not given.is_file() or given.read_bytes() != store.tokenizer_path.read_bytes():
        raise DataError(
            f"data.tokenizer={given}: not the tokenizer that {data.path} was written with, "
            f"{store.tokenizer_path}; set data.tokenizer=null to use that one, or tokenise again"
        )
    return given
