"""What a network costs: parameters and FLOPs, counted without running it."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

M = TypeVar("M", bound=nn.Module)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, a shared one counted once; buffers do not count."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_flops(module: nn.Module, image_shape: tuple[int, ...]) -> int:
    """FLOPs of one forward pass over one image of `image_shape`, usually (C, H, W), in evaluation mode.

    A multiplication and an addition count as two, so this is twice the "multiply-adds" of the DARTS paper. Counted by
    torch.utils.flop_counter: convolutions, matrix products and operators with a registered formula; BatchNorm, pooling
    and ReLU count nothing. Runs on a copy of `module` on the meta device: nothing is computed, `module` is not touched.
    """
    skeleton = copy_of_shapes(module, "meta").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        skeleton(torch.empty((1, *image_shape), device="meta"))
    return counter.get_total_flops()


def copy_of_shapes(module: M, device: str, *, without: Collection[nn.Module] = ()) -> M:
    """A copy on a device that holds anything, whose parameters need no gradients, and that nobody watches.

    In place of the modules that it is to be `without`, the copy has None.
    """
    tensors = [*module.parameters(), *module.buffers()]
    # deepcopy takes what it finds in its memo, so the weights themselves are never copied.
    memo: dict[int, Any] = {id(tensor): _shape_of(tensor, device) for tensor in tensors}
    twin = copy.deepcopy(module, memo | {id(part): None for part in without})
    for part in twin.modules():  # whoever set a hook waits for passes of the module, not of a copy
        for hooks in (part._forward_pre_hooks, part._forward_hooks, part._backward_pre_hooks, part._backward_hooks):
            hooks.clear()
    return twin


def _shape_of(tensor: torch.Tensor, device: str) -> torch.Tensor:
    shape_only = torch.empty_like(tensor, device=device)
    return nn.Parameter(shape_only, requires_grad=False) if isinstance(tensor, nn.Parameter) else shape_only
