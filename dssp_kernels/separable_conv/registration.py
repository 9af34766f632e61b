"""The registered operators of separable convolutions: schemas, shapes, FLOPs, the reference where no kernels are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import WHY_NO_CPU_KERNELS
from dssp_kernels.depthwise_conv.arguments import Pair, layout_of, output_size
from dssp_kernels.separable_conv.reference import batch_norm_reference, separable_conv2d_reference


class Geometry(NamedTuple):
    """What the operators are told of n convolutions beside their weights."""

    strides: Sequence[int]
    """[2n], as paddings and dilations are."""
    paddings: Sequence[int]
    dilations: Sequence[int]
    relu: Sequence[bool]
    follows: Sequence[int]
    """The convolution whose result, normalised, it reads; -1: it reads x. Those that read x come first."""
    eps: Sequence[float]
    """Of the norm between the two."""

    def of(self, k: int) -> tuple[Pair, Pair, Pair, bool]:
        """Stride, padding, dilation and relu of one convolution."""
        stride, padding, dilation = ((sizes[2 * k], sizes[2 * k + 1]) for sizes in self[:3])
        return stride, padding, dilation, self.relu[k]

    def results(self) -> list[int]:
        """The convolutions that no other one follows."""
        return [k for k in range(len(self.follows)) if k not in self.follows]

    def followed(self) -> list[int]:
        """The ones that others follow, in the order of these."""
        return [k for k in self.follows if k >= 0]


Statistics = tuple[list[Tensor], list[Tensor], list[Tensor]]
"""Of each norm between two convolutions: mean, unbiased variance, 1 / sqrt(biased variance + eps), [C] each."""


def maps_and_statistics(
    x: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], geometry: Geometry
) -> tuple[list[Tensor], Statistics]:
    """What all convolutions give, and the statistics between them, in plain PyTorch."""
    maps: list[Tensor] = []
    statistics: Statistics = ([], [], [])
    for k, (follows, eps) in enumerate(zip(geometry.follows, geometry.eps, strict=True)):
        read = x
        if follows >= 0:
            read, *found = batch_norm_reference(maps[follows], eps)
            for of_all, of_one in zip(statistics, found, strict=True):
                of_all.append(of_one)
        maps.append(separable_conv2d_reference(read, depthwise[k], pointwise[k], *geometry.of(k)))
    return maps, statistics


def reference_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    geometry: Geometry,
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
        maps, _ = maps_and_statistics(x, depthwise, pointwise, geometry)
    wanted = [x] if needs_input else []
    for weights, needed in ((depthwise, needs_depthwise), (pointwise, needs_pointwise)):
        wanted += [weight for weight, need in zip(weights, needed, strict=True) if need]
    results = [y for y, grad in zip(maps, grads, strict=True) if grad is not None]
    arrived = [grad for grad in grads if grad is not None]
    found = list(torch.autograd.grad(results, wanted, arrived, create_graph=create_graph))
    d_x = found.pop(0) if needs_input else None
    return d_x, found[: sum(needs_depthwise)], found[sum(needs_depthwise) :]


# ---- schemas and shapes ----------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_GROUP = (
    "Tensor[] depthwise, Tensor[] pointwise, int[] strides, int[] paddings, int[] dilations, bool[] relu, "
    "int[] follows, float[] eps"
)
_library.define(
    f"separable_conv2d_group_forward(Tensor x, {_GROUP}) -> (Tensor[], Tensor[], Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "separable_conv2d_group_backward(Tensor?[] grads, Tensor x, Tensor[] maps, Tensor[] means, Tensor[] scales, "
    f"{_GROUP}, bool needs_input_grad, bool[] needs_depthwise_grad, bool[] needs_pointwise_grad) "
    "-> (Tensor, Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


def _map_shapes(
    x_shape: Sequence[int], depthwise: Sequence[Sequence[int]], pointwise: Sequence[Sequence[int]], geometry: Geometry
) -> list[tuple[int, int, int, int]]:
    shapes: list[tuple[int, int, int, int]] = []
    for k, follows in enumerate(geometry.follows):
        batch, _, *image = x_shape if follows < 0 else shapes[follows]
        stride, padding, dilation, _ = geometry.of(k)
        rows, columns = (output_size(image[d], depthwise[k][2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1))
        shapes.append((batch, pointwise[k][0], rows, columns))
    return shapes


def _shapes_of(tensors: Sequence[Tensor]) -> list[torch.Size]:
    return [tensor.shape for tensor in tensors]


@torch.library.register_fake("dssp_kernels::separable_conv2d_group_forward", lib=_library)
def _forward_fake(
    x: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], *geometry: Any
) -> tuple[list[Tensor], ...]:
    told = Geometry(*geometry)
    shapes = _map_shapes(x.shape, _shapes_of(depthwise), _shapes_of(pointwise), told)
    statistics = (
        [x.new_empty(shapes[k][1], dtype=torch.promote_types(x.dtype, torch.float32)) for k in told.followed()]
        for _ in range(3)
    )
    layout = layout_of(x)
    return [torch.empty(s, dtype=x.dtype, device=x.device, memory_format=layout) for s in shapes], *statistics


@torch.library.register_fake("dssp_kernels::separable_conv2d_group_backward", lib=_library)
def _backward_fake(
    _grads: Sequence[Tensor | None],
    x: Tensor,
    _maps: Sequence[Tensor],
    _means: Sequence[Tensor],
    _scales: Sequence[Tensor],
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


# ---- where no kernels are --------------------------------------------------------------------------------------------


def _reference_forward(
    x: Tensor, depthwise: Sequence[Tensor], pointwise: Sequence[Tensor], *geometry: Any
) -> tuple[list[Tensor], ...]:
    maps, statistics = maps_and_statistics(x, depthwise, pointwise, Geometry(*geometry))
    return [y.contiguous(memory_format=layout_of(x)) for y in maps], *statistics


def _reference_backward(
    grads: Sequence[Tensor | None],
    x: Tensor,
    _maps: Sequence[Tensor],
    _means: Sequence[Tensor],
    _scales: Sequence[Tensor],
    depthwise: Sequence[Tensor],
    pointwise: Sequence[Tensor],
    *arguments: Any,
) -> tuple[Any, ...]:
    geometry, needs = Geometry(*arguments[:-3]), arguments[-3:]
    d_x, *d_weights = reference_gradients(grads, x, depthwise, pointwise, geometry, *needs, create_graph=False)
    return (
        x.new_empty(0) if d_x is None else d_x.contiguous(memory_format=layout_of(x)),
        *([d_weight.contiguous() for d_weight in of_all] for of_all in d_weights),
    )


for _key in ("CUDA",) if WHY_NO_CPU_KERNELS is None else ("CPU", "CUDA"):
    _library.impl("separable_conv2d_group_forward", _reference_forward, _key)
    _library.impl("separable_conv2d_group_backward", _reference_backward, _key)


# ---- FLOPs -----------------------------------------------------------------------------------------------------------


def _multiply_adds(
    x_shape: Any, depthwise: Sequence[Any], pointwise: Sequence[Any], geometry: Geometry
) -> Iterator[tuple[int, int]]:
    """Of each depthwise and each pointwise convolution."""
    shapes = _map_shapes(x_shape, depthwise, pointwise, geometry)
    for (batch, _, rows, columns), *weights in zip(shapes, depthwise, pointwise, strict=True):
        of_depthwise, of_pointwise = (batch * rows * columns * torch.Size(shape).numel() for shape in weights)
        yield of_depthwise, of_pointwise


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_group_forward)
def _forward_flops(x_shape: Any, depthwise: Any, pointwise: Any, *geometry: Any, **_keywords: Any) -> int:
    """A multiplication and an addition per output element and tap of all, as torch counts convolutions."""
    return 2 * sum(map(sum, _multiply_adds(x_shape, depthwise, pointwise, Geometry(*geometry))))


@register_flop_formula(torch.ops.dssp_kernels.separable_conv2d_group_backward)
def _backward_flops(
    grads: Sequence[Any],
    x_shape: Any,
    _maps: Any,
    _means: Any,
    _scales: Any,
    depthwise: Any,
    pointwise: Any,
    *arguments: Any,
    **_keywords: Any,
) -> int:
    """What two convolutions would take for each gradient asked for; rows computed again are not counted."""
    geometry, (needs_input, needs_depthwise, needs_pointwise) = Geometry(*arguments[:-3]), arguments[-3:]
    arrived = [grad is not None for grad in grads]
    goes_on = [needs_input] * len(grads)  # to what the convolution reads
    for k, follows in enumerate(geometry.follows):
        if follows >= 0:
            arrived[follows] = arrived[k]
            goes_on[k] = needs_input or needs_depthwise[follows] or needs_pointwise[follows]
    multiply_adds = _multiply_adds(x_shape, depthwise, pointwise, geometry)
    return sum(
        _backward_flops_of_one(*of_one, *needed)
        for came, of_one, *needed in zip(arrived, multiply_adds, goes_on, needs_depthwise, needs_pointwise, strict=True)
        if came
    )


def _backward_flops_of_one(
    depthwise: int, pointwise: int, needs_input: bool, needs_depthwise: bool, needs_pointwise: bool
) -> int:
    """From the multiply-adds of the depthwise and of the pointwise convolution."""
    through_pointwise = needs_input or needs_depthwise
    return 2 * (depthwise * (needs_input + needs_depthwise) + pointwise * (through_pointwise + needs_pointwise))
