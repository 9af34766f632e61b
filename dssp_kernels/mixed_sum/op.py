"""mixed_sum: the public function, its argument checks, the autograd.Function and the registered operators."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.backend import HAS_TRITON, WHY_NO_CPU_KERNELS, implementation_for
from dssp_kernels.mixed_sum.reference import mixed_sum_reference

RELAXATIONS = ("softmax", "given")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    tensors = _check_outputs(outputs)
    _check_parameters(outputs, tensors[0], alpha, mask, relaxation, active)
    dtype = tensors[0].dtype
    if any(tensor.dtype is not dtype for tensor in tensors):
        for tensor in tensors:
            dtype = torch.promote_types(dtype, tensor.dtype)
        outputs = [None if output is None else output.to(dtype) for output in outputs]
    outputs = _in_one_layout(outputs)
    alpha = alpha.contiguous()
    if mask is not None:
        mask = mask.reshape(-1).expand(_edges(alpha)).contiguous()
    softmax = relaxation == "softmax"
    implementation = implementation_for(alpha.device)
    if implementation == "reference":
        return mixed_sum_reference(outputs, alpha, mask, softmax, active)
    return _MixedSum.apply(implementation == "interpreter", softmax, alpha, mask, active, *outputs)


# ---- argument checks -----------------------------------------------------------------------------------------------


def _edges(alpha: Tensor) -> int:
    return alpha.shape[0] if alpha.dim() == 2 else 1


def _check_outputs(outputs: Sequence[Tensor | None]) -> list[Tensor]:
    """The entries that are tensors, all of one shape and device."""
    if not isinstance(outputs, (list, tuple)):
        raise TypeError(f"outputs: expected a list or tuple of tensors or None, got {type(outputs).__name__}")
    tensors = [output for output in outputs if output is not None]
    for i, output in enumerate(outputs):
        if output is not None and not isinstance(output, Tensor):
            raise TypeError(f"outputs[{i}]: expected a tensor or None, got {type(output).__name__}")
    if not tensors:
        raise ValueError(f"outputs: expected at least one tensor, got {len(outputs)} entries without any")
    shape, device = tensors[0].shape, tensors[0].device
    for i, output in enumerate(outputs):
        if output is None:
            continue
        if output.dtype not in _DTYPES:
            raise TypeError(f"outputs[{i}]: expected float16, bfloat16, float32 or float64, got {output.dtype}")
        if output.layout is not torch.strided:
            raise TypeError(f"outputs[{i}]: expected a dense (strided) tensor, got layout {output.layout}")
        if output.shape != shape:
            raise ValueError(f"outputs[{i}]: expected the first tensor's shape {list(shape)}, got {list(output.shape)}")
        if output.device != device:
            raise ValueError(f"outputs[{i}]: expected the first tensor's device {device}, got {output.device}")
    return tensors


def _check_parameters(
    outputs: Sequence[Tensor | None],
    first: Tensor,
    alpha: Tensor,
    mask: Tensor | None,
    relaxation: str,
    active: Tensor | None,
) -> None:
    if relaxation not in RELAXATIONS:
        raise ValueError(f"relaxation: expected one of {', '.join(RELAXATIONS)}, got {relaxation!r}")
    for name, value in (("alpha", alpha), ("mask", mask), ("active", active)):
        if value is None and name != "alpha":
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.device != first.device:
            raise ValueError(f"{name}: expected the outputs' device {first.device}, got {value.device}")
        if name == "active":
            if value.dtype is not torch.bool:
                raise TypeError(f"active: expected a bool tensor, got {value.dtype}")
        elif value.dtype not in _DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
    if alpha.dim() not in (1, 2) or alpha.numel() != len(outputs):
        raise ValueError(
            f"alpha: expected [K] or [E, K] with E*K = len(outputs) = {len(outputs)}, got shape {list(alpha.shape)}"
        )
    edges = _edges(alpha)
    if mask is not None and (mask.dim() > 1 or mask.numel() not in (1, edges)):
        raise ValueError(f"mask: expected shape [], [1] or [E] = [{edges}], got {list(mask.shape)}")
    if active is not None and active.shape != (edges,):
        raise ValueError(f"active: expected shape [E] = [{edges}], got {list(active.shape)}")


# ---- memory layout -------------------------------------------------------------------------------------------------


def _dense_order(tensor: Tensor) -> tuple[int, ...] | None:
    """Dimensions longer than 1 from outermost to innermost in memory, or None if there are gaps or overlaps.

    Tensors of one shape and equal order hold equal elements at equal flat offsets.
    """
    order = sorted((d for d in range(tensor.dim()) if tensor.shape[d] != 1), key=tensor.stride, reverse=True)
    expected = 1
    for d in reversed(order):
        if tensor.stride(d) != expected:
            return None
        expected *= tensor.shape[d]
    return tuple(order)


def _is_usual_layout(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or (tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last))


def _in_one_layout(outputs: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The same entries, all in the dense layout that most of them have; only the odd ones are copied."""
    tensors = [output for output in outputs if output is not None]
    strides = tensors[0].stride()
    if _is_usual_layout(tensors[0]) and all(tensor.stride() == strides for tensor in tensors):
        return outputs
    if tensors[0].numel() == 0:
        return [None if output is None else output.contiguous() for output in outputs]
    orders = [None if output is None else _dense_order(output) for output in outputs]
    dense = Counter(order for order in orders if order is not None)
    # Nothing dense at all: the layout PyTorch itself gives a copy of the first tensor.
    target = dense.most_common(1)[0][0] if dense else _dense_order(torch.empty_like(tensors[0]))
    assert target is not None
    return [
        output if output is None or order == target else _copy_in_order(output, target)
        for output, order in zip(outputs, orders, strict=True)
    ]


def _copy_in_order(tensor: Tensor, order: tuple[int, ...]) -> Tensor:
    """A differentiable copy whose dimensions lie in memory in ``order`` (dimensions of length 1 first)."""
    permutation = [d for d in range(tensor.dim()) if d not in order] + list(order)
    inverse = sorted(range(len(permutation)), key=permutation.__getitem__)
    return tensor.permute(permutation).contiguous().permute(inverse)


# ---- autograd ------------------------------------------------------------------------------------------------------


def _forward(interpreted: bool, *arguments: Any) -> Tensor:
    if interpreted:
        from dssp_kernels.mixed_sum import triton_kernels

        return triton_kernels.mixed_sum_forward(*arguments)
    return torch.ops.dssp_kernels.mixed_sum_forward(*arguments)


def _backward(interpreted: bool, *arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    if interpreted:
        from dssp_kernels.mixed_sum import triton_kernels

        return triton_kernels.mixed_sum_backward(*arguments)
    return torch.ops.dssp_kernels.mixed_sum_backward(*arguments)


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
        y = _forward(interpreted, outputs, alpha, mask, active, softmax)
        needs_parameter_grad = alpha.requires_grad or (mask is not None and mask.requires_grad)
        kept = outputs if needs_parameter_grad else [None] * len(outputs)
        ctx.save_for_backward(alpha, mask, active, *kept)
        ctx.interpreted, ctx.softmax, ctx.strides = interpreted, softmax, y.stride()
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        alpha, mask, active, *outputs = ctx.saved_tensors
        needs_alpha, needs_mask, _, *needs_output_grad = ctx.needs_input_grad[2:]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return None, None, *_differentiable_gradients(ctx, grad)
        if grad.stride() != ctx.strides:  # expanded by sum(), or laid out otherwise by what follows
            grad = torch.empty_strided(grad.shape, ctx.strides, dtype=grad.dtype, device=grad.device).copy_(grad)
        needs_parameter_grad = needs_alpha or needs_mask
        requested, d_alpha, d_mask = _backward(
            ctx.interpreted, grad, outputs, alpha, mask, active, ctx.softmax, needs_output_grad, needs_parameter_grad
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
    """Gradients for (alpha, mask, active, *outputs) that can be differentiated again, from the reference formula.

    Fresh views stand for the inputs, so that an output computed from another one does not count twice.
    """
    alpha, mask, active, *outputs = ctx.saved_tensors
    needed = ctx.needs_input_grad[2:]
    if not (needed[0] or needed[1]):  # linear in the outputs then, which were not saved: their values do not matter
        outputs = [torch.zeros_like(grad, requires_grad=True) if need else None for need in needed[3:]]
    inputs = [None if tensor is None else tensor.view_as(tensor) for tensor in (alpha, mask, active, *outputs)]
    y = mixed_sum_reference(inputs[3:], cast(Tensor, inputs[0]), inputs[1], ctx.softmax, inputs[2])
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need and tensor is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True, materialize_grads=True))
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


def _empty_as(tensor: Tensor) -> Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)


@torch.library.register_fake("dssp_kernels::mixed_sum_forward", lib=_library)
def _forward_fake(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, active: Tensor | None, softmax: bool
) -> Tensor:
    return _empty_as(next(output for output in outputs if output is not None))


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
    return [_empty_as(grad) for needed in needs_output_grad if needed], d_alpha, d_mask


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
    requested = [_empty_as(grad).copy_(d_output) for d_output in found[: len(wanted)]]
    d_alpha, d_mask = found[len(wanted)], found[-1] if mask is not None else alpha.new_empty(0)
    return (requested, d_alpha, d_mask) if needs_parameter_grad else (requested, alpha.new_empty(0), alpha.new_empty(0))


def _reference_forward(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, active: Tensor | None, softmax: bool
) -> Tensor:
    y = mixed_sum_reference(outputs, alpha, mask, softmax, active)
    return _empty_as(next(output for output in outputs if output is not None)).copy_(y)


if WHY_NO_CPU_KERNELS is not None:
    _library.impl("mixed_sum_forward", _reference_forward, "CPU")
    _library.impl("mixed_sum_backward", _reference_backward, "CPU")


def _cuda_forward(*arguments: Any) -> Tensor:
    from dssp_kernels.mixed_sum import triton_kernels

    return triton_kernels.mixed_sum_forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    from dssp_kernels.mixed_sum import triton_kernels

    return triton_kernels.mixed_sum_backward(*arguments)


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
