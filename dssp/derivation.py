"""From a searched supernet to a genotype: which edges stay, and with which operation."""

from __future__ import annotations

import torch

from dssp.genotype import AnyGenotype, Edge
from dssp.supernet import Supernet


def derive(supernet: Supernet, *, max_edges_per_node: int) -> AnyGenotype:
    """The discrete architecture that alpha and the gates describe (DARTS, section 2.4, with a gate in the strength).

    Of each live edge the operation with the largest softmax weight, other than `none` unless the space derives that; of
    each node the edges with the largest strength sigmoid(m_e) * max_k softmax(alpha_e)_k, at most
    ``max_edges_per_node`` (DARTS: 2, NAS-Bench-201: all).
    """
    space = supernet.space
    cells = {type: _derive_cell(supernet, type, max_edges_per_node) for type in space.cell_types}
    return space.genotype.from_cells(cells, space.concat)


def _derive_cell(supernet: Supernet, cell_type: str, max_edges: int) -> list[list[Edge]]:
    space = supernet.space
    weights = supernet.alpha[cell_type].detach().softmax(-1)
    for k, operation in enumerate(space.operations):
        if operation == "none" and not space.derives_none:
            weights[:, k] = -1.0
    best, choice = weights.max(-1)
    strength = torch.where(supernet.active(cell_type), best * supernet.gates(cell_type).to(best.device), -1.0).tolist()
    operations = [space.operations[k] for k in choice.tolist()]
    nodes = []
    for node in space.node_states:
        live = [i for i in space.edges_into(node) if strength[i] >= 0 and operations[i] != "none"]
        kept = sorted(sorted(live, key=lambda i: -strength[i])[:max_edges])
        nodes.append([(operations[i], space.edges[i][0]) for i in kept])
    return nodes
