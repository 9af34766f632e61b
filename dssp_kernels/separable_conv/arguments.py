"""What a separable convolution is given, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dssp_kernels.depthwise_conv.arguments import Pair, checked_convolution


def checked_separable(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Pair, Pair, Pair]:
    """stride, padding and dilation as pairs; TypeError or ValueError for arguments of another kind or shape."""
    pairs = checked_convolution(x, depthwise, stride, padding, dilation)
    if not isinstance(pointwise, Tensor):
        raise TypeError(f"pointwise: expected a tensor, got {type(pointwise).__name__}")
    if pointwise.dim() != 4 or pointwise.shape[0] == 0 or tuple(pointwise.shape[1:]) != (x.shape[1], 1, 1):
        raise ValueError(
            f"pointwise: expected shape [C_out, C, 1, 1] with C = {x.shape[1]} as in x, got {list(pointwise.shape)}"
        )
    if pointwise.device != x.device or pointwise.layout is not torch.strided:
        raise ValueError(
            f"pointwise: expected a dense tensor on x's device {x.device}, got {pointwise.layout} on {pointwise.device}"
        )
    return pairs


def check_dtypes(x: Tensor, depthwise: Tensor, pointwise: Tensor) -> None:
    """TypeError for weights that are not of x's dtype. Autocast comes first."""
    for name, weight in (("depthwise", depthwise), ("pointwise", pointwise)):
        if weight.dtype != x.dtype:
            raise TypeError(f"{name}: expected x's dtype {x.dtype}, got {weight.dtype}")
