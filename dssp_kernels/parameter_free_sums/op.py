"""parameter_free_sums: the function, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import backward_is_transformed, implementation_for
from dssp_kernels.depthwise_conv.arguments import output_size
from dssp_kernels.parameter_free_sums.reference import (
    IDENTITY,
    MAX,
    Functions,
    Sums,
    parameter_free_sums_reference,
)
from dssp_kernels.pointwise_batch_norm.op import LANES


def parameter_free_sums(
    x: Tensor, weights: Tensor, addends: Sequence[Tensor | None], sums: Sums, functions: Functions
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """What the candidates without parameters add to the nodes that a state has edges to:

        s_j = addends_j + sum_k weights[edges_j, candidates_k] * f_k(x)     over the k that sum j takes

    f_k is a pool, with or without the BatchNorm without weights that DARTS puts after it, or x itself. Each f_k(x) is
    computed once for all edges, and gets one gradient: in a mix per node, every edge would write and autograd add up
    one of each. An addend is what the states before have given to the node; its gradient is that of the sum, uncopied.

    Args:
        x: [B, C, H, W] that is_served().
        weights: [E, K], of the edges of a cell.
        addends: m tensors of the sums' shape, or None.
        sums, functions: see there; the functions' results have one shape.

    Returns:
        m sums, differentiable twice with respect to x, weights and addends, and of each function that is normalised
        the mean and the unbiased variance [C], without gradients. Statistics and the weights' gradients are summed in
        x's dtype along a row and in float64 over the rows; no result depends on the number of threads.
    """
    count = len(sums.edges)
    found = _ParameterFreeSums.apply(x, weights, sums, functions, *addends)
    norms = (len(found) - count) // 2
    return list(found[:count]), list(found[count : count + norms]), list(found[count + norms :])


def is_served(x: Tensor) -> bool:
    """Whether the C++ kernels are made for this state: pixels one after the other, of whole vectors of channels."""
    return (
        x.device.type == "cpu"
        and implementation_for(x.device) == "cpu"
        and x.dim() == 4
        and x.dtype in LANES
        and x.shape[1] % LANES[x.dtype] == 0
        and x.numel() > 0
        and x.is_contiguous(memory_format=torch.channels_last)
        and not torch.is_autocast_enabled("cpu")  # there convolutions' results are of another dtype
    )


def output_shape(shape: Sequence[int], functions: Functions, k: int) -> tuple[int, ...]:
    """That of f_k(x) for x of a shape."""
    batch, channels, *image = shape
    sizes = zip(image, *functions.geometry(k), strict=True)
    return batch, channels, *(output_size(size, kernel, stride, pad, 1) for size, kernel, stride, pad in sizes)


# ---- autograd --------------------------------------------------------------------------------------------------------


class _ParameterFreeSums(torch.autograd.Function):
    """Saves x, the weights, and of the pools what they gave and, of maxima, a byte per element."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, sums: Sums, functions: Functions, *addends: Tensor | None
    ) -> tuple[Tensor, ...]:
        results, pooled, positions, means, variances, scales = torch.ops.dssp_kernels.parameter_free_sums_forward(
            x,
            weights.contiguous(),
            [None if addend is None else _dense(addend) for addend in addends],
            *sums,
            *functions,
        )
        ctx.save_for_backward(x, weights, *pooled, *positions, *scales)
        ctx.sums, ctx.functions, ctx.sizes = sums, functions, (len(pooled), len(positions))
        ctx.mark_non_differentiable(*means, *variances)
        ctx.set_materialize_grads(False)
        return (*results, *means, *variances)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sums, functions = ctx.sums, ctx.functions
        of_sums = list(grads[: len(sums.edges)])  # statistics have none
        needs = ctx.needs_input_grad[:2]
        of_addends = [grad if need else None for grad, need in zip(of_sums, ctx.needs_input_grad[4:], strict=True)]
        if all(grad is None for grad in of_sums) or not any(needs):
            return None, None, None, None, *of_addends
        x, weights, *saved = ctx.saved_tensors
        if any(grad is not None and backward_is_transformed(grad) for grad in of_sums):
            gradients = _reference_gradients(of_sums, x, weights, sums, functions, needs)
            return *gradients, None, None, *of_addends
        pools, maxima = ctx.sizes
        maps = [_dense(tensor) for tensor in saved[:pools]]  # hooks on saved tensors may bring other memory
        rest = [tensor.contiguous() for tensor in saved[pools:]]
        d_x, d_weights = torch.ops.dssp_kernels.parameter_free_sums_backward(
            [None if grad is None else _dense(grad) for grad in of_sums],
            *(_dense(x), weights.contiguous(), maps, rest[:maxima], rest[maxima:], *sums, *functions, *needs),
        )
        return d_x if needs[0] else None, d_weights if needs[1] else None, None, None, *of_addends


def _dense(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last)


def _reference_gradients(
    grads: Sequence[Tensor | None],
    x: Tensor,
    weights: Tensor,
    sums: Sums,
    functions: Functions,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients of x and the weights as something that can be differentiated and batched: autograd on the reference."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        fresh = [tensor.view_as(tensor) for tensor in (x, weights)]
        results, _, _ = parameter_free_sums_reference(fresh[0], fresh[1], [None] * len(grads), sums, functions)
    reached = [result for result, grad in zip(results, grads, strict=True) if grad is not None]
    arrived = [grad for grad in grads if grad is not None]
    wanted = [tensor for tensor, need in zip(fresh, needs, strict=True) if need]
    found = iter(torch.autograd.grad(reached, wanted, arrived, create_graph=recorded))
    return [next(found) if need else None for need in needs]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_WHAT = (
    "int[] edges, int[] candidates, bool[] takes, int[] kinds, int[] kernel_sizes, int[] strides, int[] paddings, "
    "bool[] count_include_pad, bool[] normalised, float[] eps"
)
_library.define(
    f"parameter_free_sums_forward(Tensor x, Tensor weights, Tensor?[] addends, {_WHAT}) "
    "-> (Tensor[], Tensor[], Tensor[], Tensor[], Tensor[], Tensor[])",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "parameter_free_sums_backward(Tensor?[] grads, Tensor x, Tensor weights, Tensor[] pooled, Tensor[] positions, "
    f"Tensor[] scales, {_WHAT}, bool needs_input_grad, bool needs_weights_grad) -> (Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::parameter_free_sums_forward", lib=_library)
def _forward_fake(
    x: Tensor, weights: Tensor, addends: Sequence[Tensor | None], *arguments: Any
) -> tuple[list[Tensor], ...]:
    functions = Functions(*arguments[3:])
    shape = output_shape(x.shape, functions, 0)

    def empty() -> Tensor:
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    batch, channels, rows, columns = shape
    pooled = [empty() for kind in functions.kinds if kind != IDENTITY]
    bytes_each = batch * channels * rows * columns
    positions = [x.new_empty(bytes_each, dtype=torch.uint8) for kind in functions.kinds if kind == MAX]
    statistics = ([x.new_empty(channels) for _ in range(sum(functions.normalised))] for _ in range(3))
    return [empty() for _ in addends], pooled, positions, *statistics


@torch.library.register_fake("dssp_kernels::parameter_free_sums_backward", lib=_library)
def _backward_fake(
    _grads: Sequence[Tensor | None], x: Tensor, weights: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    needs_input_grad, needs_weights_grad = arguments[-2:]
    return (
        torch.empty_like(x, memory_format=torch.channels_last) if needs_input_grad else x.new_empty(0),
        torch.empty_like(weights) if needs_weights_grad else weights.new_empty(0),
    )


@register_flop_formula(torch.ops.dssp_kernels.parameter_free_sums_forward)
def _forward_flops(
    x_shape: Any, _weights: Any, _addends: Any, edges: Any, candidates: Any, takes: Any, *functions: Any, **_out: Any
) -> int:
    """A multiplication and an addition per element and function of each sum, as of a mix; torch counts no pools."""
    return 2 * sum(takes) * torch.Size(output_shape(x_shape, Functions(*functions), 0)).numel()


@register_flop_formula(torch.ops.dssp_kernels.parameter_free_sums_backward)
def _backward_flops(
    _grads: Any,
    x_shape: Any,
    _weights: Any,
    _pooled: Any,
    _positions: Any,
    _scales: Any,
    edges: Any,
    candidates: Any,
    takes: Any,
    *arguments: Any,
    **_out: Any,
) -> int:
    *functions, needs_input_grad, needs_weights_grad = arguments
    once = _forward_flops(x_shape, None, None, edges, candidates, takes, *functions)
    return once * (needs_input_grad + needs_weights_grad)
