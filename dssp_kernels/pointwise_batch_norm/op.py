"""pointwise_batch_norm: the public functions, the autograd.Function and the registered operators.

To autograd and the kernels, one convolution of one tensor is a group of one that reads one map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import DTYPES, autocast
from dssp_kernels.pointwise_batch_norm.reference import pointwise_batch_norm_reference

LANES = {torch.float32: 8, torch.float64: 4}
"""Channels in a vector of the C++ kernels, of the types that they keep sums in."""
Normalised = tuple[Tensor, Tensor, Tensor]
"""y, and the mean and the unbiased variance of what it was before."""


def pointwise_batch_norm(x: Tensor, weight: Tensor, *, relu: bool = False, eps: float = 1e-5) -> Normalised:
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
    _check_map("x", x)
    _check_weight("weight", weight, x, x.shape[1])
    return _group([x], [weight], bool(relu), [float(eps)], ["weight"])[0]


def pointwise_batch_norm_group(
    maps: Sequence[Tensor], weights: Sequence[Tensor], *, relu: bool = False, eps: Sequence[float] | None = None
) -> list[Normalised]:
    """Several pointwise convolutions with their BatchNorms that read the same maps, as if these lay side by side:

        [pointwise_batch_norm(x, weight, relu=relu, eps=e) for weight, e in zip(weights, eps)], x = cat(maps, dim=1)

    DARTS' cells put out the maps of their nodes, and the next two cells both read all of them. The C++ kernels, where
    they run, read every map once and give it one gradient; x does not exist.

    Args:
        maps: at least one, [B, C_m, H, W] each, which differ in nothing but C_m; see `x` of pointwise_batch_norm().
        weights: at least one, [C_out, C, 1, 1] each with C = sum C_m.
        relu: whether the maps pass through a ReLU first.
        eps: added to the variance, one per weight; 1e-5 by default.

    Returns:
        Per weight what pointwise_batch_norm() returns, but for rounding: gradients of a map are summed over all
        weights at once.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    for name, values in (("maps", maps), ("weights", weights)):
        if not isinstance(values, (list, tuple)):
            raise TypeError(f"{name}: expected a list or tuple of tensors, got {type(values).__name__}")
        if not values:
            raise ValueError(f"{name}: expected at least one tensor, got none")
    if eps is not None and len(eps) != len(weights):
        raise ValueError(f"eps: expected one per weight ({len(weights)}), got {len(eps)}")
    for m, x in enumerate(maps):
        _check_map(f"maps[{m}]", x)
        expected, got = ((t.shape[0], *t.shape[2:], t.dtype, t.device) for t in (maps[0], x))
        if got != expected:
            raise ValueError(f"maps[{m}]: expected (B, H, W, dtype, device) {expected} as of maps[0], got {got}")
    names = [f"weights[{k}]" for k in range(len(weights))]
    for name, weight in zip(names, weights, strict=True):
        _check_weight(name, weight, maps[0], sum(x.shape[1] for x in maps))
    return _group(maps, weights, bool(relu), [1e-5] * len(weights) if eps is None else list(map(float, eps)), names)


def is_served(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Whether the C++ kernels are made for this: pixels one after the other, each some whole vectors of channels."""
    lanes = LANES.get(maps[0].dtype, 0)
    return (
        lanes > 0
        and not any(weight.shape[0] % lanes for weight in weights)
        and all(not x.shape[1] % lanes and _is_dense(x) and x.numel() > 0 for x in maps)
    )


def _is_dense(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


def _check_map(name: str, x: Tensor) -> None:
    _check_tensor(name, x, "[B, C, H, W]")
    if x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"{name}: expected more than one value per channel, got shape {list(x.shape)}")


def _check_weight(name: str, weight: Tensor, x: Tensor, channels: int) -> None:
    _check_tensor(name, weight, "[C_out, C, 1, 1]")
    if weight.shape[0] == 0 or tuple(weight.shape[1:]) != (channels, 1, 1):
        expected = f"[C_out, C, 1, 1] with C = {channels} as in x"
        raise ValueError(f"{name}: expected shape {expected}, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"{name}: expected x's device {x.device}, got {weight.device}")


def _check_tensor(name: str, value: Tensor, shape: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
    if value.dtype not in DTYPES:
        raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if value.dim() != 4 or value.layout is not torch.strided:
        raise ValueError(f"{name}: expected a dense tensor {shape}, got {value.layout} of {list(value.shape)}")


def _group(
    maps: Sequence[Tensor], weights: Sequence[Tensor], relu: bool, eps: list[float], names: Sequence[str]
) -> list[Normalised]:
    tensors = autocast(*maps, *weights)
    maps, weights = tensors[: len(maps)], tensors[len(maps) :]
    for name, weight in zip(names, weights, strict=True):
        if weight.dtype != maps[0].dtype:
            raise TypeError(f"{name}: expected x's dtype {maps[0].dtype}, got {weight.dtype}")
    has_kernels = maps[0].device.type != "meta" and implementation_for(maps[0].device) == "cpu"
    if has_kernels and is_served(maps, weights):
        found = _PointwiseBatchNorm.apply(len(maps), relu, eps, *maps, *weights)
        return [found[k :: len(weights)] for k in range(len(weights))]
    return pointwise_batch_norm_reference(maps, weights, relu, eps)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _PointwiseBatchNorm(torch.autograd.Function):
    """Saves the maps and the results, which others hold anyway, and the weights."""

    @staticmethod
    def forward(ctx: Any, count: int, relu: bool, eps: list[float], *tensors: Tensor) -> tuple[Tensor, ...]:
        maps, weights = tensors[:count], tensors[count:]
        found = torch.ops.dssp_kernels.pointwise_batch_norm_forward(maps, weights, relu, eps)
        ys, means, variances, scales = found
        ctx.save_for_backward(*tensors, *ys, *scales)
        ctx.count, ctx.relu, ctx.eps = count, relu, eps
        ctx.mark_non_differentiable(*means, *variances)
        return (*ys, *means, *variances)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[3:]
        saved, results = ctx.saved_tensors[: len(needs)], ctx.saved_tensors[len(needs) :]
        maps, weights = saved[: ctx.count], saved[ctx.count :]
        ys, scales = results[: len(weights)], results[len(weights) :]
        grads = grads[: len(weights)]  # statistics have none
        if any(map(backward_is_transformed, grads)):
            return None, None, None, *_reference_gradients(grads, maps, weights, ctx.relu, ctx.eps, needs)
        dense = ([tensor.contiguous(memory_format=torch.channels_last) for tensor in of] for of in (grads, maps, ys))
        asked = any(needs[: ctx.count]), any(needs[ctx.count :])
        d_maps, d_weights = torch.ops.dssp_kernels.pointwise_batch_norm_backward(
            *dense, [scale.contiguous() for scale in scales], weights, ctx.relu, *asked
        )
        found = [*(d_maps or [None] * len(maps)), *(d_weights or [None] * len(weights))]
        return None, None, None, *(gradient if need else None for gradient, need in zip(found, needs, strict=True))


def _reference_gradients(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    weights: Sequence[Tensor],
    relu: bool,
    eps: Sequence[float],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients as something that can be differentiated and batched: autograd on the reference.

    Fresh views stand for the tensors, so that a weight computed from a map does not count twice.
    """
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = [tensor.view_as(tensor) for tensor in (*maps, *weights)]
        results = pointwise_batch_norm_reference(fresh[: len(maps)], fresh[len(maps) :], relu, eps)
    wanted = [tensor for tensor, need in zip(fresh, needs, strict=True) if need]
    found = iter(torch.autograd.grad([y for y, _, _ in results], wanted, grads, create_graph=recorded))
    return [next(found) if need else None for need in needs]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_library.define(
    "pointwise_batch_norm_forward(Tensor[] maps, Tensor[] weights, bool relu, float[] eps) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "pointwise_batch_norm_backward(Tensor[] grads, Tensor[] maps, Tensor[] ys, Tensor[] scales, Tensor[] weights, "
    "bool relu, bool needs_map_grads, bool needs_weight_grads) -> (Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::pointwise_batch_norm_forward", lib=_library)
def _forward_fake(
    maps: Sequence[Tensor], weights: Sequence[Tensor], relu: bool, eps: Sequence[float]
) -> tuple[list[Tensor], ...]:
    x = maps[0]
    shapes = [(x.shape[0], weight.shape[0], *x.shape[2:]) for weight in weights]
    ys = [torch.empty(s, dtype=x.dtype, device=x.device, memory_format=torch.channels_last) for s in shapes]
    return ys, *([x.new_empty(weight.shape[0]) for weight in weights] for _ in range(3))


@torch.library.register_fake("dssp_kernels::pointwise_batch_norm_backward", lib=_library)
def _backward_fake(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    ys: Sequence[Tensor],
    scales: Sequence[Tensor],
    weights: Sequence[Tensor],
    relu: bool,
    needs_map_grads: bool,
    needs_weight_grads: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    return (
        [torch.empty_like(x, memory_format=torch.channels_last) for x in maps] if needs_map_grads else [],
        [x.new_empty(x.shape) for x in weights] if needs_weight_grads else [],
    )


@register_flop_formula(torch.ops.dssp_kernels.pointwise_batch_norm_forward)
def _forward_flops(map_shapes: Any, weight_shapes: Any, *_arguments: Any, **_keywords: Any) -> int:
    """Those of the convolutions, as torch counts them; torch counts none of a BatchNorm."""
    batch, _, rows, columns = map_shapes[0]
    return sum(2 * batch * rows * columns * shape[0] * shape[1] for shape in weight_shapes)


@register_flop_formula(torch.ops.dssp_kernels.pointwise_batch_norm_backward)
def _backward_flops(
    _grads: Any,
    map_shapes: Any,
    _ys: Any,
    _scales: Any,
    weight_shapes: Any,
    _relu: bool,
    needs_map_grads: bool,
    needs_weight_grads: bool,
    **_keywords: Any,
) -> int:
    return _forward_flops(map_shapes, weight_shapes) * (needs_map_grads + needs_weight_grads)
