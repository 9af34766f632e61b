"""What a network costs: parameters and FLOPs, counted without running it."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, a shared one counted once; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(module: nn.Module, image_shape: tuple[int, int, int]) -> int:
    """FLOPs of one forward pass over one image of `image_shape` (C, H, W), in evaluation mode.

    A multiplication and an addition count as two, so this is twice the "multiply-adds" of the DARTS paper. Counted by
    torch.utils.flop_counter: convolutions, matrix products and operators with a registered formula; BatchNorm, pooling
    and ReLU count nothing. Runs on a copy of `module` on the meta device: nothing is computed, `module` is not touched.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # deepcopy takes what it finds in its memo, so the weights themselves are never copied.
    skeleton = copy.deepcopy(module, {id(tensor): _on_meta(tensor) for tensor in tensors}).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(torch.empty((1, *image_shape), device="meta"))
    return counter.get_total_flops()


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    shape_only = torch.empty_like(tensor, device="meta")
    return nn.Parameter(shape_only, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape_only
