"""Running out of memory, in one line: where, at which batch size, and what to lower."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GIB = 2**30


class OutOfMemory(Exception):
    """One line that says where memory ran out and what to do."""


@contextmanager
def memory_named(work: str, batch_size: int | None, prefix: str = "--") -> Iterator[None]:
    """Errors of allocations inside become OutOfMemory; the flags that help begin with ``prefix``."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        where = "" if batch_size is None else f" at batch size {batch_size}"
        raise OutOfMemory(
            f"{work}: out of memory{where} ({_peak()}); lower {prefix}batch-size or "
            f"{prefix}channels, or use --precision bfloat16. Checkpoints are intact"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the CPU's allocator raised it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator: can't alloc" in str(error)


def _peak() -> str:
    process = f"peak of the process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB:.1f} GiB"
    if torch.cuda.is_available():
        return f"peak on the GPU {torch.cuda.max_memory_allocated() / GIB:.1f} GiB, {process}"
    return process
