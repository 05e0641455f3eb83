"""Cost of watching a run: deductive metrics, updates and norms of weights, leakage and the order parameter.

Of a recipe's model, on one thread, in CPU seconds (which a busy machine changes less than wall time): one training
step's forward, losses, backward and AdamW; what a log step adds; what a validation adds; and from the recipe's own
schedule the share of training time that both are. Alternating within one run, medians. A batch too large for a CPU is
measured on `--rows` rows and scaled by its number of rows, and so are the monitored rows and prompts; AdamW and the
updates of weights are not scaled.

    python benchmarks/bench_monitor.py [RECIPE ...] [--rows 16] [--repeats 3]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from pldr_train.building import model_config
from pldr_train.checkpoint.live_state import WholeState
from pldr_train.dag import DagCoefficients, dag_loss
from pldr_train.distributed.world import World
from pldr_train.model import PldrllmForCausalLM
from pldr_train.optim import build_adamw
from pldr_train.recipe import Recipe, load_recipe
from pldr_train.training.monitor import ModelMonitor
from pldr_train.training.observing import power_law_norms, update_ratios

RECIPES = ("recipes/quickstart.yaml", "recipes/soc-110m-2.yaml")


@dataclass(frozen=True)
class Costs:
    """CPU seconds."""

    passes: float
    adamw: float
    log_rows: float
    log_weights: float
    leakage_and_costly: float
    order: float


def seconds(action: Callable[[], Any]) -> float:
    begun = time.process_time()
    action()
    return time.process_time() - begun


def costs(recipe: Recipe, num_rows: int, repeats: int) -> Costs:
    """Medians of a step's and the monitor's parts, scaled to the recipe's batch and monitor."""
    batch, context = recipe.trainer.batch_size, recipe.data.context_length
    num_rows = min(num_rows, batch)
    model = PldrllmForCausalLM(model_config(recipe))
    optim = recipe.optim
    optimizer = build_adamw(model.parameters(), optim.lr, optim.betas, optim.eps, optim.weight_decay)
    live, world = WholeState(model, optimizer), World()
    rows = torch.randint(300, recipe.model.vocab_size, (num_rows, context + 1))
    coefficients = DagCoefficients(A_LM=recipe.dag.A_LM, A_P=recipe.dag.A_P, G_LM=recipe.dag.G_LM)
    few = {"monitor": recipe.monitor.model_copy(update={"rows": min(num_rows, recipe.monitor.rows), "prompts": 0})}
    one_prompt = {"monitor": few["monitor"].model_copy(update={"rows": 1, "prompts": 1, "targets": 0})}
    no_prompt = {"monitor": one_prompt["monitor"].model_copy(update={"prompts": 0})}
    log = ModelMonitor(recipe)
    monitors = [ModelMonitor(recipe.model_copy(update=each)) for each in (few, one_prompt, no_prompt)]
    outputs: dict[str, Any] = {}

    def passes() -> None:
        output = model(rows[:, :-1], use_cache=False, output_deductive_outputs=True)
        dag = dag_loss(output.deductive_outputs, coefficients)
        cross_entropy = F.cross_entropy(output.logits.flatten(0, 1), rows[:, 1:].flatten())
        (cross_entropy + dag.total).backward()
        outputs.update(layers=output.deductive_outputs, dag=dag)

    def adamw() -> None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    def log_rows() -> None:
        log.add_step(outputs["layers"], outputs["dag"], num_rows)
        log.step_values()

    def log_weights() -> None:
        update_ratios(live, optim, optim.lr, world)
        power_law_norms(live, recipe.model.num_hidden_layers, world)

    def validate(monitor: ModelMonitor) -> Callable[[], None]:
        def measure() -> None:
            monitor.begin_validation()
            monitor.add_validation_rows(rows, torch.ones(num_rows, dtype=torch.bool))
            monitor.measure(model)

        return measure

    actions = [passes, adamw, log_rows, log_weights, *map(validate, monitors)]
    for action in actions[:4]:
        action()
    timed = [[seconds(action) for action in actions] for _ in range(repeats)]
    own = [statistics.median(column) for column in zip(*timed, strict=True)]
    scale = batch / num_rows
    return Costs(
        own[0] * scale,
        own[1],
        own[2] * scale,
        own[3],
        own[4] * recipe.monitor.rows / few["monitor"].rows,
        (own[5] - own[6]) * recipe.monitor.prompts,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{platform.machine()}, torch {torch.__version__}, 1 thread, {options.repeats} repeats, CPU seconds")
    for path in options.recipes:
        recipe = load_recipe(path, ["data.path=x"] if "soc" in path else []).resolved()
        found = costs(recipe, options.rows, options.repeats)
        step = found.passes + found.adamw
        log, validation = found.log_rows + found.log_weights, found.leakage_and_costly + found.order
        shares = log / recipe.logging.every_steps / step, validation / recipe.trainer.validate_every_steps / step
        print(f"\n{path}: a step {step:.3f} s (AdamW {found.adamw:.3f})")
        print(f"  a log step adds {log:.4f} s (of rows {found.log_rows:.4f}, of weights {found.log_weights:.4f})")
        print(f"  a validation adds {validation:.3f} s (order parameter {found.order:.3f})")
        print(
            f"  every {recipe.logging.every_steps} and {recipe.trainer.validate_every_steps} steps: "
            f"{shares[0]:.3%} + {shares[1]:.3%} = {sum(shares):.3%} of training"
        )


if __name__ == "__main__":
    main()
