"""pointwise_batch_norm in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.pool_batch_norm.reference import batch_norm_with_statistics


def pointwise_batch_norm_reference(x: Tensor, weight: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(batch_norm(z), mean(z), unbiased var(z)) with z = conv2d(relu(x) if relu else x, weight), batch statistics.

    x: [B, C, H, W]; weight: [C_out, C, 1, 1]; mean, variance: [C_out], in float32 at least, without gradients.
    """
    return batch_norm_with_statistics(F.conv2d(F.relu(x) if relu else x, weight), eps)
