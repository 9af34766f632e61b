"""The derived genotype is what alpha and the gates say."""

from __future__ import annotations

from dataclasses import replace

import torch

from dssp.derived.derivation import derive
from dssp.spaces import DARTS
from dssp.supernet import Supernet
from tests.search.small import set_gates, small_supernet

OPERATIONS = ("none", "max_pool_3x3", "skip_connect")


def stock(gated: bool = False) -> Supernet:
    """One node per cell would leave no choice of edges: two nodes, `none` among three candidates."""
    return Supernet(replace(DARTS, operations=OPERATIONS, nodes=2), channels=2, cells=3, classes=2, gated=gated)


def choose(supernet: Supernet, normal: list[list[float]]) -> None:
    """Softmax weights of the normal cell, one row per edge."""
    with torch.no_grad():
        supernet.alpha["normal"].copy_(torch.tensor(normal).log())


def test_each_edge_takes_its_strongest_operation_and_never_none() -> None:
    supernet = stock()
    choose(supernet, [[0.8, 0.15, 0.05], [0.1, 0.2, 0.7], [0.1, 0.5, 0.4], [0.98, 0.01, 0.01], [0.2, 0.3, 0.5]])
    genotype = derive(supernet, max_edges_per_node=3)
    assert genotype.normal == (
        (("max_pool_3x3", 0), ("skip_connect", 1)),
        (("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2)),
    )
    assert genotype.normal_concat == genotype.reduce_concat == (2, 3)


def test_each_node_keeps_its_two_strongest_edges_in_order_of_source() -> None:
    supernet = stock()
    choose(supernet, [[0.1, 0.2, 0.7]] * 2 + [[0.0, 0.4, 0.6], [0.55, 0.45, 0.0], [0.1, 0.0, 0.9]])
    assert derive(supernet, max_edges_per_node=2).normal[1] == (("skip_connect", 0), ("skip_connect", 2))
    assert derive(supernet, max_edges_per_node=1).normal[1] == (("skip_connect", 2),)


def test_a_closed_gate_outweighs_a_strong_operation() -> None:
    supernet = stock(gated=True)
    choose(supernet, [[0.0, 0.1, 0.9], [0.0, 0.4, 0.6]] * 2 + [[0.0, 0.4, 0.6]])
    set_gates(supernet, [0.5, 0.9] + [0.5] * 8)
    assert derive(supernet, max_edges_per_node=1).normal[0] == (("skip_connect", 1),)  # 0.9 * 0.6 > 0.5 * 0.9


def test_removed_edges_are_not_derived_however_strong_they_were() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.99, 0.1] * 5)
    for edge in ("normal:0->2", "normal:0->3", "normal:2->3"):
        supernet.remove_edge(edge)
    genotype = derive(supernet, max_edges_per_node=2)
    assert [[source for _, source in node] for node in genotype.normal] == [[1], [1]]
    assert [len(node) for node in genotype.reduce] == [2, 2]


def test_deriving_leaves_the_supernet_as_it_was() -> None:
    supernet = stock()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    derive(supernet, max_edges_per_node=2)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())


def test_the_whole_darts_space_derives_two_edges_per_node() -> None:
    supernet = Supernet(DARTS, channels=2, cells=3, classes=2, gated=False)
    genotype = derive(supernet, max_edges_per_node=2)
    assert [len(node) for node in genotype.normal + genotype.reduce] == [2] * 8
    assert "none" not in genotype.to_text()
