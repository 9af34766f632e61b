"""`--deterministic`: only algorithms that give the same bits every time; an operation without one ends the run."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
REPEATABLE = (":4096:8", ":16:8")  # the workspaces with which cuBLAS repeats itself (its manual, section 2.1.4)


class NotDeterministic(Exception):
    """An operation that cannot repeat its bits where that was asked for; one line that names it."""


@contextmanager
def deterministic(enabled: bool) -> Iterator[None]:
    """Inside, if ``enabled``, torch and cuDNN use deterministic algorithms only; afterwards all is as it was.

    cuBLAS reads its part from the environment when it starts, so this comes before the first work on a GPU; once it
    has, that part stays. Raises NotDeterministic where an operation has no such algorithm, and where cuBLAS was started
    otherwise.
    """
    if not enabled:
        yield
        return
    workspace, cudnn = os.environ.get(CUBLAS), torch.backends.cudnn
    if workspace not in REPEATABLE and (workspace is not None or torch.cuda.is_initialized()):
        came = "CUDA has started without it" if workspace is None else f"got {workspace!r}"
        raise NotDeterministic(f"--deterministic: {CUBLAS} must be {' or '.join(REPEATABLE)}, {came}")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    before_cudnn = cudnn.deterministic, cudnn.benchmark
    os.environ[CUBLAS] = workspace or REPEATABLE[0]
    torch.use_deterministic_algorithms(True)
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    except RuntimeError as error:
        if (refusal := _refusal(str(error))) is None:
            raise
        raise NotDeterministic(f"--deterministic: {refusal}; leave the flag out, or use another device") from error
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        cudnn.deterministic, cudnn.benchmark = before_cudnn
        if workspace is None and not torch.cuda.is_initialized():  # else it says what cuBLAS has, for the next run
            del os.environ[CUBLAS]


def _refusal(message: str) -> str | None:
    """What torch refuses, if that is what its error says."""
    if named := re.search(r"(\S+) does not have a deterministic implementation", message):
        return f"{named[1]} has no deterministic implementation"
    return (
        "an operation of cuBLAS cannot repeat its bits"
        if "not deterministic because it uses CuBLAS" in message
        else None
    )
