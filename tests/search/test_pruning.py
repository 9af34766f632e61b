"""Which edges leave: gates are compared inside a node, minima and budgets hold, and measuring disturbs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dssp.pruning.edges import STRATEGIES, GateTable, Pruner, PruningRules, normalised_gates
from dssp.pruning.held_out import Measure
from dssp.supernet import Supernet
from tests.search.small import set_gates, small_supernet

GATE = st.floats(0.001, 0.999)


def rules(strategy: str, **settings: Any) -> PruningRules:
    """One pruning point per epoch from the first on, down to half of the edges, unless told otherwise."""
    defaults = {"threshold": 0.5, "min_edges": 1, "edge_budget": 0.5, "warmup_epochs": 0, "last_epoch": 2, "every": 1}
    return PruningRules(strategy=strategy, **{**defaults, **settings})


def no_measure() -> torch.Tensor:
    raise AssertionError("only the strategy `measured` measures")


def losses_by(supernet: Supernet, cost: Mapping[str, float], asked: list[str] | None = None) -> Measure:
    """Held-out losses to which every masked edge adds its cost; `asked` collects the edges masked to find out."""

    def losses() -> torch.Tensor:
        masked = [edge for edge in supernet.live_edges() if supernet.mixed_edges(edge)[0].is_pruned]
        if asked is not None:
            asked.extend(masked)
        return torch.tensor([sum(cost[edge] for edge in masked)])

    return losses


def prune(supernet: Supernet, rules: PruningRules, losses: Measure = no_measure) -> Pruner:
    """All pruning points of a search."""
    pruner = Pruner(supernet, rules, losses)
    for epoch in range(rules.last_epoch + 3):
        pruner.end_epoch(epoch, step=10 * (epoch + 1))
    return pruner


def fan_in(supernet: Supernet) -> dict[str, int]:
    """Live incoming edges by node."""
    nodes: dict[str, int] = {}
    for edge in supernet.edges():
        nodes.setdefault(f"{edge.split(':')[0]}:{edge.split('>')[1]}", 0)
    for edge in supernet.live_edges():
        nodes[f"{edge.split(':')[0]}:{edge.split('>')[1]}"] += 1
    return nodes


def is_connected(supernet: Supernet) -> bool:
    """Whether every node is reached from an input of its cell through live edges."""
    reached = {f"{type}:{source}" for type in ("normal", "reduce") for source in (0, 1)}
    for edge in supernet.live_edges():  # sources come before nodes
        cell_type, ends = edge.split(":")
        source, node = ends.split("->")
        if f"{cell_type}:{source}" in reached:
            reached.add(f"{cell_type}:{node}")
    return set(fan_in(supernet)) <= reached


# ---- normalised gates ------------------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 3), GATE, st.booleans()), min_size=1, max_size=14),
    st.lists(st.floats(0.01, 1.0), min_size=4, max_size=4),
)
def test_common_factor_on_the_gates_of_a_node_changes_nothing(
    edges: list[tuple[int, float, bool]], factors: list[float]
) -> None:
    nodes, gates, live = ([edge[i] for edge in edges] for i in range(3))
    scaled = [gate * factors[node] for gate, node in zip(gates, nodes, strict=True)]
    assert normalised_gates(scaled, nodes, live) == pytest.approx(normalised_gates(gates, nodes, live), rel=1e-9)


@given(st.lists(st.tuples(st.integers(0, 3), GATE, st.booleans()), min_size=1, max_size=14))
def test_live_gates_of_a_node_average_to_one_and_gone_edges_score_zero(edges: list[tuple[int, float, bool]]) -> None:
    nodes, gates, live = ([edge[i] for edge in edges] for i in range(3))
    scores = normalised_gates(gates, nodes, live)
    assert all(score == 0 for score, is_live in zip(scores, live, strict=True) if not is_live)
    for node in set(nodes):
        own = [s for s, n, is_live in zip(scores, nodes, live, strict=True) if n == node and is_live]
        assert not own or sum(own) / len(own) == pytest.approx(1.0)


def test_gates_of_zero_do_not_divide_by_zero() -> None:
    assert normalised_gates([0.0, 0.0], [2, 2], [True, True]) == [1.0, 1.0]


# ---- strategies ------------------------------------------------------------------------------------------------------


def test_absolute_removes_the_gates_below_the_threshold() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.6, 0.4, 0.6, 0.6, 0.1, 0.9, 0.9, 0.49, 0.51, 0.9])
    pruner = Pruner(supernet, rules("absolute"), no_measure)
    assert set(pruner.end_epoch(0, step=1)) == {"normal:1->2", "normal:2->3", "reduce:0->3"}


def test_relative_compares_a_gate_with_its_own_node() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.1, 0.12, 0.9, 0.9, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3])
    # 0.10 is low but usual in its node; 0.2 is higher and low among 0.9s; 0.3 beside 0.9 is exactly half the mean.
    assert Pruner(supernet, rules("relative"), no_measure).end_epoch(0, step=1) == ["normal:2->3"]


def test_relative_looks_again_at_a_node_after_an_edge_has_left() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.5, 0.5, 0.01, 0.2, 0.9] + [0.5] * 5)
    # Mean 0.37 spares 0.2 (s = 0.54); without the 0.01 the mean is 0.55 and s = 0.36.
    leaving = Pruner(supernet, rules("relative"), no_measure).end_epoch(0, step=1)
    assert leaving == ["normal:0->3", "normal:1->3"]


def test_gates_that_sink_together_fool_the_absolute_threshold_and_not_the_relative_one() -> None:
    sunk = [0.31, 0.29, 0.30, 0.32, 0.28, 0.30, 0.31, 0.29, 0.30] * 2
    absolute, relative = small_supernet(), small_supernet()
    for supernet in (absolute, relative):
        set_gates(supernet, sunk)
    prune(absolute, rules("absolute", last_epoch=0))
    prune(relative, rules("relative", last_epoch=0))
    assert set(fan_in(absolute).values()) == {1}  # down to the minimum everywhere, in a single epoch
    assert len(relative.live_edges()) == 18


def test_budget_removes_the_lowest_normalised_gates() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.2, 0.2, 0.5, 0.9, 0.9, 0.9, 0.6, 0.9, 0.1, 0.9])
    pruner = prune(supernet, rules("budget", edge_budget=0.8, last_epoch=0))
    assert [event["edge"] for event in pruner.history] == ["reduce:1->3", "normal:0->3"]


def test_measured_removes_what_costs_least_of_what_the_gates_propose() -> None:
    supernet = small_supernet(nodes=2)
    set_gates(supernet, [0.9, 0.9, 0.1, 0.2, 0.9, 0.9, 0.9, 0.3, 0.4, 0.9])
    asked: list[str] = []
    cost = {"normal:0->3": 0.5, "normal:1->3": -0.1, "reduce:0->3": 0.3, "reduce:1->3": 0.1}
    losses = losses_by(supernet, cost, asked)
    pruner = prune(supernet, rules("measured", edge_budget=0.8, last_epoch=0), losses)
    assert asked == ["normal:0->3", "normal:1->3", "reduce:0->3", "reduce:1->3"]  # twice as many as leave
    assert [event["edge"] for event in pruner.history] == ["normal:1->3", "reduce:1->3"]


def test_none_removes_nothing() -> None:
    supernet = small_supernet()
    set_gates(supernet, [0.01, 0.99] * 9)
    assert not prune(supernet, rules("none")).history and len(supernet.live_edges()) == 18


@given(
    gates=st.lists(GATE, min_size=18, max_size=18),
    effects=st.lists(st.floats(-1, 1), min_size=18, max_size=18),
    strategy=st.sampled_from(STRATEGIES),
    min_edges=st.integers(1, 4),
    threshold=st.floats(0, 2),
    edge_budget=st.floats(0, 1),
    warmup_epochs=st.integers(0, 3),
    last_epoch=st.integers(0, 7),
    every=st.integers(1, 3),
)
@settings(max_examples=40, deadline=None)
def test_minimum_paths_and_budget_hold_whatever_the_gates_and_rules(
    gates: list[float], effects: list[float], strategy: str, min_edges: int, **settings: Any
) -> None:
    supernet = small_supernet()
    set_gates(supernet, gates)
    cost = dict(zip(supernet.edges(), effects, strict=True))
    before = fan_in(supernet)
    these = rules(strategy, min_edges=min_edges, **settings)
    pruner = prune(supernet, these, losses_by(supernet, cost))

    after = fan_in(supernet)
    assert all(after[node] >= min(min_edges, before[node]) for node in before)
    assert is_connected(supernet)
    removed = [event["edge"] for event in pruner.history]
    assert set(removed) == set(supernet.edges()) - set(supernet.live_edges()) and len(removed) == len(set(removed))
    assert all(event["epoch"] >= these.warmup_epochs for event in pruner.history)
    if strategy in ("budget", "measured") and these.points():
        reachable = sum(min(min_edges, edges) for edges in before.values())
        assert len(supernet.live_edges()) == max(18 - round((1 - these.edge_budget) * 18), reachable)


# ---- schedule --------------------------------------------------------------------------------------------------------


def test_points_lie_between_warm_up_and_the_last_pruning_epoch() -> None:
    assert rules("budget", warmup_epochs=2, last_epoch=7).points() == [2, 3, 4, 5, 6, 7]
    assert rules("budget", warmup_epochs=2, last_epoch=7, every=3).points() == [4, 7]
    assert rules("budget", last_epoch=0).points() == [0]
    assert rules("budget", warmup_epochs=3, last_epoch=2).points() == []


def test_budget_is_spread_evenly_over_the_points() -> None:
    these = rules("budget", warmup_epochs=1, last_epoch=3, edge_budget=0.5)
    assert [these.target(epoch, 28) for epoch in range(5)] == [28, 23, 19, 14, 14]


def test_between_the_points_nothing_leaves() -> None:
    supernet = small_supernet()
    pruner = prune(supernet, rules("budget", warmup_epochs=1, last_epoch=6, every=2))
    assert {event["epoch"] for event in pruner.history} == {2, 4, 6}


def test_history_says_epoch_and_step_and_rebuilds_the_supernet() -> None:
    supernet, fresh = small_supernet(), small_supernet()
    pruner = prune(supernet, rules("budget"))
    assert pruner.history[0].keys() == {"epoch", "step", "edge"} and pruner.history[0]["step"] == 10
    other = Pruner(fresh, rules("budget"), no_measure)
    other.load_state_dict(pruner.state_dict())
    assert fresh.live_edges() == supernet.live_edges() and other.history == pruner.history


def test_impossible_rules_are_named() -> None:
    with pytest.raises(ValueError, match="prune_strategy: expected one of measured, .*, got 'sometimes'"):
        Pruner(small_supernet(), rules("sometimes"), no_measure)
    with pytest.raises(ValueError, match="min_edges: expected at least 1, .* got 0"):
        Pruner(small_supernet(), rules("relative", min_edges=0), no_measure)


def test_proposals_suffice_even_where_nodes_can_spare_little() -> None:
    supernet = small_supernet(nodes=4)
    set_gates(supernet, [*[0.5] * 5, 0.45, 0.45, 0.45, 0.65, *[0.5] * 5] * 2)
    table = GateTable.of(supernet)
    # With a minimum of 3, the two nodes with the six lowest gates can spare one edge each: six proposals are too few.
    proposed = table.proposals(min_edges=3, count=3)
    spared = {node: min(sum(table.nodes[i] == node for i in proposed), node[1] - 3) for node in set(table.nodes)}
    assert len(proposed) > 6 and sum(max(spare, 0) for spare in spared.values()) >= 3
