"""pointwise_batch_norm: the public function, the autograd.Function and the registered operators."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import DTYPES, autocast
from dssp_kernels.pointwise_batch_norm.reference import pointwise_batch_norm_reference

_LANES = {torch.float32: 8, torch.float64: 4}


def pointwise_batch_norm(
    x: Tensor, weight: Tensor, *, relu: bool = False, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """A pointwise convolution and a BatchNorm without weights after it, by the statistics of the batch.

        z = conv2d(relu(x) if relu else x, weight)
        y = (z - mean(z)) / sqrt(var(z) + eps), per channel

    What DARTS' cells bring their inputs to their width with. On CPU tensors of float32 or float64, dense in
    channels_last memory, whose channels are multiples of 8 (float64: of 4), the C++ kernels run: relu(x) and the
    gradient of z exist some pixels at a time, z only until it is normalised in place, and nothing is kept but y.
    Results do not depend on the number of threads. Elsewhere torch.nn.functional's operators run.

    Args:
        x: [B, C, H, W], float16, bfloat16, float32 or float64.
        weight: [C_out, C, 1, 1], of x's dtype and device.
        relu: whether x passes through a ReLU first.
        eps: added to the variance.

    Returns:
        y [B, C_out, H, W] of x's dtype and layout, and what running statistics take in: mean [C_out] and unbiased
        variance [C_out] of z, float32 (float64 for float64), without gradients. y is differentiable twice with respect
        to x and weight. Under autocast x and weight are cast as those of torch.nn.functional.conv2d.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    _check(x, weight)
    x, weight = autocast(x, weight)
    if weight.dtype != x.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    has_kernels = x.device.type != "meta" and implementation_for(x.device) == "cpu"
    if has_kernels and is_served(x, weight):
        y, mean, variance = _PointwiseBatchNorm.apply(x, weight, bool(relu), float(eps))
        return y, mean, variance
    return pointwise_batch_norm_reference(x, weight, bool(relu), float(eps))


def is_served(x: Tensor, weight: Tensor) -> bool:
    """Whether the C++ kernels are made for this: pixels one after the other, each some whole vectors of channels."""
    lanes = _LANES.get(x.dtype, 0)
    return lanes > 0 and not (weight.shape[0] % lanes or weight.shape[1] % lanes) and _is_dense(x) and x.numel() > 0


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _check(x: Tensor, weight: Tensor) -> None:
    for name, value, shape in (("x", x, "[B, C, H, W]"), ("weight", weight, "[C_out, C, 1, 1]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.dim() != 4 or value.layout is not torch.strided:
            raise ValueError(f"{name}: expected a dense tensor {shape}, got {value.layout} of {list(value.shape)}")
    if weight.shape[0] == 0 or tuple(weight.shape[1:]) != (x.shape[1], 1, 1):
        expected = f"[C_out, C, 1, 1] with C = {x.shape[1]} as in x"
        raise ValueError(f"weight: expected shape {expected}, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected x's device {x.device}, got {weight.device}")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"x: expected more than one value per channel, got shape {list(x.shape)}")


# ---- autograd --------------------------------------------------------------------------------------------------------


class _PointwiseBatchNorm(torch.autograd.Function):
    """Saves x and y, which others hold anyway, and the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, relu: bool, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, variance, scale = torch.ops.dssp_kernels.pointwise_batch_norm_forward(x, weight, relu, eps)
        ctx.save_for_backward(x, weight, y, scale)
        ctx.relu, ctx.eps = relu, eps
        ctx.mark_non_differentiable(mean, variance)
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_statistics: Any) -> tuple[Tensor | None, ...]:
        x, weight, y, scale = ctx.saved_tensors
        needs = ctx.needs_input_grad[:2]
        if backward_is_transformed(grad):
            return *_reference_gradients(grad, x, weight, ctx.relu, ctx.eps, needs), None, None
        grad, x, y = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (grad, x, y))  # from hooks
        d_x, d_weight = torch.ops.dssp_kernels.pointwise_batch_norm_backward(
            grad, x, y, scale.contiguous(), weight, ctx.relu, *needs
        )
        return d_x if needs[0] else None, d_weight if needs[1] else None, None, None


def _reference_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, relu: bool, eps: float, needs: tuple[bool, bool]
) -> list[Tensor | None]:
    """Gradients of x and weight as something that can be differentiated and batched: autograd on the reference.

    Fresh views stand for the two, so that a weight computed from x does not count twice.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        x, weight = x.view_as(x), weight.view_as(weight)
        y, _, _ = pointwise_batch_norm_reference(x, weight, relu, eps)
    wanted = [tensor for tensor, need in zip((x, weight), needs, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=recorded))
    return [next(found) if need else None for need in needs]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_library.define(
    "pointwise_batch_norm_forward(Tensor x, Tensor weight, bool relu, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "pointwise_batch_norm_backward(Tensor grad, Tensor x, Tensor y, Tensor scale, Tensor weight, bool relu, "
    "bool needs_input_grad, bool needs_weight_grad) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::pointwise_batch_norm_forward", lib=_library)
def _forward_fake(x: Tensor, weight: Tensor, relu: bool, eps: float) -> tuple[Tensor, ...]:
    shape = (x.shape[0], weight.shape[0], *x.shape[2:])
    y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return y, *(x.new_empty(weight.shape[0]) for _ in range(3))


@torch.library.register_fake("dssp_kernels::pointwise_batch_norm_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    weight: Tensor,
    relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if needs_input_grad else x.new_empty(0),
        x.new_empty(weight.shape) if needs_weight_grad else x.new_empty(0),
    )


@register_flop_formula(torch.ops.dssp_kernels.pointwise_batch_norm_forward)
def _forward_flops(x_shape: Any, weight_shape: Any, *_arguments: Any, **_keywords: Any) -> int:
    """Those of the convolution, as torch counts it; torch counts none of a BatchNorm."""
    return 2 * x_shape[0] * x_shape[2] * x_shape[3] * weight_shape[0] * weight_shape[1]


@register_flop_formula(torch.ops.dssp_kernels.pointwise_batch_norm_backward)
def _backward_flops(
    _grad: Any,
    x_shape: Any,
    _y: Any,
    _scale: Any,
    weight_shape: Any,
    _relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
    **_keywords: Any,
) -> int:
    return _forward_flops(x_shape, weight_shape) * (needs_input_grad + needs_weight_grad)
