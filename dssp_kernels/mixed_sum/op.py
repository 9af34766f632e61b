"""mixed_sum: the public function, its argument checks, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.arguments import checked_mixture, empty_as, with_strides
from dssp_kernels.backend import HAS_TRITON, WHY_NO_CPU_KERNELS, backward_is_transformed, implementation_for
from dssp_kernels.mixed_sum.reference import mixed_sum_reference


def mixed_sum(
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None = None,
    *,
    relaxation: str = "softmax",
    active: Tensor | None = None,
) -> Tensor:
    """Sum of E edges, each a gated mix of K candidate operations, in one kernel (DARTS eq. 2, with a gate per edge):

        y = sum_e sigmoid(mask_e) * sum_k w_ek * outputs[e*K + k],    w = softmax(alpha, -1)

    Args:
        outputs: E*K entries, edge-major; each a tensor or None (the zero op: it keeps its share of the softmax and adds
            nothing). One shape, one device; float16, bfloat16, float32 or float64, which may differ between entries.
        alpha: [K] or [E, K], the architecture parameters (logits); under ``relaxation="given"`` the weights themselves.
        mask: None (gate 1), [] / [1] (one gate for all edges) or [E]: gate logits.
        relaxation: ``"softmax"`` or ``"given"``.
        active: None or bool [E] on the outputs' device. An inactive edge is neither read nor added and all its
            gradients are exact zeros. Read by the kernel: no host synchronisation.

    Returns:
        A tensor of the outputs' shape, promoted dtype and memory layout (contiguous, channels_last or any dense
        permutation; where entries differ, the layout most of them have). Sums are float32 (float64 for float64).

    Differentiable twice with respect to every output, alpha and mask. Bit-reproducible.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    outputs, alpha, mask = checked_mixture(outputs, alpha, mask, relaxation, active)
    active = None if active is None else active.contiguous()  # a column of a table, say
    softmax = relaxation == "softmax"
    implementation = implementation_for(alpha.device)
    if implementation == "reference":
        return mixed_sum_reference(outputs, alpha, mask, softmax, active)
    interpreted = implementation == "interpreter"
    if not torch.is_grad_enabled():  # what autograd.Function costs is a third of a small mix
        return _operators(interpreted).mixed_sum_forward(outputs, alpha, mask, active, softmax)
    return _MixedSum.apply(interpreted, softmax, alpha, mask, active, *outputs)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _operators(triton: bool) -> Any:
    """Where the operators are functions by their names: Triton's launchers, or what is registered for each device."""
    if triton:
        from dssp_kernels.mixed_sum import triton_launchers

        return triton_launchers
    return torch.ops.dssp_kernels


class _MixedSum(torch.autograd.Function):
    """Saves the candidates' outputs only if alpha or mask needs a gradient: a weight step keeps none of them alive."""

    @staticmethod
    def forward(
        ctx: Any,
        interpreted: bool,
        softmax: bool,
        alpha: Tensor,
        mask: Tensor | None,
        active: Tensor | None,
        *outputs: Tensor | None,
    ) -> Tensor:
        y = _operators(interpreted).mixed_sum_forward(outputs, alpha, mask, active, softmax)
        needs_parameter_grad = alpha.requires_grad or (mask is not None and mask.requires_grad)
        kept = outputs if needs_parameter_grad else [None] * len(outputs)
        ctx.save_for_backward(alpha, mask, active, *kept)
        ctx.interpreted, ctx.softmax, ctx.strides = interpreted, softmax, y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, mask, active, *outputs = ctx.saved_tensors
        needs_alpha, needs_mask, _, *needs_output_grad = ctx.needs_input_grad[2:]
        if backward_is_transformed(grad):
            return None, None, *_differentiable_gradients(ctx, grad)
        grad = with_strides(grad, ctx.strides)
        outputs = [None if output is None else with_strides(output, ctx.strides) for output in outputs]
        alpha, mask, active = [None if tensor is None else tensor.contiguous() for tensor in (alpha, mask, active)]
        needs_parameter_grad = needs_alpha or needs_mask
        requested, d_alpha, d_mask = _operators(ctx.interpreted).mixed_sum_backward(
            grad, outputs, alpha, mask, active, ctx.softmax, needs_output_grad, needs_parameter_grad
        )
        d_outputs = iter(requested)
        return (
            None,
            None,
            d_alpha if needs_alpha else None,
            d_mask if needs_mask else None,
            None,
            *(next(d_outputs) if needed else None for needed in needs_output_grad),
        )


def _differentiable_gradients(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """Gradients for (alpha, mask, active, *outputs) that can be differentiated and batched, from the reference formula.

    Fresh views stand for the inputs, so that an output computed from another one does not count twice.
    """
    alpha, mask, active, *outputs = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:]
    if not (needed[0] or needed[1]):  # linear in the outputs then, which were not saved: their values do not matter
        outputs = [torch.zeros_like(grad, requires_grad=True) if need else None for need in needed[3:]]
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (alpha, mask, active, *outputs)]
        y = mixed_sum_reference(inputs[3:], cast(Tensor, inputs[0]), inputs[1], ctx.softmax, inputs[2])
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=recorded, materialize_grads=True))
    return [next(found) if need else None for need in needed]


# ---- registration --------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_library.define(
    "mixed_sum_forward(Tensor?[] outputs, Tensor alpha, Tensor? mask, Tensor? active, bool softmax) -> Tensor",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "mixed_sum_backward(Tensor grad, Tensor?[] outputs, Tensor alpha, Tensor? mask, Tensor? active, bool softmax, "
    "bool[] needs_output_grad, bool needs_parameter_grad) -> (Tensor[], Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)


@torch.library.register_fake("dssp_kernels::mixed_sum_forward", lib=_library)
def _forward_fake(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, active: Tensor | None, softmax: bool
) -> Tensor:
    return empty_as(next(output for output in outputs if output is not None))


@torch.library.register_fake("dssp_kernels::mixed_sum_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    softmax: bool,
    needs_output_grad: Sequence[bool],
    needs_parameter_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    d_alpha = torch.empty_like(alpha) if needs_parameter_grad else alpha.new_empty(0)
    d_mask = torch.empty_like(mask) if needs_parameter_grad and mask is not None else alpha.new_empty(0)
    return [empty_as(grad) for needed in needs_output_grad if needed], d_alpha, d_mask


def _reference_backward(
    grad: Tensor,
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    softmax: bool,
    needs_output_grad: Sequence[bool],
    needs_parameter_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The registered backward where no kernels are there: autograd on the reference formula."""
    with torch.enable_grad():
        leaves = [
            (torch.zeros_like(grad) if output is None else output.detach()).requires_grad_()
            if output is not None or needed
            else None
            for output, needed in zip(outputs, needs_output_grad, strict=True)
        ]
        parameters = [alpha.detach().requires_grad_()]
        if mask is not None:
            parameters.append(mask.detach().requires_grad_())
        y = mixed_sum_reference(leaves, parameters[0], parameters[1] if mask is not None else None, softmax, active)
        wanted = [leaf for leaf, needed in zip(leaves, needs_output_grad, strict=True) if needed and leaf is not None]
        found = torch.autograd.grad(y, [*wanted, *parameters], grad, materialize_grads=True)
    requested = [empty_as(grad).copy_(d_output) for d_output in found[: len(wanted)]]
    d_alpha, d_mask = found[len(wanted)], found[-1] if mask is not None else alpha.new_empty(0)
    return (requested, d_alpha, d_mask) if needs_parameter_grad else (requested, alpha.new_empty(0), alpha.new_empty(0))


def _reference_forward(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, active: Tensor | None, softmax: bool
) -> Tensor:
    y = mixed_sum_reference(outputs, alpha, mask, softmax, active)
    return empty_as(next(output for output in outputs if output is not None)).copy_(y)


if WHY_NO_CPU_KERNELS is not None:
    _library.impl("mixed_sum_forward", _reference_forward, "CPU")
    _library.impl("mixed_sum_backward", _reference_backward, "CPU")


def _cuda_forward(*arguments: Any) -> Tensor:
    return _operators(True).mixed_sum_forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    return _operators(True).mixed_sum_backward(*arguments)


_library.impl("mixed_sum_forward", _cuda_forward if HAS_TRITON else _reference_forward, "CUDA")
_library.impl("mixed_sum_backward", _cuda_backward if HAS_TRITON else _reference_backward, "CUDA")


@register_flop_formula(torch.ops.dssp_kernels.mixed_sum_forward)
def _forward_flops(
    outputs_shape: Sequence[Any], *_arguments: Any, out_shape: Any = None, out_val: Any = None, **_keywords: Any
) -> int:
    """A multiplication and an addition per element of every entry that is there."""
    present = [shape for shape in outputs_shape if shape is not None]
    return 2 * len(present) * torch.Size(present[0]).numel()


@register_flop_formula(torch.ops.dssp_kernels.mixed_sum_backward)
def _backward_flops(
    grad_shape: Any,
    outputs_shape: Sequence[Any],
    _alpha: Any,
    _mask: Any,
    _active: Any,
    _softmax: bool,
    needs_output_grad: Sequence[bool],
    needs_parameter_grad: bool,
    **_keywords: Any,
) -> int:
    """A multiplication per element of every gradient asked for, two operations per element of every dot product."""
    dots = sum(shape is not None for shape in outputs_shape) if needs_parameter_grad else 0
    return (sum(needs_output_grad) + 2 * dots) * torch.Size(grad_shape).numel()
