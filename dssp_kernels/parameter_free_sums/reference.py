"""parameter_free_sums in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.pool_batch_norm.reference import batch_norm_with_statistics

MAX, AVERAGE, IDENTITY = range(3)
"""What a function is."""


class Functions(NamedTuple):
    """What the operators are told of n functions of a state that have no parameters."""

    kinds: Sequence[int]
    kernel_sizes: Sequence[int]
    """[2n], as strides and paddings are; 1, 1 and 0 for the identity."""
    strides: Sequence[int]
    paddings: Sequence[int]
    count_include_pad: Sequence[bool]
    normalised: Sequence[bool]
    """By a BatchNorm without weights, by the statistics of the batch. Never the identity."""
    eps: Sequence[float]

    def geometry(self, k: int) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Kernel size, stride and padding of one."""
        kernel, stride, padding = ((sizes[2 * k], sizes[2 * k + 1]) for sizes in self[1:4])
        return kernel, stride, padding


class Sums(NamedTuple):
    """Which functions enter which sums: that of an edge takes those of its candidates that are functions."""

    edges: Sequence[int]
    """[m], rows of the weights."""
    candidates: Sequence[int]
    """[n], columns of the weights."""
    takes: Sequence[bool]
    """[m * n]: whether a sum has a function at all."""


def parameter_free_sums_reference(
    x: Tensor, weights: Tensor, addends: Sequence[Tensor | None], sums: Sums, functions: Functions
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(sums, means, unbiased variances), see parameter_free_sums(); the latter of each function that is normalised."""
    values: list[Tensor] = []
    means: list[Tensor] = []
    variances: list[Tensor] = []
    for k, kind in enumerate(functions.kinds):
        y = x
        if kind == MAX:
            y = F.max_pool2d(x, *functions.geometry(k))
        elif kind == AVERAGE:
            y = F.avg_pool2d(x, *functions.geometry(k), False, functions.count_include_pad[k])
        if functions.normalised[k]:
            y, mean, variance = batch_norm_with_statistics(y, functions.eps[k])
            means.append(mean)
            variances.append(variance)
        values.append(y)
    results = []
    for j, (edge, addend) in enumerate(zip(sums.edges, addends, strict=True)):
        total = torch.zeros_like(values[0]) if addend is None else addend
        for k, (candidate, y) in enumerate(zip(sums.candidates, values, strict=True)):
            if sums.takes[j * len(values) + k]:
                total = total + weights[edge, candidate].to(y.dtype) * y
        results.append(total)
    return results, means, variances
