"""Launchers of mixed_sum's Triton kernels: one launch forward, two backward, whatever E and K."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dssp_kernels.mixed_sum.triton_kernels import (
    mixed_sum_bwd_finish_kernel,
    mixed_sum_bwd_kernel,
    mixed_sum_fwd_kernel,
)
from dssp_kernels.triton_launch import THREADS, cdiv, launch, power_of_two, sum_dtype

# Candidates whose loads are in flight together, a power of two. In the backward pass also those that one program
# serves, so that registers do not grow with K.
GROUP = 8
# Programs of the backward pass per group at most; each loops over its share. A constant, so that the partial sums stay
# few and results do not depend on the device; enough to fill the largest GPU.
PROGRAMS = 1024
FINISH_ELEMENTS = 8192  # partial sums that the finishing kernel reads at a time: 128 bytes per thread
FINISH_WARPS = 8


def _block(itemsize: int, candidates: int) -> tuple[int, int]:
    """(elements per program and step, elements per 16 bytes): about eight 16-byte loads in flight per thread.

    Many candidates bring enough loads by themselves; more would only cost registers and with them resident programs.
    """
    vector = 16 // itemsize
    return THREADS * vector * (4 if candidates <= 2 else 2 if candidates <= 4 else 1), vector


def mixed_sum_forward(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, active: Tensor | None, softmax: bool
) -> Tensor:
    """The registered operator on CUDA. Relies on op.py: entries of one shape, dtype, device and dense strides."""
    y = torch.empty_like(next(output for output in outputs if output is not None))
    n, candidates = y.numel(), alpha.shape[-1]
    if n == 0:
        return y
    edges = len(outputs) // candidates
    block, vector = _block(y.element_size(), candidates)
    grid = (cdiv(n // vector, block // vector) + (n % vector > 0),)
    with torch.cuda.device_of(y):
        launch(
            mixed_sum_fwd_kernel,
            grid,
            y,
            tuple(outputs),
            alpha,
            mask,
            active,
            n,
            E=edges,
            K=candidates,
            GROUP=GROUP,
            SHARED_MASK=mask is not None and mask.numel() < edges,
            SOFTMAX=softmax,
            BLOCK=block,
            VECTOR=vector,
            REST=n % vector > 0,
        )
    return y


def mixed_sum_backward(
    grad: Tensor,
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    softmax: bool,
    needs_output_grad: Sequence[bool],
    needs_parameter_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The registered operator on CUDA: gradients asked for, in order; of alpha; of mask (empty if not asked for)."""
    grads = [torch.empty_like(grad) if needed else None for needed in needs_output_grad]
    requested = [tensor for tensor in grads if tensor is not None]
    n, candidates = grad.numel(), alpha.shape[-1]
    edges = len(outputs) // candidates
    grad_alpha = torch.empty_like(alpha) if needs_parameter_grad else alpha.new_empty(0)
    grad_mask = torch.empty_like(mask) if needs_parameter_grad and mask is not None else alpha.new_empty(0)
    if n == 0:
        return requested, grad_alpha.zero_(), grad_mask.zero_()
    if not requested and not needs_parameter_grad:
        return requested, grad_alpha, grad_mask
    block, vector = _block(grad.element_size(), candidates)
    programs = min(PROGRAMS, cdiv(n, block))
    columns = power_of_two(candidates)
    shared_mask = mask is not None and mask.numel() < edges
    with torch.cuda.device_of(grad):
        partials = None
        if needs_parameter_grad:
            partials = torch.empty((edges, programs, columns), dtype=sum_dtype(grad), device=grad.device)
        launch(
            mixed_sum_bwd_kernel,
            (edges * cdiv(candidates, GROUP), programs),
            grad,
            tuple(outputs) if needs_parameter_grad else (None,) * len(outputs),
            tuple(grads),
            partials,
            alpha,
            mask,
            active,
            n,
            E=edges,
            K=candidates,
            GROUP=GROUP,
            COLUMNS=columns,
            SHARED_MASK=shared_mask,
            SOFTMAX=softmax,
            BLOCK=block,
            VECTOR=vector,
            REST=n % vector > 0,
        )
        if partials is not None:
            launch(
                mixed_sum_bwd_finish_kernel,
                (1 if shared_mask else edges,),
                partials,
                grad_alpha,
                grad_mask,
                alpha,
                mask,
                active,
                programs,
                E=edges,
                K=candidates,
                GROUP=GROUP,
                COLUMNS=columns,
                ROWS=max(1, min(PROGRAMS, FINISH_ELEMENTS // columns)),
                SHARED_MASK=shared_mask,
                SOFTMAX=softmax,
                num_warps=FINISH_WARPS,
            )
    return requested, grad_alpha, grad_mask
