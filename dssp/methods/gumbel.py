"""What methods that sample their candidates share: Gumbel noise for every edge, and a temperature that falls."""

from __future__ import annotations

import torch
from torch import Tensor

from dssp.methods.base import Method, Noise
from dssp.relaxation import Mixture, softmax_over


class GumbelMethod(Method):
    """A step draws g = -log(e), e ~ Exp(1), for each candidate; argmax(alpha + g) is then a draw from softmax(alpha).

    The temperature falls linearly over the epochs, from ``temperature`` to ``temperature_min``. Held-out images are
    judged without noise, by softmax(alpha).
    """

    def noise(self, generator: torch.Generator, epoch: int) -> Noise:
        drawn = {"temperature": torch.tensor(self.temperature(epoch))}
        for cell_type in self.supernet.cell_types:
            exponential = torch.empty(self.supernet.alpha[cell_type].shape).exponential_(generator=generator)
            drawn[cell_type] = -exponential.clamp_min(torch.finfo(torch.float32).tiny).log()
        return drawn

    def temperature(self, epoch: int) -> float:
        """Of the softmax, in an epoch."""
        start, end = self.config.temperature, self.config.temperature_min
        return start + (end - start) * epoch / max(self.config.epochs - 1, 1)

    def mixtures(self, noise: Noise) -> dict[str, Mixture]:
        if not noise:
            return super().mixtures(noise)
        return {type: self.sampled(type, noise[type], noise["temperature"]) for type in self.supernet.cell_types}

    def sampled(self, cell_type: str, gumbel: Tensor, temperature: Tensor) -> Mixture:
        """softmax((alpha + g) / tau) over the candidates that are left: the concrete relaxation."""
        alpha = self.supernet.alpha[cell_type]
        perturbed = (alpha + gumbel.to(alpha.device)) / temperature.to(alpha.device)
        return Mixture(softmax_over(perturbed, self.supernet.offered(cell_type)))
