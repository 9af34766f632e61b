"""pool_batch_norm: the public function, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dssp_kernels.backend import backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import DTYPES, layout_of, output_size, pair
from dssp_kernels.pool_batch_norm.reference import pool_batch_norm_reference

POOLS = ("max", "avg")


def pool_batch_norm(
    x: Tensor,
    pool: str,
    kernel_size: int | Sequence[int],
    *,
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    count_include_pad: bool = True,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """A pool and the BatchNorm without weights that DARTS puts after it, by the statistics of the batch.

        p = max_pool2d(x) or avg_pool2d(x)
        y = (p - mean(p)) / sqrt(var(p) + eps), per channel

    On CPU tensors in channels_last memory the C++ kernels run: p never exists in memory, and of the pixels that were a
    maximum only their position in the window is kept, a byte each (PyTorch: p, and eight bytes). Statistics are summed
    in float32 along a row and in float64 over the rows; results do not depend on the number of threads, of which an
    image takes one. Elsewhere torch.nn.functional's operators run.

    Args:
        x: [B, C, H, W], float16, bfloat16, float32 or float64.
        pool: ``"max"`` or ``"avg"``.
        kernel_size, stride, padding: an integer or a pair (rows, columns); the stride is the kernel_size by default,
            the padding at most half of it.
        count_include_pad: whether padding counts in an average.
        eps: added to the variance.

    Returns:
        y [B, C, H', W'] of x's dtype and layout, and what running statistics take in: mean [C] and unbiased variance
        [C] of p, float32 (float64 for float64), without gradients. y is differentiable twice with respect to x.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    arguments = _checked(x, pool, kernel_size, stride, padding, count_include_pad, eps)
    has_kernels = x.device.type != "meta" and implementation_for(x.device) == "cpu"
    if has_kernels and _is_served(x, arguments[1]):
        y, mean, variance = _PoolBatchNorm.apply(x, *arguments)
        return y, mean, variance
    return pool_batch_norm_reference(x, *arguments)


def _is_served(x: Tensor, kernel: tuple[int, int]) -> bool:
    """Whether the C++ kernels are made for this: a byte must be able to say which pixel of a window was the largest."""
    return x.numel() > 0 and layout_of(x) is torch.channels_last and kernel[0] * kernel[1] <= 256


_Arguments = tuple[bool, tuple[int, int], tuple[int, int], tuple[int, int], bool, float]


def _checked(
    x: Tensor,
    pool: str,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None,
    padding: int | Sequence[int],
    count_include_pad: bool,
    eps: float,
) -> _Arguments:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x: expected float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() != 4 or x.layout is not torch.strided:
        raise ValueError(f"x: expected a dense tensor [B, C, H, W], got {x.layout} of shape {list(x.shape)}")
    if pool not in POOLS:
        raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    kernel = pair("kernel_size", kernel_size, 1)
    strides = kernel if stride is None else pair("stride", stride, 1)
    paddings = pair("padding", padding, 0)
    if any(2 * p > k for p, k in zip(paddings, kernel, strict=True)):
        raise ValueError(f"padding: expected at most half of kernel_size {kernel}, got {padding!r}")
    outputs = [output_size(x.shape[2 + d], kernel[d], strides[d], paddings[d], 1) for d in (0, 1)]
    if min(outputs) < 1:
        raise ValueError(
            f"x: expected an image no smaller than the kernel, got {list(x.shape[2:])} for {list(kernel)} with "
            f"padding {list(paddings)}"
        )
    if x.shape[0] * outputs[0] * outputs[1] == 1:
        raise ValueError(f"x: expected more than one value per channel after pooling, got shape {list(x.shape)}")
    return pool == "max", kernel, strides, paddings, bool(count_include_pad), float(eps)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _PoolBatchNorm(torch.autograd.Function):
    """Saves x and y, which others hold anyway, and a byte per element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        y, positions, mean, variance, scale = torch.ops.dssp_kernels.pool_batch_norm_forward(x, *arguments)
        ctx.save_for_backward(x, y, positions, scale)
        ctx.arguments = arguments
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: Any) -> tuple[Tensor | None, ...]:
        x, y, positions, scale = ctx.saved_tensors
        nothing = (None,) * len(ctx.arguments)
        if backward_is_transformed(grad):
            return _differentiable_gradient(x, grad, ctx.arguments), *nothing
        *pool, _eps = ctx.arguments
        positions, scale = positions.contiguous(), scale.contiguous()  # hooks on saved tensors may bring other memory
        return torch.ops.dssp_kernels.pool_batch_norm_backward(grad, x, y, positions, scale, *pool), *nothing


def _differentiable_gradient(x: Tensor, grad: Tensor, arguments: _Arguments) -> Tensor:
    """The gradient for x as something that can be differentiated and batched: autograd on the reference."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        of = x.view_as(x)
        y, _, _ = pool_batch_norm_reference(of, *arguments)
    return torch.autograd.grad(y, of, grad, create_graph=recorded)[0]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_POOL = "bool is_max, int[2] kernel_size, int[2] stride, int[2] padding, bool count_include_pad"
_library.define(
    f"pool_batch_norm_forward(Tensor x, {_POOL}, float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    f"pool_batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor positions, Tensor scale, {_POOL}) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::pool_batch_norm_forward", lib=_library)
def _forward_fake(
    x: Tensor,
    is_max: bool,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_include_pad: bool,
    eps: float,
) -> tuple[Tensor, ...]:
    batch, channels, *size = x.shape
    rows, columns = (output_size(size[d], kernel_size[d], stride[d], padding[d], 1) for d in (0, 1))
    y = torch.empty((batch, channels, rows, columns), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    lanes = 4 if x.dtype is torch.float64 else 8  # positions: [image][row][vector of channels][column][lane]
    padded = (channels + lanes - 1) // lanes * lanes
    positions = x.new_empty(batch * rows * columns * padded if is_max else 0, dtype=torch.uint8)
    statistics = (x.new_empty(channels, dtype=torch.promote_types(x.dtype, torch.float32)) for _ in range(3))
    return y, positions, *statistics


@torch.library.register_fake("dssp_kernels::pool_batch_norm_backward", lib=_library)
def _backward_fake(grad: Tensor, x: Tensor, *_arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=layout_of(x))
