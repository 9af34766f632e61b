"""relu_diagonals: what DARTS' FactorizedReduce reads of its input, in one pass over a quarter as many pixels twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from dssp_kernels import parameter_free


@parameter_free
def relu_diagonals(x: Tensor) -> Tensor:
    """The pixels of even row and column and, as further channels, those one off both ways, after a ReLU:

        z = cat([relu(x)[:, :, ::2, ::2], relu(x)[:, :, 1::2, 1::2]], dim=1)

    [B, C, H, W] -> [B, 2C, ceil(H / 2), ceil(W / 2)] in x's memory layout; where H or W is odd, the second half
    is padded with zeros. Differentiable twice. Autograd's own slicing would fill a whole map of zeros for each slice.
    """
    if torch.compiler.is_exporting():  # written into a file, filling a tensor slice by slice becomes scatters
        return _formula(x)
    return _ReLUDiagonals.apply(x)


def _formula(x: Tensor) -> Tensor:
    height, width = x.shape[2:]
    x = x.relu()
    shifted = x[:, :, 1::2, 1::2]
    if height % 2 or width % 2:
        shifted = F.pad(shifted, (0, width % 2, 0, height % 2))
    return torch.cat([x[:, :, ::2, ::2], shifted], dim=1)


class _ReLUDiagonals(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        z = _gather(x).relu_()
        ctx.save_for_backward(z)
        ctx.size = x.shape[2:]
        return z

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (z,) = ctx.saved_tensors
        return _Scatter.apply(torch.ops.aten.threshold_backward(grad, z, 0), *ctx.size)


class _Scatter(Function):
    """Back to where the pixels were, zeros elsewhere: linear, so its gradient is the gathering again."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, height: int, width: int) -> Tensor:
        channels = z.shape[1] // 2
        x = _empty(z, channels, height, width).zero_()
        x[:, :, ::2, ::2] = z[:, :channels]
        x[:, :, 1::2, 1::2] = z[:, channels:, : height // 2, : width // 2]
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _gather(grad), None, None


def _gather(x: Tensor) -> Tensor:
    channels, height, width = x.shape[1:]
    z = _empty(x, 2 * channels, (height + 1) // 2, (width + 1) // 2)
    if height % 2 or width % 2:
        z.zero_()
    z[:, :channels] = x[:, :, ::2, ::2]
    z[:, channels:, : height // 2, : width // 2] = x[:, :, 1::2, 1::2]
    return z


def _empty(like: Tensor, *shape: int) -> Tensor:
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if channels_last and not like.is_contiguous() else torch.contiguous_format
    return torch.empty((like.shape[0], *shape), dtype=like.dtype, device=like.device, memory_format=layout)
