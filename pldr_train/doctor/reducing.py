"""One process of the all-reduce: `python reducing.py RANK PROCESSES BACKEND PORT SIZE_BYTES ROUNDS LIMIT_S`.

It is run as a file and imports torch alone, so that a process is up in the time that torch takes. It prints one JSON
line: the seconds of a round and whether the sum was right, or the error.
"""

from __future__ import annotations

import datetime
import faulthandler
import json
import os
import statistics
import sys
import time
from typing import Any

_ERROR_CHARACTERS = 400


def main(arguments: list[str]) -> int:
    """Take part, and print what came of it."""
    rank, processes, backend, port, size_bytes, rounds, limit_s = arguments
    # Whatever hangs below, even inside a driver: the process ends, also when nobody is left to end it.
    faulthandler.dump_traceback_later(float(limit_s) + 5, exit=True)
    try:
        outcome = reduce(int(rank), int(processes), backend, int(port), int(size_bytes), int(rounds), float(limit_s))
    except Exception as error:
        lines = " ".join(line.strip() for line in str(error).splitlines())
        outcome = {"error": f"{type(error).__name__}: {lines}"[:_ERROR_CHARACTERS]}
    print(json.dumps(outcome), flush=True)
    return 1 if "error" in outcome else 0


def reduce(
    rank: int, processes: int, backend: str, port: int, size_bytes: int, rounds: int, limit_s: float
) -> dict[str, Any]:
    """Sum a tensor over all processes, `rounds` times after one that is not counted."""
    # Here: an error of the import is reported as any other.
    import torch  # noqa: PLC0415
    import torch.distributed as dist  # noqa: PLC0415

    limit = datetime.timedelta(seconds=limit_s)
    cuda = backend == "nccl"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=limit)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes, timeout=limit)
    values = torch.empty(size_bytes // 4, dtype=torch.float32, device=device)
    times, right = [], True
    for _ in range(rounds + 1):
        values.fill_(rank + 1)
        dist.barrier()
        begun = time.perf_counter()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begun)
        right = right and bool((values == processes * (processes + 1) / 2).all())
    return {"seconds": statistics.median(times[1:]), "right": right}


if __name__ == "__main__":
    code = main(sys.argv[1:])
    # Without the end of the interpreter: threads of a communication that broke off may never end.
    os._exit(code)
