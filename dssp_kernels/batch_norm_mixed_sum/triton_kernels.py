"""Triton kernels of batch_norm_mixed_sum.

A dense tensor is [outer, channels, inner] in memory: contiguous has inner = H * W, channels_last inner = 1. A program
owns a block of channels, so what is known per channel is loaded once, and walks its units in tiles [LANES, WIDTH]:

    contiguous      a unit is WIDTH neighbours of the one channel in the block
    channels_last   a unit is a row (b, h, w); its WIDTH columns are the channels of the block
"""

from __future__ import annotations

import triton
import triton.language as tl

from dssp_kernels.batch_norm_mixed_sum import reference
from dssp_kernels.mixed_sum.triton_kernels import _issue_loads, mixed_sum_bwd_finish_kernel

PLAIN = tl.constexpr(reference.PLAIN)
BATCH = tl.constexpr(reference.BATCH)


# ---- shared ----------------------------------------------------------------------------------------------------------


@triton.jit
def _aligned(channels, ALIGN: tl.constexpr, COLUMNS: tl.constexpr):
    """The number of channels; where they are neighbours, the compiler sees what it is a multiple of."""
    return channels if COLUMNS == 1 else channels // ALIGN * ALIGN


@triton.jit
def _offsets(
    start,
    block,
    channels,
    run,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """Offsets [LANES, WIDTH] of the units start .. start + LANES of a block of channels."""
    lane = tl.arange(0, LANES)
    if run is None:
        first = (start + lane) * (channels // ALIGN * ALIGN) + block * WIDTH
    else:
        lane = (start % run).to(run.dtype) + lane
        first = (((start // run + lane // run) * channels + block) * run + lane % run) * WIDTH
    return first[:, None] + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _of_channels(tile, COLUMNS: tl.constexpr):
    """A tile [LANES, WIDTH] as [values of a channel, channels]."""
    return tl.reshape(tile, [tile.shape[0] * tile.shape[1] // COLUMNS, COLUMNS])


@triton.jit
def _members(tensors, like, active, group, edge, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """GROUP pairs (tensors[group * GROUP + i] or like, whether that tensor is there and its edge active).

    The pointer is selected, so the code that uses it exists once, not once per group.
    """
    live = group >= 0
    if active is not None:
        live = tl.load(active + edge)
    members = ()
    for i in tl.static_range(GROUP):
        tensor = like
        there = group < 0
        for g in tl.static_range(GROUPS):
            if tensors[g * GROUP + i] is not None:
                tensor = tl.where(group == g, tensors[g * GROUP + i], tensor)
                there = there | (group == g)
        members = members + ((tensor, there & live),)
    return members


# ---- tables: what is known per entry and channel ---------------------------------------------------------------------


@triton.jit
def _known(values: tl.constexpr, entry, start):
    """values[entry] of a tuple of constants."""
    found = start
    for i in tl.static_range(len(values)):
        found = tl.where(entry == i, values[i], found)
    return found


@triton.jit
def _per_channel(tensors, COUNT: tl.constexpr, entry, channel, exists, default: tl.constexpr):
    """tensors[entry] at these channels, or the default, in float64. COUNT: their number, zero if no entry has any."""
    values = tl.full(channel.shape, default, tl.float64)
    for i in tl.static_range(COUNT):
        if tensors[i] is not None:  # noqa: SIM102  # known at compile time, the other at run time
            if entry == i:
                values = tl.load(tensors[i] + channel, mask=exists, other=default).to(tl.float64)
    return values


@triton.jit
def _coefficient(alpha, mask, entry, K: tl.constexpr, CANDIDATES: tl.constexpr, SOFTMAX: tl.constexpr):
    """gate * weight of an entry, float64."""
    ABSENT: tl.constexpr = -float("inf") if SOFTMAX else 0.0
    edge = entry // K
    candidates = tl.arange(0, CANDIDATES)
    w = tl.load(alpha + edge * K + candidates, mask=candidates < K, other=ABSENT).to(tl.float64)  # [CANDIDATES]
    if SOFTMAX:
        w = tl.exp(w - tl.max(w))
        w = w / tl.sum(w)
    coefficient = tl.sum(tl.where(candidates == entry % K, w, 0.0))
    if mask is not None:
        coefficient = coefficient / (1.0 + tl.exp(-tl.load(mask + edge).to(tl.float64)))
    return coefficient


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["units", "share", "run", "channels"])
def batch_norm_mixed_sum_statistics_kernel(
    outputs,
    partials,
    active,
    units,
    share,
    run,
    channels,
    E: tl.constexpr,
    K: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """partials [entry, split, 3, channel]: reference, mean minus reference, sum of squared deviations of that share.

    Grid (blocks of channels, splits, E*K). Each lane sums deviations from the first value it meets, which is among its
    values, so squares of n values lose no more than n roundings, whatever the mean is. Lanes merge as in Chan, Golub
    and LeVeque (1979).
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    block = tl.program_id(0)
    entry = tl.program_id(2)
    x = None
    exists = entry < 0
    for i in tl.static_range(E * K):
        if outputs[i] is not None:
            x = outputs[i] if x is None else tl.where(entry == i, outputs[i], x)
            exists = exists | (entry == i)
    if active is not None:
        exists = exists & tl.load(active + entry // K)
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.where(exists, tl.minimum(begin + share, units), begin)
    row = _aligned(channels, ALIGN, COLUMNS)
    columns = (block * COLUMNS + tl.arange(0, COLUMNS) < row)[None, :]
    lane = tl.arange(0, LANES)
    first = tl.full([LANES, WIDTH], 0.0, ACC)
    total = tl.full([LANES, WIDTH], 0.0, ACC)
    squares = tl.full([LANES, WIDTH], 0.0, ACC)
    for start in range(begin, end, LANES * VECTORS):
        values = ()
        insides = ()
        for v in tl.static_range(VECTORS):
            at = start + v * LANES
            insides = insides + ((at + lane < end)[:, None],)
            offsets = _offsets(at, block, channels, run, LANES, WIDTH, ALIGN)
            values = values + (tl.load(x + offsets, mask=insides[v] & columns, other=0.0),)  # [LANES, WIDTH]
        _issue_loads()
        for v in tl.static_range(VECTORS):
            if v == 0:
                first = tl.where(start == begin, values[v].to(ACC), first)
            deviation = tl.where(insides[v], values[v].to(ACC) - first, 0.0)
            total += deviation
            squares += deviation * deviation
    count = tl.maximum((end - begin - lane + LANES - 1) // LANES, 0).to(ACC)[:, None] + tl.full(
        [LANES, WIDTH], 0.0, ACC
    )
    mean = total / tl.maximum(count, 1.0)
    squares = _of_channels(squares - total * mean, COLUMNS)
    count = _of_channels(count, COLUMNS)
    first = _of_channels(first, COLUMNS)
    reference = tl.max(tl.where(count > 0, first, -float("inf")), axis=0)  # [COLUMNS], any near the others serves
    mean = tl.where(count > 0, first - reference[None, :] + _of_channels(mean, COLUMNS), 0.0)
    merged = tl.sum(count * mean, axis=0) / tl.maximum((end - begin) * (WIDTH // COLUMNS), 1).to(ACC)
    apart = tl.where(count > 0, mean - merged[None, :], 0.0)
    squares = tl.sum(squares + count * apart * apart, axis=0)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    place = partials + (entry * tl.num_programs(1) + tl.program_id(1)).to(tl.int64) * 3 * channels + channel
    tl.store(place, reference, mask=channel < channels)  # [COLUMNS]
    tl.store(place + channels, merged, mask=channel < channels)
    tl.store(place + 2 * channels, squares, mask=channel < channels)


@triton.jit
def _merged(
    partials, entry, channel, present, units, share, splits, channels, POSITIONS: tl.constexpr, ROWS: tl.constexpr
):
    """(mean, variance) of an entry at these channels from the partial statistics, zeros where not present; float64."""
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64)
    readable = (rows < splits) & present[None, :]
    count = tl.where(readable, tl.minimum(units - rows * share, share) * POSITIONS, 0).to(
        tl.float64
    )  # [ROWS, CHANNELS]
    place = partials + (entry * splits + rows) * 3 * channels + channel[None, :]
    reference = tl.load(place, mask=readable, other=0.0).to(tl.float64)
    mean = reference + tl.load(place + channels, mask=readable, other=0.0).to(tl.float64)
    squares = tl.load(place + 2 * channels, mask=readable, other=0.0).to(tl.float64)
    total = (units * POSITIONS).to(tl.float64)
    merged = tl.sum(count * mean, axis=0) / total
    apart = tl.where(readable, mean - merged[None, :], 0.0)
    return merged, tl.sum(squares + count * apart * apart, axis=0) / total


@triton.jit(do_not_specialize=["units", "share", "splits", "channels"])
def batch_norm_mixed_sum_fwd_tables_kernel(
    mean,
    variance,
    tables,
    partials,
    alpha,
    mask,
    active,
    weights,
    biases,
    running_means,
    running_variances,
    units,
    share,
    splits,
    channels,
    E: tl.constexpr,
    K: tl.constexpr,
    KINDS: tl.constexpr,
    EPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    RUNNING_MEANS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    POSITIONS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Statistics used [entry, channel], and tables [2 or 3, entry, channel]: an entry adds (o - mean) * scale + shift.

    Grid (E*K, blocks of channels).
    """
    entry = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    live = entry >= 0 if active is None else tl.load(active + entry // K)
    kind = _known(KINDS, entry, entry * 0)
    m = _per_channel(running_means, RUNNING_MEANS, entry, channel, exists, 0.0)
    v = _per_channel(running_variances, RUNNING_MEANS, entry, channel, exists, 1.0)
    if partials is not None:  # noqa: SIM102
        if live & (kind == BATCH):
            m, v = _merged(partials, entry, channel, exists, units, share, splits, channels, POSITIONS, ROWS)
    m = tl.where(live, m, 0.0)
    v = tl.where(live, v, 1.0)
    place = entry * channels + channel
    tl.store(mean + place, m, mask=exists)  # [CHANNELS]
    tl.store(variance + place, v, mask=exists)
    ACC: tl.constexpr = tables.dtype.element_ty
    scale = _coefficient(alpha, mask, entry, K, CANDIDATES, SOFTMAX) + tl.full([CHANNELS], 0.0, tl.float64)
    rounded = m.to(ACC)
    if BIASES > 0:
        shift = scale * _per_channel(biases, BIASES, entry, channel, exists, 0.0)
    if kind != PLAIN:
        eps = _known(EPS, entry, tl.full([], 0.0, tl.float64))
        scale = scale * _per_channel(weights, WEIGHTS, entry, channel, exists, 1.0) / tl.sqrt(v + eps)
    tl.store(tables + place, rounded, mask=exists)
    tl.store(tables + E * K * channels + place, scale.to(ACC), mask=exists)
    if BIASES > 0:
        shift -= scale * (m - rounded.to(tl.float64))
        tl.store(tables + 2 * E * K * channels + place, shift.to(ACC), mask=exists)


@triton.jit(do_not_specialize=["units", "run", "channels"])
def batch_norm_mixed_sum_fwd_kernel(
    y,
    outputs,
    tables,
    active,
    units,
    run,
    channels,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    SHIFTED: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y = sum over the entries of active edges of (o - mean) * scale + shift.

    Grid (tiles * blocks of channels), blocks first: programs that run together read neighbouring memory.
    """
    ACC: tl.constexpr = tables.dtype.element_ty
    PER_EDGE: tl.constexpr = (K + GROUP - 1) // GROUP
    ENTRIES: tl.constexpr = GROUPS // PER_EDGE * K
    row = _aligned(channels, ALIGN, COLUMNS)
    blocks = (channels + COLUMNS - 1) // COLUMNS
    block = tl.program_id(0) % blocks
    start = (tl.program_id(0) // blocks).to(tl.int64) * LANES
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < row
    inside = (start + tl.arange(0, LANES) < units)[:, None] & exists[None, :]
    offsets = _offsets(start, block, channels, run, LANES, WIDTH, ALIGN)
    total = tl.full([LANES, WIDTH], 0.0, ACC)
    for group in range(GROUPS):
        entries = _members(outputs, y, active, group, group // PER_EDGE, GROUPS, GROUP)
        first = tables + (group // PER_EDGE * K + group % PER_EDGE * GROUP) * row + channel
        inputs = ()
        for i in tl.static_range(GROUP):
            x = tl.load(
                entries[i][0] + offsets, mask=tl.where(entries[i][1], inside, False), other=0.0
            )  # [LANES, WIDTH]
            inputs = inputs + (x,)
        _issue_loads()
        for i in tl.static_range(GROUP):
            there = tl.where(entries[i][1], exists, False)
            mean = tl.load(first + i * row, mask=there, other=0.0)  # [COLUMNS]
            scale = tl.load(first + (ENTRIES + i) * row, mask=there, other=0.0)
            total += (inputs[i].to(ACC) - mean[None, :]) * scale[None, :]
            if SHIFTED:
                total += tl.load(first + (2 * ENTRIES + i) * row, mask=there, other=0.0)[None, :]
    tl.store(y + offsets, total.to(y.dtype.element_ty), mask=inside)  # [LANES, WIDTH]


# ---- backward --------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["units", "share", "run", "channels"])
def batch_norm_mixed_sum_bwd_sums_kernel(
    grad,
    outputs,
    partials,
    mean,
    active,
    units,
    share,
    run,
    channels,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """partials [group, GROUP + 1, split, channel]: sums of grad * (o - mean) of a group's entries, then of grad.

    Grid (blocks of channels * groups, splits), groups first: what reads the same part of grad shares the cache.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    SUM: tl.constexpr = LANES // VECTORS  # a thread's vectors add up in registers
    group = tl.program_id(0) % GROUPS
    block = tl.program_id(0) // GROUPS
    edge = group // ((K + GROUP - 1) // GROUP)
    first = edge * K + group % ((K + GROUP - 1) // GROUP) * GROUP
    row = _aligned(channels, ALIGN, COLUMNS)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < row
    begin = tl.program_id(1).to(tl.int64) * share
    end = tl.minimum(begin + share, units)
    if active is not None:
        end = tl.where(tl.load(active + edge), end, begin)
    entries = _members(outputs, grad, active, group, edge, GROUPS, GROUP)
    means = ()
    sums = ()
    for i in tl.static_range(GROUP):
        m = tl.load(
            mean + (first + i) * row + channel, mask=tl.where(entries[i][1], exists, False), other=0.0
        )  # [COLUMNS]
        means = means + (m.to(ACC)[None, :],)
        sums = sums + (tl.full([SUM, WIDTH], 0.0, ACC),)
    total = tl.full([SUM, WIDTH], 0.0, ACC)
    for start in range(begin, end, LANES):
        offsets = _offsets(start, block, channels, run, LANES, WIDTH, ALIGN)
        inside = (start + tl.arange(0, LANES) < end)[:, None] & exists[None, :]
        inputs = ()
        for i in tl.static_range(GROUP):
            x = tl.load(
                entries[i][0] + offsets, mask=tl.where(entries[i][1], inside, False), other=0.0
            )  # [LANES, WIDTH]
            inputs = inputs + (x,)
        g = tl.load(grad + offsets, mask=inside, other=0.0)  # [LANES, WIDTH]
        _issue_loads()
        g = g.to(ACC)
        total += tl.sum(tl.reshape(g, [VECTORS, SUM, WIDTH]), axis=0)
        added = ()
        for i in tl.static_range(GROUP):
            product = g * (inputs[i].to(ACC) - means[i])
            added = added + (sums[i] + tl.sum(tl.reshape(product, [VECTORS, SUM, WIDTH]), axis=0),)
        sums = added
    sums = sums + (total,)
    splits = tl.num_programs(1)
    for i in tl.static_range(GROUP + 1):
        place = partials + ((group * (GROUP + 1) + i) * splits + tl.program_id(1)).to(tl.int64) * channels + channel
        tl.store(place, tl.sum(_of_channels(sums[i], COLUMNS), axis=0), mask=channel < channels)  # [COLUMNS]


@triton.jit
def _sum_of_splits(partials, row, channel, exists, splits, channels, ROWS: tl.constexpr):
    """Partial sums [row, split, channel] over the splits, float64."""
    rows = tl.arange(0, ROWS)[:, None].to(tl.int64)
    place = partials + (row * splits + rows) * channels + channel[None, :]
    tile = tl.load(place, mask=(rows < splits) & exists[None, :], other=0.0)  # [ROWS, CHANNELS]
    return tl.sum(tile.to(tl.float64), axis=0)


@triton.jit
def _store_per_channel(tensors, COUNT: tl.constexpr, entry, channel, exists, values):
    """tensors[entry] = values, where it is asked for."""
    for i in tl.static_range(COUNT):
        if tensors[i] is not None:  # noqa: SIM102
            if entry == i:
                tl.store(tensors[i] + channel, values.to(tensors[i].dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["count", "splits", "channels"])
def batch_norm_mixed_sum_bwd_tables_kernel(
    tables,
    dots,
    grad_weights,
    grad_biases,
    partials,
    mean,
    variance,
    alpha,
    mask,
    active,
    weights,
    biases,
    count,
    splits,
    channels,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUP: tl.constexpr,
    KINDS: tl.constexpr,
    EPS: tl.constexpr,
    SOFTMAX: tl.constexpr,
    WEIGHTS: tl.constexpr,
    BIASES: tl.constexpr,
    GRAD_WEIGHTS: tl.constexpr,
    GRAD_BIASES: tl.constexpr,
    CANDIDATES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Tables [4, entry, channel] of d_output = scale * grad + shift + slope * (o - mean), in the order mean, scale,
    shift, slope; gradients of the norms' weights and biases; dots [edge, block, candidate] = <grad, normalised entry>.

    Grid (E*K, blocks of channels).
    """
    ACC: tl.constexpr = tables.dtype.element_ty
    entry = tl.program_id(0)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels
    live = entry >= 0 if active is None else tl.load(active + entry // K)
    kind = _known(KINDS, entry, entry * 0)
    place = entry * channels + channel
    m = tl.load(mean + place, mask=exists, other=0.0)  # [CHANNELS]
    rounded = m.to(ACC)
    inverse = tl.full([CHANNELS], 1.0, tl.float64)
    if kind != PLAIN:
        eps = _known(EPS, entry, tl.full([], 0.0, tl.float64))
        inverse = 1.0 / tl.sqrt(tl.load(variance + place, mask=exists, other=1.0) + eps)
    weight = _per_channel(weights, WEIGHTS, entry, channel, exists, 1.0)
    coefficient = tl.where(live, _coefficient(alpha, mask, entry, K, CANDIDATES, SOFTMAX), 0.0)  # alpha may be NaN
    scale = coefficient * weight * inverse
    shift = tl.full([CHANNELS], 0.0, tl.float64)
    slope = tl.full([CHANNELS], 0.0, tl.float64)
    if partials is not None:
        group = entry // K * ((K + GROUP - 1) // GROUP) + entry % K // GROUP
        first = group * (GROUP + 1)
        total = _sum_of_splits(partials, first + GROUP, channel, exists, splits, channels, ROWS)
        product = _sum_of_splits(partials, first + entry % K % GROUP, channel, exists, splits, channels, ROWS)
        product = inverse * (product - (m - rounded.to(tl.float64)) * total)  # <grad, (o - mean) / deviation>
        _store_per_channel(grad_weights, GRAD_WEIGHTS, entry, channel, exists, coefficient * product)
        _store_per_channel(grad_biases, GRAD_BIASES, entry, channel, exists, coefficient * total)
        if dots is not None:
            normalised = weight * product + _per_channel(biases, BIASES, entry, channel, exists, 0.0) * total
            dot = tl.sum(tl.where(exists, normalised, 0.0))
            tl.store(dots + (entry // K * tl.num_programs(1) + tl.program_id(1)) * CANDIDATES + entry % K, dot.to(ACC))
        if kind == BATCH:
            slope = -scale * inverse * product / count
            shift = -scale * total / count - slope * (m - rounded.to(tl.float64))
    # What is not normalised by its batch has a gradient that does not depend on its values.
    tl.store(tables + place, tl.where(live & (kind == BATCH), rounded, 0.0), mask=exists)
    tl.store(tables + E * K * channels + place, scale.to(ACC), mask=exists)
    tl.store(tables + 2 * E * K * channels + place, shift.to(ACC), mask=exists)
    tl.store(tables + 3 * E * K * channels + place, slope.to(ACC), mask=exists)


@triton.jit
def _differentiate(
    program,
    grad,
    outputs,
    grads,
    tables,
    active,
    units,
    run,
    channels,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    READS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The gradients of a group's entries in one tile of one block of channels."""
    ACC: tl.constexpr = tables.dtype.element_ty
    ENTRIES: tl.constexpr = K * (GROUPS // ((K + GROUP - 1) // GROUP))
    group = program % GROUPS
    edge = group // ((K + GROUP - 1) // GROUP)
    candidate = group % ((K + GROUP - 1) // GROUP) * GROUP
    row = _aligned(channels, ALIGN, COLUMNS)
    blocks = (channels + COLUMNS - 1) // COLUMNS
    block = program // GROUPS % blocks
    start = (program // GROUPS // blocks).to(tl.int64) * LANES
    offsets = _offsets(start, block, channels, run, LANES, WIDTH, ALIGN)
    channel = block * COLUMNS + tl.arange(0, COLUMNS)
    exists = channel < row
    inside = (start + tl.arange(0, LANES) < units)[:, None] & exists[None, :]
    inputs = ()
    if READS:
        sources = _members(outputs, grad, active, group, edge, GROUPS, GROUP)
        for i in tl.static_range(GROUP):
            x = tl.load(
                sources[i][0] + offsets, mask=tl.where(sources[i][1], inside, False), other=0.0
            )  # [LANES, WIDTH]
            inputs = inputs + (x,)
    readable = inside if active is None else tl.where(tl.load(active + edge), inside, False)
    g = tl.load(grad + offsets, mask=readable, other=0.0)  # [LANES, WIDTH]
    if READS:  # else there is one load, and a barrier would only cost registers
        _issue_loads()
    g = g.to(ACC)
    targets = _members(grads, grad, None, group, edge, GROUPS, GROUP)
    for i in tl.static_range(GROUP):
        table = tables + (edge * K + candidate + i) * row + channel
        written = tl.where(targets[i][1], exists, False)
        d = g * tl.load(table + ENTRIES * row, mask=written)[None, :]
        if READS:
            mean = tl.load(table, mask=written)  # [COLUMNS]
            shift = tl.load(table + 2 * ENTRIES * row, mask=written)
            slope = tl.load(table + 3 * ENTRIES * row, mask=written)
            d += shift[None, :] + slope[None, :] * (inputs[i].to(ACC) - mean[None, :])
        tl.store(targets[i][0] + offsets, d.to(grad.dtype.element_ty), mask=tl.where(targets[i][1], inside, False))


@triton.jit(do_not_specialize=["units", "run", "channels", "dot_blocks"])
def batch_norm_mixed_sum_bwd_kernel(
    grad,
    outputs,
    grads,
    tables,
    dots,
    grad_alpha,
    grad_mask,
    alpha,
    mask,
    active,
    units,
    run,
    channels,
    dot_blocks,
    E: tl.constexpr,
    K: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    SOFTMAX: tl.constexpr,
    CANDIDATES: tl.constexpr,
    DOT_ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """grads[i] = scale * grad + shift + slope * (o - mean); gradients of alpha and mask from the dots.

    Grid (E if there are dots, and tiles * blocks of channels * groups): the first E programs spare a launch.
    """
    FIRST: tl.constexpr = 0 if dots is None else E
    if dots is not None:  # noqa: SIM102
        if tl.program_id(0) < E:
            mixed_sum_bwd_finish_kernel(
                dots, grad_alpha, grad_mask, alpha, mask, active, dot_blocks,
                E, K, 1, CANDIDATES, DOT_ROWS, False, SOFTMAX,
            )  # fmt: skip
    if WRITES:  # noqa: SIM102
        if tl.program_id(0) >= FIRST:
            _differentiate(
                tl.program_id(0) - FIRST, grad, outputs, grads, tables, active, units, run, channels,
                K, GROUPS, GROUP, READS, LANES, WIDTH, COLUMNS, ALIGN,
            )  # fmt: skip


# ---- running statistics ----------------------------------------------------------------------------------------------


@triton.jit
def _move(running, new, share, live, exists):
    """running = (1 - share) * running + share * new, in float64."""
    old = tl.load(running, mask=exists, other=0.0)
    moved = (1.0 - share) * old.to(tl.float64) + share * new
    tl.store(running, moved.to(old.dtype), mask=tl.where(live, exists, False))


@triton.jit(do_not_specialize=["count", "channels"])
def batch_norm_running_statistics_kernel(
    running_means,
    running_variances,
    counters,
    mean,
    variance,
    active,
    count,
    channels,
    K: tl.constexpr,
    ENTRIES: tl.constexpr,
    MOMENTA: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """BatchNorm2d's update of the norms of some entries, all of them different norms; grid (norms)."""
    bessel = count.to(tl.float64) / tl.maximum(count - 1, 1).to(tl.float64)
    for t in tl.static_range(len(ENTRIES)):
        if tl.program_id(0) == t:
            live = count >= 0 if active is None else tl.load(active + ENTRIES[t] // K)
            batches = tl.load(counters[t]) + 1
            tl.debug_barrier()  # every thread has read before one writes
            tl.store(counters[t], batches, mask=live)
            share = 1.0 / batches.to(tl.float64) if MOMENTA[t] < 0 else tl.full([], MOMENTA[t], tl.float64)
            for start in range(0, channels, CHANNELS):
                channel = start + tl.arange(0, CHANNELS)
                exists = tl.where(count > 0, channel < channels, False)
                place = ENTRIES[t] * channels + channel
                m = tl.load(mean + place, mask=exists, other=0.0)  # [CHANNELS]
                v = tl.load(variance + place, mask=exists, other=0.0)
                _move(running_means[t] + channel, m, share, live, exists)
                _move(running_variances[t] + channel, bessel * v, share, live, exists)
