"""Fair DARTS (Chu, Zhou, Zhang, Li 2020, arXiv:1911.12126)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from dssp.methods.base import Method
from dssp.relaxation import Mixture


class FairDarts(Method):
    """y_e = sum_k sigmoid(alpha_ek) o_k(x): candidates do not compete, and are pushed to 0 or 1 by

        L_01 = -1/N * sum over all alpha of (sigmoid(alpha) - 0.5)^2        (eq. 5, N of them)

    which is added to the validation loss, ``zero_one_weight`` times (eq. 6). Derived is what reaches
    ``sigmoid_threshold``: of each edge the strongest candidate, of each node the strongest edges, down to a single
    one, which a node keeps even where it does not (the paper's nodes may lose all; here, those with a shortcut);
    ``over_threshold`` in the epoch's row counts what does. `none` is no candidate: a sigmoid near 0 says the same.
    """

    offers_none: ClassVar[bool] = False

    def mixture(self, cell_type: str) -> Mixture:
        return Mixture(self.candidate_weights(cell_type))

    def candidate_weights(self, cell_type: str) -> Tensor:
        return self.supernet.alpha[cell_type].sigmoid() * self.supernet.offered(cell_type)

    def penalty(self) -> Tensor:
        return super().penalty() + self.config.zero_one_weight * self.zero_one_loss()

    def zero_one_loss(self) -> Tensor:
        """L_01 over the candidates that are left: a scalar."""
        sums, counts = [], []
        for cell_type in self.supernet.cell_types:
            left = self.supernet.offered(cell_type) & self.supernet.active(cell_type).unsqueeze(1)
            sums.append(((self.supernet.alpha[cell_type].sigmoid() - 0.5).square() * left).sum())
            counts.append(left.sum())
        return -torch.stack(sums).sum() / torch.stack(counts).sum()

    def end_epoch(self, epoch: int, step: int) -> dict[str, Any]:
        over = [self._live_weights(type) >= self.config.sigmoid_threshold for type in self.supernet.cell_types]
        return {**super().end_epoch(epoch, step), "over_threshold": int(torch.cat(over).sum())}

    def derivation_weights(self, cell_type: str) -> Tensor:
        weights, space = self._live_weights(cell_type), self.supernet.space
        derivable = weights.where(weights >= self.config.sigmoid_threshold, weights - 1.0)
        for node in space.node_states:
            if space.has_shortcut(node):
                continue
            first, last = space.edges_into(node)[0], space.edges_into(node)[-1] + 1
            best = int(weights[first:last].argmax()) + first * len(space.operations)
            derivable.view(-1)[best] = weights.view(-1)[best]
        return derivable

    def _live_weights(self, cell_type: str) -> Tensor:
        """The sigmoids, 0 where the edge is gone."""
        return self.candidate_weights(cell_type).detach() * self.supernet.active(cell_type).unsqueeze(1)
