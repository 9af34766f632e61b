"""PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search (Xu et al. 2020, arXiv:1907.05737)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dssp.config import SearchConfig
from dssp.methods.base import Method
from dssp.partial_channels import PartialEdges
from dssp.pruning.held_out import Losses
from dssp.relaxation import Mixture, softmax_per_node
from dssp.supernet import SearchEdges, Supernet


class PcDarts(Method):
    """A quarter of the channels runs the candidates (dssp.partial_channels), edges are weighed against each other.

    b_e = softmax over the edges e' into the same node of beta_e' (section 3.3, eq. 3), learned with alpha; a candidate
    has the weight b_e * softmax(alpha_e)_k in the mix and, as in the authors' code, in the derivation. The first epochs
    train weights only (the paper: 15 of 50).
    """

    edges: ClassVar[type[SearchEdges]] = PartialEdges
    weighs_edges: ClassVar[bool] = True

    def __init__(self, config: SearchConfig, supernet: Supernet, losses: Losses) -> None:
        super().__init__(config, supernet, losses)
        nodes = torch.tensor([node for _, node in supernet.space.edges])
        self._nodes = nodes.to(supernet.classifier.weight.device)

    def mixture(self, cell_type: str) -> Mixture:
        return Mixture(self.derivation_weights(cell_type))

    def derivation_weights(self, cell_type: str) -> Tensor:
        shares = softmax_per_node(self.supernet.beta[cell_type], self.supernet.active(cell_type), self._nodes)
        return shares.unsqueeze(1) * self.candidate_weights(cell_type)
