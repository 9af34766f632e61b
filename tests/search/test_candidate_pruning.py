"""Candidates leave twice, those that are worth least, and never the last ones."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from dssp.config import parse_search
from dssp.methods.dssp import Dssp
from dssp.pruning.candidates import CandidatePruner, CandidateSchedule, Worth
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def worth_of(supernet: Supernet) -> Worth:
    """Later candidates are worth more (in this space: those with weights), and more on later edges."""
    edges, operations = list(supernet.edges()), supernet.space.operations
    return lambda candidates: [operations.index(name) + 0.01 * edges.index(edge) for edge, name in candidates]


def test_schedule_passes_the_geometric_mean_while_candidates_mix_and_ends_with_the_search() -> None:
    def survivors(schedule: CandidateSchedule, candidates: int) -> list[int | None]:
        return [schedule.survivors(epoch, candidates) for epoch in range(9)]

    schedule = CandidateSchedule(first=3, last=7, kept=2)
    assert survivors(schedule, 8) == [None, None, None, 4, None, None, None, 2, None]
    assert survivors(schedule, 2) == [None] * 7 + [2, None]
    assert survivors(CandidateSchedule(first=3, last=5, kept=2), 8) == [None] * 3 + [4, None, 2] + [None] * 3
    assert CandidateSchedule(first=0, last=0, kept=2).survivors(0, 8) == 2


@pytest.mark.parametrize(
    ("flags", "first"),
    [
        ("", 5),  # edges leave after epochs 2 to 5
        ("--prune-every 3", 4),
        ("--edge-budget 1", 3),
        ("--prune-strategy budget", 5),
        ("--prune-strategy relative", 3),
        ("--prune-strategy none", 3),
        ("--path-epochs 0", 9),
    ],
)
def test_first_candidates_leave_with_the_last_scheduled_edges_or_at_two_thirds(flags: str, first: int) -> None:
    config = parse_search(f"--epochs 12 --warmup-epochs 2 --path-epochs 6 {flags}".split()).resolve()
    supernet = small_supernet()
    method = Dssp(config, supernet, lambda *, comparing=False: torch.zeros(1))
    assert (method.first_candidate_epoch(), method.candidates.schedule.last) == (first, 11)


@pytest.mark.parametrize(
    ("kept", "on_steps", "on_strides"),
    [
        (3, ["skip_connect", "dil_conv_3x3", "dil_conv_5x5"], ["avg_pool_3x3", "dil_conv_3x3", "dil_conv_5x5"]),
        (2, ["skip_connect", "dil_conv_5x5"], ["avg_pool_3x3", "dil_conv_5x5"]),
        (1, ["dil_conv_5x5"], ["dil_conv_5x5"]),
    ],
)
def test_what_is_worth_least_leaves_on_every_live_edge_but_not_all_without_weights(
    kept: int, on_steps: list[str], on_strides: list[str]
) -> None:
    supernet = small_supernet(nodes=2, light=False)
    supernet.remove_edge("normal:0->2")
    pruner = CandidatePruner(supernet, CandidateSchedule(first=0, last=1, kept=kept), worth_of(supernet), lambda: True)
    assert pruner.end_epoch(0, step=5) and not pruner.end_epoch(3, step=9)
    pruner.end_epoch(1, step=7)
    for edge in supernet.live_edges():
        cell_type, position = supernet.locate(edge)
        flags = supernet.offered(cell_type)[position].tolist()
        # a skip connection of stride 2 has weights
        strides = cell_type == "reduce" and supernet.space.edges[position][0] < 2
        expected = on_strides if strides else on_steps
        assert [name for name, left in zip(supernet.space.operations, flags, strict=True) if left] == expected
        assert [op is not None for op in supernet.mixed_edges(edge)[0]._ops] == flags
    assert supernet(torch.randn(2, 1, 8, 8)).isfinite().all()
    assert {event["epoch"] for event in pruner.history} == {0, 1}
    assert len(pruner.history) == 9 * (7 - kept)  # of 7 candidates on each of 9 edges


@pytest.mark.parametrize("any_kind", [False, True])
def test_what_has_weights_stays_where_it_is_worth_least_unless_kinds_do_not_count(any_kind: bool) -> None:
    supernet = small_supernet(nodes=2, light=False)
    worth, schedule = worth_of(supernet), CandidateSchedule(first=0, last=0, kept=2)

    def upside_down(candidates: Sequence[tuple[str, str]]) -> list[float]:
        return [-value for value in worth(candidates)]

    pruner = CandidatePruner(supernet, schedule, upside_down, lambda: True, any_kind=any_kind)
    pruner.end_epoch(0, step=5)
    for edge in supernet.live_edges():
        cell_type, position = supernet.locate(edge)
        flags = supernet.offered(cell_type)[position].tolist()
        left = [name for name, offered in zip(supernet.space.operations, flags, strict=True) if offered]
        strides = cell_type == "reduce" and supernet.space.edges[position][0] < 2
        with_weights = "skip_connect" if strides else "sep_conv_3x3"
        assert left == ["max_pool_3x3", "avg_pool_3x3" if any_kind else with_weights]


def test_history_rebuilds_the_supernet() -> None:
    supernet, fresh = (small_supernet(nodes=2, light=False) for _ in range(2))
    pruner = CandidatePruner(supernet, CandidateSchedule(first=0, last=0, kept=2), worth_of(supernet), lambda: True)
    pruner.end_epoch(0, step=1)
    other = CandidatePruner(fresh, CandidateSchedule(first=0, last=0, kept=2), worth_of(fresh), lambda: True)
    other.load_state_dict(pruner.state_dict())
    assert fresh.state_dict().keys() == supernet.state_dict().keys()
    for type in supernet.cell_types:
        assert torch.equal(fresh.offered(type), supernet.offered(type))


def test_removed_candidate_is_gone_and_the_last_one_stays() -> None:
    supernet = small_supernet(nodes=2, light=False)
    before = len(supernet.weights())
    supernet.remove_candidate("normal:0->2", "sep_conv_3x3")
    assert len(supernet.weights()) == before - 4  # the four weights of the one normal cell's
    assert not any("_ops.0._ops.3." in name for name in supernet.cells[0].state_dict())
    with pytest.raises(ValueError, match="operation: expected one of max_pool_3x3, .* got 'conv'"):
        supernet.remove_candidate("normal:0->2", "conv")
    with pytest.raises(ValueError, match="position: expected one of the candidates"):
        supernet.remove_candidate("normal:0->2", "sep_conv_3x3")
    light = small_supernet(nodes=2)
    light.remove_candidate("normal:0->2", "skip_connect")
    with pytest.raises(ValueError, match="and not the last one"):
        light.remove_candidate("normal:0->2", "max_pool_3x3")
