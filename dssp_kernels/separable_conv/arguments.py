"""What a separable convolution is given, checked."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


def check_norm(norm: nn.BatchNorm2d, z: Tensor | None = None) -> None:
    """TypeError or ValueError for a norm that a SeparablePair cannot have; or not with what it normalises, if given."""
    if type(norm) is not nn.BatchNorm2d:  # a subclass may compute anything
        raise TypeError(f"norm: expected an nn.BatchNorm2d, got {type(norm).__name__}")
    if not can_normalise_rows(norm):
        raise ValueError(
            "norm: expected training mode, affine=False and a momentum, got "
            f"training={norm.training}, affine={norm.weight is not None}, momentum={norm.momentum}"
        )
    if z is None:
        return
    if norm.num_features != z.shape[1]:
        raise ValueError(
            f"norm: expected {z.shape[1]} features, as the first convolution gives, got {norm.num_features}"
        )
    if z.shape[0] * z.shape[2] * z.shape[3] == 1:
        raise ValueError(f"norm: expected more than one value per channel, got shape {list(z.shape)}")


def can_normalise_rows(norm: nn.BatchNorm2d) -> bool:
    """Whether a norm goes by the statistics of the batch and nothing else, so that a SeparablePair can have it."""
    buffers, parameters = norm._buffers, norm._parameters  # a tenth of the time that norm.weight takes
    return (
        norm.training
        and parameters["weight"] is None
        and parameters["bias"] is None
        and (norm.momentum is not None or buffers["running_mean"] is None)
    )
