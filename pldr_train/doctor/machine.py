"""This machine as this process may use it: cores, memory, limits, and the GPUs that torch sees."""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pldr_train.doctor.finding import Finding

_LEAST_MEMORY_BYTES = 4 * 2**30
_LEAST_SHM_BYTES = 2**30
_FEW_FILES, _ENOUGH_FILES = 1024, 4096
_UNLIMITED = 1 << 60
"""cgroup v1 writes a huge number for no limit."""


def size_text(size: float) -> str:
    """Return the bytes as text, in GiB, little ones in MiB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 0.1 * 2**30 else f"{size / 2**20:,.1f} MiB"


# -------------------------------------------------------------------------------------------------------------- cgroups


@dataclass(frozen=True)
class Cgroup:
    """Limits that a container or a batch system set; None: no limit."""

    cores: float | None
    memory_bytes: int | None
    memory_used_bytes: int | None = None
    """By the group that has the lowest limit."""


def read_cgroup(root: Path = Path("/")) -> Cgroup:
    """Return the tightest limits of this process's control groups (v2 and v1) and of those above them.

    Args:
        root: where /proc and /sys are.
    """
    cores: list[float] = []
    memory: list[tuple[int, int | None]] = []
    for folder in _groups(root):
        quota = _words(folder / "cpu.max") or _v1_quota(folder)
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            cores.append(int(quota[0]) / int(quota[1]))
        for limit_file, used_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _words(folder / limit_file), _words(folder / used_file)
            if limit and limit[0] != "max" and int(limit[0]) < _UNLIMITED:
                memory.append((int(limit[0]), int(used[0]) if used else None))
    tightest = min(memory, key=lambda pair: pair[0], default=(None, None))
    return Cgroup(min(cores, default=None), *tightest)


def _groups(root: Path) -> Iterator[Path]:
    """Yield the folders of the groups of this process, each with its parents; those that do not exist hold no files."""
    mount = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = ["0::/"]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in controllers.split(","):
            base = mount / controller.removeprefix("name=") if controller else mount
            inside = Path(path.lstrip("/"))
            # A path with ".." lies outside what a container sees; the top of what it sees is its own group.
            parts = [] if ".." in inside.parts else [inside, *inside.parents]
            yield from {base / part: None for part in [*parts, Path()]}


def _words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def _v1_quota(folder: Path) -> list[str]:
    return _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")


# --------------------------------------------------------------------------------------------------------------- checks


def check_cores(environment: Mapping[str, str], processes: int, cgroup: Cgroup, affinity: int) -> Iterator[Finding]:
    """Yield the cores that this process may use, and the threads that each of `processes` would start on them.

    Args:
        environment: variables, for OMP_NUM_THREADS.
        processes: of a run on this machine.
        cgroup: limits set from outside.
        affinity: cores that the process may run on.
    """
    there = os.cpu_count() or affinity
    usable = max(1, int(min(affinity, cgroup.cores or affinity)))
    limit = f", control group {cgroup.cores:g}" if cgroup.cores is not None else ""
    text = f"{usable} usable of {there} (affinity {affinity}{limit})"
    figures = {"usable": usable, "machine": there, "affinity": affinity, "cgroup": cgroup.cores}
    if processes > usable:
        advice = "start fewer processes, or ask the container or batch system for more cores"
        yield Finding("warn", "cores", f"{text}, for {processes} processes", advice, figures)
    else:
        yield Finding("ok", "cores", text, figures=figures)
    yield _threads(environment.get("OMP_NUM_THREADS"), processes, usable)


def _threads(setting: str | None, processes: int, usable: int) -> Finding:
    share = max(1, usable // processes)
    fix = f"export OMP_NUM_THREADS={share} ({usable} cores for {processes} process{'es' if processes > 1 else ''})"
    if setting is None:
        # Of several processes `pldr-train fit` and the scripts of launch/ give each its share.
        what = f"each of {processes} processes gets {share}" if processes > 1 else f"torch starts {usable}"
        return Finding("ok", "threads", f"OMP_NUM_THREADS is not set: {what}")
    if not setting.isdecimal() or int(setting) < 1:
        return Finding("warn", "threads", f"OMP_NUM_THREADS={setting} is no number of threads", fix)
    text = f"OMP_NUM_THREADS={setting}, with {share} cores for each process"
    if int(setting) > share:
        return Finding("warn", "threads", f"{text}: threads wait for each other", fix)
    return Finding("ok", "threads", text)


def usable_memory_bytes(root: Path = Path("/")) -> int:
    """Return the memory that this process may use, taken or free: the machine's, or what a control group allows."""
    cgroup, total = read_cgroup(root), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total if cgroup.memory_bytes is None else min(total, cgroup.memory_bytes)


def check_memory(meminfo: str, cgroup: Cgroup) -> Iterator[Finding]:
    """Yield the memory that is there and free; `meminfo` is the text of /proc/meminfo."""
    lines = (line.split(":") for line in meminfo.splitlines() if ":" in line)
    sizes = {name: int(value.split()[0]) * 1024 for name, value in lines}
    total, available = sizes["MemTotal"], sizes["MemAvailable"]
    text = f"{size_text(available)} free of {size_text(total)}"
    if cgroup.memory_bytes is not None and cgroup.memory_bytes < total:
        available = min(available, cgroup.memory_bytes - (cgroup.memory_used_bytes or 0))
        total = cgroup.memory_bytes
        text = f"{size_text(available)} free of the {size_text(total)} that the control group allows"
    figures = {"total_bytes": total, "available_bytes": available}
    if available < _LEAST_MEMORY_BYTES:
        advice = f"end other programs, or ask for more: a run wants {size_text(_LEAST_MEMORY_BYTES)} at least"
        yield Finding("warn", "memory", text, advice, figures)
    else:
        yield Finding("ok", "memory", text, figures=figures)


def check_shared_memory(path: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Yield the size of /dev/shm, through which loader workers hand over batches and NCCL its buffers."""
    advice = "in Docker: --shm-size=8g or --ipc=host; elsewhere: mount -o remount,size=8G /dev/shm"
    if not path.is_dir():
        yield Finding("warn", "shared memory", f"there is no {path}", advice)
        return
    disk = os.statvfs(path)
    total, free = disk.f_blocks * disk.f_frsize, disk.f_bavail * disk.f_frsize
    text = f"{size_text(free)} free of {size_text(total)} in {path}"
    figures = {"total_bytes": total, "free_bytes": free}
    if free < _LEAST_SHM_BYTES:
        yield Finding("warn", "shared memory", text, advice, figures)
    else:
        yield Finding("ok", "shared memory", text, figures=figures)


def check_open_files(limits: tuple[int, int] | None = None) -> Iterator[Finding]:
    """Yield how many files a process may open: `limits` are the soft and the hard one, None: this process's."""
    soft, hard = limits or resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        yield Finding("ok", "open files", "no limit")
        return
    endless = hard == resource.RLIM_INFINITY
    wanted = 65_536 if endless else min(65_536, hard)
    text = f"{soft:,} a process (at most {'any' if endless else f'{hard:,}'})"
    if soft >= _ENOUGH_FILES:
        yield Finding("ok", "open files", text)
        return
    advice = f"ulimit -n {wanted}" if wanted > soft else "raise the hard limit in /etc/security/limits.conf"
    yield Finding("warn" if soft < _FEW_FILES else "note", "open files", text, advice)


def check_locked_memory(limits: tuple[int, int] | None = None, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield how much memory a process may lock: InfiniBand and RoCE register their buffers with it.

    Args:
        limits: the soft and the hard one in bytes; None: this process's.
        root: where /sys is, which lists such network cards.
    """
    soft, _ = limits or resource.getrlimit(resource.RLIMIT_MEMLOCK)
    try:
        cards = sorted(card.name for card in (root / "sys/class/infiniband").iterdir())
    except OSError:
        cards = []
    endless = soft == resource.RLIM_INFINITY
    text = "no limit" if endless else f"{soft / 2**20:,.0f} MiB a process"
    figures = {"limit_bytes": None if endless else soft, "rdma_cards": cards}
    if cards and not endless:
        advice = (
            "ulimit -l unlimited (Docker: --ulimit memlock=-1; else /etc/security/limits.conf), or NCCL_IB_DISABLE=1"
        )
        yield Finding("warn", "locked memory", f"{text}, too little for {', '.join(cards)}", advice, figures)
    else:
        yield Finding(
            "ok", "locked memory", text if cards else f"{text}; no RDMA card that wants more", figures=figures
        )


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
