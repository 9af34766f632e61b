"""Which candidates leave an edge, and when: twice, those that are worth least, until a few are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from dssp.supernet import Supernet

Worth = Callable[[Sequence[tuple[str, str]]], Sequence[float]]
"""How much candidates, given as (edge, operation), lower the held-out loss."""


@dataclass(frozen=True)
class CandidateSchedule:
    """The candidates of every edge go down to `kept` at the end of epoch `last`, and half way, in ratio, at `first`."""

    first: int
    last: int
    kept: int

    def survivors(self, epoch: int, candidates: int) -> int | None:
        """How many of `candidates` an edge keeps after the end of `epoch`; None: this is no pruning point."""
        if epoch == self.last:
            return min(self.kept, candidates)
        return round((candidates * self.kept) ** 0.5) if epoch == self.first and candidates > self.kept else None


class CandidatePruner:
    """Removes candidates from the live edges of a supernet and remembers what left when.

    On every edge those leave that `worth` says are worth least: what alpha believes does not count (it favours skip
    connections, and more so the longer it learns). Where two or more survive, the best of those with weights stays, and
    the best of those without, unless they may be of `any_kind`. For what has weights is still being trained while it is
    judged and shows too little, what has none shows all it has from the first step: only the last comparison, of whole
    paths, decides between the two. One also stays if without it nothing could be derived any more, which `can_derive`
    tells of the candidates that the supernet offers.
    """

    def __init__(
        self,
        supernet: Supernet,
        schedule: CandidateSchedule,
        worth: Worth,
        can_derive: Callable[[], bool],
        *,
        any_kind: bool = False,
    ) -> None:
        self.supernet, self.schedule, self.worth, self.can_derive = supernet, schedule, worth, can_derive
        self.any_kind = any_kind
        self.history: list[dict[str, Any]] = []

    def end_epoch(self, epoch: int, step: int) -> list[str]:
        """Prune if this epoch is a pruning point; the candidates that left, as `normal:0->2/skip_connect`."""
        operations = self.supernet.space.operations
        survivors = self.schedule.survivors(epoch, len(operations))
        if survivors is None:
            return []
        left = {edge: self._left(edge) for edge in self.supernet.live_edges()}
        candidates = [(edge, name) for edge, names in left.items() if len(names) > survivors for name in names]
        ranked = sorted(zip(candidates, self.worth(candidates), strict=True), key=lambda candidate: candidate[1])
        leaving, any_kind = [], self.any_kind or survivors < 2
        for (edge, operation), _ in ranked:
            is_spare = len(left[edge]) > survivors and (any_kind or self._has_peer(edge, operation, left[edge]))
            if is_spare and self._is_dispensable(edge, operation):
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

    def _has_peer(self, edge: str, operation: str, left: Sequence[str]) -> bool:
        """Whether another candidate left on the edge has weights if this one has, or none if this one has none."""
        mixed_edge, names = self.supernet.mixed_edges(edge)[0], self.supernet.space.operations
        has_weights = {name: any(True for _ in mixed_edge._ops[names.index(name)].parameters()) for name in left}
        return list(has_weights.values()).count(has_weights[operation]) > 1

    def _is_dispensable(self, edge: str, operation: str) -> bool:
        """Then it is offered no more."""
        cell_type, position = self.supernet.locate(edge)
        offered = self.supernet.offered(cell_type)[position]
        k = self.supernet.space.operations.index(operation)
        offered[k] = False
        offered[k] = not (dispensable := self.can_derive())
        return dispensable

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
