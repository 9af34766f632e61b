"""The cell space of DARTS: two inputs, a few nodes, every node fed by all states before it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class CellSpace:
    """A cell as a directed acyclic graph of states (DARTS, arXiv:1806.09055, section 2.1).

    States are numbered 0 .. inputs-1 for the inputs and inputs .. inputs+nodes-1 for the nodes; an edge is a pair
    (source, node) with source < node. Every edge chooses among `operations`.
    """

    name: str
    operations: tuple[str, ...]
    nodes: int = 4
    inputs: int = 2

    def __post_init__(self) -> None:
        for field in ("nodes", "inputs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: got {getattr(self, field)}, expected at least 1")

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All edges in DARTS' order: node by node, and within a node by source."""
        return tuple((source, node) for node in self.concat for source in range(node))

    @property
    def concat(self) -> tuple[int, ...]:
        """The states whose concatenation is the cell's output: all nodes."""
        return tuple(range(self.inputs, self.inputs + self.nodes))

    def edges_into(self, node: int) -> range:
        """Positions in `edges` of the edges that enter state `node`; they are consecutive, in order of source.

        Raises ValueError if `node` is no node of the cell.
        """
        if node not in self.concat:
            raise ValueError(f"node: got {node}, expected one of {self.concat[0]} to {self.concat[-1]}")
        first = sum(range(self.inputs, node))
        return range(first, first + node)

    @staticmethod
    def reduction_cells(cells: int) -> frozenset[int]:
        """Positions of the reduction cells in a network of `cells` cells: at 1/3 and 2/3 of its depth."""
        return frozenset({cells // 3, 2 * cells // 3})


DARTS = CellSpace(
    name="darts",
    operations=(
        "none",
        "max_pool_3x3",
        "avg_pool_3x3",
        "skip_connect",
        "sep_conv_3x3",
        "sep_conv_5x5",
        "dil_conv_3x3",
        "dil_conv_5x5",
    ),
)
