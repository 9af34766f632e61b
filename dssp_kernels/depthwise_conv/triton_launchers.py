"""Launchers of depthwise_conv2d's Triton kernels: one launch forward, one for x's gradient, two for the weight's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dssp_kernels.depthwise_conv.arguments import layout_of, output_size
from dssp_kernels.depthwise_conv.triton_kernels import (
    depthwise_conv2d_bwd_input_kernel,
    depthwise_conv2d_bwd_weight_finish_kernel,
    depthwise_conv2d_bwd_weight_kernel,
    depthwise_conv2d_fwd_kernel,
)
from dssp_kernels.triton_launch import THREADS, cdiv, launch, power_of_two, sum_dtype

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


def _tile(x: Tensor, other: Tensor, units: int, vectors: int) -> dict[str, int]:
    """LANES and CHANNELS of a program's tile, and ALIGN: elements that its runs of channels are multiples of.

    The blocks of channels are those that leave the fewest lanes idle, of these the widest, and 32 bytes at least.
    """
    channels, vector = x.shape[1], 16 // x.element_size()
    elements, width, align = min(ELEMENTS, vectors * vector), 1, 1
    if layout_of(x) is torch.channels_last:
        widths = [width for width in (MAX_CHANNELS, 32, 16, 8, 4) if width >= 2 * vector]
        width = min(widths, key=lambda width: (cdiv(channels, width) * width, -width))
        width = min(width, power_of_two(channels))
        align = math.gcd(vector, channels, *(tensor.stride(dim) for tensor in (x, other) for dim in (0, 2, 3)))
    else:
        elements = min(elements, SCALARS)
    return {"LANES": min(THREADS * elements // width, power_of_two(units)), "CHANNELS": width, "ALIGN": align}


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
    blocks = cdiv(batch * columns, tile["LANES"]) * cdiv(rows, ROWS) * cdiv(channels, tile["CHANNELS"])
    with torch.cuda.device_of(x):
        launch(
            depthwise_conv2d_fwd_kernel,
            (blocks,),
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
    rows = cdiv(height + arguments["padding_rows"] % arguments["SH"], arguments["SH"])
    columns = cdiv(width + arguments["padding_columns"] % arguments["SW"], arguments["SW"])
    tile = _tile(x, grad, batch * columns, 2)
    share = max(1, ROWS // arguments["SH"])
    blocks = cdiv(batch * columns, tile["LANES"]) * cdiv(rows, share) * cdiv(channels, tile["CHANNELS"])
    launch(
        depthwise_conv2d_bwd_input_kernel,
        (blocks,),
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
    tiles = cdiv(batch * columns, tile["LANES"]) * (rows // rows_each)
    groups = cdiv(kw, max(1, WEIGHT_TAPS // kh))
    blocks = groups * cdiv(channels, tile["CHANNELS"])
    share = cdiv(tiles, max(1, PROGRAMS // blocks))
    splits = cdiv(tiles, share)
    partials = torch.empty((splits, kh, kw, channels), dtype=sum_dtype(x), device=x.device)
    launch(
        depthwise_conv2d_bwd_weight_kernel,
        (blocks, splits),
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
        TAPS=cdiv(kw, groups),
        **arguments,
        **tile,
    )
    launch(
        depthwise_conv2d_bwd_weight_finish_kernel,
        (cdiv(d_weight.numel(), FINISH_COLUMNS),),
        d_weight,
        partials,
        splits,
        channels,
        TAPS=kh * kw,
        ROWS=FINISH_ROWS,
        COLUMNS=FINISH_COLUMNS,
        num_warps=FINISH_WARPS,
    )
