"""Which candidates leave an edge, and when: twice, the ones whose masking costs least, until a few are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dssp.held_out import Measure, candidate_effects
from dssp.supernet import Supernet


@dataclass(frozen=True)
class CandidateSchedule:
    """After two thirds of the first `epochs` epochs, and at their end, the candidates of every edge go down to `kept`.

    On the way they pass the geometric mean, so that both times the same share of them leaves.
    """

    epochs: int
    kept: int

    def survivors(self, epoch: int, candidates: int) -> int | None:
        """How many of `candidates` an edge keeps after the end of `epoch`; None: this is no pruning point."""
        first, last = round(2 * self.epochs / 3) - 1, self.epochs - 1
        if epoch == last:
            return min(self.kept, candidates)
        return round((candidates * self.kept) ** 0.5) if epoch == first and candidates > self.kept else None


class CandidatePruner:
    """Removes candidates from the live edges of a supernet and remembers what left when.

    A candidate leaves if masking it, the softmax renormalised over the others of its edge, raises the loss on held-out
    images least: what alpha believes does not count (it favours skip connections, and more so the longer it learns).
    """

    def __init__(self, supernet: Supernet, schedule: CandidateSchedule, losses: Measure) -> None:
        self.supernet, self.schedule, self.losses = supernet, schedule, losses
        self.history: list[dict[str, Any]] = []

    def end_epoch(self, epoch: int, step: int) -> list[str]:
        """Prune if this epoch is a pruning point; the candidates that left, as `normal:0->2/skip_connect`."""
        operations = self.supernet.space.operations
        survivors = self.schedule.survivors(epoch, len(operations))
        if survivors is None:
            return []
        left = {edge: self._left(edge) for edge in self.supernet.live_edges()}
        candidates = [(edge, name) for edge, names in left.items() if len(names) > survivors for name in names]
        effects = candidate_effects(self.supernet, candidates, self.losses)
        ranked = sorted(zip(candidates, (float(effect.mean()) for effect in effects), strict=True), key=lambda c: c[1])
        leaving = []
        for (edge, operation), _ in ranked:
            if len(left[edge]) > survivors:
                left[edge].remove(operation)
                leaving.append(f"{edge}/{operation}")
        for candidate in leaving:
            self._remove(candidate)
            self.history.append({"epoch": epoch, "step": step, "candidate": candidate})
        return leaving

    def _left(self, edge: str) -> list[str]:
        cell_type, position = self.supernet.locate(edge)
        flags = self.supernet.offered(cell_type)[position].tolist()
        return [name for name, offered in zip(self.supernet.space.operations, flags, strict=True) if offered]

    def _remove(self, candidate: str) -> None:
        edge, operation = candidate.split("/")
        self.supernet.remove_candidate(edge, operation)

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Removes from a fresh supernet the candidates that had left; call before its weights are loaded."""
        self.history = list(state["history"])
        for event in self.history:
            self._remove(event["candidate"])
