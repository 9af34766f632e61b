"""Running statistics of norms whose batch statistics a kernel has found."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
    """Takes in the mean and the unbiased variance of a batch, as nn.BatchNorm2d does with a momentum."""
    buffers = norm._buffers  # a tenth of the time that norm.running_mean takes
    running_mean, running_variance = buffers["running_mean"], buffers["running_var"]
    if not norm.track_running_stats or running_mean is None or running_variance is None:
        return
    assert norm.momentum is not None  # callers leave cumulative averages to the norm itself
    with torch.no_grad():
        running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
        running_variance.lerp_(variance.to(running_variance.dtype), norm.momentum)
        if (batches := buffers["num_batches_tracked"]) is not None:
            batches.add_(1)
