"""separable_conv2d: the public function, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import WHY_NO_CPU_KERNELS, backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import Pair, autocast, checked_convolution, layout_of, output_size
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.separable_conv.reference import separable_conv2d_reference


def separable_conv2d(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    *,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    relu: bool = False,
) -> Tensor:
    """A depthwise and a pointwise convolution, after a ReLU if asked for: DARTS' DilConv and each half of its SepConv.

        y = conv2d(conv2d(relu(x) if relu else x, depthwise, groups=C), pointwise)

    Neither relu(x) nor the map between the convolutions exists in memory, forward or backward: its rows are computed
    again where the pointwise weights' gradient needs them.

    Args:
        x: [B, C, H, W], float16, bfloat16, float32 or float64; any memory layout, gaps and overlaps included.
        depthwise: [C, 1, kh, kw], of x's dtype and device.
        pointwise: [C_out, C, 1, 1], likewise.
        stride, padding, dilation: of the depthwise convolution, an integer or a pair (rows, columns).
        relu: whether x passes through a ReLU first.

    Returns:
        [B, C_out, H', W'] of x's dtype; channels_last if the channels of x lie innermost in memory, else contiguous.
        Under autocast the inputs are cast as those of torch.nn.functional.conv2d.

    Differentiable twice with respect to x and both weights. On CPU tensors the C++ kernels run: sums, and the map
    between, in float32 (float64 for float64), bit-reproducible on any number of threads. Elsewhere depthwise_conv2d()
    and torch.nn.functional.conv2d run one after the other.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    strides, paddings, dilations = checked_separable(x, depthwise, pointwise, stride, padding, dilation)
    x, depthwise, pointwise = autocast(x, depthwise, pointwise)
    check_dtypes(x, depthwise, pointwise)
    if x.device.type == "meta" or implementation_for(x.device) != "cpu":
        y = depthwise_conv2d(x, depthwise, stride=strides, padding=paddings, dilation=dilations, relu=relu)
        return F.conv2d(y, pointwise)
    return _SeparableConv2d.apply(x, depthwise, pointwise, strides, paddings, dilations, relu)


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


# ---- autograd --------------------------------------------------------------------------------------------------------


class _SeparableConv2d(torch.autograd.Function):
    """Saves x as it came and the weights, nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        depthwise: Tensor,
        pointwise: Tensor,
        stride: tuple[int, int],
        padding: tuple[int, int],
        dilation: tuple[int, int],
        relu: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, depthwise, pointwise)
        ctx.arguments = (stride, padding, dilation, relu)
        return torch.ops.dssp_kernels.separable_conv2d_forward(x, depthwise, pointwise, *ctx.arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[:3]
        if backward_is_transformed(grad):
            return *_differentiable_gradients(ctx, grad), None, None, None, None
        found = torch.ops.dssp_kernels.separable_conv2d_backward(grad, *ctx.saved_tensors, *ctx.arguments, *needed)
        return *(d if need else None for d, need in zip(found, needed, strict=True)), None, None, None, None


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients for (x, depthwise, pointwise) that can be differentiated and batched: autograd on the reference.

    Fresh views stand for the inputs, so that a weight computed from x does not count twice.
    """
    needed = ctx.needs_input_grad[:3]
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [tensor.view_as(tensor) for tensor in ctx.saved_tensors]
        y = separable_conv2d_reference(*inputs, *ctx.arguments)
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=recorded))
    return [next(found) if need else None for need in needed]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_GEOMETRY = "int[2] stride, int[2] padding, int[2] dilation, bool relu"
_library.define(
    f"separable_conv2d_forward(Tensor x, Tensor depthwise, Tensor pointwise, {_GEOMETRY}) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    f"separable_conv2d_backward(Tensor grad, Tensor x, Tensor depthwise, Tensor pointwise, {_GEOMETRY}, "
    "bool needs_input_grad, bool needs_depthwise_grad, bool needs_pointwise_grad) -> (Tensor, Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::separable_conv2d_forward", lib=_library)
def empty_result(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
) -> Tensor:
    """A tensor of the shape, dtype and layout that the convolution gives."""
    size = [output_size(x.shape[2 + d], depthwise.shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)]
    shape = (x.shape[0], pointwise.shape[0], *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


@torch.library.register_fake("dssp_kernels::separable_conv2d_backward", lib=_library)
def _backward_fake(
    grad: Tensor, x: Tensor, depthwise: Tensor, pointwise: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor]:
    needs_input, needs_depthwise, needs_pointwise = arguments[-3:]
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if needs_input else x.new_empty(0),
        x.new_empty(depthwise.shape) if needs_depthwise else x.new_empty(0),
        x.new_empty(pointwise.shape) if needs_pointwise else x.new_empty(0),
    )


def _reference_forward(x: Tensor, *arguments: Any) -> Tensor:
    """The registered forward where no kernels are there."""
    return separable_conv2d_reference(x, *arguments).contiguous(memory_format=layout_of(x))


def _reference_backward(
    grad: Tensor, x: Tensor, depthwise: Tensor, pointwise: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    """The registered backward where no kernels are there: autograd on the reference formula."""
    *geometry, needs_input, needs_depthwise, needs_pointwise = arguments
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (x, depthwise, pointwise)]
        y = separable_conv2d_reference(*inputs, *geometry)  # type: ignore[arg-type]  # one list, many types
        d_x, d_depthwise, d_pointwise = torch.autograd.grad(y, inputs, grad)
    return (
        d_x.contiguous(memory_format=layout_of(x)) if needs_input else x.new_empty(0),
        d_depthwise.contiguous() if needs_depthwise else x.new_empty(0),
        d_pointwise.contiguous() if needs_pointwise else x.new_empty(0),
    )


for _key in ("CUDA",) if WHY_NO_CPU_KERNELS is None else ("CPU", "CUDA"):
    _library.impl("separable_conv2d_forward", _reference_forward, _key)
    _library.impl("separable_conv2d_backward", _reference_backward, _key)


def multiply_adds(x_shape: Any, depthwise_shape: Any, pointwise_shape: Any, *geometry: Any) -> tuple[int, int]:
    """Of the depthwise and of the pointwise convolution."""
    stride, padding, dilation = geometry
    rows, columns = (
        output_size(x_shape[2 + d], depthwise_shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    pixels = x_shape[0] * rows * columns
    return pixels * torch.Size(depthwise_shape).numel(), pixels * torch.Size(pointwise_shape).numel()


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_forward)
def _forward_flops(x_shape: Any, depthwise_shape: Any, pointwise_shape: Any, *arguments: Any, **_keywords: Any) -> int:
    """A multiplication and an addition per output element and tap of both, as torch counts convolutions."""
    return 2 * sum(multiply_adds(x_shape, depthwise_shape, pointwise_shape, *arguments[:3]))


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_backward)
def _backward_flops(
    _grad_shape: Any, x_shape: Any, depthwise_shape: Any, pointwise_shape: Any, *arguments: Any, **_keywords: Any
) -> int:
    """What two convolutions would take for each gradient asked for; rows computed again are not counted."""
    return backward_flops(*multiply_adds(x_shape, depthwise_shape, pointwise_shape, *arguments[:3]), *arguments[4:7])


def backward_flops(
    depthwise: int, pointwise: int, needs_input: bool, needs_depthwise: bool, needs_pointwise: bool
) -> int:
    """From the multiply-adds of the depthwise and of the pointwise convolution."""
    through_pointwise = needs_input or needs_depthwise
    return 2 * (depthwise * (needs_input + needs_depthwise) + pointwise * (through_pointwise + needs_pointwise))
