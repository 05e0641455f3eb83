"""Datasheet figures of GPUs: what a plan of a run reckons with.

Peaks are those of dense matrices: a datasheet that states them "with sparsity" is halved. fp32 is the peak without
tensor cores (no TF32), which is how the program multiplies in fp32. Memory is what the vendor prints as GB; cards
report nearly that number of GiB (an H200 of 141 GB: 140.4 GiB; an L40S with ECC on: 45 of 48). The link is both
directions together, as printed.

Sources, all NVIDIA's: H100 datasheet (SXM5), H200 datasheet (SXM), A100 datasheet (SXM4, 40 and 80 GB), L40S datasheet,
Ada GPU architecture whitepaper (RTX 4090; bf16 with fp32 accumulation), HGX B200 specifications (an eighth of the board
of 8 GPUs).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from pldr_train.errors import UserError


@dataclass(frozen=True)
class Gpu:
    """One GPU: peaks in TFLOPS (1e12 FLOPs per second), memory in GiB, the link in GB/s of both directions together."""

    name: str
    bf16_tflops: float
    fp32_tflops: float
    memory_gib: float
    interconnect: str
    link_gb_per_s: float

    def peak_flops(self, precision: str) -> float:
        """Return the FLOPs per second in `precision`, bf16 or fp32."""
        assert precision in {"bf16", "fp32"}
        return (self.bf16_tflops if precision == "bf16" else self.fp32_tflops) * 1e12


GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("h100", 989.4, 67.0, 80.0, "NVLink 4", 900.0),
        Gpu("h200", 989.4, 67.0, 141.0, "NVLink 4", 900.0),
        Gpu("a100-40gb", 312.0, 19.5, 40.0, "NVLink 3", 600.0),
        Gpu("a100-80gb", 312.0, 19.5, 80.0, "NVLink 3", 600.0),
        Gpu("l40s", 362.05, 91.6, 48.0, "PCIe 4.0 x16", 64.0),
        Gpu("rtx4090", 165.2, 82.6, 24.0, "PCIe 4.0 x16", 64.0),
        Gpu("b200", 2250.0, 75.0, 180.0, "NVLink 5", 1800.0),
    )
}


ASSUMED_MFU = 0.4
"""Share of the peak that a training is assumed to reach where nobody has measured it."""


def gpu_named(name: str) -> Gpu:
    """Return the GPU of that name, in any case; raises UserError with the names there are and the nearest of them."""
    found = GPUS.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), GPUS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? There are" if near else "there are"
    raise UserError(
        f"--gpu {name}: unknown; {hint} {', '.join(GPUS)}; for another card add --gpu-memory-gib and --peak-tflops to "
        "one of these"
    )


_DEVICE_NAMES = {
    "h100": ("H100 80GB HBM3",),
    "h200": ("H200",),
    "a100-40gb": ("A100-SXM4-40GB", "A100-PCIE-40GB"),
    "a100-80gb": ("A100-SXM4-80GB", "A100-PCIE-80GB", "A100 80GB PCIe"),
    "l40s": ("L40S",),
    "rtx4090": ("GeForce RTX 4090",),
    "b200": ("B200",),
}
"""How the driver names them; other models of a family (H100 PCIe, H100 NVL, RTX 4090 D) have other peaks."""


def gpu_of_device(name: str) -> Gpu | None:
    """Return the GPU that a driver calls `name`, such as "NVIDIA H100 80GB HBM3"; None if it is none of `GPUS`."""
    own = name.removeprefix("NVIDIA ").strip()
    return next((GPUS[gpu] for gpu, names in _DEVICE_NAMES.items() if own in names), None)
