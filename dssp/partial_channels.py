"""PC-DARTS' edges: a quarter of the channels run the candidates, the others pass by, and both are shuffled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dssp.relaxation import Mixture
from dssp.spaces import CellSpace
from dssp.supernet import SearchEdges
from dssp_kernels import SharedOutputs, mixed_sum

SHARE = 4  # one channel in so many runs the candidates: the paper's K


class PartialEdges(SearchEdges):
    """Edges of a cell under partial channel connections (Xu et al. 2020, arXiv:1907.05737, section 3.2, eq. 2).

        node_j = sum_e b_e * shuffle([sum_k w_ek o_k(x[:C/4]), x[C/4:]])

    What passes by an edge of stride 2 goes through a max pool 2x2, as in the authors' code. A mixture's weights are
    b_e * w_ek; those of an edge sum to b_e, so the sum is what the channels that pass by are multiplied by. All edges
    of a node are mixed in one kernel, what passes by them in another; the shuffle, which is linear, comes once, last.

    Raises ValueError if a quarter of the channels is no whole number, or the cell changes the width: no channel could
    pass by.
    """

    def __init__(self, space: CellSpace, channels: int, stride: int, c_in: int | None = None) -> None:
        if c_in is not None:
            raise ValueError(f"c_in: partial channels need edges that keep the width, got {c_in} to {channels}")
        if channels % SHARE:
            raise ValueError(f"channels: expected a multiple of {SHARE} for partial channels, got {channels}")
        super().__init__(space, channels // SHARE, stride)
        self._mixed, self._stride, self._inputs = channels // SHARE, stride, space.inputs

    def forward(self, inputs: Sequence[Tensor], mixture: Mixture) -> list[Tensor]:
        """mixture: of all edges, in the space's order."""
        states, shared = list(inputs), SharedOutputs()
        heads, bypasses = (
            [self._head(state) for state in states],
            [self._bypass(state, i) for i, state in enumerate(states)],
        )
        of_nodes = mixture.split([len(node.edges) for node in self._nodes])
        for node, of_node in zip(self._nodes, of_nodes, strict=True):
            mixed = node(heads, of_node.weights, None, shared, of_node.runs)
            beside = mixed_sum(bypasses, of_node.weights.sum(1, keepdim=True), relaxation="given")
            states.append(interleaved([mixed, *beside.chunk(SHARE - 1, dim=1)]))
            heads.append(self._head(states[-1]))
            bypasses.append(self._bypass(states[-1], len(states) - 1))
        return states

    def _head(self, state: Tensor) -> Tensor:
        return state[:, : self._mixed].clone()  # dense, once, for the many that read it

    def _bypass(self, state: Tensor, position: int) -> Tensor:
        rest = state[:, self._mixed :]
        if self._stride == 1 or position >= self._inputs:
            return rest
        return F.max_pool2d(rest, self._stride, ceil_mode=True)  # odd sizes round up, as the candidates do


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """The first channels of all parts, then the second ones, and so on (a channel shuffle), in their memory layout."""
    if parts[0].is_contiguous(memory_format=torch.channels_last):
        return torch.stack([part.movedim(1, -1) for part in parts], dim=-1).flatten(-2).movedim(-1, 1)
    return torch.stack(list(parts), dim=2).flatten(1, 2)
