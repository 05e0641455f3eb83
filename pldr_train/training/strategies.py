"""Lightning strategies that share a run over processes: one process, DDP, FSDP2 and DeepSpeed's ZeRO.

They differ in how a model is placed, how gradients are accumulated and where the live weights lie; everything else
(the loop, checkpoints, resume, clipping) is the same for all and lies elsewhere. Checkpoints are the run's own (see
`shards.py`); Lightning's and DeepSpeed's are not used. This is the only file that imports deepspeed.
"""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from lightning.pytorch.strategies.deepspeed import DeepSpeedStrategy
from torch import Tensor, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from typing_extensions import override

from pldr_train.building import put_whole
from pldr_train.checkpoint.live_state import LiveState, RowsState, WholeState, rows_of
from pldr_train.checkpoint.zero_state import ZeroFlatState, ZeroPartitionedState
from pldr_train.distributed.world import World
from pldr_train.errors import RecipeError
from pldr_train.model import PldrllmForCausalLM
from pldr_train.model.modeling_pldrllm import PldrllmDecoderLayer
from pldr_train.recipe import Recipe, strategy_in_force
from pldr_train.training.deepspeed_config import deepspeed_config

_MIB = 1 << 20


class LaunchedEnvironment(ClusterEnvironment):
    """Tells Lightning of processes that something else has started and numbered; it would guess otherwise."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self._world = world

    @property
    def creates_processes_externally(self) -> bool:
        """Lightning starts none."""
        return True

    @property
    def main_address(self) -> str:
        """Of rank 0."""
        return os.environ.get("MASTER_ADDR", "127.0.0.1")

    @property
    def main_port(self) -> int:
        """Of rank 0; the processes have met already."""
        return int(os.environ.get("MASTER_PORT", "0"))

    @staticmethod
    def detect() -> bool:
        """It is given, not found."""
        return False

    def world_size(self) -> int:
        """Return the number of processes."""
        return self._world.size

    def set_world_size(self, size: int) -> None:
        """Lightning computes the same."""
        assert size == self._world.size, (size, self._world)

    def global_rank(self) -> int:
        """Return this process."""
        return self._world.rank

    def set_global_rank(self, rank: int) -> None:
        """Lightning computes the same."""
        assert rank == self._world.rank, (rank, self._world)

    def local_rank(self) -> int:
        """Return this process on its machine."""
        return self._world.local_rank

    def node_rank(self) -> int:
        """Return this machine."""
        return self._world.rank // self._world.local_size


class SharedRun(Strategy):
    """What the run's own code asks of every strategy, beside Lightning's interface; each class below mixes it in."""

    def shard(self, model: PldrllmForCausalLM) -> None:
        """Cut an empty model (on the meta device) where the strategy does so; whole otherwise."""

    def put(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Give a module of an empty model its values, see `building.Put`."""
        put_whole(module, values)

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch; gradients need to be reduced after the last one only."""
        return nullcontext()

    def live_state(self) -> LiveState:
        """Return the weights and moments that this process holds."""
        module: Any = self.lightning_module
        return WholeState(module.model, self.optimizers[0])

    def global_gradient_norm(self) -> Tensor | None:
        """2-norm of the step's whole gradient as the engine found it before clipping; None: compute it, see optim."""
        return None

    @property
    def gradients_are_sharded(self) -> bool:
        """Whether a sum over this process' gradients is a share of the sum over all."""
        return False

    @property
    def clips_by_norm(self) -> bool:
        """Whether the engine itself does, by the recipe's limit."""
        return False

    # Weights and optimizer are saved and restored by `StepBoundary`, whatever the strategy.

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Nothing for Lightning to save."""
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Nothing for Lightning to save."""
        return {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write the small state file, on rank 0."""
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options=storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Read the small state file, on every process."""
        state: dict[str, Any] = self.checkpoint_io.load_checkpoint(checkpoint_path, "cpu", weights_only=weights_only)
        return state

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        """Nothing for Lightning to restore."""

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Nothing for Lightning to restore."""

    @property
    def lightning_restore_optimizer(self) -> bool:
        """It does not."""
        return False


class SingleProcess(SharedRun, SingleDeviceStrategy):
    """One process."""


class DataParallel(SharedRun, DDPStrategy):
    """torch's DDP: every process has everything, gradients are averaged."""

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Gradients are reduced while the last micro-batch is computed."""
        if is_last:
            return nullcontext()
        model: Any = self.model
        context: AbstractContextManager[None] = model.no_sync()
        return context


class FullySharded(SharedRun, ModelParallelStrategy):
    """torch's FSDP2: every process has some rows of each tensor, and gathers a layer while it computes it."""

    def shard(self, model: PldrllmForCausalLM) -> None:
        """Each layer is a unit, the embedding and the head another one."""
        mesh = self.device_mesh["data_parallel"]
        for layer in model.decoder.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device=self.root_device)

    @torch.no_grad()
    def put(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Keep this process' rows."""
        for name, value in values.items():
            target = getattr(module, name)
            if isinstance(target, DTensor):
                start, count = rows_of(target)
                local = target.to_local()
                local.copy_(value.view(-1)[start : start + count].view(local.shape))
            else:
                target.copy_(value)

    @override
    def live_state(self) -> LiveState:
        module: Any = self.lightning_module
        for unit in module.model.modules():
            if isinstance(unit, FSDPModule):
                unit.reshard()  # after a validation the outermost unit still has whole weights
        return RowsState(module.model, self.optimizers[0])

    @property
    @override
    def gradients_are_sharded(self) -> bool:
        return True


class DeepSpeedZero(SharedRun, DeepSpeedStrategy):
    """DeepSpeed's ZeRO stages on GPUs, and on the CPU, where Lightning's own strategy refuses.

    The engine runs in fp32 with our autocast around it, or (parallel.weights=bf16) in its bf16 mode.

    Args:
        recipe: resolved.
        options: of Lightning's strategy.
    """

    def __init__(self, recipe: Recipe, **options: Any) -> None:
        if not torch.cuda.is_available():
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        super().__init__(config={}, logging_level=logging.WARNING, **options)
        self._recipe = recipe

    def setup_environment(self) -> None:
        """As in any strategy of several processes; DeepSpeed adopts the process group that there is."""
        import_deepspeed()
        assert self.accelerator is not None
        self.accelerator.setup_device(self.root_device)
        self.setup_distributed()

    def setup_distributed(self) -> None:
        """Lightning's looks for CUDA devices only."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
            return
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def shard(self, model: PldrllmForCausalLM) -> None:
        """Complete the configuration, whose buckets depend on the model's size."""
        deepspeed = import_deepspeed()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        if self._recipe.parallel.offload_optimizer == "nvme" and not deepspeed.ops.__compatible_ops__.get("async_io"):
            raise RecipeError(
                "parallel.offload_optimizer=nvme: DeepSpeed cannot use asynchronous file access here; install "
                "libaio with its headers (Debian: libaio-dev) and a C++ compiler (ds_report says more), or use cpu"
            )
        self.config = deepspeed_config(self._recipe, num_parameters, pin_memory=torch.cuda.is_available())
        self._config_initialized = True
        if self._stage == 3:
            # A layer's weights come and go together: the power law's module returns no tensors that hooks could see.
            deepspeed.utils.set_z3_leaf_modules(model, [PldrllmDecoderLayer])

    def put(self, module: nn.Module, values: dict[str, Tensor]) -> None:
        """Whole values; with stage 3 cut at once, so that no process ever holds the whole model."""
        put_whole(module, values)
        if self._stage == 3:
            deepspeed = import_deepspeed()
            offload = self._recipe.parallel.offload_parameters
            dtype = torch.bfloat16 if self._recipe.parallel.weights == "bf16" else torch.float32
            deepspeed.zero.Init(module=module, remote_device=offload, config_dict_or_path=self.config, dtype=dtype)

    @contextmanager
    def model_sharded_context(self) -> Generator[None, None, None]:
        """Nothing: modules are cut in `put`."""
        yield

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        deepspeed = import_deepspeed()
        # The engine asks for the device's number also where there is none.
        arguments = argparse.Namespace(device_rank=self.root_device.index or 0)
        engine, zero, _, _ = deepspeed.initialize(
            args=arguments,
            config=self.config,
            model=model,
            model_parameters=[parameter for parameter in model.parameters() if parameter.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        return engine, zero

    @contextmanager
    def _at_boundary(self, is_last: bool) -> Iterator[None]:
        engine = self.deepspeed_engine
        engine.set_gradient_accumulation_boundary(is_last)
        # The engine does so at the start of its forward, which goes around all micro-batches here. Without it stage 3
        # takes each for the first one and forgets the gradients of those before.
        if hasattr(engine.optimizer, "clear_backward_seen_flag"):
            engine.optimizer.clear_backward_seen_flag()
        yield

    def accumulating(self, is_last: bool) -> AbstractContextManager[None]:
        """Tell the engine whether this micro-batch is the last one before its step."""
        return self._at_boundary(is_last)

    @override
    def live_state(self) -> LiveState:
        module: Any = self.lightning_module
        if self._stage == 3:
            return ZeroPartitionedState(module.model, self._zero, self.global_rank)
        return ZeroFlatState(module.model, self._zero)

    def global_gradient_norm(self) -> Tensor | None:
        """Return the norm that the engine has computed for its own clipping."""
        norm = self._zero._global_grad_norm
        return torch.as_tensor(norm, dtype=torch.float32)

    @property
    @override
    def gradients_are_sharded(self) -> bool:
        return True

    @property
    @override
    def clips_by_norm(self) -> bool:
        return True

    @property
    def _zero(self) -> Any:
        return self.deepspeed_engine.optimizer

    @property
    def _stage(self) -> int:
        return self._recipe.parallel.zero_stage


def import_deepspeed() -> Any:
    """DeepSpeed, kept from compiling an extension for inference on CPUs when processes meet, which takes a minute."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def meet_alone() -> None:
    """Give engines that cannot do without one a process group, in a run of one process."""
    if not dist.is_initialized():
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=HashStore(), rank=0, world_size=1
        )


def build_strategy(recipe: Recipe, world: World) -> SharedRun:
    """Return the strategy that a resolved recipe names, for a world that has been joined.

    The trainer is to be given a `LaunchedEnvironment` of the same world.
    """
    parallel = recipe.parallel
    name = strategy_in_force(parallel.strategy, world.size)
    limit = timedelta(seconds=parallel.timeout_s)
    if name == "single":
        return SingleProcess(device=torch.device("cuda", world.local_rank) if trains_on_gpu(recipe) else "cpu")
    meet_alone()
    if name == "ddp":
        return DataParallel(
            timeout=limit,
            bucket_cap_mb=parallel.reduce_bucket_mib or 25,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )
    if name == "fsdp":
        return FullySharded(data_parallel_size=world.size, tensor_parallel_size=1, timeout=limit)
    return DeepSpeedZero(recipe, timeout=limit)


def compiles(recipe: Recipe) -> bool:
    """Return whether a recipe's layers are compiled here."""
    if recipe.trainer.compile != "auto":
        return recipe.trainer.compile == "always"
    return trains_on_gpu(recipe) and not recipe.parallel.is_zero_3


def trains_on_gpu(recipe: Recipe) -> bool:
    """Return whether a recipe's processes each take a CUDA device here."""
    return recipe.trainer.accelerator != "cpu" and torch.cuda.is_available()
