"""Triton kernels of mixed_sum.

Tensors are addressed flat, by element. All but the last n % VECTOR elements are read and written 16 bytes at a time
under a mask that is constant within 16 bytes; the last few go one by one, in code that exists only where there are any.
"""

from __future__ import annotations

import triton
import triton.language as tl

# ---- shared ----------------------------------------------------------------------------------------------------------


@triton.jit
def _issue_loads():
    """All loads above are on their way before one below starts.

    Left alone, the compiler saves registers by waiting for each before it issues the next. It moves no load over a
    barrier, hence no arithmetic that needs a value loaded behind it: callers load what all of theirs needs afterwards.
    """
    tl.debug_barrier()


@triton.jit
def _edge_factors(
    alpha, mask, edge, K: tl.constexpr, SHARED_MASK: tl.constexpr, SOFTMAX: tl.constexpr, ACC: tl.constexpr
):
    """The K scalars gate * weight of one edge, as a tuple."""
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.load(alpha + edge * K + k).to(ACC),)
    scale = tl.full([], 1.0, ACC)
    if mask is not None:
        scale = 1.0 / (1.0 + tl.exp(-tl.load(mask + (0 if SHARED_MASK else edge)).to(ACC)))
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


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit
def _add_edge(
    total,
    outputs,
    alpha,
    mask,
    edge,
    offsets,
    inside,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """total + sum_k gate * w_k * outputs[k]; outputs are the edge's own K."""
    factors = ()
    for first in tl.static_range(0, K, GROUP):
        inputs = ()
        for k in tl.static_range(first, min(first + GROUP, K)):
            x = offsets  # stands for an absent entry
            if outputs[k] is not None:
                x = tl.load(outputs[k] + offsets, mask=inside)  # [SIZE]
            inputs = inputs + (x,)
        _issue_loads()
        if first == 0:
            factors = _edge_factors(alpha, mask, edge, K, SHARED_MASK, SOFTMAX, total.dtype)
        for k in tl.static_range(first, min(first + GROUP, K)):
            if outputs[k] is not None:
                total += factors[k] * inputs[k - first].to(total.dtype)
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
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Elements start .. start + SIZE of y, as far as end."""
    offsets = start + tl.arange(0, SIZE)
    inside = offsets < end
    live = ()
    for e in tl.static_range(E):
        live = live + (True if active is None else tl.load(active + e),)
    total = tl.zeros([SIZE], tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32)
    for e in tl.static_range(E):
        if live[e]:
            edge = tl.full([], e, tl.int32)  # not a constant: the code of all edges is compiled once
            row = outputs[e * K : e * K + K]
            total = _add_edge(total, row, alpha, mask, edge, offsets, inside, K, GROUP, SHARED_MASK, SOFTMAX)
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=inside)  # [SIZE]


@triton.jit(do_not_specialize=["n"])
def mixed_sum_fwd_kernel(
    y,
    outputs,
    alpha,
    mask,
    active,
    n,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """y = sum_ek active[e] * sigmoid(mask[e]) * w[e, k] * outputs[e*K + k].

    Grid (blocks of whole vectors, and one program for the rest shorter than a vector if there is one).
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK
    whole = (n // VECTOR).to(tl.int64) * VECTOR
    if REST:  # noqa: SIM102  # known at compile time, the other at run time
        if start >= whole:
            _mix(y, outputs, alpha, mask, active, whole, n, E, K, GROUP, SHARED_MASK, SOFTMAX, VECTOR)
    _mix(y, outputs, alpha, mask, active, start, whole, E, K, GROUP, SHARED_MASK, SOFTMAX, BLOCK)


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit
def _differentiate(
    dots,
    grad,
    outputs,
    grads,
    factors,
    live,
    start,
    end,
    DOTS: tl.constexpr,
    COUNT: tl.constexpr,
    SIZE: tl.constexpr,
    LANES: tl.constexpr,
):
    """Write the input gradients of elements start .. start + SIZE, as far as end; dots + their <grad, outputs>."""
    ACC: tl.constexpr = factors[0].dtype
    offsets = start + tl.arange(0, SIZE)
    inside = offsets < end
    readable = inside if live is None else offsets < tl.where(live, end, 0)
    inputs = ()
    if DOTS:
        for i in tl.static_range(COUNT):
            x = offsets  # stands for an absent entry
            if outputs[i] is not None:
                x = tl.load(outputs[i] + offsets, mask=readable, other=0.0)  # [SIZE]
            inputs = inputs + (x,)
        _issue_loads()
    g = tl.load(grad + offsets, mask=readable, other=0.0).to(ACC)  # [SIZE]
    sums = ()
    for i in tl.static_range(COUNT):
        if grads[i] is not None:
            tl.store(grads[i] + offsets, (factors[i] * g).to(grad.dtype.element_ty), mask=inside)  # [SIZE]
        if DOTS:
            dot = dots[i]
            if outputs[i] is not None:
                dot += tl.sum(tl.reshape(g * inputs[i].to(ACC), [LANES, SIZE // LANES]), axis=1)
            sums = sums + (dot,)
    return sums


@triton.jit
def _sum_each(vectors, LANES: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr):
    """COUNT vectors [LANES] -> their sums [WIDTH], then zeros: one reduction, hence one synchronisation, for all."""
    parts = vectors
    for _ in tl.static_range(WIDTH - COUNT):
        parts = parts + (tl.zeros([LANES], vectors[0].dtype),)
    for level in tl.static_range(1, WIDTH.bit_length()):
        joined = ()
        for i in tl.static_range(WIDTH >> level):
            joined = joined + (tl.join(parts[i], parts[i + (WIDTH >> level)]),)
        parts = joined
    return tl.sum(tl.reshape(parts[0], [LANES, WIDTH]), axis=0)


@triton.jit
def _group_backward(
    grad,
    outputs,
    grads,
    partials,
    factors,
    live,
    n,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """This program's share of a group of candidates; partials points to its WIDTH places."""
    LANES: tl.constexpr = BLOCK // VECTOR
    DOTS: tl.constexpr = partials is not None
    program = tl.program_id(1)
    programs = tl.num_programs(1)
    dots = ()
    if DOTS:
        for _ in tl.static_range(COUNT):
            dots = dots + (tl.zeros([LANES], factors[0].dtype),)
    whole = (n // VECTOR).to(tl.int64) * VECTOR
    for start in range(program.to(tl.int64) * BLOCK, whole, programs * BLOCK):
        dots = _differentiate(dots, grad, outputs, grads, factors, live, start, whole, DOTS, COUNT, BLOCK, LANES)
    if REST:  # noqa: SIM102  # known at compile time, the other at run time
        if program == programs - 1:
            dots = _differentiate(dots, grad, outputs, grads, factors, live, whole, n, DOTS, COUNT, LANES, LANES)
    if DOTS:
        tl.store(partials + tl.arange(0, WIDTH), _sum_each(dots, LANES, COUNT, WIDTH))  # [WIDTH]


@triton.jit(do_not_specialize=["n"])
def mixed_sum_bwd_kernel(
    grad,
    outputs,
    grads,
    partials,
    alpha,
    mask,
    active,
    n,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
    BLOCK: tl.constexpr,
    VECTOR: tl.constexpr,
    REST: tl.constexpr,
):
    """grads[e*K + k] = factor[e, k] * grad; partials[e, program, k] = <grad, outputs[e*K + k]> in the program's share.

    Grid (E * groups of candidates, programs): what reads the same part of grad runs together and shares the cache.
    An inactive edge reads nothing, writes zero gradients and zero partial sums.
    """
    ACC: tl.constexpr = tl.float64 if grad.dtype.element_ty == tl.float64 else tl.float32
    GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
    WIDTH: tl.constexpr = min(GROUP, COLUMNS)
    edge = tl.program_id(0) // GROUPS
    factors = _edge_factors(alpha, mask, edge, K, SHARED_MASK, SOFTMAX, ACC)
    live = None
    if active is not None:
        live = tl.load(active + edge)
        kept = ()
        for k in tl.static_range(K):
            kept = kept + (tl.where(live, factors[k], 0.0),)  # alpha may be NaN
        factors = kept
    for i in tl.static_range(E * GROUPS):
        if tl.program_id(0) == i:
            first: tl.constexpr = i % GROUPS * GROUP
            place: tl.constexpr = i // GROUPS * K + first
            count: tl.constexpr = min(GROUP, K - first)
            row = None
            if partials is not None:
                row = partials + (edge * tl.num_programs(1) + tl.program_id(1)) * COLUMNS + first
            _group_backward(
                grad,
                outputs[place : place + count],
                grads[place : place + count],
                row,
                factors[first : first + count],
                live,
                n,
                count,
                WIDTH,
                BLOCK,
                VECTOR,
                REST,
            )


@triton.jit(do_not_specialize=["programs"])
def mixed_sum_bwd_finish_kernel(
    partials,
    grad_alpha,
    grad_mask,
    alpha,
    mask,
    active,
    programs,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    SHARED_MASK: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    """Partial sums [E, programs, COLUMNS] -> gradients of alpha and mask; grid (E), or (1) if edges share the mask."""
    ACC: tl.constexpr = partials.dtype.element_ty
    ABSENT: tl.constexpr = -float("inf") if SOFTMAX else 0.0
    candidates = tl.arange(0, COLUMNS)
    exists = candidates < K
    written = candidates < (K + GROUP - 1) // GROUP * GROUP
    first = tl.program_id(0)
    shared_total = tl.full([], 0.0, ACC)
    for e in range(first, E if SHARED_MASK else first + 1):
        d = tl.zeros([COLUMNS], ACC)
        for row in range(0, programs, ROWS):
            rows = row + tl.arange(0, ROWS)[:, None]
            tile = partials + (e * programs + rows) * COLUMNS + candidates[None, :]
            d += tl.sum(tl.load(tile, mask=(rows < programs) & written[None, :], other=0.0), axis=0)  # [ROWS, COLUMNS]
        w = tl.load(alpha + e * K + candidates, mask=exists, other=ABSENT).to(ACC)  # [COLUMNS]
        if SOFTMAX:
            w = tl.exp(w - tl.max(w))
            w = w / tl.sum(w)
        mean = tl.sum(w * d)
        d_alpha = w * (d - mean) if SOFTMAX else d
        d_mask = mean
        if mask is not None:
            gate = 1.0 / (1.0 + tl.exp(-tl.load(mask + (0 if SHARED_MASK else e)).to(ACC)))
            d_alpha = gate * d_alpha
            d_mask = gate * (1.0 - gate) * mean
        if active is not None:
            live = tl.load(active + e)
            d_alpha = tl.where(live, d_alpha, 0.0)
            d_mask = tl.where(live, d_mask, 0.0)
        tl.store(grad_alpha + e * K + candidates, d_alpha, mask=exists)  # [COLUMNS]
        if mask is not None:
            if SHARED_MASK:
                shared_total += d_mask
            else:
                tl.store(grad_mask + e, d_mask)
    if SHARED_MASK:
        tl.store(grad_mask, shared_total)
