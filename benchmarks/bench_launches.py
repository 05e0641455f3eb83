"""Count the operations that a training step launches, and those for which the host waits, on any machine.

Everything that reaches torch's dispatcher counts, but for views and allocations: on a GPU each is a launch (a few where
a list of tensors is taken). The step is bf16 autocast of 5 layers x 14 heads x d 64 over two rows of 64 tokens; the
counts depend on neither the rows nor the vocabulary. The DAG loss counts as on a GPU: the CPU's way is another.

With `--compiled` also the step whose layers are compiled: what Inductor schedules for a layer on a GPU (see
`scheduled_kernels`), everything else as before, and the Triton kernels where they are: one launch for the DAG loss of a
tensor, and one each way for the residual units of a metric learner.

    python benchmarks/bench_launches.py [--layers 5] [--all NAME] [--json FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _pop_mode_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.bench_train_step import Loss, llama_loss_of, llama_of, loss_of
from benchmarks.scheduled_kernels import counting_backend
from pldr_train.model import PldrllmConfig, PldrllmForCausalLM, refining
from pldr_train.recipe import recipe_from_dict
from pldr_train.training.module import PldrllmModule
from pldr_train.training.quiet import quiet_libraries
from pldr_train.training.weights import compile_layers

log_trace_exp = importlib.import_module("pldr_train.dag.log_trace_exp")

# Neither computes nor copies: torch does not mark these as views.
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
RELABELLINGS = ("detach", "alias", "_unsafe_view", "lift_fresh", "resolve_conj")
WAITING_OPERATIONS = ("_local_scalar_dense", "nonzero", "equal", "masked_select", "unique2", "_unique2")
WAITING_METHODS = ("tolist", "cpu", "numpy", "__array__")
"""Of tensors. They reach no dispatcher where the tensor is on the host already, as all are here."""
HOST_DATA = "pldr_train/data/"
"""What is in there works on the host's own tensors, under every accelerator."""


@dataclass
class Launches:
    """What a stretch of a program launched. `on` may be set to False for a part that is not to count."""

    operations: Counter[str] = field(default_factory=Counter)
    waits: Counter[str] = field(default_factory=Counter)
    """By operation and place, file:line."""
    on: bool = True
    one_dag_kernel: bool = False
    """Whether Triton is there for the DAG loss."""

    @property
    def casts(self) -> int:
        return self.operations["_to_copy"] + self.operations["_foreach_copy_"]

    def note_wait(self, what: str) -> None:
        torch_itself = str(Path(torch.__file__).parent)
        frames = [
            each
            for each in traceback.extract_stack()
            if each.filename != __file__ and torch_itself not in each.filename
        ]
        if HOST_DATA not in frames[-1].filename:
            self.waits[f"{what}, {frames[-1].filename}:{frames[-1].lineno}"] += 1


class _Operations(TorchDispatchMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if not self.launches.on or func.is_view or name in ALLOCATIONS + RELABELLINGS:
            pass
        elif name == "log_trace_exp" and self.launches.one_dag_kernel:
            self.launches.operations[name] += 1
        elif name == "log_trace_exp":
            with self:  # tensors without values take the way of a device
                log_trace_exp._fixed_sequence(args[0].to("meta"), args[1])
        elif name in WAITING_OPERATIONS:
            self.launches.note_wait(name)
        else:
            self.launches.operations[name] += 1
        return func(*args, **(kwargs or {}))


class _HostReads(TorchFunctionMode):
    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.launches.on and name in WAITING_METHODS:
            self.launches.note_wait(name)
        return func(*args, **(kwargs or {}))


@contextmanager
def counted_launches() -> Iterator[Launches]:
    """Count what this thread launches inside."""
    launches = Launches()
    with _Operations(launches), _HostReads(launches):
        yield launches


# The steps.


def passes(model: nn.Module, loss: Loss) -> Launches:
    """Forward, loss and backward of a second step; the first one prepares."""
    model.train()
    for _ in range(2):
        model.zero_grad()
        with counted_launches() as launches:
            with torch.autocast("cpu", torch.bfloat16):
                value = loss(token_ids())
            value.backward()
    return launches


def whole_step(layers: int, kind: str, coefficient: float, compiled: bool = False) -> Launches:
    """A step between log steps as the LightningModule takes it, with clipping, AdamW and the sums for the log."""
    counts = CompiledLayers() if compiled else None
    values = {
        "run": {"name": "launches"},
        "model": {"num_hidden_layers": layers, "vocab_size": VOCAB, "custom_G_type": kind},
        "dag": dict.fromkeys(("A_LM", "A_P", "G_LM"), coefficient) | {"every_steps": 1000},
        "data": {"source": "quickstart", "context_length": 64},
        "trainer": {
            "max_steps": 3, "batch_size": 2, "precision": "bf16", "accelerator": "cpu",
            "compile": "always" if compiled else "never",
        },
        "logging": {"every_steps": 1000},
    }  # fmt: skip
    if kind == "learned":
        del values["model"]["custom_G_type"]
    quiet_libraries()
    trainer = pl.Trainer(
        max_steps=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    batches = [{"input_ids": token_ids(), "cursors": torch.zeros(2, 5, dtype=torch.int64)}] * 3
    module = PldrllmModule(recipe_from_dict(values))
    step, found = module.training_step, []

    def counted_step(batch: dict[str, Tensor], batch_idx: int) -> None:
        if batch_idx < 2:
            step(batch, batch_idx)  # prepares, and compiles
            return
        with counted_launches() as launches:
            if counts is not None:
                counts.launches, launches.one_dag_kernel = launches, True
            step(batch, batch_idx)
        found.append(launches)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "training_step", counted_step))
        stack.enter_context(mock.patch("pldr_train.optim.one_by_one", _never))
        if counts is not None:
            stack.enter_context(mock.patch("pldr_train.training.module.compile_layers", counts.compile))
            stack.enter_context(mock.patch.object(refining, "kernels_for", _written_out))
        trainer.fit(module, DataLoader(batches, batch_size=None))
    (launches,) = found
    return launches


class CompiledLayers:
    """Compiles the layers of a model for counting; `launches` gets what each run of their code would launch."""

    def __init__(self) -> None:
        self.launches: Launches | None = None

    def compile(self, model: PldrllmForCausalLM) -> None:
        compile_layers(model, counting_backend(self._ran))
        for layer in model.decoder.layers:
            layer._compiled_forward = self._unseen(layer._compiled_forward)

    def _unseen(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that the counting modes do not see: code is not compiled, or is compiled anew, under modes."""

        def unseen(*arguments: Any, **options: Any) -> Any:
            if self.launches is None:
                return call(*arguments, **options)
            with _pop_mode_temporarily(), _disable_current_modes():
                return call(*arguments, **options)

        return unseen

    @contextmanager
    def _ran(self, _part: str, found: Counter[str]) -> Iterator[None]:
        launches = self.launches
        if launches is None:
            yield
            return
        launches.operations.update(found)
        launches.on = False
        yield
        launches.on = True


def _never(_device: torch.device) -> bool:
    return False


def _written_out(*_: object) -> refining.Kernels:
    return refining.Kernels(refining.written_out, refining.backward_written_out)


VOCAB = 1000
MODELS = (
    ("G = identity", "identity", 0.0),
    ("learned G, no DAG loss", "learned", 0.0),
    ("learned G, DAG loss of all three", "learned", 0.005),
)
"""Name, kind of G, and coefficients of the DAG loss."""


def token_ids() -> Tensor:
    return torch.randint(4, VOCAB, (2, 65), generator=torch.Generator().manual_seed(1))


def measured(layers: int) -> Iterator[tuple[str, Launches, Launches | None]]:
    """Each model's name, its two passes and its whole step."""
    llama = llama_of(PldrllmConfig(vocab_size=VOCAB, num_hidden_layers=layers))
    yield "Llama of the same shape (transformers)", passes(llama, llama_loss_of(llama)), None
    for name, kind, coefficient in MODELS:
        config = PldrllmConfig(
            vocab_size=VOCAB, num_hidden_layers=layers, custom_G_type=None if kind == "learned" else kind
        )
        model = PldrllmForCausalLM(config)
        both = passes(model, loss_of(model, (coefficient,) * 3 if coefficient else None))
        yield name, both, whole_step(layers, kind, coefficient)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument(
        "--all", default="", metavar="NAME", help="print all operations of models whose name holds this"
    )
    parser.add_argument("--compiled", action="store_true", help="also the steps whose layers are compiled")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {options.layers} layers x 14 heads x d64, bf16 autocast\n")
    print("| model | forward, loss, backward | of them casts | whole step | waits of the step |")
    print("|---|---|---|---|---|")
    rows: list[dict[str, Any]] = []
    details: list[str] = []
    for name, both, step in measured(options.layers):
        waits = (both if step is None else step).waits
        row = {"model": name, "passes": both.operations.total(), "casts": both.casts, "waits": waits.total()}
        row["step"] = None if step is None else step.operations.total()
        rows.append(row)
        whole = "" if step is None else f"{row['step']:,}"
        print(f"| {name} | {row['passes']:,} | {row['casts']:,} | {whole} | {row['waits']} |", flush=True)
        details += [f"{name} waits: {count} x {place}" for place, count in waits.items()]
        if options.all and options.all in name:
            details += [f"{name}: {count:5d} {operation}" for operation, count in both.operations.most_common()]
    for name, kind, coefficient in MODELS if options.compiled else ():
        step = whole_step(options.layers, kind, coefficient, compiled=True)
        rows.append({"model": f"{name}, compiled", "step": step.operations.total(), "waits": step.waits.total()})
        print(f"| {name}, compiled | | | {step.operations.total():,} | {step.waits.total()} |", flush=True)
        if options.all and options.all in name:
            details += [
                f"{name}, compiled: {count:5d} {operation}" for operation, count in step.operations.most_common()
            ]
    print("\n" + "\n".join(details))
    if options.json is not None:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
