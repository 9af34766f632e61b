"""Triton kernels and launchers of depthwise_conv2d: one launch forward, one for x's gradient, two for the weight's.

A program works on tiles [LANES, CHANNELS]. A lane is a column of an image; the columns of all images are numbered
through, so that no lane is idle whatever the width. A program takes several rows of its lanes, because a pixel that was
read, widened and rectified once then serves all of them. Where channels lie innermost in memory (channels_last), they
are read and written 16 bytes at a time; elsewhere a program has one channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dssp_kernels.depthwise_conv.arguments import layout_of, output_size
from dssp_kernels.mixed_sum.triton_kernels import _cdiv, _issue_loads

THREADS = 128
NUM_WARPS = 2 if torch.version.hip else 4  # a warp is 64 threads on AMD's data centre GPUs
MAX_CHANNELS = 64  # of a program: a lane of them is 128 bytes or more
ELEMENTS = 8  # of a tile per thread, two vectors at most; in the weight's gradient, which keeps a tile per tap, one
SCALARS = 4  # likewise where channels do not lie innermost: every element takes an address of its own
ROWS = 4  # rows of results per program: more of them read less, and take more registers
GROUP = 8  # rows read together
WEIGHT_ROWS = 2  # rows of the result's gradient that the weight's gradient takes at a time, if the height allows
WEIGHT_TAPS = 15  # of a program: sums for as many columns of taps as fit, up to eight registers per thread and tap
# Its programs; each loops over its share. A constant, so that the partial sums stay few and results do not depend on
# the device. With that many registers each, two are resident per multiprocessor.
PROGRAMS = 256
FINISH_ROWS, FINISH_COLUMNS, FINISH_WARPS = 256, 32, 8  # partial sums that the finishing kernel reads at a time

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


# ---- launchers -------------------------------------------------------------------------------------------------------


def _power_of_two(number: int) -> int:
    """The least that is not smaller."""
    return 1 << (number - 1).bit_length()


def _tile(x: Tensor, other: Tensor, units: int, vectors: int) -> dict[str, int]:
    """LANES and CHANNELS of a program's tile, and ALIGN: elements that its runs of channels are multiples of.

    The blocks of channels are those that leave the fewest lanes idle, of these the widest, and 32 bytes at least.
    """
    channels, vector = x.shape[1], 16 // x.element_size()
    elements, width, align = min(ELEMENTS, vectors * vector), 1, 1
    if layout_of(x) is torch.channels_last:
        widths = [width for width in (MAX_CHANNELS, 32, 16, 8, 4) if width >= 2 * vector]
        width = min(widths, key=lambda width: (_cdiv(channels, width) * width, -width))
        width = min(width, _power_of_two(channels))
        align = math.gcd(vector, channels, *(tensor.stride(dim) for tensor in (x, other) for dim in (0, 2, 3)))
    else:
        elements = min(elements, SCALARS)
    return {"LANES": min(THREADS * elements // width, _power_of_two(units)), "CHANNELS": width, "ALIGN": align}


def _strides(name: str, tensor: Tensor) -> dict[str, int]:
    image, channel, row, column = tensor.stride()
    return {f"{name}_image": image, f"{name}_row": row, f"{name}_column": column, f"{name}_channel": channel}


def _arguments(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], relu: bool
) -> dict[str, Any]:
    """What all kernels but the finishing one take."""
    return {
        "height": x.shape[2],
        "width": x.shape[3],
        "channels": x.shape[1],
        "padding_rows": padding[0],
        "padding_columns": padding[1],
        "KH": weight.shape[2],
        "KW": weight.shape[3],
        "SH": stride[0],
        "SW": stride[1],
        "DH": dilation[0],
        "DW": dilation[1],
        "RELU": relu,
        "GROUP": GROUP,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,  # Triton's default is about to change
    }


def depthwise_conv2d_forward(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], relu: bool
) -> Tensor:
    """The registered operator on CUDA. Relies on op.py for the checks; x of any strides."""
    batch, channels, *size = x.shape
    rows, columns = (output_size(size[d], weight.shape[2 + d], stride[d], padding[d], dilation[d]) for d in (0, 1))
    y = torch.empty((batch, channels, rows, columns), dtype=x.dtype, device=x.device, memory_format=layout_of(x))
    if batch == 0:
        return y
    tile = _tile(x, y, batch * columns, 2)
    blocks = _cdiv(batch * columns, tile["LANES"]) * _cdiv(rows, ROWS) * _cdiv(channels, tile["CHANNELS"])
    with torch.cuda.device_of(x):
        depthwise_conv2d_fwd_kernel[(blocks,)](
            y,
            x,
            weight.contiguous(),
            **_strides("y", y),
            **_strides("x", x),
            units=batch * columns,
            rows=rows,
            columns=columns,
            ROWS=ROWS,
            **_arguments(x, weight, stride, padding, dilation, relu),
            **tile,
        )
    return y


def depthwise_conv2d_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    relu: bool,
    needs_input_grad: bool,
    needs_weight_grad: bool,
) -> tuple[Tensor, Tensor]:
    """The registered operator on CUDA: gradients of x and weight, empty if not asked for."""
    if layout_of(grad) is not layout_of(x):
        grad = grad.contiguous(memory_format=layout_of(x))
    arguments = _arguments(x, weight, stride, padding, dilation, relu)
    d_x, d_weight = x.new_empty(0), x.new_empty(0)
    with torch.cuda.device_of(x):
        if needs_input_grad:
            d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))
            _write_input_gradient(d_x, grad, x, weight.contiguous(), arguments)
        if needs_weight_grad:
            d_weight = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
            _write_weight_gradient(d_weight, grad, x, arguments)
    return d_x, d_weight


def _write_input_gradient(d_x: Tensor, grad: Tensor, x: Tensor, weight: Tensor, arguments: dict[str, Any]) -> None:
    batch, channels, height, width = x.shape
    if batch == 0:
        return
    rows = _cdiv(height + arguments["padding_rows"] % arguments["SH"], arguments["SH"])
    columns = _cdiv(width + arguments["padding_columns"] % arguments["SW"], arguments["SW"])
    tile = _tile(x, grad, batch * columns, 2)
    share = max(1, ROWS // arguments["SH"])
    blocks = _cdiv(batch * columns, tile["LANES"]) * _cdiv(rows, share) * _cdiv(channels, tile["CHANNELS"])
    depthwise_conv2d_bwd_input_kernel[(blocks,)](
        d_x,
        grad,
        x,
        weight,
        **_strides("d_x", d_x),
        **_strides("grad", grad),
        **_strides("x", x),
        units=batch * columns,
        rows=rows,
        columns=columns,
        out_height=grad.shape[2],
        out_width=grad.shape[3],
        ROWS=share,
        **arguments,
        **tile,
    )


def _write_weight_gradient(d_weight: Tensor, grad: Tensor, x: Tensor, arguments: dict[str, Any]) -> None:
    batch, channels, rows, columns = grad.shape
    if batch == 0:
        d_weight.zero_()
        return
    kh, kw = d_weight.shape[2:]
    tile = _tile(x, grad, batch * columns, 1)
    rows_each = math.gcd(rows, WEIGHT_ROWS)  # a row beyond the last must not take part: zero times infinity is NaN
    tiles = _cdiv(batch * columns, tile["LANES"]) * (rows // rows_each)
    groups = _cdiv(kw, max(1, WEIGHT_TAPS // kh))
    blocks = groups * _cdiv(channels, tile["CHANNELS"])
    share = _cdiv(tiles, max(1, PROGRAMS // blocks))
    splits = _cdiv(tiles, share)
    dtype = torch.float64 if x.dtype is torch.float64 else torch.float32
    partials = torch.empty((splits, kh, kw, channels), dtype=dtype, device=x.device)
    depthwise_conv2d_bwd_weight_kernel[(blocks, splits)](
        partials,
        grad,
        x,
        **_strides("grad", grad),
        **_strides("x", x),
        units=batch * columns,
        rows=rows,
        columns=columns,
        tiles=tiles,
        share=share,
        ROWS=rows_each,
        TAPS=_cdiv(kw, groups),
        **arguments,
        **tile,
    )
    depthwise_conv2d_bwd_weight_finish_kernel[(_cdiv(d_weight.numel(), FINISH_COLUMNS),)](
        d_weight,
        partials,
        splits,
        channels,
        TAPS=kh * kw,
        ROWS=FINISH_ROWS,
        COLUMNS=FINISH_COLUMNS,
        num_warps=FINISH_WARPS,
        enable_fp_fusion=True,
    )
