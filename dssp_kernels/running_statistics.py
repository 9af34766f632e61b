"""Running statistics of norms whose batch statistics a kernel has found."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def update_running_statistics(found: Iterable[tuple[nn.BatchNorm2d, Tensor, Tensor]]) -> None:
    """Takes in the mean and the unbiased variance of a batch, per norm, as nn.BatchNorm2d does with a momentum."""
    running: dict[float, tuple[list[Tensor], list[Tensor]]] = {}  # by momentum: the buffers, and what they move towards
    counters = []
    for norm, mean, variance in found:
        buffers = norm._buffers  # a tenth of the time that norm.running_mean takes
        running_mean, running_variance = buffers["running_mean"], buffers["running_var"]
        if not norm.track_running_stats or running_mean is None or running_variance is None:
            continue
        assert norm.momentum is not None  # callers leave cumulative averages to the norm itself
        old, new = running.setdefault(norm.momentum, ([], []))
        old += running_mean, running_variance
        new += mean.to(running_mean.dtype), variance.to(running_variance.dtype)
        if (batches := buffers["num_batches_tracked"]) is not None:
            counters.append(batches)
    with torch.no_grad():
        for momentum, (old, new) in running.items():
            torch._foreach_lerp_(old, new, momentum)
        if counters:
            torch._foreach_add_(counters, 1)
