"""The LightningModule: a PLDR-LLM trained on cross-entropy plus the DAG loss of its deductive outputs."""

from __future__ import annotations

import functools
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from pldr_train.building import empty_model, fill_model, model_config, put_whole
from pldr_train.dag import TENSOR_NAMES, DagCoefficients, DagLoss, dag_loss, schedule_factor
from pldr_train.distributed.world import World
from pldr_train.metrics import catalog
from pldr_train.metrics.means import WeightedMeans
from pldr_train.model import PldrllmForCausalLM
from pldr_train.optim import freeze, lr_of_recipe, trained_groups
from pldr_train.optimizers import OPTIMIZERS
from pldr_train.recipe import Recipe
from pldr_train.training.attention import set_attention, uncompiled
from pldr_train.training.monitor import ModelMonitor
from pldr_train.training.objective import (
    TokenLoss,
    choose_targets,
    count_scored,
    draw_targets,
    mark_unscored,
    row_inputs,
)
from pldr_train.training.stepping import StepControl, nan_if_not_finite
from pldr_train.training.stock_trainer import StockTrainerSupport
from pldr_train.training.strategies import SharedRun, compiles
from pldr_train.training.weights import compile_layers, given_weights, recompute, saved_model, set_predefined_curvature


class PldrllmModule(pl.LightningModule):
    """Trains a PLDR-LLM as a recipe says.

    One batch of the data loader is all that this process contributes to one optimizer step; it is cut into
    micro-batches here (manual optimization), because the loss is normalised by the number of tokens of the whole step,
    which must be known before the first backward.

    Args:
        recipe: the resolved recipe.
        model: a model to train instead of the one that the recipe describes.
        world: the processes of the run, which all build the model at the same time.
    """

    model: PldrllmForCausalLM

    def __init__(self, recipe: Recipe, model: PldrllmForCausalLM | None = None, world: World | None = None) -> None:
        super().__init__()
        self.recipe = recipe.resolved()
        self._world = world or World()
        self.automatic_optimization = False
        self.train_means = WeightedMeans(catalog.QUANTITIES)
        self.validation_means = WeightedMeans(catalog.QUANTITIES)
        self.monitor = ModelMonitor(self.recipe, self._world.rank, self._world.size)
        self.monitor_s = 0.0
        """Time spent on the monitor's metrics; the reader resets it."""
        self.clock: Callable[[], float] = time.perf_counter
        self.control: StepControl | None = None
        """Of the optimizer, once there is one."""
        self._lr_fraction = 0.0
        """Of the peak learning rates, which the last step was taken with."""
        self._monitored: dict[str, float] = {}
        if model is not None:
            self.model = model

    def configure_model(self) -> None:
        """Build the model, in the strategy's context, unless there is one already."""
        if hasattr(self, "model"):
            return
        strategy = self._shared_run()
        model = empty_model(model_config(self.recipe))
        self._world.on_all(lambda: freeze(self.recipe.optim, model))
        given = self._world.on_all(lambda: given_weights(model, self.recipe))
        if strategy is not None:
            self._world.on_all(functools.partial(strategy.shard, model))
        put = put_whole if strategy is None else strategy.put
        fill_model(model, self.recipe.run.seed, put, given, self.recipe.model.init)
        self.model = model  # not before: Lightning cannot let go of a model without memory
        self._world.on_all(lambda: set_predefined_curvature(self.model, self.recipe))
        self._world.on_all(lambda: set_attention(self.model, self.recipe))
        self.model.train()
        recompute(self.model, self.recipe.parallel.activation_checkpointing)
        if compiles(self.recipe):
            compile_layers(self.model)

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return what a plain `lightning.Trainer` lacks; the strategies of `fit` come with callbacks of their own."""
        return [] if self._shared_run() is not None else [StockTrainerSupport()]

    def configure_optimizers(self) -> dict[str, Any]:
        """Return the recipe's optimizer and schedule; how its steps are clipped is `StepControl`'s."""
        settings, strategy = self.recipe.optim, self._shared_run()
        optimizer = OPTIMIZERS[settings.name].build(trained_groups(settings, self.model), settings)
        clip_norm = None if strategy is not None and strategy.clips_by_norm else settings.clip_norm
        leave_out = self.recipe.trainer.on_nonfinite != "raise"
        self.control = StepControl(optimizer, settings.clip_value, clip_norm, leave_out)

        def fraction_of_peak(step: int) -> float:
            return lr_of_recipe(self.recipe, step, peak=1.0)

        return {"optimizer": optimizer, "lr_scheduler": LambdaLR(optimizer, fraction_of_peak)}

    def forward(self, input_ids: Tensor, output_deductive_outputs: bool = False, **options: Any) -> Any:
        """(B, S) token ids -> the model's output without a cache, padding and documents as the recipe says.

        `options` are those of `PldrllmForCausalLM.forward`.
        """
        return self.model(
            input_ids=input_ids,
            **row_inputs(input_ids, self.recipe.data),
            use_cache=False,
            output_deductive_outputs=output_deductive_outputs,
            **options,
        )

    def on_train_start(self) -> None:
        """Look at a predefined G here, so that no step has to."""
        self.model.decoder.check_predefined_once()

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """One optimizer step over this process' rows (R, S + 1) of the global batch."""
        rows, targets = batch["input_ids"], self._targets(batch)
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        global_tokens = self._sum_over_processes(count_scored(targets)).clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        window = self.train_means.window() if self._may_leave_out() else None
        size = self.recipe.trainer.micro_batch_size or len(rows)
        micro_batches = list(zip(torch.split(rows, size), torch.split(targets, size), strict=True))
        for number, (micro_batch, scored) in enumerate(micro_batches, start=1):
            with self._accumulating(is_last=number == len(micro_batches)):
                loss = self._micro_batch_loss(micro_batch, scored, global_tokens, len(rows))
                self.manual_backward(nan_if_not_finite(loss))
        self._lr_fraction = scheduler.lr_lambdas[0](scheduler.last_epoch)
        self._step(optimizer.step)
        scheduler.step()
        if window is not None and not self.step_is_finite():
            self.train_means.restore(*window)
            self.monitor.forget_step()

    def _targets(self, batch: dict[str, Tensor]) -> Tensor:
        """Return (R, S) the targets that the loss scores, `IGNORED_TOKEN_ID` in the place of the others."""
        targets, which = batch["input_ids"][:, 1:], self.recipe.trainer.targets
        draws = None
        if which == "random_one":
            draws = draw_targets(self.recipe.run.seed, batch["cursors"][:, 0]).to(targets.device, non_blocking=True)
        return choose_targets(targets, which, draws)

    def _step(self, take: Any) -> None:
        strategy = self._shared_run()
        sharded = strategy is not None and strategy.gradients_are_sharded
        engine = strategy is not None and strategy.clips_by_norm
        assert self.control is not None
        self.control.step(
            take,
            self.model.parameters(),
            reduce=self._sum_over_processes if sharded else None,
            engine_norm=strategy.global_gradient_norm if strategy is not None and engine else None,
            measure_clipped=self._logs_next_step(),
        )

    @property
    def parameter_names(self) -> list[str]:
        """Of the model, in its order."""
        return [name for name, _ in self.model.named_parameters()]

    def coefficients(self, step: int) -> DagCoefficients:
        """Return the coefficients of the DAG loss in force at optimizer step `step`, counted from 0."""
        dag = self.recipe.dag
        return DagCoefficients(**{
            name: getattr(dag, name) * schedule_factor(step, *dag.schedule(name), dag.schedule_shape)
            for name in TENSOR_NAMES
        })  # fmt: skip

    def _dag_loss(self, deductive_outputs: Any, step: int, measure: bool = True) -> DagLoss:
        dag = self.recipe.dag
        coefficients, factors = self.coefficients(step), dag.layer_factors
        return dag_loss(deductive_outputs, coefficients, measure=measure, reduce=dag.reduce, layer_factors=factors)

    def step_is_finite(self) -> bool:
        """Return whether the last step's loss and gradient were finite, alike on all ranks; the host waits for it."""
        return self.control is None or self.control.is_finite()

    def _may_leave_out(self) -> bool:
        return self.recipe.trainer.on_nonfinite != "raise"

    def _shared_run(self) -> SharedRun | None:
        """Return the strategy, unless the module is used by itself or under one of Lightning's own."""
        strategy = None if self._trainer is None else self.trainer.strategy
        return strategy if isinstance(strategy, SharedRun) else None

    def _accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        strategy = self._shared_run()
        return nullcontext() if strategy is None else strategy.accumulating(is_last)

    def _autocast(self) -> AbstractContextManager[Any]:
        """bf16 arithmetic over weights of any type, under every strategy; an engine's own would differ."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.recipe.trainer.precision == "bf16")

    def _micro_batch_loss(self, rows: Tensor, targets: Tensor, global_tokens: Tensor, rows_in_step: int) -> Tensor:
        """Return this micro-batch's share of the step's loss, a scalar with its graph."""
        logs = self._logs_next_step()
        measure = bool(self.recipe.dag.trained) or (self.global_step + 1) % self.recipe.dag.every_steps == 0
        with self._autocast():
            # Data-parallel processes average their gradients; the sum over all tokens needs their number back.
            output, tokens = self._score(rows, targets, self.trainer.world_size / global_tokens)
            dag = self._dag_loss(output.deductive_outputs, self.global_step, measure)
        self.train_means.update(_quantities(tokens, dag, len(rows)))
        if logs:
            with self.monitoring():
                self.monitor.add_step(output.deductive_outputs, dag, len(rows))
        loss: Tensor = output.loss + dag.total * (len(rows) / rows_in_step)
        return loss

    def _score(self, rows: Tensor, targets: Tensor, factor: Tensor | float = 1.0) -> tuple[Any, TokenLoss]:
        """Return the output of rows (R, S + 1), its loss `factor` times the sum over targets (R, S), and the sums."""
        scored = mark_unscored(targets)
        output = self(rows[:, :-1], output_deductive_outputs=True, targets=scored, loss_factor=factor)
        return output, TokenLoss(output.cross_entropy_sum, output.correct, count_scored(targets))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Score fixed validation rows (R, S + 1); rows that only fill up a process' share do not count."""
        rows = batch["input_ids"]
        is_row = batch.get("row_mask", torch.ones(len(rows), dtype=torch.bool))
        self.monitor.add_validation_rows(rows, is_row)
        if self.trainer.world_size > 1:
            counted = rows[is_row.to(rows.device)]
            if len(counted) == 0:
                # The others need this process' share of the weights to compute theirs.
                with self._autocast():
                    self(rows[:1, :-1])
                return
            rows = counted
        with self._autocast():
            output, tokens = self._score(rows, rows[:, 1:])
            # Those of the last step: a run that resumes at its validation finds the same.
            dag = self._dag_loss(output.deductive_outputs, max(0, self.global_step - 1))
        self.validation_means.update(_quantities(tokens, dag, len(rows)))
        self.monitor.add_validation_dag(dag, len(rows))

    def on_validation_epoch_start(self) -> None:
        """Forget the previous validation."""
        self.validation_means.reset()
        self.monitor.begin_validation()

    def on_validation_epoch_end(self) -> None:
        """Measure what a validation measures beside the loss; offer losses and leakage to Lightning's callbacks."""
        reduce = self._sum_over_processes if self.trainer.world_size > 1 else None
        with self.monitoring():
            self._monitored = self.monitor.measure(self.model, reduce, self._autocast)
        # Lightning takes a quarter of a millisecond for each, and hundreds are of single layers.
        offered = {
            name: value
            for name, value in self.validation_values().items()
            if name.startswith((f"{catalog.VAL}/", f"{catalog.LEAKAGE_GROUP}/")) and "/layer_" not in name
        }
        self.log_dict(offered, logger=False)

    @contextmanager
    def scoring(self) -> Iterator[PldrllmForCausalLM]:
        """Give the model in eval mode, computing as in training, but uncompiled."""
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad(), uncompiled(self.model), self._autocast():
                yield self.model
        finally:
            self.model.train(was_training)

    @contextmanager
    def monitoring(self) -> Iterator[None]:
        """Counts the time as the monitor's."""
        begun = self.clock()
        try:
            yield
        finally:
            self.monitor_s += self.clock() - begun

    def training_values(self) -> dict[str, float]:
        """Return the means over the steps since the last call, and the last step's `train/lr`; begins a new window."""
        values = self.peek_training_values() | {catalog.LR: self.lr_of_step()} | self._scheduled_coefficients()
        self.train_means.reset()
        values |= self._group_values()
        with self.monitoring():
            values |= self.monitor.step_values()
        control = self.control
        if control is not None and control.norm is not None and control.clipped_norm is not None:
            norms = {catalog.GRAD_NORM: float(control.norm), catalog.GRAD_NORM_CLIPPED: float(control.clipped_norm)}
            values |= {name: norm for name, norm in norms.items() if math.isfinite(norm)}
        return values

    def lr_of_step(self, factor: float = 1.0) -> float:
        """Return the last step's learning rate, of a group whose `lr_factor` is `factor`."""
        return self.recipe.optim.lr * factor * self._lr_fraction

    def _group_values(self) -> dict[str, float]:
        """Return the last step's learning rate and gradient norm of each group of parameters."""
        if not self.recipe.optim.groups or self.control is None:
            return {}
        factors = {group.label: group.lr_factor for group, _ in trained_groups(self.recipe.optim, self.model)}
        rates = {catalog.group_name(label, "lr"): self.lr_of_step(factor) for label, factor in factors.items()}
        norms = self.control.group_norms
        finite = {label: float(norm) for label, norm in norms.items() if math.isfinite(norm)}
        return rates | {catalog.group_name(label, "grad_norm"): norm for label, norm in finite.items()}

    def _scheduled_coefficients(self) -> dict[str, float]:
        """Return the last step's coefficients of the tensors that have a schedule."""
        last, dag = self.coefficients(max(0, self.global_step - 1)), self.recipe.dag
        scheduled = [name for name in TENSOR_NAMES if dag.schedule(name)[0] != "constant"]
        return {f"{catalog.DAG_COEFFICIENT}/{name}": getattr(last, name) for name in scheduled}

    def peek_training_values(self) -> dict[str, float]:
        """Return the means over the steps since the window began; the window goes on."""
        return _scores(catalog.TRAIN, self.train_means.compute())

    def training_window(self) -> dict[str, Tensor]:
        """Return the window's sums and weights, for a checkpoint."""
        return {"sums": self.train_means.sums.cpu(), "weights": self.train_means.weights.cpu()}

    def load_training_window(self, window: Mapping[str, Tensor]) -> None:
        """Go on with a window from a checkpoint; one of an earlier version lacks the weighted DAG losses."""
        sums, weights = window["sums"], window["weights"]
        if len(sums) < len(catalog.QUANTITIES):
            places = [catalog.QUANTITIES.index(catalog.dag_name(name)) for name in TENSOR_NAMES]
            factors = [getattr(self.recipe.dag, name) for name in TENSOR_NAMES]
            weighted = sum(factor * sums[place] for factor, place in zip(factors, places, strict=True))
            sums = torch.cat((sums, torch.as_tensor(weighted).reshape(1)))
            weights = torch.cat((weights, weights[places].max().reshape(1)))
        self.train_means.restore(sums, weights)

    def validation_values(self) -> dict[str, float]:
        """Return the means of the last validation, as `val/...`, and what the monitor found in it."""
        return _scores(catalog.VAL, self.validation_means.compute()) | self._monitored

    def bring_metrics_to_device(self) -> None:
        """Keep all sums where the model computes; strategies that place the weights themselves move nothing else."""
        device = self.trainer.strategy.root_device
        for metric in (self.train_means, self.validation_means, self.monitor):
            metric.to(device)

    def _logs_next_step(self) -> bool:
        return int(self.global_step + 1) % self.recipe.logging.every_steps == 0

    def _sum_over_processes(self, count: Tensor) -> Tensor:
        if self.trainer.world_size == 1:
            return count
        total: Tensor = self.trainer.strategy.reduce(count, reduce_op="sum")
        return total


def whole_model(recipe: Recipe, module: PldrllmModule, checkpoint: Path) -> PldrllmForCausalLM:
    """Return a model that this process can use by itself: the module's, or where that is sharded a checkpoint's."""
    return saved_model(recipe, checkpoint) if recipe.parallel.strategy in ("fsdp", "deepspeed") else module.model


def _scores(group: str, means: Mapping[str, float]) -> dict[str, float]:
    """Return the means as metrics of a group, with the loss and the perplexity that follow from them."""
    scores = dict(means)
    weighted = scores.pop(catalog.WEIGHTED_DAG, 0.0)
    if catalog.CROSS_ENTROPY in scores:
        cross_entropy = scores[catalog.CROSS_ENTROPY]
        scores = {catalog.LOSS: cross_entropy + weighted} | perplexity(cross_entropy) | scores
    return {f"{group}/{name}": value for name, value in scores.items()}


def perplexity(cross_entropy: float) -> dict[str, float]:
    """exp of a cross-entropy in nat/token, unless that is too large for a number."""
    fits = cross_entropy < math.log(sys.float_info.max)
    return {catalog.PERPLEXITY: math.exp(cross_entropy)} if fits else {}


def _quantities(tokens: Any, dag: DagLoss, rows: int) -> dict[str, tuple[Tensor, Tensor | float]]:
    quantities: dict[str, tuple[Tensor, Tensor | float]] = {
        catalog.CROSS_ENTROPY: (tokens.cross_entropy_sum, tokens.tokens),
        catalog.ACCURACY: (tokens.correct, tokens.tokens),
        catalog.WEIGHTED_DAG: (dag.total * rows, float(rows)),
    }
    for name, value in dag.per_tensor.items():
        quantities[catalog.dag_name(name)] = (value * rows, float(rows))
    return quantities
