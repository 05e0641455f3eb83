"""The dashboard of a run: which metrics stand together, in sections; what W&B's workspace is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pldr_train.metrics.catalog import CACHED, CONTINUATIONS, DEDUCTIVE, PARAMETERS, TENSORS
from pldr_train.metrics.table import DAG_TENSORS, WEIGHT_GROUPS
from pldr_train.wandb_runs.media import SAMPLES_KEY, heatmap_key, histogram_key


@dataclass(frozen=True)
class Panel:
    """One chart."""

    title: str
    metrics: tuple[str, ...]
    unit: str = ""
    logarithmic: bool = False


@dataclass(frozen=True)
class Gallery:
    """One browser of pictures or histograms."""

    title: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class Part:
    """One section."""

    name: str
    panels: Sequence[Panel | Gallery]
    is_open: bool = False
    columns: int = 3


def dashboard(num_layers: int) -> list[Part]:
    """All sections, for a model of so many layers; the more a metric says of a run's health, the further up."""
    return [
        Part("Health", _health(), is_open=True),
        Part("Loss", _loss(), is_open=True),
        Part("DAG losses", _dag(num_layers)),
        Part("Deductive outputs", _deductive(num_layers)),
        Part("Leakage", _leakage()),
        Part("Optimisation", _optimisation(num_layers)),
        Part("System", _system()),
        Part("Data", _data()),
        Part("Media", _media(num_layers), columns=2),
    ]


def _health() -> list[Panel | Gallery]:
    of_g = f"{DEDUCTIVE}/G_LM"
    return [
        Panel("Cross-entropy", ("train/cross_entropy", "val/cross_entropy"), "nat/token"),
        Panel("Leakage: what reading the future is worth", _GAP, "nat/token"),
        Panel("NLL in one pass and token by token", _BOTH_NLL, "nat/token"),
        Panel("Order parameter", tuple(f"{CONTINUATIONS}/{each}/bounded" for each in TENSORS), logarithmic=True),
        Panel(
            "Variance between the rows of a matrix (0: all alike)",
            tuple(f"{DEDUCTIVE}/{each}/row_map_collapse" for each in TENSORS),
        ),
        Panel("Rank", tuple(f"{DEDUCTIVE}/{each}/rank" for each in TENSORS)),
        Panel("G_LM: sensitivity to the input", (f"{of_g}/input_sensitivity",), logarithmic=True),
        Panel("Gradient", ("train/grad_norm", "train/grad_norm_clipped"), logarithmic=True),
        Panel("Steps that were not finite", ("train/nonfinite_steps",), "steps"),
    ]


_GAP = ("leakage/gap", "leakage/gap_low", "leakage/gap_high")
_BOTH_NLL = ("leakage/block_nll", "leakage/sequential_nll")


def _loss() -> list[Panel | Gallery]:
    return [
        Panel("Loss with the DAG losses", ("train/loss", "val/loss"), "nat/token"),
        Panel("Cross-entropy", ("train/cross_entropy", "val/cross_entropy"), "nat/token"),
        Panel("Perplexity", ("train/perplexity", "val/perplexity"), logarithmic=True),
        Panel("Accuracy", ("train/accuracy", "val/accuracy")),
        Panel("Cross-entropy in training", ("train/cross_entropy",), "nat/token", logarithmic=True),
        Panel("Cross-entropy in validation", ("val/cross_entropy",), "nat/token", logarithmic=True),
    ]


def _dag(num_layers: int) -> list[Panel | Gallery]:
    return [
        *(
            Panel(f"DAG loss of {tensor}", (f"train/dag/{tensor}", f"val/dag/{tensor}"), "nat", logarithmic=True)
            for tensor in DAG_TENSORS
        ),
        *(
            Panel(
                f"DAG loss of {tensor} by layer, {words}",
                tuple(f"{prefix}/dag/layer_{layer}/{tensor}" for layer in range(num_layers)),
                "nat",
                logarithmic=True,
            )
            for prefix, words in (("train", "training"), ("val", "validation"))
            for tensor in DAG_TENSORS
            if num_layers
        ),
    ]


_OF_ALL_TENSORS = (
    ("Mean", "mean", False),
    ("Spread", "spread", True),
    ("Mean of the absolute values", "abs_mean", True),
    ("Least element", "min", False),
    ("Greatest element", "max", False),
    ("Not finite", "nonfinite_share", False),
    ("Heads unlike each other", "cross_head_rms", True),
    ("Spectral norm", "spectral_norm", True),
    ("ln |det|", "log_abs_det", False),
    ("Singular matrices", "singular_share", False),
)
_BY_LAYER = (("row_map_collapse", False), ("rank", False), ("spectral_norm", True), ("abs_mean", True))


def _deductive(num_layers: int) -> list[Panel | Gallery]:
    layers = range(num_layers)
    panels = [
        Panel(title, tuple(f"{DEDUCTIVE}/{each}/{name}" for each in TENSORS), logarithmic=log)
        for title, name, log in _OF_ALL_TENSORS
    ]
    panels += [
        Panel("Entropy of attention", (f"{DEDUCTIVE}/attention/entropy",), "nat"),
        Panel("Entropy of attention, over its largest", (f"{DEDUCTIVE}/attention/relative_entropy",)),
        Panel("Order parameter, RMSE over the mean", _each(CONTINUATIONS, "relative_rmse"), logarithmic=True),
        Panel("Order parameter of a cached run", _each(CACHED, "bounded"), logarithmic=True),
    ]
    if num_layers:
        panels += [
            Panel(
                f"{tensor}: {name} by layer",
                tuple(f"{DEDUCTIVE}/layer_{layer}/{tensor}/{name}" for layer in layers),
                logarithmic=log,
            )
            for name, log in _BY_LAYER
            for tensor in TENSORS
        ]
        entropies = tuple(f"{DEDUCTIVE}/layer_{layer}/attention/relative_entropy" for layer in layers)
        panels.append(Panel("Entropy of attention by layer, over its largest", entropies))
    return list(panels)


def _each(prefix: str, name: str) -> tuple[str, ...]:
    return tuple(f"{prefix}/{tensor}/{name}" for tensor in TENSORS)


def _leakage() -> list[Panel | Gallery]:
    return [
        Panel("Gap with its 95 % interval", _GAP, "nat/token"),
        Panel("NLL in one pass and token by token", _BOTH_NLL, "nat/token"),
        Panel("Accuracy both ways", ("leakage/block_accuracy", "leakage/sequential_accuracy")),
        Panel("Targets scored both ways", ("leakage/targets",), "tokens"),
    ]


def _optimisation(num_layers: int) -> list[Panel | Gallery]:
    panels: list[Panel | Gallery] = [
        Panel("Learning rate", ("train/lr",)),
        Panel("Gradient norm", ("train/grad_norm", "train/grad_norm_clipped"), logarithmic=True),
        Panel("Update over weights", tuple(f"train/update_ratio/{each}" for each in WEIGHT_GROUPS), logarithmic=True),
        Panel("Power law: RMS", tuple(f"{DEDUCTIVE}/{each}/rms" for each in PARAMETERS)),
    ]
    if num_layers:
        panels += [
            Panel(
                f"Power law: RMS of {parameter} by layer",
                tuple(f"{DEDUCTIVE}/layer_{layer}/{parameter}/rms" for layer in range(num_layers)),
            )
            for parameter in PARAMETERS
        ]
    return panels


def _system() -> list[Panel | Gallery]:
    return [
        Panel("Throughput", ("system/tokens_per_s",), "tokens/s"),
        Panel("Model FLOP/s", ("system/tflops_per_s",), "TFLOP/s"),
        Panel("MFU", ("system/mfu",)),
        Panel("Time of a step", ("system/step_s_p50", "system/step_s_p95", "system/step_s_max"), "s"),
        Panel("Memory", ("system/host_memory_gib", "system/gpu_memory_gib"), "GiB"),
        Panel("Time spent on monitoring", ("system/monitor_share",)),
    ]


def _data() -> list[Panel | Gallery]:
    left_out = ("null", "empty", "invalid_utf8", "too_short", "too_long", "unreadable")
    return [
        Panel("Tokens", ("tokens",), "tokens"),
        Panel("Documents", ("data/documents",), "documents"),
        Panel("Documents left out or mended", tuple(f"data/{each}" for each in left_out), "documents"),
        Panel("Waiting for data", ("system/data_wait_share",)),
        Panel("Time waited for data", ("system/data_wait_s",), "s"),
    ]


def _media(num_layers: int) -> list[Panel | Gallery]:
    return [
        *(Gallery(f"{tensor}, layers down and heads across", (heatmap_key(tensor),)) for tensor in TENSORS),
        Gallery("Samples", (SAMPLES_KEY,)),
        *(
            Gallery(f"Values of {tensor}", tuple(histogram_key(tensor, layer) for layer in range(num_layers)))
            for tensor in TENSORS
            if num_layers
        ),
    ]
