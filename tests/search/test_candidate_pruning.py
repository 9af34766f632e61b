"""Candidates leave twice, those that are worth least, and never the last ones."""

from __future__ import annotations

import pytest
import torch

from dssp.candidate_pruning import CandidatePruner, CandidateSchedule, Worth
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def worth_of(supernet: Supernet) -> Worth:
    """Later candidates are worth more, and more on later edges."""
    edges, operations = list(supernet.edges()), supernet.space.operations
    return lambda candidates: [operations.index(name) + 0.01 * edges.index(edge) for edge, name in candidates]


def test_schedule_passes_the_geometric_mean_while_candidates_mix_and_ends_with_the_search() -> None:
    def survivors(schedule: CandidateSchedule, candidates: int) -> list[int | None]:
        return [schedule.survivors(epoch, candidates) for epoch in range(9)]

    schedule = CandidateSchedule(epochs=6, path_epochs=2, kept=2)
    assert survivors(schedule, 8) == [None, None, None, 4, None, None, None, 2, None]
    assert survivors(schedule, 2) == [None] * 7 + [2, None]
    assert survivors(CandidateSchedule(epochs=6, path_epochs=0, kept=2), 8) == [None] * 3 + [4, None, 2] + [None] * 3
    assert CandidateSchedule(epochs=1, path_epochs=0, kept=2).survivors(0, 8) == 2


def test_what_is_worth_least_leaves_on_every_live_edge() -> None:
    supernet = small_supernet(nodes=2, light=False)
    supernet.remove_edge("normal:0->2")
    pruner = CandidatePruner(
        supernet, CandidateSchedule(epochs=2, path_epochs=0, kept=2), worth_of(supernet), lambda: True
    )
    assert pruner.end_epoch(0, step=5) and not pruner.end_epoch(3, step=9)
    pruner.end_epoch(1, step=7)
    kept = list(supernet.space.operations[-2:])
    for edge in supernet.live_edges():
        cell_type, position = supernet.locate(edge)
        flags = supernet.offered(cell_type)[position].tolist()
        assert [name for name, left in zip(supernet.space.operations, flags, strict=True) if left] == kept
        assert [op is not None for op in supernet.mixed_edges(edge)[0]._ops] == flags
    assert supernet(torch.randn(2, 1, 8, 8)).isfinite().all()
    assert {event["epoch"] for event in pruner.history} == {0, 1}
    assert len(pruner.history) == 9 * 5  # of 7 candidates on each of 9 edges, 2 are left


def test_history_rebuilds_the_supernet() -> None:
    supernet, fresh = (small_supernet(nodes=2, light=False) for _ in range(2))
    pruner = CandidatePruner(
        supernet, CandidateSchedule(epochs=1, path_epochs=0, kept=2), worth_of(supernet), lambda: True
    )
    pruner.end_epoch(0, step=1)
    other = CandidatePruner(fresh, CandidateSchedule(epochs=1, path_epochs=0, kept=2), worth_of(fresh), lambda: True)
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
