"""Arguments of depthwise convolutions: the checks, the output's size and layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

Pair = tuple[int, int]


def checked_convolution(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
) -> tuple[Pair, Pair, Pair]:
    """stride, padding and dilation as pairs, for x [B, C, H, W] and weight [C, 1, kh, kw].

    Raises TypeError or ValueError naming the argument, what came and what was expected.
    """
    _check_tensors(x, weight)
    strides = pair("stride", stride, 1)
    paddings = pair("padding", padding, 0)
    dilations = pair("dilation", dilation, 1)
    _check_output_size(x, weight, strides, paddings, dilations)
    return strides, paddings, dilations


def pair(name: str, value: int | Sequence[int], least: int) -> Pair:
    """An integer, or a pair (rows, columns) of integers, as a pair; TypeError or ValueError under `name` otherwise."""
    both = (value, value) if isinstance(value, int) else value
    if not (
        isinstance(both, (tuple, list)) and len(both) == 2 and isinstance(both[0], int) and isinstance(both[1], int)
    ):
        raise TypeError(f"{name}: expected an integer or a pair of integers, got {value!r}")
    if both[0] < least or both[1] < least:
        raise ValueError(f"{name}: expected at least {least}, got {value!r}")
    return both[0], both[1]


def output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Outputs of a convolution along one axis."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def layout_of(x: Tensor) -> torch.memory_format:
    """channels_last if the channels of x lie innermost in memory, else contiguous."""
    return torch.channels_last if x.stride(1) == 1 and x.stride(3) != 1 else torch.contiguous_format


def has_channels_last(x: Tensor) -> bool:
    """Whether the layout of x is what the kernels are made for."""
    return x.dim() == 4 and x.stride(1) == 1


def autocast(*tensors: Tensor) -> list[Tensor]:
    """The tensors as torch.nn.functional.conv2d would take them under autocast, if that is on."""
    device = tensors[0].device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [tensor if tensor.dtype is torch.float64 else tensor.to(dtype) for tensor in tensors]


def _check_tensors(x: Tensor, weight: Tensor) -> None:
    for name, value, shape in (("x", x, "[B, C, H, W]"), ("weight", weight, "[C, 1, kh, kw]")):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(value).__name__}")
        if value.dtype not in DTYPES:
            raise TypeError(f"{name}: expected float16, bfloat16, float32 or float64, got {value.dtype}")
        if value.layout is not torch.strided:
            raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {value.layout}")
        if value.dim() != 4:
            raise ValueError(f"{name}: expected 4 dimensions {shape}, got shape {list(value.shape)}")
    channels = x.shape[1]
    if channels == 0:
        raise ValueError(f"x: expected at least one channel, got shape {list(x.shape)}")
    if weight.shape[0] != channels or weight.shape[1] != 1 or weight.shape[2] == 0 or weight.shape[3] == 0:
        raise ValueError(f"weight: expected shape [C, 1, kh, kw] with C = {channels} as in x, got {list(weight.shape)}")
    if weight.device != x.device:
        raise ValueError(f"weight: expected x's device {x.device}, got {weight.device}")


def _check_output_size(
    x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]
) -> None:
    for dim in (0, 1):
        if output_size(x.shape[2 + dim], weight.shape[2 + dim], stride[dim], padding[dim], dilation[dim]) < 1:
            raise ValueError(
                f"x: expected an image no smaller than the kernel, got {list(x.shape[2:])} for a kernel of "
                f"{list(weight.shape[2:])} with padding {list(padding)} and dilation {list(dilation)}"
            )
