"""Running means that stay on the device: one copy to the host when somebody looks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class RunningMeans:
    """Means of named scalars over the steps of an epoch."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def update(self, values: Mapping[str, Tensor]) -> None:
        """Add one step's scalars (tensors, detached)."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def compute(self) -> dict[str, float]:
        """The means so far, in one transfer from the device."""
        if not self._sums:
            return {}
        sums = torch.stack([value.double() for value in self._sums.values()]).tolist()
        return {name: total / self._counts[name] for name, total in zip(self._sums, sums, strict=True)}
