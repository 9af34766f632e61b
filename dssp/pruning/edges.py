"""Which edges leave the search space, and when: normalised gates, the four strategies, the measured effect.

Why gates are normalised. Every path out of a cell ends in a BatchNorm, so the loss does not see a common scale of a
node's gates; the penalty pulls exactly along that direction and, under Adam, at the optimizer's own pace whatever
lambda is. Raw gates therefore sink together and say little. What the loss does see is a gate relative to the others
that enter the same node, so that is what is compared:

    s_e = sigmoid(m_e) / mean over the live in-edges e' of e's node of sigmoid(m_e')

(where nodes have shortcuts, over the live edges of e's cell: see CellSpace.gate_groups)

Why gates only propose. A relative gate is still a learned parameter with noise in it. Under the default strategy it
picks which edges to look at; the loss increase on fixed held-out images when an edge is masked decides which go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dssp.pruning.held_out import Measure, edge_effects
from dssp.supernet import Supernet

STRATEGIES = ("measured", "budget", "relative", "absolute", "none")


@dataclass(frozen=True)
class PruningRules:
    """When and how much to prune: after every `every`-th epoch from the warm-up's last on, up to `last_epoch`.

    Strategies:
        absolute: every edge with sigmoid(m) < threshold, as the paper writes it.
        relative: every edge with normalised gate s < threshold.
        budget: the lowest s, until the schedule's number of edges is reached.
        measured: as budget, but twice as many edges are proposed and those leave whose masking costs least.
        none: nothing is pruned.
    """

    strategy: str
    threshold: float
    min_edges: int
    edge_budget: float
    warmup_epochs: int
    last_epoch: int
    every: int

    def points(self) -> list[int]:
        """The epochs at whose end edges may leave."""
        if self.strategy == "none":
            return []
        return list(range(self.warmup_epochs + self.every - 1, self.last_epoch + 1, self.every))

    def last_scheduled(self) -> int | None:
        """The epoch with which the schedule of the edges is fulfilled; None if no edge leaves by schedule."""
        is_scheduled = self.strategy in ("measured", "budget") and self.edge_budget < 1
        return self.points()[-1] if is_scheduled and self.points() else None

    def target(self, epoch: int, edges: int) -> int:
        """How many of ``edges`` the schedule leaves after the pruning point at the end of ``epoch``."""
        points = self.points()
        passed = sum(point <= epoch for point in points) / max(len(points), 1)
        return edges - round((1.0 - self.edge_budget) * edges * passed)


def normalised_gates(gates: Sequence[float], groups: Sequence[Hashable], live: Sequence[bool]) -> list[float]:
    """s_e = gate_e / mean of the live gates of the same group; 0 for edges that are gone."""
    result = []
    for gate, group, is_live in zip(gates, groups, live, strict=True):
        peers = [g for g, other, alive in zip(gates, groups, live, strict=True) if other == group and alive]
        result.append(gate * len(peers) / sum(peers) if is_live and sum(peers) > 0 else float(is_live))
    return result


@dataclass
class GateTable:
    """The live edges of a supernet with their gates, as one table over all cell types.

    groups     within which gates are compared, by default the nodes.
    shortcuts  the nodes that have one; it counts as an incoming edge that never leaves.
    """

    names: list[str]
    nodes: list[tuple[str, int]]
    gates: list[float]
    live: list[bool]
    groups: list[tuple[str, int]] = field(default_factory=list)
    shortcuts: frozenset[tuple[str, int]] = frozenset()
    scores: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.scores = normalised_gates(self.gates, self.groups or self.nodes, self.live)

    @classmethod
    def of(cls, supernet: Supernet) -> GateTable:
        types = supernet.cell_types
        gates = torch.cat([supernet.gates(type).cpu() for type in types]).tolist()
        live = torch.cat([supernet.active(type) for type in types]).tolist()
        space = supernet.space
        nodes = [(type, node) for type in types for _, node in space.edges]
        groups = [(type, group) for type in types for group in space.gate_groups]
        shortcuts = frozenset((type, node) for type, node in nodes if space.has_shortcut(node))
        return cls(list(supernet.edges()), nodes, gates, live, groups, shortcuts)

    def removable(self, min_edges: int) -> list[int]:
        """Positions of the edges whose node keeps at least ``min_edges`` without them, lowest score first."""
        spare = self._spare(min_edges)
        candidates = [i for i, alive in enumerate(self.live) if alive and spare[self.nodes[i]] > 0]
        return sorted(candidates, key=lambda i: self.scores[i])

    def proposals(self, min_edges: int, count: int) -> list[int]:
        """Lowest scores first: twice ``count``, and more where too many of those are edges that a node cannot spare."""
        spare = self._spare(min_edges)
        proposed: list[int] = []
        can_leave = 0
        for i in self.removable(min_edges):
            if len(proposed) >= 2 * count and can_leave >= count:
                break
            proposed.append(i)
            can_leave += spare[self.nodes[i]] > 0
            spare[self.nodes[i]] -= 1
        return proposed

    def _spare(self, min_edges: int) -> dict[tuple[str, int], int]:
        """Per node how many edges it can lose and keep ``min_edges``."""
        spare = {node: (node in self.shortcuts) - min_edges for node in self.nodes}
        for node, alive in zip(self.nodes, self.live, strict=True):
            spare[node] += alive
        return spare

    def without(self, position: int) -> GateTable:
        """The table after that edge has left; the scores of its node change."""
        live = [alive and i != position for i, alive in enumerate(self.live)]
        return replace(self, live=live)


class Pruner:
    """Removes edges from a supernet as the rules say and remembers what left when.

    Every node keeps at least ``min_edges`` >= 1 incoming edges, its shortcut counted among them, and sources come
    before nodes, so a path from the cell's inputs to its output always remains.
    """

    def __init__(self, supernet: Supernet, rules: PruningRules, losses: Measure) -> None:
        if rules.strategy not in STRATEGIES:
            raise ValueError(f"prune_strategy: expected one of {', '.join(STRATEGIES)}, got {rules.strategy!r}")
        if rules.min_edges < 1:
            raise ValueError(
                f"min_edges: expected at least 1, or a node would lose its last path, got {rules.min_edges}"
            )
        self.supernet, self.rules, self.losses = supernet, rules, losses
        self.history: list[dict[str, Any]] = []

    def end_epoch(self, epoch: int, step: int) -> list[str]:
        """Prune if this epoch is a pruning point; the edges that left."""
        if epoch not in self.rules.points():
            return []
        leaving = self._leaving(epoch)
        for edge in leaving:
            self.supernet.remove_edge(edge)
            self.history.append({"epoch": epoch, "step": step, "edge": edge})
        return leaving

    def _leaving(self, epoch: int) -> list[str]:
        table = GateTable.of(self.supernet)
        rules = self.rules
        if rules.strategy == "absolute":
            return self._take(table, lambda table, i: table.gates[i] < rules.threshold)
        if rules.strategy == "relative":
            return self._take(table, lambda table, i: table.scores[i] < rules.threshold)
        count = sum(table.live) - rules.target(epoch, len(table.names))
        if rules.strategy == "measured" and count > 0:
            proposed = [table.names[i] for i in table.proposals(rules.min_edges, count)]
            effects = edge_effects(self.supernet, proposed, self.losses)
            mean_effect = dict(zip(proposed, (float(effect.mean()) for effect in effects), strict=True))
            table.scores = [mean_effect.get(name, math.inf) for name in table.names]
        return self._take(table, lambda table, i: True, count)

    def _take(
        self, table: GateTable, may_leave: Callable[[GateTable, int], bool], count: int | None = None
    ) -> list[str]:
        """Up to ``count`` edges, lowest score first, as long as their node can spare them."""
        leaving: list[str] = []
        while count is None or len(leaving) < count:
            position = next((i for i in table.removable(self.rules.min_edges) if may_leave(table, i)), None)
            if position is None or math.isinf(table.scores[position]):
                break
            leaving.append(table.names[position])
            scores, table = table.scores, table.without(position)
            if self.rules.strategy == "measured":
                table.scores = scores
        return leaving

    def state_dict(self) -> dict[str, Any]:
        return {"history": self.history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Removes from a fresh supernet the edges that had left; call before its weights are loaded."""
        self.history = list(state["history"])
        for event in self.history:
            self.supernet.remove_edge(event["edge"])
