"""What a pruned FusedMixedEdge still costs, as a share of an active one with DARTS' candidates."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bench.timing import time_interleaved
from dssp.spaces import DARTS
from dssp.spaces.operations import OPERATIONS
from dssp_kernels import FusedMixedEdge


def darts_edge(channels: int, device: torch.device) -> FusedMixedEdge:
    candidates: list[nn.Module] = [
        OPERATIONS[name](channels, channels, 1, False) for name in DARTS.operations if name != "none"
    ]
    return FusedMixedEdge(candidates).to(device).to(memory_format=torch.channels_last)


def pruned_cost(shape: tuple[int, ...], device: torch.device, seconds: float) -> dict[str, float]:
    """Time of a pruned edge over the time of an active one, forward and forward + backward, training mode."""
    x = torch.randn(shape, device=device).to(memory_format=torch.channels_last).requires_grad_()
    edges = {"active": darts_edge(shape[1], device), "pruned": darts_edge(shape[1], device)}
    edges["pruned"].prune()
    passes = {"forward": run_forward, "forward+backward": run_forward_backward}
    shares = {}
    for name, run in passes.items():
        contenders = {state: [lambda edge=edge, run=run: run(edge, x)] for state, edge in edges.items()}
        shares[name] = time_interleaved(contenders, device, seconds=seconds, min_rounds=3).ratio("pruned", "active")
    return shares


def run_forward(edge: FusedMixedEdge, x: Tensor) -> None:
    with torch.no_grad():
        edge(x)


def run_forward_backward(edge: FusedMixedEdge, x: Tensor) -> None:
    y = edge(x)
    if y.requires_grad:  # a pruned edge leaves nothing to differentiate
        torch.autograd.grad(y, [x, *edge.parameters()], torch.ones_like(y), allow_unused=True)
