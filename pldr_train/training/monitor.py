"""What is measured of a model in training beside its loss: its deductive outputs, and whether it reads the future.

Cheap metrics are taken of the forward pass of each step that is logged. The rest is taken at validations of the first
`monitor.rows` validation rows, which are the same at every validation and for every number of processes: row n belongs
to process n mod world size. Every process makes equally many passes, as sharded weights need.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from pldr_train.dag import DagLoss
from pldr_train.metrics.catalog import DAG_TENSORS, LEAKAGE_GROUP, TRAIN, VAL, dag_name
from pldr_train.metrics.deductive import (
    AttentionEntropy,
    DeductiveMetrics,
    OrderParameter,
    RowMapJacobians,
    causal_visible_positions,
)
from pldr_train.metrics.layer_metrics import CACHED, CONTINUATIONS, TENSORS
from pldr_train.metrics.leakage import LeakageSums, score_targets, spread_positions
from pldr_train.metrics.means import WeightedMeans
from pldr_train.metrics.row_map import RowMap, captured_row_maps, jacobian_norms, spread_rows
from pldr_train.metrics.tensor_metrics import CHEAP, COSTLY
from pldr_train.model.power_law_attention import DeductiveOutputs
from pldr_train.recipe import Recipe
from pldr_train.runs.snapshots import tensor_name
from pldr_train.training.attention import uncompiled
from pldr_train.training.continuations import add_to_order_parameters, fit_to_chunks, last_chunk, samples_of
from pldr_train.training.objective import document_positions, row_inputs

_LONGEST_PROMPT_TOKENS = 256
_JACOBIAN_ROWS = 32
"""Rows of Grams at which a layer's row map is looked at, as in the author's row study; at least one of each text."""
MOST_ATTENTION_WEIGHTS = 2**28
"""Attention weights of all layers written out at once, 1 GiB in fp32; a row of the 110M model has a quarter."""

Reduce = Callable[[Tensor], Tensor]


class ModelMonitor(nn.Module):
    """Gathers the values; a torch module, so that its sums live on the model's device.

    Args:
        recipe: resolved.
        rank: this process'.
        world_size: processes of the run.
    """

    def __init__(self, recipe: Recipe, rank: int = 0, world_size: int = 1) -> None:
        super().__init__()
        model, self.settings = recipe.model, recipe.monitor
        self.recipe, self.rank, self.world_size = recipe, rank, world_size
        self.snapshot: dict[str, Tensor] = {}
        """The deductive outputs of validation row 0 at the last validation, on the process that has it."""
        layers, heads, width = model.num_hidden_layers, model.num_attention_heads, model.head_dim
        self.of_step = DeductiveMetrics(layers, heads, width, sets=(CHEAP,))
        self.of_rows = DeductiveMetrics(layers, heads, width, sets=(COSTLY,), interleaved=model.reference_rope)
        self.row_maps = RowMapJacobians(layers)
        self.entropy = AttentionEntropy(layers)
        self.continuations = OrderParameter(layers, CONTINUATIONS)
        self.cached = OrderParameter(layers, CACHED)
        names = [dag_name(tensor, layer) for layer in range(layers) for tensor in DAG_TENSORS]
        self.dag_of_step, self.dag_of_validation = WeightedMeans(names), WeightedMeans(names)
        self.row_positions = document_positions if recipe.data.document_mask else None
        self.beat: Callable[[], None] = _nothing
        """Is called before each pass of the model: all of them together may take long."""
        self._rows: list[Tensor] = []
        self._is_row: list[Tensor] = []

    # Steps.

    def add_step(self, layers: Sequence[DeductiveOutputs], dag: DagLoss, rows: int) -> None:
        """Add a micro-batch of a step that is logged."""
        self.dag_of_step.update(_per_layer(dag, rows))
        if self.settings.deductive:
            self.of_step.update(layers)

    def forget_step(self) -> None:
        """The step's update is left out, and so is what was added of it."""
        self.dag_of_step.reset()
        self.of_step.reset()

    def step_values(self) -> dict[str, float]:
        """Return what was added since the last call; called on all processes."""
        values = {f"{TRAIN}/{name}": value for name, value in _taken(self.dag_of_step).items()}
        return values | _taken(self.of_step) if self.settings.deductive else values

    # Validations.

    def begin_validation(self) -> None:
        """Forget the last validation."""
        self._rows, self._is_row, self.snapshot = [], [], {}
        self.dag_of_validation.reset()

    def add_validation_dag(self, dag: DagLoss, rows: int) -> None:
        """Add the DAG losses of validation rows."""
        self.dag_of_validation.update(_per_layer(dag, rows))

    def add_validation_rows(self, rows: Tensor, is_row: Tensor) -> None:
        """Offer the next validation rows (R, S + 1) of this process; `is_row` (R,) is False where one only fills up."""
        missing = math.ceil(self.settings.rows / self.world_size) - sum(map(len, self._rows))
        if missing > 0:
            self._rows.append(rows[:missing])
            self._is_row.append(is_row[:missing].cpu())

    @torch.no_grad()
    def measure(
        self,
        model: Any,
        reduce: Reduce | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> dict[str, float]:
        """Return all that belongs to a validation; called on all processes, with the model in eval mode.

        Args:
            model: a PLDR-LLM with its head.
            reduce: the sum over processes.
            autocast: how the model computes in training.
        """
        values = {f"{VAL}/{name}": value for name, value in _taken(self.dag_of_validation).items()}
        if not self._rows:
            return values
        rows = torch.cat(self._rows)
        numbers = self.rank + self.world_size * torch.arange(len(rows))
        counted = (numbers < self.settings.rows) & torch.cat(self._is_row)
        with uncompiled(model), autocast(), heartbeat_during(model, self.beat):
            values |= self._leakage(model, rows, counted, reduce)
            if self.settings.deductive:
                self._costly(model, rows, numbers, counted, reduce)
                if self.recipe.model.custom_G_type == "learned":  # any other depends on nothing
                    self._order(model, rows, numbers, counted)
        if self.settings.deductive:
            for metric in (self.of_rows, self.row_maps, self.entropy, self.continuations, self.cached):
                values |= _taken(metric)
        return values

    def _leakage(self, model: Any, rows: Tensor, counted: Tensor, reduce: Reduce | None) -> dict[str, float]:
        settings, context = self.settings, rows.shape[1] - 1
        positions = settings.positions or spread_positions(context, settings.targets, self.recipe.run.seed)
        if not positions:
            return {}
        asked = torch.tensor(sorted(set(positions)))
        scores = score_targets(model, rows, asked, self._batch_size(rows), self.row_positions)
        sums = scores.sums(counted[:, None].expand_as(scores.positions)).as_tensor().to(rows.device)
        total = LeakageSums.from_tensor(sums if reduce is None else reduce(sums))
        if total.targets == 0:
            return {}
        found = asdict(total.compute())
        found.pop("rows")
        # One row has no interval.
        return {f"{LEAKAGE_GROUP}/{name}": value for name, value in found.items() if math.isfinite(value)}

    def _costly(self, model: Any, rows: Tensor, numbers: Tensor, counted: Tensor, reduce: Reduce | None) -> None:
        """Run over the rows once more, for what needs more than a step has."""
        each = math.ceil(_JACOBIAN_ROWS / self.settings.rows)
        with captured_row_maps(model, lambda gram: _rows_of_texts(gram, each)) as row_maps:
            self._matrices_and_attention(model, rows, counted)
        self._row_maps(row_maps, numbers, counted, reduce)

    def _row_maps(self, row_maps: Sequence[RowMap], numbers: Tensor, counted: Tensor, reduce: Reduce | None) -> None:
        """The Jacobians at rows of each text's Gram; each process fills in those of its own texts."""
        if not row_maps:
            return
        first = row_maps[0].rows[0]
        shape = (2, len(row_maps), self.settings.rows, first.shape[1])
        found = torch.zeros(shape, dtype=torch.float64, device=first.device)
        for index, row_map in enumerate(row_maps):
            texts = torch.cat(row_map.rows)[counted.to(first.device)]
            for picked, number in zip(texts, numbers[counted].tolist(), strict=True):
                norms, _ = jacobian_norms(row_map.units, picked)
                finite = norms.isfinite()
                found[:, index, number] = torch.stack((norms.where(finite, 0.0), finite.double()))
        values, are_there = found if reduce is None else reduce(found)
        self.row_maps.update(values.where(are_there > 0, math.nan).flatten(1))

    def _matrices_and_attention(self, model: Any, rows: Tensor, counted: Tensor) -> None:
        """One pass over the rows: singular values and the entropy of attention, and row 0 for the snapshot.

        Of a causal Gram the last chunk is taken. Models whose attention weights of one row are too many to be written
        out do without their entropy.
        """
        shape, context = self.recipe.model, rows.shape[1] - 1
        weights_of_row = shape.num_hidden_layers * shape.num_attention_heads * context**2
        write_out = weights_of_row <= MOST_ATTENTION_WEIGHTS
        at_once = min(self._batch_size(rows), MOST_ATTENTION_WEIGHTS // weights_of_row) if write_out else 1
        for start in range(0, len(rows), at_once):
            ids = rows[start : start + at_once, :-1]
            real = counted[start : start + at_once].to(ids.device)
            beside = row_inputs(ids, self.recipe.data)
            output = model.decoder(
                input_ids=ids,
                **beside,
                use_cache=False,
                output_deductive_outputs=True,
                output_attentions=write_out,
            )
            deductive = last_chunk(output.deductive_outputs)
            if not self.snapshot and self.rank == 0:
                self.snapshot = snapshot_tensors(deductive)
            if bool(real.any()):
                self.of_rows.update(samples_of(deductive, real))
                if write_out:
                    seen = _visible(output.attentions[0], **beside).expand(len(ids), -1)[real]
                    self.entropy.update([weights[real] for weights in output.attentions], seen)
            del output

    def _order(self, model: Any, rows: Tensor, numbers: Tensor, counted: Tensor) -> None:
        """The order parameter: deductive outputs after two continuations of the same prompts, and after the prompts."""
        context = rows.shape[1] - 1
        chunk = self.recipe.model.gram_chunk_size
        lengths = fit_to_chunks(min(context // 2, _LONGEST_PROMPT_TOKENS), self.settings.new_tokens, chunk, context)
        if lengths is None:
            return
        share = min(math.ceil(self.settings.prompts / self.world_size), len(rows))
        for start in range(0, share, self._batch_size(rows)):
            part = slice(start, min(start + self._batch_size(rows), share))
            add_to_order_parameters(
                self.continuations,
                self.cached,
                model,
                rows[part, : lengths[0]],
                lengths[1],
                [self.recipe.run.seed + 2 * int(number) for number in numbers[part]],
                num_pieces=self.recipe.model.vocab_size,
                wanted=counted[part] & (numbers[part] < self.settings.prompts),
                row_positions=self.row_positions,
            )

    def _batch_size(self, rows: Tensor) -> int:
        return min(self.recipe.trainer.micro_batch_size or len(rows), len(rows))


@contextmanager
def heartbeat_during(model: Any, beat: Callable[[], None]) -> Iterator[None]:
    """Have `beat` called before each pass of the model, so that a watchdog sees that work goes on."""
    handle = model.decoder.register_forward_pre_hook(lambda *_: beat())
    try:
        yield
    finally:
        handle.remove()


def _nothing() -> None:
    pass


def _taken(metric: Any) -> dict[str, float]:
    """Return a metric's values, over all processes; it begins anew. Nothing may have been added to it here, or
    anywhere.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric", category=UserWarning)
        values: dict[str, float] = metric.compute()
    metric.reset()
    # What only describes must not end a run; the loss shows its own end.
    return {name: value for name, value in values.items() if math.isfinite(value)}


def _per_layer(dag: DagLoss, rows: int) -> dict[str, tuple[Tensor, Tensor | float]]:
    return {
        dag_name(name, layer): (value * rows, float(rows))
        for name, values in dag.per_layer.items()
        for layer, value in enumerate(values)
    }


def _rows_of_texts(gram: Tensor, count: int) -> Tensor:
    """Return rows (B, n, d), spread over the heads, of each text's normed Gram (B, ..., H, d, d): the last chunk's."""
    return torch.stack([spread_rows(each.reshape(-1, *each.shape[-3:])[-1], count) for each in gram])


def _visible(weights: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None) -> Tensor:
    """(1 or B, S), how many positions each row of the attention weights (B, H, S, S) sees."""
    if position_ids is not None:
        return position_ids + 1
    return causal_visible_positions(weights, attention_mask)


def snapshot_tensors(layers: Sequence[DeductiveOutputs]) -> dict[str, Tensor]:
    """Return what a snapshot keeps of the deductive outputs of a batch: those of its first sample, the last chunk's."""
    found = {}
    for index, layer in enumerate(layers):
        for name, attribute in TENSORS.items():
            tensor: Tensor | None = getattr(layer, attribute)
            if tensor is not None:
                matrices = tensor[0].reshape(-1, *tensor.shape[-3:])[-1]
                found[tensor_name(index, name)] = matrices.detach().float().cpu().contiguous()
    return found
