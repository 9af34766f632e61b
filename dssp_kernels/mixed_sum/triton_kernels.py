"""Triton kernels and launchers of mixed_sum: one launch forward, two backward, whatever E and K."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _edge_factors(
    alpha, mask, EDGE: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, SOFTMAX: tl.constexpr, ACC: tl.constexpr
):
    """The K scalars gate * weight of one edge."""
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.load(alpha + EDGE * K + k).to(ACC),)
    scale = tl.full([], 1.0, ACC)
    if mask is not None:
        scale = 1.0 / (1.0 + tl.exp(-tl.load(mask + (0 if SHARED else EDGE)).to(ACC)))
    if SOFTMAX:
        largest = weights[0]
        for k in tl.static_range(1, K):
            largest = tl.maximum(largest, weights[k])
        powers = ()
        total = tl.full([], 0.0, ACC)
        for k in tl.static_range(K):
            powers = powers + (tl.exp(weights[k] - largest),)
            total += powers[k]
        weights = powers
        scale = scale / total
    factors = ()
    for k in tl.static_range(K):
        factors = factors + (weights[k] * scale,)
    return factors


@triton.jit
def _add_edge(total, outputs, offsets, inside, factors, EDGE: tl.constexpr, K: tl.constexpr):
    """total + sum_k factors[k] * outputs[EDGE * K + k] at the offsets."""
    for k in tl.static_range(K):
        if outputs[EDGE * K + k] is not None:
            x = tl.load(outputs[EDGE * K + k] + offsets, mask=inside)  # [SIZE]
            total += factors[k] * x.to(total.dtype)
    return total


@triton.jit
def _mix(
    y,
    outputs,
    alpha,
    mask,
    active,
    start,
    end,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SIZE: tl.constexpr,
):
    """y[start:end], at most SIZE elements of it."""
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    offsets = start + tl.arange(0, SIZE)
    inside = offsets < end
    total = tl.zeros([SIZE], ACC)
    for e in tl.static_range(len(outputs) // K):
        if active is None:
            factors = _edge_factors(alpha, mask, e, K, SHARED, SOFTMAX, ACC)
            total = _add_edge(total, outputs, offsets, inside, factors, e, K)
        else:
            if tl.load(active + e):
                factors = _edge_factors(alpha, mask, e, K, SHARED, SOFTMAX, ACC)
                total = _add_edge(total, outputs, offsets, inside, factors, e, K)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=inside)  # [SIZE]


@triton.jit(do_not_specialize=["n"])
def mixed_sum_fwd_kernel(
    y,
    outputs,
    alpha,
    mask,
    active,
    n,
    K: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    whole = (n // VECTOR).to(tl.int64) * VECTOR
    if start < whole:
        _mix(y, outputs, alpha, mask, active, start, whole, K, SHARED, SOFTMAX, BLOCK)
    else:
        _mix(y, outputs, alpha, mask, active, whole, n, K, SHARED, SOFTMAX, VECTOR)


@triton.jit
def _block_backward(
    dots,
    grad,
    outputs,
    grads,
    factors,
    start,
    end,
    DOTS: tl.constexpr,
    EDGE: tl.constexpr,
    K: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
    ACC: tl.constexpr,
):
    offsets = start + tl.arange(0, SIZE)
    inside = offsets < end
    g = tl.load(grad + offsets, mask=inside, other=0.0).to(ACC)  # [SIZE]
    sums = ()
    for k in tl.static_range(K):
        if DOTS:
            if outputs[EDGE * K + k] is not None:
                x = tl.load(outputs[EDGE * K + k] + offsets, mask=inside, other=0.0)  # [SIZE]
                product = tl.reshape(g * x.to(ACC), [LANES, SIZE // LANES])
                sums = sums + (dots[k] + tl.sum(product, axis=1),)
            else:
                sums = sums + (dots[k],)
        if grads[EDGE * K + k] is not None:
            tl.store(grads[EDGE * K + k] + offsets, (factors[k] * g).to(grad.dtype.element_ty), mask=inside)
    return sums


@triton.jit
def _interleave(parts, WIDTH: tl.constexpr):
    """[LANES] x WIDTH -> [LANES, WIDTH]; WIDTH is a power of two."""
    LANES: tl.constexpr = parts[0].shape[0]
    for level in tl.static_range(1, WIDTH.bit_length()):
        half: tl.constexpr = WIDTH // 2**level
        joined = ()
        for i in tl.static_range(half):
            joined = joined + (tl.join(parts[i], parts[i + half]),)
        parts = joined
    return tl.reshape(parts[0], [LANES, WIDTH])


@triton.jit
def _live_edge_backward(
    grad,
    outputs,
    grads,
    partials,
    alpha,
    mask,
    n,
    EDGE: tl.constexpr,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    SHARED: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    STACK: tl.constexpr,
):
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    DOTS: tl.constexpr = partials is not None
    LANES: tl.constexpr = BLOCK // VECTOR
    pid = tl.program_id(1)
    programs = tl.num_programs(1)
    factors = _edge_factors(alpha, mask, EDGE, K, SHARED, SOFTMAX, ACC)
    dots = ()
    if DOTS:
        for _ in tl.static_range(K):
            dots = dots + (tl.zeros([LANES], ACC),)
    whole = (n // VECTOR).to(tl.int64) * VECTOR
    for start in range(pid.to(tl.int64) * BLOCK, whole, programs * BLOCK):
        dots = _block_backward(
            dots, grad, outputs, grads, factors, start, whole, DOTS, EDGE, K, BLOCK, LANES, ACC
        )
    for start in range(whole + programs - 1 - pid, n, VECTOR):
        dots = _block_backward(
            dots, grad, outputs, grads, factors, start, n, DOTS, EDGE, K, LANES, LANES, ACC
        )
    if DOTS:
        row = partials + (EDGE * programs + pid) * WIDTH
        if STACK:
            for _ in tl.static_range(WIDTH - K):
                dots = dots + (tl.zeros([LANES], ACC),)
            tl.store(row + tl.arange(0, WIDTH), tl.sum(_interleave(dots, WIDTH), axis=0))
        else:
            for k in tl.static_range(K):
                tl.store(row + k, tl.sum(dots[k]))


@triton.jit(do_not_specialize=["n"])
def mixed_sum_bwd_kernel(grad, outputs, grads, partials, alpha, mask, active, n, K: tl.constexpr, WIDTH: tl.constexpr, SHARED: tl.constexpr, SOFTMAX: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr, STACK: tl.constexpr):
    for e in tl.static_range(len(outputs) // K):
        if tl.program_id(0) == e:
            _live_edge_backward(grad, outputs, grads, partials, alpha, mask, n, e, K, WIDTH, SHARED, SOFTMAX, BLOCK, VECTOR, STACK)
