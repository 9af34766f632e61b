"""What the launchers of all Triton kernels share: the size of a program, and arithmetic that costs no time."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

THREADS = 128
NUM_WARPS = 2 if torch.version.hip else 4  # a warp is 64 threads on AMD's data centre GPUs


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int | None = None, **constants: Any) -> None:
    """Run a kernel in programs of THREADS threads, unless told otherwise."""
    warps = NUM_WARPS if num_warps is None else num_warps
    kernel[grid](*arguments, **constants, num_warps=warps, enable_fp_fusion=True)  # Triton's default is about to change


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)  # triton.cdiv takes ten times as long, and launches are what a supernet waits for


def power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What the tensor's values are added up in."""
    return torch.float64 if tensor.dtype is torch.float64 else torch.float32
