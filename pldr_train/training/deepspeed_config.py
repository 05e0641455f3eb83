"""DeepSpeed's configuration out of a recipe."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pldr_train.errors import RecipeError
from pldr_train.recipe import Recipe
from pldr_train.untrusted import read_json

_MIB = 1 << 20
_MOST_ELEMENTS = 500_000_000
OURS = (
    "gradient_accumulation_steps",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_clipping",
    "optimizer",
    "scheduler",
    "bf16",
    "fp16",
    "amp",
    "torch_autocast",
    "checkpoint",
    "load_universal_checkpoint",
)
"""Keys that a file of the user may not set: they would change what is trained, or how it is saved."""
REFUSED_WHEN_ON = ("wall_clock_breakdown", "flops_profiler")
"""Keys that the engine fails with here: its timers expect one forward of the model for each of its own."""


def deepspeed_config(recipe: Recipe, num_parameters: int, pin_memory: bool = False) -> dict[str, Any]:
    """Return the configuration for a resolved recipe, parallel.deepspeed_config merged over it.

    Args:
        recipe: resolved.
        num_parameters: of the model, which bounds the buckets: DeepSpeed allocates 5e8 elements for any model.
        pin_memory: whether what is offloaded to the host lies in pinned memory, for transfers to a GPU.

    Raises:
        RecipeError: that file cannot be read or sets what the recipe decides.
    """
    config = _own_config(recipe, num_parameters, pin_memory)
    _merge(config, users_config(recipe))
    return config


def users_config(recipe: Recipe) -> dict[str, Any]:
    """Return what parallel.deepspeed_config holds; nothing without it.

    Raises:
        RecipeError: see `deepspeed_config`.
    """
    path = recipe.parallel.deepspeed_config
    return {} if path is None else _read(Path(path))


def _own_config(recipe: Recipe, num_parameters: int, pin_memory: bool) -> dict[str, Any]:
    parallel = recipe.parallel
    weights_bf16 = parallel.weights == "bf16"
    element_bytes = 2 if weights_bf16 else 4
    zero: dict[str, Any] = {
        "stage": parallel.zero_stage,
        "reduce_bucket_size": _elements(parallel.reduce_bucket_mib, element_bytes, num_parameters),
        "allgather_bucket_size": _elements(parallel.allgather_bucket_mib, element_bytes, num_parameters),
        "overlap_comm": False,
        "contiguous_gradients": True,
    }
    if parallel.offload_optimizer is not None:
        zero["offload_optimizer"] = _offload(parallel.offload_optimizer, parallel.offload_path, pin_memory)
    if parallel.offload_parameters is not None:
        zero["offload_param"] = _offload(parallel.offload_parameters, None, pin_memory)
    config: dict[str, Any] = {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # Offloaded to the host, torch's fused AdamW steps as well; DeepSpeed's own needs a compiler at the first run.
        "zero_force_ds_cpu_optimizer": False,
        "gradient_accumulation_steps": 1,
        "train_micro_batch_size_per_gpu": recipe.trainer.micro_batch_size,
        "gradient_clipping": recipe.optim.clip_norm or 0.0,
        "wall_clock_breakdown": False,
        "steps_per_print": 1 << 62,
    }
    if weights_bf16:
        config["bf16"] = {"enabled": True, "check_grad_overflow": True}
    return config


def _elements(mib: float | None, element_bytes: int, num_parameters: int) -> int:
    wanted = min(num_parameters, _MOST_ELEMENTS) if mib is None else int(mib * _MIB) // element_bytes
    return max(2, wanted + wanted % 2)  # the engine asks for an even number


def _offload(device: str, path: str | None, pin_memory: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"device": device, "pin_memory": pin_memory or device == "nvme"}
    if device == "nvme":
        settings["nvme_path"] = path
    return settings


def _read(path: Path) -> dict[str, Any]:
    key = f"parallel.deepspeed_config={path}"
    try:
        content = read_json(path)
    except OSError as error:
        raise RecipeError(f"{key}: cannot be read ({error.strerror}); name a JSON file") from error
    except ValueError as error:
        raise RecipeError(f"{key}: is no JSON ({error}); correct it") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{key}: holds no JSON object; write keys of DeepSpeed's configuration")
    taken = sorted(name for name in content if name in OURS)
    zero = content.get("zero_optimization", {})
    if not isinstance(zero, dict):
        raise RecipeError(f"{key}: zero_optimization={json.dumps(zero)} is no JSON object; write its keys in braces")
    if "stage" in zero:
        taken.append("zero_optimization.stage")
    if taken:
        raise RecipeError(
            f"{key}: sets {', '.join(taken)}, which the recipe decides (batch sizes, precision, clipping, "
            "parallel.zero_stage and so on); remove it there and set the recipe's key"
        )
    timed = [name for name in REFUSED_WHEN_ON if _is_on(content.get(name))]
    if timed:
        raise RecipeError(
            f"{key}: turns on {', '.join(timed)}, which fails in this program's training step; remove it there (the "
            "run's metrics.jsonl has timings)"
        )
    return content


def _is_on(value: Any) -> bool:
    return bool(value.get("enabled") if isinstance(value, Mapping) else value)


def _merge(config: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(config.get(name), dict):
            _merge(config[name], value)
        else:
            config[name] = value
