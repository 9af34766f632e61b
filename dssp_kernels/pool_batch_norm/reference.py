"""pool_batch_norm in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.backend import transforms_are_active


def pool_batch_norm_reference(
    x: Tensor,
    is_max: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(batch_norm(p), mean(p), unbiased var(p)) with p = max_pool2d(x) or avg_pool2d(x), statistics of the batch.

    x: [B, C, H, W]; y: [B, C, H', W']; mean, variance: [C], in float32 at least, without gradients.
    """
    geometry = tuple(kernel_size), tuple(stride), tuple(padding)
    pooled = F.max_pool2d(x, *geometry) if is_max else F.avg_pool2d(x, *geometry, False, count_include_pad)
    return batch_norm_with_statistics(pooled, eps)


def batch_norm_with_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """batch_norm(x) by the statistics of the batch, and these: mean and unbiased variance [C], in float32 at least."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if transforms_are_active():  # statistics that batch_norm writes in place, vmap cannot map
        variance, mean = torch.var_mean(x.detach().to(dtype), (0, 2, 3))
        return F.batch_norm(x, None, None, training=True, eps=eps), mean, variance
    mean, variance = torch.zeros(2, x.shape[1], dtype=dtype, device=x.device)
    y = F.batch_norm(x, mean, variance, training=True, momentum=1.0, eps=eps)
    return y, mean, variance  # momentum 1: the running statistics are those of the batch
