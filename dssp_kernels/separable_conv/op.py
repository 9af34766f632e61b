"""separable_conv2d and separable_conv2d_group: the public functions, the autograd.Function, the registered operators.

To autograd and the kernels, a single convolution is a group of one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import WHY_NO_CPU_KERNELS, backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import Pair, autocast, layout_of, output_size
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.separable_conv.arguments import check_dtypes, checked_separable
from dssp_kernels.separable_conv.reference import separable_conv2d_reference

_T = TypeVar("_T")
Geometry = tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[bool]]
"""Strides, paddings and dilations, two per convolution, and one relu."""


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
    geometry = list(strides), list(paddings), list(dilations), [relu]
    return _SeparableConv2dGroup.apply(x, geometry, depthwise, pointwise)[0]


class SeparableConvolution(NamedTuple):
    """What separable_conv2d() takes beside x."""

    depthwise: Tensor
    pointwise: Tensor
    stride: int | Sequence[int] = 1
    padding: int | Sequence[int] = 0
    dilation: int | Sequence[int] = 1
    relu: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """separable_conv2d() of x."""
        depthwise, pointwise, stride, padding, dilation, relu = self
        return separable_conv2d(x, depthwise, pointwise, stride=stride, padding=padding, dilation=dilation, relu=relu)


def separable_conv2d_group(x: Tensor, convolutions: Sequence[SeparableConvolution]) -> list[Tensor]:
    """Separable convolutions of the same x, such as those that the candidates on an edge of DARTS' supernet start with:

        y_k = convolutions[k](x)

    To autograd they are one operation. Backward, an image goes through one convolution after the other, and each adds
    its gradient to those before it while they are in the cache. A result that nobody used costs nothing then.

    Args:
        x: [B, C, H, W], as in separable_conv2d().
        convolutions: at least one. They may differ in everything but C.

    Returns:
        A list of what separable_conv2d() returns for each, bit for bit. Where there are no C++ kernels, it does run.

    Differentiable twice with respect to x and all weights. Bit-reproducible on any number of threads. Gradients of x
    are added in the order of the convolutions, in float32 (float64 for float64), and rounded to x's dtype after each.

    Raises:
        TypeError, ValueError: naming the convolution and the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not isinstance(convolutions, (list, tuple)) or isinstance(convolutions, SeparableConvolution):
        raise TypeError(f"convolutions: expected a list or tuple of them, got {type(convolutions).__name__}")
    if not convolutions:
        raise ValueError("convolutions: expected at least one, got none")
    for k, convolution in enumerate(convolutions):
        if not isinstance(convolution, SeparableConvolution):
            raise TypeError(f"convolutions[{k}]: expected a SeparableConvolution, got {type(convolution).__name__}")
    if x.device.type == "meta" or implementation_for(x.device) != "cpu":
        return [_named(k, convolution, x) for k, convolution in enumerate(convolutions)]
    pairs = [_named(k, checked_separable, x, *convolution[:5]) for k, convolution in enumerate(convolutions)]
    depthwise, pointwise, *_, relu = zip(*convolutions, strict=True)
    x, *weights = autocast(x, *depthwise, *pointwise)
    for k, of_one in enumerate(zip(*_halves(weights), strict=True)):
        _named(k, check_dtypes, x, *of_one)
    strides, paddings, dilations = ([size for pair in of_all for size in pair] for of_all in zip(*pairs, strict=True))
    return list(_SeparableConv2dGroup.apply(x, (strides, paddings, dilations, list(relu)), *weights))


def _named(k: int, check: Callable[..., _T], *arguments: Any) -> _T:
    """check(*arguments), whose errors then name the convolution."""
    try:
        return check(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"convolutions[{k}]: {error}") from None


# ---- autograd --------------------------------------------------------------------------------------------------------


def _halves(values: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    """What concerns the depthwise weights of all convolutions, and what the pointwise ones."""
    return values[: len(values) // 2], values[len(values) // 2 :]


class _SeparableConv2dGroup(torch.autograd.Function):
    """Saves x as it came and the weights, nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        depthwise, pointwise = _halves(weights)
        results = torch.ops.dssp_kernels.separable_conv2d_group_forward(x, depthwise, pointwise, *geometry)
        if not x.requires_grad:  # what depends on frozen weights alone is no business of autograd's
            pairs = zip(results, depthwise, pointwise, strict=True)
            ctx.mark_non_differentiable(*(y for y, d, p in pairs if not (d.requires_grad or p.requires_grad)))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        arrived = [grad for grad in grads if grad is not None]
        needs_input, _, *needs_weights = ctx.needs_input_grad
        needs_input = needs_input and bool(arrived)
        needs_weights = [need and grad is not None for need, grad in zip(needs_weights, (*grads, *grads), strict=True)]
        if not (needs_input or any(needs_weights)):
            return (None,) * (2 + len(needs_weights))
        x, *weights = ctx.saved_tensors
        given = (grads, x, *_halves(weights), *ctx.geometry, needs_input, *_halves(needs_weights))
        if any(backward_is_transformed(grad) for grad in arrived):
            found = _reference_gradients(*given, create_graph=torch.is_grad_enabled())
        else:
            found = torch.ops.dssp_kernels.separable_conv2d_group_backward(*given)
        d_x, *d_weights = found
        gradients = itertools.chain(*d_weights)
        return d_x if needs_input else None, None, *(next(gradients) if need else None for need in needs_weights)


def _reference_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
    relu: Sequence[bool],
    needs_input: bool,
    needs_depthwise: Sequence[bool],
    needs_pointwise: Sequence[bool],
    *,
    create_graph: bool,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of x, and of the weights that need one, that can be differentiated: autograd on the reference.

    Fresh views stand for the inputs, so that a weight computed from x does not count twice.
    """

    def fresh(tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()

    with torch.enable_grad():
        x, depthwise, pointwise = fresh(x), [fresh(w) for w in depthwise], [fresh(w) for w in pointwise]
        convolutions = _one_by_one(depthwise, pointwise, strides, paddings, dilations, relu)
        results = [
            separable_conv2d_reference(x, *convolution)
            for convolution, grad in zip(convolutions, grads, strict=True)
            if grad is not None
        ]
    wanted = [x] if needs_input else []
    for weights, needed in ((depthwise, needs_depthwise), (pointwise, needs_pointwise)):
        wanted += [weight for weight, need in zip(weights, needed, strict=True) if need]
    arrived = [grad for grad in grads if grad is not None]
    found = list(torch.autograd.grad(results, wanted, arrived, create_graph=create_graph))
    d_x = found.pop(0) if needs_input else None
    return d_x, found[: sum(needs_depthwise)], found[sum(needs_depthwise) :]


def _one_by_one(
    depthwise: Sequence[Any],
    pointwise: Sequence[Any],
    strides: Sequence[int],
    paddings: Sequence[int],
    dilations: Sequence[int],
    relu: Sequence[bool],
) -> Iterator[tuple[Any, Any, Pair, Pair, Pair, bool]]:
    """The arguments of each convolution as separable_conv2d_reference() takes them."""
    pairs = (zip(sizes[::2], sizes[1::2], strict=True) for sizes in (strides, paddings, dilations))
    return zip(depthwise, pointwise, *pairs, relu, strict=True)


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_GROUP = "Tensor x, Tensor[] depthwise, Tensor[] pointwise, int[] strides, int[] paddings, int[] dilations, bool[] relu"
_library.define(
    f"separable_conv2d_group_forward({_GROUP}) -> Tensor[]",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    f"separable_conv2d_group_backward(Tensor?[] grads, {_GROUP}, bool needs_input_grad, bool[] needs_depthwise_grad, "
    "bool[] needs_pointwise_grad) -> (Tensor, Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


def _empty_result(
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


@torch.library.register_fake("dssp_kernels::separable_conv2d_group_forward", lib=_library)
def _forward_fake(x: Tensor, *group: Any) -> list[Tensor]:
    return [_empty_result(x, *convolution) for convolution in _one_by_one(*group)]


@torch.library.register_fake("dssp_kernels::separable_conv2d_group_backward", lib=_library)
def _backward_fake(
    _grads: Sequence[Tensor | None],
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    *arguments: Any,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    needs_input, needs_depthwise, needs_pointwise = arguments[-3:]
    return (
        torch.empty_like(x, memory_format=layout_of(x)) if needs_input else x.new_empty(0),
        [x.new_empty(weight.shape) for weight, need in zip(depthwise, needs_depthwise, strict=True) if need],
        [x.new_empty(weight.shape) for weight, need in zip(pointwise, needs_pointwise, strict=True) if need],
    )


def _reference_forward(x: Tensor, *group: Any) -> list[Tensor]:
    """The registered forward where no kernels are there."""
    results = (separable_conv2d_reference(x, *convolution) for convolution in _one_by_one(*group))
    return [y.contiguous(memory_format=layout_of(x)) for y in results]


def _reference_backward(grads: Sequence[Tensor | None], x: Tensor, *arguments: Any) -> tuple[Any, ...]:
    """The registered backward where no kernels are there."""
    d_x, *d_weights = _reference_gradients(grads, x, *arguments, create_graph=False)
    return (
        x.new_empty(0) if d_x is None else d_x.contiguous(memory_format=layout_of(x)),
        *([d_weight.contiguous() for d_weight in of_all] for of_all in d_weights),
    )


for _key in ("CUDA",) if WHY_NO_CPU_KERNELS is None else ("CPU", "CUDA"):
    _library.impl("separable_conv2d_group_forward", _reference_forward, _key)
    _library.impl("separable_conv2d_group_backward", _reference_backward, _key)


def _multiply_adds(x_shape: Any, depthwise_shape: Any, pointwise_shape: Any, *geometry: Any) -> tuple[int, int]:
    """Of the depthwise and of the pointwise convolution."""
    stride, padding, dilation = geometry
    rows, columns = (
        output_size(x_shape[2 + d], depthwise_shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1)
    )
    pixels = x_shape[0] * rows * columns
    return pixels * torch.Size(depthwise_shape).numel(), pixels * torch.Size(pointwise_shape).numel()


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_group_forward)
def _forward_flops(x_shape: Any, *group: Any, **_keywords: Any) -> int:
    """A multiplication and an addition per output element and tap of both, as torch counts convolutions."""
    return 2 * sum(sum(_multiply_adds(x_shape, *convolution[:5])) for convolution in _one_by_one(*group))


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_group_backward)
def _backward_flops(grads_shape: Sequence[Any], x_shape: Any, *arguments: Any, **_keywords: Any) -> int:
    """What two convolutions would take for each gradient asked for; rows computed again are not counted."""
    *group, needs_input, needs_depthwise, needs_pointwise = arguments
    convolutions = zip(_one_by_one(*group), grads_shape, needs_depthwise, needs_pointwise, strict=True)
    return sum(
        _backward_flops_of_one(*_multiply_adds(x_shape, *convolution[:5]), needs_input, *needed)
        for convolution, grad, *needed in convolutions
        if grad is not None
    )


def _backward_flops_of_one(
    depthwise: int, pointwise: int, needs_input: bool, needs_depthwise: bool, needs_pointwise: bool
) -> int:
    """From the multiply-adds of the depthwise and of the pointwise convolution."""
    through_pointwise = needs_input or needs_depthwise
    return 2 * (depthwise * (needs_input + needs_depthwise) + pointwise * (through_pointwise + needs_pointwise))
