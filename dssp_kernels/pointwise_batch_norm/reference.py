"""pointwise_batch_norm in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dssp_kernels.pool_batch_norm.reference import batch_norm_with_statistics


def pointwise_batch_norm_reference(
    maps: Sequence[Tensor], weights: Sequence[Tensor], relu: bool, eps: Sequence[float]
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per weight (batch_norm(z), mean(z), unbiased var(z)), batch statistics, with

        z = conv2d(relu(x) if relu else x, weight)          x = cat(maps, dim=1)

    maps: [B, C_m, H, W] each; weights: [C_out, sum C_m, 1, 1] each; mean, variance: [C_out], in float32 at least,
    without gradients.
    """
    x = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
    x = F.relu(x) if relu else x
    return [batch_norm_with_statistics(F.conv2d(x, weight), e) for weight, e in zip(weights, eps, strict=True)]
