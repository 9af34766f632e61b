"""From a searched supernet to a genotype: which edges stay, and with which operation."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from dssp.derived.budget import Budget, Option, node_options, strongest
from dssp.genotype import AnyGenotype, Edge
from dssp.paths.space import genotype_of, path_of
from dssp.relaxation import softmax_over
from dssp.supernet import Supernet

SKIP = "skip_connect"


def derive(
    supernet: Supernet,
    weights: Mapping[str, Tensor] | None = None,
    *,
    max_edges_per_node: int,
    max_skips: int | None = None,
    budget: Budget | None = None,
) -> AnyGenotype:
    """The discrete architecture that alpha and the gates describe (DARTS, section 2.4, with a gate in the strength).

    Of each live edge the operation with the largest weight, other than `none` unless the space derives that; of each
    node the edges with the largest strength sigmoid(m_e) * max_k weight_ek, at most ``max_edges_per_node`` (DARTS: 2,
    NAS-Bench-201: all).

    Args:
        weights: per cell type [edges, candidates], by default softmax(alpha); what is negative is not derived, but for
            what is above -1 where a budget leaves a node nothing else.
        max_skips: skip connections that the normal cell may have (P-DARTS, Chen et al. 2019, arXiv:1904.12760,
            section 3.3): as long as it has more, the weakest of them gives way to what is next on its edge or node.
        budget: what the derived network may cost. Where the above costs more, the largest sum of strengths that fits
            (and has no more skip connections) is derived, see budget.strongest(); a node may then have fewer edges, one
            at least, or none beside a shortcut.

    Raises ConfigError if nothing fits, naming the smallest network that is left.
    """
    space = supernet.space
    cells = {}
    for cell_type in supernet.cell_types:
        limit = max_skips if cell_type == "normal" else None
        strengths = _strengths(supernet, cell_type, weights)
        cell = _derive_cell(supernet, strengths, max_edges_per_node)
        while limit is not None and len(skips := _skips(supernet, cell)) > limit:
            k = space.operations.index(SKIP)
            strengths[min(skips, key=strengths[:, k].tolist().__getitem__), k] = -1.0
            cell = _derive_cell(supernet, strengths, max_edges_per_node)
        cells[cell_type] = cell
    genotype = space.genotype.from_cells(cells, space.concat)
    if budget is None or budget.admits(space, genotype):
        return genotype
    return _derive_within(budget, supernet, weights, max_edges_per_node, max_skips)


def _derive_within(
    budget: Budget, supernet: Supernet, weights: Mapping[str, Tensor] | None, max_edges: int, max_skips: int | None
) -> AnyGenotype:
    """The strongest that fits. Skip connections of the normal cell are one more cost with a limit."""
    space, nodes = supernet.space, []
    limits = (*budget.room, *(() if max_skips is None else (max_skips,)))
    for i, cell_type in enumerate(supernet.cell_types):
        options: list[list[Option]] = []
        for e, strengths in enumerate(_strengths(supernet, cell_type, weights).tolist()):
            options.append([])
            for k, (name, strength) in enumerate(zip(space.operations, strengths, strict=True)):
                skips = () if max_skips is None else (int(cell_type == "normal" and name == SKIP),)
                if strength > -1:
                    costs = (*budget.costs[cell_type][e][name], *skips)
                    options[-1].append(Option(strength, costs, ((i * len(space.edges) + e, k),)))
        for node in space.node_states:
            edges = [options[e] for e in space.edges_into(node) if options[e]]
            least = 0 if space.has_shortcut(node) else 1
            nodes.append(node_options(edges, least, max_edges, len(limits)))
    found = strongest(nodes, limits)
    if found is None:
        raise budget.nothing_fits(nodes)
    return genotype_of(supernet, path_of(supernet, dict(found.chosen)))


def _strengths(supernet: Supernet, cell_type: str, weights: Mapping[str, Tensor] | None) -> Tensor:
    """What each candidate of each edge counts, [edges, candidates] on the CPU; negative: it cannot be derived."""
    space = supernet.space
    if weights is None:
        own = softmax_over(supernet.alpha[cell_type].detach(), supernet.offered(cell_type))
    else:
        own = weights[cell_type].detach()
    strengths = own.cpu() * supernet.gates(cell_type).cpu().unsqueeze(1)
    strengths[~supernet.active(cell_type).cpu()] = -1.0
    strengths[~supernet.offered(cell_type).cpu()] = -1.0
    if "none" in space.operations and not space.derives_none:
        strengths[:, space.operations.index("none")] = -1.0
    return strengths


def _derive_cell(supernet: Supernet, strengths: Tensor, max_edges: int) -> list[list[Edge]]:
    space = supernet.space
    best, choice = strengths.max(-1)
    strength, operations = best.tolist(), [space.operations[k] for k in choice.tolist()]
    nodes = []
    for node in space.node_states:
        live = [i for i in space.edges_into(node) if strength[i] >= 0 and operations[i] != "none"]
        kept = sorted(sorted(live, key=lambda i: -strength[i])[:max_edges])
        nodes.append([(operations[i], space.edges[i][0]) for i in kept])
    return nodes


def _skips(supernet: Supernet, nodes: list[list[Edge]]) -> list[int]:
    """The positions of the edges that are skip connections in a derived cell."""
    kept = [
        (source, node) for node, edges in zip(supernet.space.node_states, nodes, strict=True) for _, source in edges
    ]
    names = [name for edges in nodes for name, _ in edges]
    return [supernet.space.edges.index(edge) for edge, name in zip(kept, names, strict=True) if name == SKIP]
