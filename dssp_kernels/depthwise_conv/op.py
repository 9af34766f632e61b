"""depthwise_conv2d: the public function, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import HAS_TRITON, WHY_NO_CPU_KERNELS, backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import autocast, checked_convolution, layout_of, output_size
from dssp_kernels.depthwise_conv.reference import depthwise_conv2d_reference


def depthwise_conv2d(
    x: Tensor,
    weight: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    relu: bool = False,
) -> Tensor:
    """A filter per channel, after a ReLU if asked for: the first half of DARTS' separable and dilated convolutions.

        y = conv2d(relu(x) if relu else x, weight, groups=C)

    relu(x) never exists in memory, neither forward nor for the backward pass.

    Args:
        x: [B, C, H, W], float16, bfloat16, float32 or float64; any memory layout, gaps and overlaps included.
        weight: [C, 1, kh, kw], of x's dtype and device.
        stride, padding, dilation: an integer for both dimensions or a pair (rows, columns).
        relu: whether x passes through a ReLU first.

    Returns:
        [B, C, H', W'] of x's dtype, with H' = (H + 2 * padding - dilation * (kh - 1) - 1) // stride + 1, W' likewise;
        channels_last if the channels of x lie innermost in memory, else contiguous. Under autocast the inputs are cast
        as those of torch.nn.functional.conv2d.

    Differentiable twice with respect to x and weight. On CPU tensors the C++ kernels run: sums in float32 (float64 for
    float64), bit-reproducible on any number of threads. They are made for channels_last; contiguous ones are read
    and written in place too, an element instead of a vector at a time, which takes two to four times as long. Padding
    is zeros multiplied like any other value: an infinite weight gives NaN there. On CUDA tensors the Triton kernels run
    where they serve, with the same sums, bit-reproducible too: filters up to 7x7 and strides up to 3 with any padding
    and dilation. Beyond, CUDA tensors go through torch.nn.functional.conv2d.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    strides, paddings, dilations = checked_convolution(x, weight, stride, padding, dilation)
    x, weight = autocast(x, weight)
    if x.dtype != weight.dtype:
        raise TypeError(f"weight: expected x's dtype {x.dtype}, got {weight.dtype}")
    implementation = "reference" if x.device.type == "meta" else implementation_for(x.device)
    if implementation == "reference" or (implementation != "cpu" and not _triton_serves(weight, strides)):
        return depthwise_conv2d_reference(x, weight, strides, paddings, dilations, relu)
    return _DepthwiseConv2d.apply(implementation == "interpreter", x, weight, strides, paddings, dilations, relu)


def _triton_serves(weight: Tensor, stride: tuple[int, int]) -> bool:
    """Whether the sums of a Triton program fit into its registers."""
    return max(weight.shape[2:]) <= 7 and max(stride) <= 3


# ---- autograd --------------------------------------------------------------------------------------------------------


def _operators(triton: bool) -> Any:
    """Where the operators are functions by their names: Triton's launchers, or what is registered for each device."""
    if triton:
        from dssp_kernels.depthwise_conv import triton_launchers

        return triton_launchers
    return torch.ops.dssp_kernels


class _DepthwiseConv2d(torch.autograd.Function):
    """Saves x as it came: the ReLU's mask is read off it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        interpreted: bool,
        x: Tensor,
        weight: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.interpreted, ctx.arguments = interpreted, (stride, padding, dilation, relu)
        return _operators(interpreted).depthwise_conv2d_forward(x, weight, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needs_input, needs_weight = ctx.needs_input_grad[1:3]
        if backward_is_transformed(grad):
            return None, *_differentiable_gradients(ctx, grad), None, None, None, None
        x, weight = ctx.saved_tensors
        d_x, d_weight = _operators(ctx.interpreted).depthwise_conv2d_backward(
            grad, x, weight, *ctx.arguments, needs_input, needs_weight
        )
        return None, d_x if needs_input else None, d_weight if needs_weight else None, None, None, None, None


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients for (x, weight) that can be differentiated and batched: autograd on the reference formula.

    Fresh views stand for the inputs, so that a weight computed from x does not count twice.
    """
    needed = ctx.needs_input_grad[1:3]
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        y = depthwise_conv2d_reference(*inputs, *ctx.arguments)
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=recorded))
    return [next(found) if need else None for need in needed]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_library.define(
    "depthwise_conv2d_forward(Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, bool relu) "
    "-> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "depthwise_conv2d_backward(Tensor grad, Tensor x, Tensor weight, int[2] stride, int[2] padding, int[2] dilation, "
    "bool relu, bool needs_input_grad, bool needs_weight_grad) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::depthwise_conv2d_forward", lib=_library)
def _forward_fake(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], relu: bool
) -> Tensor:
    size = [output_size(x.shape[2 + d], weight.shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)]
    return torch.empty((x.shape[0], x.shape[1], *size), dtype=x.dtype, device=x.device, memory_format=layout_of(x))


@torch.library.register_fake("dssp_kernels::depthwise_conv2d_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
    return d_x if needs_input_grad else x.new_empty(0), d_weight if needs_weight_grad else x.new_empty(0)


def _reference_forward(x: Tensor, *arguments: Any) -> Tensor:
    """The registered forward where no kernels are there."""
    return depthwise_conv2d_reference(x, *arguments).contiguous(memory_format=layout_of(x))


def _reference_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The registered backward where no kernels are there: autograd on the reference formula."""
    with torch.enable_grad():
        inputs = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = depthwise_conv2d_reference(*inputs, stride, padding, dilation, relu)
        d_x, d_weight = torch.autograd.grad(y, inputs, grad)
    d_x = d_x.contiguous(memory_format=layout_of(x)) if needs_input_grad else x.new_empty(0)
    return d_x, d_weight.contiguous() if needs_weight_grad else x.new_empty(0)


if WHY_NO_CPU_KERNELS is not None:
    _library.impl("depthwise_conv2d_forward", _reference_forward, "CPU")
    _library.impl("depthwise_conv2d_backward", _reference_backward, "CPU")


def _triton_forward(*arguments: Any) -> Tensor:
    return _operators(True).depthwise_conv2d_forward(*arguments)


def _triton_backward(*arguments: Any) -> tuple[Tensor, Tensor]:
    return _operators(True).depthwise_conv2d_backward(*arguments)


_library.impl("depthwise_conv2d_forward", _triton_forward if HAS_TRITON else _reference_forward, "CUDA")
_library.impl("depthwise_conv2d_backward", _triton_backward if HAS_TRITON else _reference_backward, "CUDA")


def _multiply_adds(x_shape: Any, weight_shape: Any, stride: Any, padding: Any, dilation: Any) -> int:
    rows, columns = (
        output_size(x_shape[2 + d], weight_shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    return x_shape[0] * rows * columns * torch.Size(weight_shape).numel()


@register_flop_formula(torch.ops.dssp_kernels.depthwise_conv2d_forward)
def _forward_flops(
    x_shape: Any, weight_shape: Any, stride: Any, padding: Any, dilation: Any, _relu: bool, **_keywords: Any
) -> int:
    """A multiplication and an addition per output element and tap, as torch counts a convolution."""
    return 2 * _multiply_adds(x_shape, weight_shape, stride, padding, dilation)


@register_flop_formula(torch.ops.dssp_kernels.depthwise_conv2d_backward)
def _backward_flops(
    _grad_shape: Any,
    x_shape: Any,
    weight_shape: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    _relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
    **_keywords: Any,
) -> int:
    """For each gradient asked for, as many as the forward pass."""
    passes = needs_input_grad + needs_weight_grad
    return 2 * passes * _multiply_adds(x_shape, weight_shape, stride, padding, dilation)
