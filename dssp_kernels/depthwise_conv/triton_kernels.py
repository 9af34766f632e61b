"""Triton kernels of depthwise_conv2d.

A program works on tiles [LANES, CHANNELS]. A lane is a column of an image; the columns of all images are numbered
through, so that no lane is idle whatever the width. A program takes several rows of its lanes, because a pixel that was
read, widened and rectified once then serves all of them. Where channels lie innermost in memory (channels_last), they
are read and written 16 bytes at a time; elsewhere a program has one channel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dssp_kernels.mixed_sum.triton_kernels import _issue_loads

# Arguments that would only multiply the compiled variants. Strides of channels stay out: one, in channels_last.
_SIZES = [
    *(f"{tensor}_{dim}" for tensor in ("y", "x", "d_x", "grad") for dim in ("image", "row", "column")),
    *("units", "rows", "columns", "height", "width", "out_height", "out_width", "channels"),
    *("padding_rows", "padding_columns", "tiles", "share", "splits"),
]


# ---- shared ----------------------------------------------------------------------------------------------------------


@triton.jit
def _program(rows, channels, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """(channels [CHANNELS], first row, number among the blocks of lanes) of a program; channels run fastest."""
    blocks = (channels + CHANNELS - 1) // CHANNELS
    row_blocks = (rows + ROWS - 1) // ROWS
    program = tl.program_id(0)
    channel = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    return channel, program // blocks % row_blocks * ROWS, program // blocks // row_blocks


@triton.jit
def _lanes(block, units, columns, LANES: tl.constexpr):
    """(image, column, whether it exists) of each lane of a block."""
    unit = block.to(units.dtype) * LANES + tl.arange(0, LANES)
    return (unit // columns).to(tl.int64), unit % columns, unit < units


@triton.jit
def _aligned(image, row, column, channel, ALIGN: tl.constexpr):
    """The strides; the compiler sees that all but the channels' are multiples of ALIGN."""
    return (image // ALIGN * ALIGN).to(tl.int64), (row // ALIGN * ALIGN).to(tl.int64), column // ALIGN * ALIGN, channel


@triton.jit
def _pixels(pointer, image, column, channel, strides):
    """Pointers [LANES, CHANNELS] into row 0."""
    lane = image * strides[0] + column.to(tl.int64) * strides[2]
    return pointer + (lane[:, None] + (channel.to(tl.int64) * strides[3])[None, :])


@triton.jit
def _both(lanes, channels):
    """Mask [LANES, CHANNELS]."""
    return lanes[:, None] & channels[None, :]


@triton.jit
def _zeros(COUNT: tl.constexpr, LANES: tl.constexpr, CHANNELS: tl.constexpr, ACC: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.full([LANES, CHANNELS], 0.0, ACC),)
    return zeros


@triton.constexpr_function
def _partner(a, s, count, of_a, of_b, of_s):
    """The b with a * of_a + b * of_b = s * of_s, the tap or row that meets row s; -1 if none of 0 .. count does."""
    b, rest = divmod(s * of_s - a * of_a, of_b)
    return b if rest == 0 and 0 <= b < count else -1


@triton.constexpr_function
def _is_met(s, targets, taps, up, step, down):
    return any(_partner(t, s, taps, up, step, down) >= 0 for t in range(targets))


@triton.jit
def _load_rows(
    source,
    TARGETS: tl.constexpr,
    TAPS: tl.constexpr,
    UP: tl.constexpr,
    STEP: tl.constexpr,
    DOWN: tl.constexpr,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
):
    """Rows BEGIN .. END of source = (pixels, which exist, first row, height, stride of rows), counted from the first.

    Zeros outside of the image. Target row t meets row s at tap i if t * UP + i * STEP = s * DOWN; a row that none meets
    is not read.
    """
    tiles = ()
    for s in tl.static_range(BEGIN, END):
        tile = source[2]  # stands for a row that no target row meets
        if _is_met(s, TARGETS, TAPS, UP, STEP, DOWN):
            row = source[2] + s
            exists = tl.where((row >= 0) & (row < source[3]), source[1], False)
            tile = tl.load(source[0] + row * source[4], mask=exists, other=0.0)  # [LANES, CHANNELS]
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _add_column_of_taps(
    sums,
    weights,
    exists,
    source,
    PHASES: tl.constexpr,
    PHASE: tl.constexpr,
    TAPS: tl.constexpr,
    KW: tl.constexpr,
    UP: tl.constexpr,
    STEP: tl.constexpr,
    DOWN: tl.constexpr,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums[t * PHASES + PHASE] + the products of a column of taps with the rows of source that target row t meets."""
    ACC: tl.constexpr = sums[0].dtype
    TARGETS: tl.constexpr = len(sums) // PHASES
    BEGIN: tl.constexpr = min(0, (TAPS - 1) * STEP) // DOWN
    END: tl.constexpr = ((TARGETS - 1) * UP + max(0, (TAPS - 1) * STEP)) // DOWN + 1
    taps = ()
    for i in tl.static_range(TAPS):
        taps = taps + (tl.load(weights + i * KW, mask=exists, other=0.0).to(ACC)[None, :],)  # [1, CHANNELS]
    for begin in tl.static_range(BEGIN, END, GROUP):
        tiles = _load_rows(source, TARGETS, TAPS, UP, STEP, DOWN, begin, min(begin + GROUP, END))
        _issue_loads()
        for s in tl.static_range(begin, min(begin + GROUP, END)):
            value = tiles[s - begin].to(ACC)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            for t in tl.static_range(TARGETS):
                if _partner(t, s, TAPS, UP, STEP, DOWN) >= 0:
                    added = sums[t * PHASES + PHASE] + taps[_partner(t, s, TAPS, UP, STEP, DOWN)] * value
                    sums = sums[: t * PHASES + PHASE] + (added,) + sums[t * PHASES + PHASE + 1 :]
    return sums


# ---- forward ---------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv2d_fwd_kernel(
    y,
    x,
    weight,
    y_image,
    y_row,
    y_column,
    y_channel,
    x_image,
    x_row,
    x_column,
    x_channel,
    units,
    rows,
    columns,
    height,
    width,
    channels,
    padding_rows,
    padding_columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """y = conv2d(relu(x) or x, weight). Grid (blocks of lanes * blocks of ROWS rows of y * blocks of channels)."""
    ACC: tl.constexpr = tl.float64 if y.dtype.element_ty == tl.float64 else tl.float32
    y_strides = _aligned(y_image, y_row, y_column, y_channel, ALIGN)
    x_strides = _aligned(x_image, x_row, x_column, x_channel, ALIGN)
    channel, row, block = _program(rows, channels, ROWS, CHANNELS)
    exists = channel < channels // ALIGN * ALIGN
    image, column, there = _lanes(block, units, columns, LANES)
    weights = weight + channel * (KH * KW)
    first = row * SH - padding_rows
    sums = _zeros(ROWS, LANES, CHANNELS, ACC)
    for j in range(KW):
        place = column * SW - padding_columns + j * DW
        inside = _both(there & (place >= 0) & (place < width), exists)
        source = (_pixels(x, image, place, channel, x_strides), inside, first, height, x_strides[1])
        sums = _add_column_of_taps(sums, weights + j, exists, source, 1, 0, KH, KW, SH, DH, 1, RELU, GROUP)
    pixels = _pixels(y, image, column, channel, y_strides)
    inside = _both(there, exists)
    for t in tl.static_range(ROWS):
        value = sums[t].to(y.dtype.element_ty)
        tl.store(pixels + (row + t) * y_strides[1], value, mask=tl.where(row + t < rows, inside, False))


# ---- backward: the gradient of x -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv2d_bwd_input_kernel(
    d_x,
    grad,
    x,
    weight,
    d_x_image,
    d_x_row,
    d_x_column,
    d_x_channel,
    grad_image,
    grad_row,
    grad_column,
    grad_channel,
    x_image,
    x_row,
    x_column,
    x_channel,
    units,
    rows,
    columns,
    height,
    width,
    out_height,
    out_width,
    channels,
    padding_rows,
    padding_columns,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """d_x = conv_transpose2d(grad, weight), zero where x <= 0 if RELU.

    In the padded image, row stride * n + phase meets tap i only if i * dilation = phase (modulo stride), and then row
    n - i * dilation // stride of grad. A lane is a column n with its pixels of all phases; units, rows and columns
    count n likewise. Grid as in the forward kernel.
    """
    ACC: tl.constexpr = tl.float64 if d_x.dtype.element_ty == tl.float64 else tl.float32
    PHASES: tl.constexpr = SW
    TARGETS: tl.constexpr = ROWS * SH
    d_x_strides = _aligned(d_x_image, d_x_row, d_x_column, d_x_channel, ALIGN)
    grad_strides = _aligned(grad_image, grad_row, grad_column, grad_channel, ALIGN)
    x_strides = _aligned(x_image, x_row, x_column, x_channel, ALIGN)
    channel, row, block = _program(rows, channels, ROWS, CHANNELS)
    exists = channel < channels // ALIGN * ALIGN
    image, column, there = _lanes(block, units, columns, LANES)
    row += padding_rows // SH
    column += padding_columns // PHASES
    weights = weight + channel * (KH * KW)
    sums = _zeros(TARGETS * PHASES, LANES, CHANNELS, ACC)
    for tap in tl.static_range(PHASES):
        for j in range(tap, KW, PHASES):
            place = column - j * DW // PHASES
            inside = _both(there & (place >= 0) & (place < out_width), exists)
            source = (_pixels(grad, image, place, channel, grad_strides), inside, row, out_height, grad_strides[1])
            sums = _add_column_of_taps(
                sums,
                weights + j,
                exists,
                source,
                PHASES,
                tap * DW % PHASES,
                KH,
                KW,
                1,
                -DH,
                SH,
                False,
                GROUP,
            )
    row = row * SH - padding_rows
    for phase in tl.static_range(PHASES):
        place = column * PHASES + phase - padding_columns
        inside = _both(there & (place >= 0) & (place < width), exists)
        inputs = ()
        if RELU:
            source = (_pixels(x, image, place, channel, x_strides), inside, row, height, x_strides[1])
            inputs = _load_rows(source, TARGETS, 1, 1, 1, 1, 0, TARGETS)
            _issue_loads()
        pixels = _pixels(d_x, image, place, channel, d_x_strides)
        for t in tl.static_range(TARGETS):
            value = sums[t * PHASES + phase]
            if RELU:
                value = tl.where(inputs[t].to(ACC) <= 0.0, 0.0, value)
            target = tl.where((row + t >= 0) & (row + t < height), inside, False)
            tl.store(pixels + (row + t) * d_x_strides[1], value.to(d_x.dtype.element_ty), mask=target)


# ---- backward: the gradient of the weight ----------------------------------------------------------------------------


@triton.jit
def _add_products(
    sums,
    grads,
    source,
    PLACE: tl.constexpr,
    TAPS: tl.constexpr,
    UP: tl.constexpr,
    STEP: tl.constexpr,
    RELU: tl.constexpr,
    GROUP: tl.constexpr,
):
    """sums[PLACE + i] + the products of the rows of grads and the rows of source that tap i meets."""
    ACC: tl.constexpr = sums[0].dtype
    ROWS: tl.constexpr = len(grads)
    END: tl.constexpr = (ROWS - 1) * UP + (TAPS - 1) * STEP + 1
    for begin in tl.static_range(0, END, GROUP):
        tiles = _load_rows(source, ROWS, TAPS, UP, STEP, 1, begin, min(begin + GROUP, END))
        _issue_loads()
        for s in tl.static_range(begin, min(begin + GROUP, END)):
            value = tiles[s - begin].to(ACC)
            if RELU:
                value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
            for i in tl.static_range(TAPS):
                if _partner(i, s, ROWS, STEP, UP, 1) >= 0:
                    added = sums[PLACE + i] + grads[_partner(i, s, ROWS, STEP, UP, 1)].to(ACC) * value
                    sums = sums[: PLACE + i] + (added,) + sums[PLACE + i + 1 :]
    return sums


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv2d_bwd_weight_kernel(
    partials,
    grad,
    x,
    grad_image,
    grad_row,
    grad_column,
    grad_channel,
    x_image,
    x_row,
    x_column,
    x_channel,
    units,
    rows,
    columns,
    height,
    width,
    channels,
    padding_rows,
    padding_columns,
    tiles,
    share,
    KH: tl.constexpr,
    KW: tl.constexpr,
    SH: tl.constexpr,
    SW: tl.constexpr,
    DH: tl.constexpr,
    DW: tl.constexpr,
    RELU: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    TAPS: tl.constexpr,
    LANES: tl.constexpr,
    CHANNELS: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """partials [split, tap, channel] = sums of grad * x, rectified if RELU, over the split's share of the tiles.

    A tile is ROWS rows, a divisor of all, of a block of lanes. Grid (groups of TAPS columns of taps * blocks of
    channels, splits), groups first: what reads the same part of grad and x runs together and shares the cache.
    """
    ACC: tl.constexpr = partials.dtype.element_ty
    GROUPS: tl.constexpr = (KW + TAPS - 1) // TAPS
    grad_strides = _aligned(grad_image, grad_row, grad_column, grad_channel, ALIGN)
    x_strides = _aligned(x_image, x_row, x_column, x_channel, ALIGN)
    first_tap = tl.program_id(0) % GROUPS * TAPS
    channel = tl.program_id(0) // GROUPS * CHANNELS + tl.arange(0, CHANNELS)
    exists = channel < channels // ALIGN * ALIGN
    sums = _zeros(TAPS * KH, LANES, CHANNELS, ACC)
    begin = tl.program_id(1) * share
    for tile in range(begin, tl.minimum(begin + share, tiles)):
        row = tile % (rows // ROWS) * ROWS
        image, column, there = _lanes(tile // (rows // ROWS), units, columns, LANES)
        source = (_pixels(grad, image, column, channel, grad_strides), _both(there, exists), row, rows, grad_strides[1])
        grads = _load_rows(source, ROWS, 1, 1, 1, 1, 0, ROWS)
        first = row * SH - padding_rows
        for j in tl.static_range(TAPS):
            place = column * SW - padding_columns + (first_tap + j) * DW
            inside = _both(there & (place >= 0) & (place < width), exists)
            source = (_pixels(x, image, place, channel, x_strides), inside, first, height, x_strides[1])
            sums = _add_products(sums, grads, source, j * KH, KH, SH, DH, RELU, GROUP)
    target = partials + tl.program_id(1).to(tl.int64) * (KH * KW) * channels + channel
    for j in tl.static_range(TAPS):
        wanted = tl.where(first_tap + j < KW, exists, False)
        for i in tl.static_range(KH):
            tap = i * KW + first_tap + j
            tl.store(target + tap * channels, tl.sum(sums[j * KH + i], axis=0), mask=wanted)  # [CHANNELS]


@triton.jit(do_not_specialize=_SIZES)
def depthwise_conv2d_bwd_weight_finish_kernel(
    d_weight,
    partials,
    splits,
    channels,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Partial sums [split, tap, channel] -> d_weight [channel, tap]; grid (blocks of COLUMNS of tap and channel)."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    size = channels * TAPS
    total = tl.zeros([COLUMNS], partials.dtype.element_ty)
    for first in range(0, splits, ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        place = partials + row.to(tl.int64) * size + column[None, :]
        total += tl.sum(tl.load(place, mask=(row < splits) & (column < size)[None, :], other=0.0), axis=0)
    place = d_weight + column % channels * TAPS + column // channels
    tl.store(place, total.to(d_weight.dtype.element_ty), mask=column < size)  # [COLUMNS]
