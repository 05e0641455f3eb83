"""The GPUs that torch sees: memory, capability, driver, and whether they reach each other directly."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pldr_train.doctor.finding import Finding
from pldr_train.doctor.machine import size_text

_BF16_CAPABILITY = (8, 0)
_MOSTLY_FREE = 0.9


def driver_version(root: Path = Path("/")) -> str | None:
    """Return the version of NVIDIA's kernel driver; None without one."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", text)
    return found.group(1) if found else "unknown"


def check_gpus(cuda: Any, cuda_version: str | None, driver: str | None) -> Iterator[Finding]:
    """Yield one finding for the driver, one for each GPU, one for pairs that cannot reach each other.

    Args:
        cuda: torch.cuda.
        cuda_version: that torch was built for; None: a build for the CPU only.
        driver: version of the kernel driver; None: there is none.
    """
    number = cuda.device_count() if cuda.is_available() else 0
    if not number:
        yield _no_gpu(cuda_version, driver)
        return
    text = f"{number}, driver {driver or 'unknown'}, torch built for CUDA {cuda_version}"
    yield Finding("ok", "gpus", text, figures={"number": number, "driver": driver, "cuda": cuda_version})
    for index in range(number):
        yield _gpu(cuda, index)
    apart = [
        f"{first}-{second}"
        for first in range(number)
        for second in range(first + 1, number)
        if not cuda.can_device_access_peer(first, second)
    ]
    if apart:
        advice = "nothing, if the cards share no NVLink or switch; else look at `nvidia-smi topo -m` and the IOMMU"
        yield Finding("note", "peer access", f"none between GPUs {', '.join(apart)}: data goes through memory", advice)
    elif number > 1:
        yield Finding("ok", "peer access", f"between all {number} GPUs")


def _no_gpu(cuda_version: str | None, driver: str | None) -> Finding:
    figures = {"number": 0, "driver": driver, "cuda": cuda_version}
    if driver is None:
        return Finding("note", "gpus", "none: a run computes on the CPU", figures=figures)
    if cuda_version is None:
        text = f"none that torch can use: it is a build for the CPU only, though there is a driver {driver}"
        advice = "install a torch built for CUDA (https://pytorch.org/get-started), or stay on the CPU"
    else:
        text = f"none that torch can use, with driver {driver} and torch built for CUDA {cuda_version}"
        advice = (
            "look at nvidia-smi and CUDA_VISIBLE_DEVICES; an older driver needs a torch for an older CUDA, a container "
            "needs --gpus all"
        )
    return Finding("warn", "gpus", text, advice, figures)


def _gpu(cuda: Any, index: int) -> Finding:
    properties = cuda.get_device_properties(index)
    capability = (int(properties.major), int(properties.minor))
    free, total = cuda.mem_get_info(index)
    has_bf16 = capability >= _BF16_CAPABILITY
    able = f"capability {capability[0]}.{capability[1]}, {'bf16' if has_bf16 else 'no bf16'}"
    text = f"{properties.name}: {size_text(free)} free of {size_text(total)}, {able}"
    figures = {"name": properties.name, "free_bytes": free, "total_bytes": total, "capability": list(capability)}
    figures["bf16"] = has_bf16
    if free < _MOSTLY_FREE * total:
        advice = "another program holds its memory: `nvidia-smi` names it; end it or set CUDA_VISIBLE_DEVICES"
        return Finding("warn", f"gpu {index}", text, advice, figures)
    if not has_bf16:
        return Finding("note", f"gpu {index}", text, "set trainer.precision=fp32: bf16 is emulated here", figures)
    return Finding("ok", f"gpu {index}", text, figures=figures)
