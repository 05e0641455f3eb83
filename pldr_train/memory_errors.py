"""Memory that ran out, on the host or on a GPU, as one message for the user. Imports no torch."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from pldr_train.errors import UserError

_ON_GPU = ("CUDA out of memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cudaErrorMemoryAllocation")
_ON_HOST = ("DefaultCPUAllocator: ", "std::bad_alloc", "Cannot allocate memory")


def where_memory_ran_out(error: BaseException) -> str | None:
    """Return `"GPU"` or `"CPU"` if the error says that memory could not be allocated there, else None."""
    text = str(error)
    if type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and any(sign in text for sign in _ON_GPU)
    ):
        return "GPU"
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return "CPU"
    return "CPU" if isinstance(error, RuntimeError) and any(sign in text for sign in _ON_HOST) else None


@contextmanager
def worded_out_of_memory(advice: str) -> Iterator[None]:
    """Say what to lower where memory runs out inside; other errors pass.

    Args:
        advice: what to do, without a capital letter or a full stop.

    Raises:
        UserError: instead of what PyTorch or Python raise then.
    """
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        place = where_memory_ran_out(error)
        if place is None:
            raise
        raise UserError(f"out of memory ({place}){_asked_for(str(error))}: {advice}") from error


def _asked_for(text: str) -> str:
    found = re.search(r"[Tt]ried to allocate ([\d.]+) ?(\w+)", text)
    if found is None:
        return ""
    amount, unit = found.groups()
    size = f"{float(amount) / 2**30:.2f} GiB" if unit == "bytes" else f"{amount} {unit}"
    return f", {size} more could not be had"
