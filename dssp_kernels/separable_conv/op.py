"""separable_conv2d and separable_conv2d_group: the public functions and the autograd.Function.

To autograd and the kernels, a single convolution is a group of one.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dssp_kernels.backend import backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import Pair, autocast, output_size
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.running_statistics import update_running_statistics
from dssp_kernels.separable_conv.arguments import check_dtypes, check_norm, checked_separable
from dssp_kernels.separable_conv.registration import Geometry, reference_gradients

_T = TypeVar("_T")


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
    geometry = Geometry(strides, paddings, dilations, [relu], [-1], [0.0])
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


class SeparablePair(NamedTuple):
    """Two separable convolutions and a BatchNorm between them: DARTS' SepConv but for its last BatchNorm.

    norm: in training mode and without weight, bias and cumulative averages. Its running statistics are updated.
    """

    first: SeparableConvolution
    norm: nn.BatchNorm2d
    second: SeparableConvolution

    def __call__(self, x: Tensor) -> Tensor:
        """second(norm(first(x))), one after the other."""
        return self.second(self.norm(self.first(x)))


def separable_conv2d_group(x: Tensor, convolutions: Sequence[SeparableConvolution | SeparablePair]) -> list[Tensor]:
    """Separable convolutions of the same x, such as those that the candidates on an edge of DARTS' supernet start with:

        y_k = convolutions[k](x)

    To autograd they are one operation. Backward, an image goes through one convolution after the other, and each adds
    its gradient to those before it while they are in the cache. A result that nobody used costs nothing then.

    Of a SeparablePair, only what its first convolution gives, z, is kept beside x and the weights. Its moments are
    summed as its rows are written, in float32 along a row and in float64 over the rows, about a mean close by;
    norm(z) exists a row at a time, where the second convolution reads it, and so does the gradient of z.

    Args:
        x: [B, C, H, W], as in separable_conv2d().
        convolutions: at least one, or pairs. They may differ in everything but C.

    Returns:
        A list of what separable_conv2d() returns for each, bit for bit; for a pair, what its __call__ does, but for
        rounding. Where there are no C++ kernels, these do run.

    Differentiable twice with respect to x and all weights. Bit-reproducible on any number of threads. Gradients of x
    are added in the order of the convolutions, in float32 (float64 for float64), and rounded to x's dtype after each.

    Raises:
        TypeError, ValueError: naming the convolution and the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not isinstance(convolutions, (list, tuple)) or isinstance(convolutions, (SeparableConvolution, SeparablePair)):
        raise TypeError(f"convolutions: expected a list or tuple of them, got {type(convolutions).__name__}")
    if not convolutions:
        raise ValueError("convolutions: expected at least one, got none")
    reading_x, pairs = _parted(convolutions)
    if x.device.type == "meta" or implementation_for(x.device) != "cpu":
        return [_named(f"convolutions[{k}]", entry, x) for k, entry in enumerate(convolutions)]
    flat = [*reading_x, *(pair.second for pair in pairs.values())]
    depthwise, pointwise, *_, relu = zip(*flat, strict=True)
    strides, paddings, dilations = _checked_sizes(x, reading_x, pairs)
    x, *weights = autocast(x, *depthwise, *pointwise)
    names = [f"convolutions[{k}]" for k in range(len(convolutions))] + [f"convolutions[{k}].second" for k in pairs]
    for name, *two in zip(names, *_halves(weights), strict=True):
        _named(name, check_dtypes, x, *two)
    follows = [-1] * len(reading_x) + list(pairs)
    eps = [0.0] * len(reading_x) + [pair.norm.eps for pair in pairs.values()]
    geometry = Geometry(strides, paddings, dilations, list(relu), follows, eps)
    found = _SeparableConv2dGroup.apply(x, geometry, *weights)
    results, statistics = found[: len(convolutions)], found[len(convolutions) :]
    update_running_statistics(zip((pair.norm for pair in pairs.values()), *_halves(statistics), strict=True))
    order = [*(k for k in range(len(convolutions)) if k not in pairs), *pairs]
    return [y for _, y in sorted(zip(order, results, strict=True), key=operator.itemgetter(0))]


def _parted(
    convolutions: Sequence[SeparableConvolution | SeparablePair],
) -> tuple[list[SeparableConvolution], dict[int, SeparablePair]]:
    """The convolutions that read x, one per entry, and the pairs by their entry; errors for entries of other kinds."""
    reading_x: list[SeparableConvolution] = []
    pairs: dict[int, SeparablePair] = {}
    for k, entry in enumerate(convolutions):
        of_one: tuple[Any, ...] = (entry,)
        if isinstance(entry, SeparablePair):
            _named(f"convolutions[{k}]", check_norm, entry.norm)
            pairs[k] = entry
            of_one = entry.first, entry.second
        for convolution in of_one:
            if not isinstance(convolution, SeparableConvolution):
                kind = type(convolution).__name__
                raise TypeError(f"convolutions[{k}]: expected a SeparableConvolution or a SeparablePair, got {kind}")
        reading_x.append(of_one[0])
    return reading_x, pairs


def _checked_sizes(
    x: Tensor, reading_x: Sequence[SeparableConvolution], pairs: dict[int, SeparablePair]
) -> tuple[list[int], list[int], list[int]]:
    """Strides, paddings and dilations of those that read x, then of the second ones: two each."""
    sizes = [_named(f"convolutions[{k}]", checked_separable, x, *one[:5]) for k, one in enumerate(reading_x)]
    for k, (first, norm, second) in pairs.items():
        z = _stand_in(x, first, sizes[k])
        _named(f"convolutions[{k}]", check_norm, norm, z)
        sizes.append(_named(f"convolutions[{k}].second", checked_separable, z, *second[:5]))
    strides, paddings, dilations = ([size for pair in of_all for size in pair] for of_all in zip(*sizes, strict=True))
    return strides, paddings, dilations


def _named(name: str, check: Callable[..., _T], *arguments: Any) -> _T:
    """check(*arguments), whose errors then name the convolution."""
    try:
        return check(*arguments)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from None


def _stand_in(x: Tensor, convolution: SeparableConvolution, geometry: tuple[Pair, Pair, Pair]) -> Tensor:
    """A tensor of the shape that a convolution gives, without memory of its own."""
    kernel = convolution.depthwise.shape[2:]
    image = (output_size(x.shape[2 + d], kernel[d], *(pair[d] for pair in geometry)) for d in (0, 1))
    return x.new_empty(()).expand(x.shape[0], convolution.pointwise.shape[0], *image)


# ---- autograd --------------------------------------------------------------------------------------------------------


def _halves(values: Sequence[_T]) -> tuple[Sequence[_T], Sequence[_T]]:
    """What concerns the depthwise weights of all convolutions, and what the pointwise ones; means, and variances."""
    return values[: len(values) // 2], values[len(values) // 2 :]


class _SeparableConv2dGroup(torch.autograd.Function):
    """Saves x as it came, the weights, and of every pair the map and the statistics in the middle."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, geometry: Geometry, *weights: Tensor) -> tuple[Tensor, ...]:
        depthwise, pointwise = _halves(weights)
        operators = torch.ops.dssp_kernels
        maps, means, variances, scales = operators.separable_conv2d_group_forward(x, depthwise, pointwise, *geometry)
        ctx.save_for_backward(x, *weights, *(maps[k] for k in geometry.followed()), *means, *scales)
        ctx.set_materialize_grads(False)
        ctx.geometry = geometry
        frozen = [not (d.requires_grad or p.requires_grad) for d, p in zip(depthwise, pointwise, strict=True)]
        for k, follows in enumerate(geometry.follows):
            if follows >= 0:
                frozen[k] = frozen[k] and frozen[follows]
        results = geometry.results()
        without_grad = [] if x.requires_grad else [maps[k] for k in results if frozen[k]]  # no business of autograd's
        ctx.mark_non_differentiable(*means, *variances, *without_grad)
        return (*(maps[k] for k in results), *means, *variances)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        geometry: Geometry = ctx.geometry
        of_maps: list[Tensor | None] = [None] * len(geometry.follows)
        for k, grad in zip(geometry.results(), grads):  # noqa: B905  # statistics have none
            of_maps[k] = grad
        reached = list(of_maps)
        for k, follows in enumerate(geometry.follows):
            if follows >= 0:
                reached[follows] = of_maps[k]
        arrived = [grad for grad in of_maps if grad is not None]
        needs_input, _, *needs_weights = ctx.needs_input_grad
        needs_input = needs_input and bool(arrived)
        needs_weights = [need and grad is not None for need, grad in zip(needs_weights, reached * 2, strict=True)]
        if not (needs_input or any(needs_weights)):
            return (None,) * (2 + len(needs_weights))
        x, *saved = ctx.saved_tensors
        weights, inner = saved[: len(needs_weights)], saved[len(needs_weights) :]
        needs: Any = (needs_input, *_halves(needs_weights))
        if any(backward_is_transformed(grad) for grad in arrived):
            create_graph = torch.is_grad_enabled()
            found = reference_gradients(of_maps, x, *_halves(weights), geometry, *needs, create_graph=create_graph)
        else:
            pairs = len(inner) // 3
            maps, statistics = inner[:pairs], [statistic.contiguous() for statistic in inner[pairs:]]  # from hooks
            found = torch.ops.dssp_kernels.separable_conv2d_group_backward(
                of_maps, x, maps, *_halves(statistics), *_halves(weights), *geometry, *needs
            )
        d_x, *d_weights = found
        gradients = itertools.chain(*d_weights)
        return d_x if needs_input else None, None, *(next(gradients) if need else None for need in needs_weights)
