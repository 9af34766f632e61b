"""Running means that stay on the device: one copy to the host when somebody looks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class RunningMeans:
    """Means of named scalars over the steps of an epoch; what is not finite is left out (NaN if nothing else came)."""

    def __init__(self) -> None:
        # Names that came together -> float64 [2, names] on the device: their sums, and how many were finite.
        self._totals: dict[tuple[str, ...], Tensor] = {}

    def update(self, values: Mapping[str, Tensor]) -> Tensor:
        """Add one step's scalars (tensors, detached); whether all were finite, as a bool scalar on their device."""
        if not values:
            return torch.tensor(True)
        names, stacked = tuple(values), torch.stack(list(values.values())).double()
        finite = stacked.isfinite()
        step = torch.stack([torch.where(finite, stacked, 0.0), finite.double()])
        self._totals[names] = self._totals[names].to(step.device) + step if names in self._totals else step
        return finite.all()

    def compute(self) -> dict[str, float]:
        """The means so far, in one transfer from the device."""
        if not self._totals:
            return {}
        sums, counts = torch.cat(list(self._totals.values()), dim=1).tolist()
        means: dict[str, tuple[float, float]] = {}
        names = [name for group in self._totals for name in group]
        for name, total, count in zip(names, sums, counts, strict=True):
            before = means.get(name, (0.0, 0.0))
            means[name] = before[0] + total, before[1] + count
        return {name: total / count if count else math.nan for name, (total, count) in means.items()}

    def state_dict(self) -> dict[str, Any]:
        return {"names": [list(names) for names in self._totals], "totals": [t.cpu() for t in self._totals.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._totals = {tuple(names): t for names, t in zip(state["names"], state["totals"], strict=True)}
