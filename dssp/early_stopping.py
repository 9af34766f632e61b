"""RobustDARTS' early stopping: the search ends when the loss becomes sharp in alpha, with the cell from before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dssp.genotype import AnyGenotype, genotype_from_dict

WINDOW = 5  # epochs that are averaged, and that lie between the two averages
RATIO = 0.75

ITERATIONS = 50
TOLERANCE = 1e-3


class EarlyStopping:
    """Stops when mean(lambda of epochs i-9 .. i-5) < 0.75 * mean(lambda of epochs i-4 .. i).

    lambda is the dominant eigenvalue of the Hessian of the validation loss in alpha; where it grows, discretising
    costs accuracy (Zela et al. 2020, arXiv:1909.09656, section 4.3). What is derived then is the cell of epoch i-5.

    genotype      that cell, None while the search goes on
    stopped_after the epochs that ran until then
    """

    def __init__(self) -> None:
        self.eigenvalues: list[float] = []
        self._genotypes: list[AnyGenotype] = []  # of the last epochs
        self.genotype: AnyGenotype | None = None
        self.stopped_after: int | None = None

    def update(self, epoch: int, eigenvalue: float, genotype: AnyGenotype) -> bool:
        """Take note of an epoch of the search; whether it was the last one."""
        self.eigenvalues.append(eigenvalue)
        self._genotypes = [*self._genotypes, genotype][-WINDOW - 1 :]
        last, before = self.eigenvalues[-WINDOW:], self.eigenvalues[-2 * WINDOW : -WINDOW]
        if len(before) < WINDOW or not sum(before) < RATIO * sum(last):  # nor if one of them is no number
            return False
        self.genotype, self.stopped_after = self._genotypes[0], epoch + 1
        return True

    def state_dict(self) -> dict[str, Any]:
        return {
            "eigenvalues": list(self.eigenvalues),
            "genotypes": [genotype.to_dict() for genotype in self._genotypes],
            "stopped_after": self.stopped_after,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.eigenvalues = list(state["eigenvalues"])
        self._genotypes = [genotype_from_dict(fields) for fields in state["genotypes"]]
        self.stopped_after = state["stopped_after"]
        self.genotype = None if self.stopped_after is None else self._genotypes[0]


def dominant_eigenvalue(loss: Tensor, parameters: Sequence[nn.Parameter]) -> float:
    """The largest magnitude of an eigenvalue of the Hessian of `loss` in all `parameters` together.

    By power iteration with Hessian-vector products, from a fixed random vector, until |H v| changes by less than a
    thousandth. Waits for the device.
    """
    gradient = _flat(
        torch.autograd.grad(loss, parameters, create_graph=True, allow_unused=True, materialize_grads=True)
    )
    start = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0))
    vector, found = start.to(gradient), 0.0
    for _ in range(ITERATIONS):
        product = (gradient * (vector / vector.norm())).sum()
        vector = _flat(
            torch.autograd.grad(product, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        )
        before, found = found, float(vector.norm())
        if abs(found - before) <= TOLERANCE * found:
            break
    return found


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])
