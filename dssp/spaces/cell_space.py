"""A search space as data: the graph of its cells, what their edges choose among, and the network around them."""

from __future__ import annotations

from dataclasses import dataclass

from dssp.genotype import AnyGenotype
from dssp.spaces.skeleton import BuildSkeleton


@dataclass(frozen=True, kw_only=True)
class CellSpace:
    """Cells as directed acyclic graphs of states (DARTS, arXiv:1806.09055, section 2.1) in a macro skeleton.

    States are numbered 0 .. inputs-1 for the inputs and inputs .. inputs+nodes-1 for the nodes; an edge is a pair
    (source, node) with source < node. Every edge chooses among `operations`.

    cell_types         the kinds of cells; each has an architecture of its own, shared by all cells of the kind. None:
                       every cell has one of its own; the types are then stage1, stage2, ...
    fan_in             how many of the states before a node, the nearest ones, have an edge to it; None: all.
    shortcuts          whether every node but the first also adds the state before it, as it is: it needs no edge then.
    output_nodes       how many of the last nodes are concatenated to the cell's output; None: all.
    skeleton           builds the network around the cells.
    genotype           what a search of this space ends in.
    derives_none       whether `none` may be what is derived for an edge that was not removed.
    norms_after_pools  whether a BatchNorm follows every pool in the supernet, as in DARTS.

    Raises ValueError for a cell without inputs, nodes or edges, or with more output nodes than nodes.
    """

    name: str
    operations: tuple[str, ...]
    cell_types: tuple[str, ...] | None
    inputs: int
    nodes: int
    skeleton: BuildSkeleton
    genotype: type[AnyGenotype]
    fan_in: int | None = None
    shortcuts: bool = False
    output_nodes: int | None = None
    derives_none: bool = False
    norms_after_pools: bool = True

    def __post_init__(self) -> None:
        for field in ("nodes", "inputs"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}: got {getattr(self, field)}, expected at least 1")
        if self.fan_in is not None and self.fan_in < 1:
            raise ValueError(f"fan_in: got {self.fan_in}, expected at least 1")
        if self.output_nodes is not None and not 1 <= self.output_nodes <= self.nodes:
            raise ValueError(f"output_nodes: got {self.output_nodes}, expected 1 to {self.nodes}")

    def types(self, cells: int) -> tuple[str, ...]:
        """The kinds of cells in a network of `cells` cells."""
        return self.cell_types or tuple(f"stage{i}" for i in range(1, cells + 1))

    @property
    def node_states(self) -> tuple[int, ...]:
        """The numbers of the nodes."""
        return tuple(range(self.inputs, self.inputs + self.nodes))

    @property
    def edges(self) -> tuple[tuple[int, int], ...]:
        """All edges in DARTS' order: node by node, and within a node by source."""
        return tuple((source, node) for node in self.node_states for source in self.sources(node))

    @property
    def concat(self) -> tuple[int, ...]:
        """The states whose concatenation is the cell's output."""
        return self.node_states if self.output_nodes is None else self.node_states[-self.output_nodes :]

    def edges_into(self, node: int) -> range:
        """Positions in `edges` of the edges that enter state `node`; they are consecutive, in order of source.

        Raises ValueError if `node` is no node of the cell.
        """
        if node not in self.node_states:
            raise ValueError(f"node: got {node}, expected one of {self.node_states[0]} to {self.node_states[-1]}")
        first = sum(len(self.sources(before)) for before in range(self.inputs, node))
        return range(first, first + len(self.sources(node)))

    def sources(self, node: int) -> range:
        """The states that have an edge to a node."""
        return range(0 if self.fan_in is None else max(node - self.fan_in, 0), node)

    def has_shortcut(self, node: int) -> bool:
        """Whether a node adds the state before it, whatever its edges do."""
        return self.shortcuts and node > self.inputs

    @property
    def gate_groups(self) -> tuple[int, ...]:
        """Per edge the group within which its gate is compared: edges whose common scale the loss cannot see.

        Where a node is the sum of its edges alone and read by norms alone, that is the node. With shortcuts, the states
        of a cell are one stream, x_n = sum_{i <= n} gate_i f_i(x_{i-1}): what scales all its gates scales all its
        states, and every reader begins with a convolution and a BatchNorm, which undo it. A gate over the mean of its
        node, where it is alone, would be 1 whatever it learns; over the mean of its cell it says how much a layer adds.
        """
        return tuple(self.inputs if self.shortcuts else node for _, node in self.edges)
