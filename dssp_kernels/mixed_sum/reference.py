"""mixed_sum in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mixed_sum_reference(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, softmax: bool, active: Tensor | None
) -> Tensor:
    """y = sum_ek active[e] * sigmoid(mask[e]) * w[e,k] * outputs[e*K+k]  with  w = softmax(alpha, -1)  or  w = alpha.

    outputs: E*K tensors of one shape and dtype, or None; alpha: [K] or [E, K]; mask, active: [E] or None.
    Half-precision outputs are summed in float32.
    """
    tensors = [output for output in outputs if output is not None]
    dtype = tensors[0].dtype
    sum_dtype = torch.promote_types(dtype, torch.float32)
    coefficients = alpha.to(torch.promote_types(alpha.dtype, sum_dtype)).reshape(-1, alpha.shape[-1])  # [E, K]
    if softmax:
        coefficients = coefficients.softmax(-1)
    if mask is not None:
        coefficients = coefficients * mask.to(coefficients.dtype).sigmoid().reshape(-1, 1)
    if active is not None:
        coefficients = torch.where(active.reshape(-1, 1), coefficients, 0.0)
    candidates = coefficients.shape[1]
    total = torch.zeros_like(tensors[0], dtype=sum_dtype)
    for i, output in enumerate(outputs):
        if output is None:
            continue
        edge, candidate = divmod(i, candidates)
        if active is not None:  # not only a zero weight: whatever an inactive edge holds, NaN included, stays out
            output = torch.where(active[edge], output, 0.0)
        total = total + coefficients[edge, candidate].to(sum_dtype) * output.to(sum_dtype)
    return total.to(dtype)
