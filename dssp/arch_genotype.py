"""The genotype of NAS-Bench-201: one operation for each of six edges, written as an arch string."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

OPERATIONS = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")  # in the benchmark's order
NODES = 3  # beside the cell's input, which is state 0

Edge = tuple[str, int]
Cell = tuple[tuple[Edge, ...], ...]


@dataclass(frozen=True)
class ArchGenotype:
    """A cell of NAS-Bench-201 (arXiv:2001.00326): per node one edge (operation, source) from every state before it.

    State 0 is the cell's input, node 3 its output; the edge that is not there has the operation `none`. Raises
    ValueError saying which node, what came and what was expected.
    """

    normal: Cell

    space: ClassVar[str] = "nasbench201"
    inputs: ClassVar[int] = 1
    shortcuts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.normal, tuple) or len(self.normal) != NODES:
            raise ValueError(f"normal: expected a tuple of {NODES} nodes, got {_short(repr(self.normal))}")
        for state, node in enumerate(self.normal, start=1):
            if not isinstance(node, tuple) or not all(isinstance(e, tuple) and len(e) == 2 for e in node):
                raise ValueError(f"normal: node {state}: expected edges (operation, source), got {_short(repr(node))}")
            sources = [source for _, source in node]
            if any(type(source) is not int for source in sources) or sources != list(range(state)):
                raise ValueError(f"normal: node {state}: expected edges from {list(range(state))}, got {sources}")
            for operation, _ in node:
                if operation not in OPERATIONS:
                    raise ValueError(
                        f"normal: node {state}: got operation {operation!r}, expected one of {', '.join(OPERATIONS)}"
                    )

    @property
    def cells(self) -> dict[str, tuple[Cell, tuple[int, ...]]]:
        """Per cell type the edges that are there, node by node, and the states that are the cell's output."""
        kept = tuple(tuple(edge for edge in node if edge[0] != "none") for node in self.normal)
        return {"normal": (kept, (NODES,))}

    @classmethod
    def from_cells(cls, cells: Mapping[str, Sequence[Sequence[Edge]]], concat: Sequence[int]) -> ArchGenotype:
        """The genotype that keeps these edges; the other ones are `none`."""
        nodes = []
        for state, node in enumerate(cells["normal"], start=1):
            operations = {source: operation for operation, source in node}
            nodes.append(tuple((operations.get(source, "none"), source) for source in range(state)))
        return cls(tuple(nodes))

    def to_dict(self) -> dict[str, Any]:
        """The genotype as JSON types; `from_dict` reads it back."""
        return {"normal": [[list(edge) for edge in node] for node in self.normal]}

    @classmethod
    def from_dict(cls, fields: object) -> ArchGenotype:
        """The genotype that `to_dict` wrote. Raises ValueError saying what is wrong."""
        if not isinstance(fields, dict) or set(fields) != {"normal"}:
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"genotype: expected an object with the field normal, got {got}")
        return cls(_tuples(fields["normal"]))

    def to_text(self) -> str:
        """The arch string: `|op~0|+|op~0|op~1|+|op~0|op~1|op~2|`."""
        return "+".join(f"|{'|'.join(f'{operation}~{source}' for operation, source in node)}|" for node in self.normal)

    @classmethod
    def from_text(cls, text: str) -> ArchGenotype:
        """The genotype of an arch string, white space around it allowed. Raises ValueError saying what is wrong."""
        nodes = text.strip().split("+")
        if len(nodes) != NODES:
            got = f"{len(nodes)} in {_short(repr(text))}"
            raise ValueError(f"arch string: expected {NODES} nodes joined by '+', got {got}")
        return cls(tuple(_node(state, node) for state, node in enumerate(nodes, start=1)))


def _node(state: int, text: str) -> tuple[Edge, ...]:
    if not re.fullmatch(r"\|([^|]*\|)+", text):
        raise ValueError(f"arch string: node {state}: expected |operation~source|...|, got {_short(repr(text))}")
    edges = []
    for part in text[1:-1].split("|"):
        match = re.fullmatch(r"(\w+)~([0-9])", part)
        if match is None:
            raise ValueError(f"arch string: node {state}: expected operation~source, got {_short(repr(part))}")
        edges.append((match[1], int(match[2])))
    return tuple(edges)


def _tuples(value: object) -> Any:
    """Lists as tuples, down to the edges; deeper ones stay, and are refused."""
    if not isinstance(value, list):
        return value
    return tuple(
        tuple(tuple(edge) if isinstance(edge, list) else edge for edge in node) if isinstance(node, list) else node
        for node in value
    )


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "..."
