"""From architecture parameters to the weights of a mix: softmax over the candidates that are left, normalised gates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """How edges mix their candidates.

    weights  [edges, candidates]: what each candidate's output is multiplied by, the edge's gate included.
    runs     which candidates run at all, [edges][candidates]; None: all that are left. Those that do not are zeros.
    """

    weights: Tensor
    runs: Sequence[Sequence[bool]] | None = None

    def split(self, sizes: Sequence[int]) -> list[Mixture]:
        """One mixture for each of the groups of consecutive edges with these sizes."""
        parts, first = [], 0
        for weights in self.weights.split(list(sizes)):
            parts.append(Mixture(weights, self.runs and self.runs[first : first + len(weights)]))
            first += len(weights)
        return parts


def softmax_over(alpha: Tensor, offered: Tensor) -> Tensor:
    """softmax over the offered candidates of each edge, zero for the others: [E, K], bool [E, K] -> [E, K].

    Every edge must offer one candidate at least.
    """
    return alpha.masked_fill(~offered, -torch.inf).softmax(-1)


def softmax_per_node(logits: Tensor, live: Tensor, nodes: Tensor) -> Tensor:
    """softmax over the live edges into the same node, 0 for edges that are gone: [E], bool [E], [E] -> [E].

    ``nodes`` says which node each edge enters; every one must have a live edge.
    """
    peers = (nodes.unsqueeze(0) == nodes.unsqueeze(1)) & live
    total = logits.masked_fill(~peers, -torch.inf).logsumexp(-1)
    return torch.where(live, logits - total, -torch.inf).exp()


def normalised_gates(mask: Tensor, live: Tensor, groups: Tensor) -> Tensor:
    """g_e = sigmoid(m_e) / mean of sigmoid(m_e') over the live edges e' of the same group; 0 for edges that are gone.

    Args:
        mask: gate logits [E].
        live: bool [E].
        groups: the group of each edge, [E]: the node that it enters, or CellSpace.gate_groups.
    """
    gates = torch.where(live, mask.sigmoid(), 0.0)
    same_group = (groups.unsqueeze(0) == groups.unsqueeze(1)).to(gates.dtype)
    count = same_group @ live.to(gates.dtype)
    return gates * count / (same_group @ gates).clamp_min(torch.finfo(gates.dtype).tiny)
