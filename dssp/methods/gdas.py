"""GDAS: Searching for a Robust Neural Architecture in Four GPU Hours (Dong and Yang 2019, arXiv:1910.04465)."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from dssp.methods.gumbel import GumbelMethod
from dssp.relaxation import Mixture


class Gdas(GumbelMethod):
    """On every edge the candidate with the largest alpha + g runs, and no other; alpha learns straight through it.

    With h = softmax((alpha + g) / tau), the weights are one_hot(argmax h) on the way forward and h on the way back
    (section 3.2, eq. 3 and 4). The loss has a derivative by the weight of the candidate that ran only: the others'
    outputs, which it would take, do not exist. As in the authors' code, theirs count as zero; what reaches their alpha
    comes through the normalisation of h. tau falls from 10 to 0.1, as there.
    """

    on_host: ClassVar[bool] = True

    def sampled(self, cell_type: str, gumbel: Tensor, temperature: Tensor) -> Mixture:
        soft = super().sampled(cell_type, gumbel, temperature).weights
        hard = torch.nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        runs = hard.bool() & self.supernet.active(cell_type).unsqueeze(1)
        return Mixture(hard + (soft - soft.detach()), runs.tolist())

    def penalty(self) -> Tensor:
        """Plus a zero that depends on alpha: where `none` is drawn on every way through a cell, the loss does not."""
        return super().penalty() + 0 * torch.cat([alpha.flatten() for alpha in self.supernet.alpha.values()]).sum()
