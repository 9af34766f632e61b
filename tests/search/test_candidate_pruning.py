"""Candidates leave twice, those whose masking costs least, and never the last ones."""

from __future__ import annotations

import pytest
import torch

from dssp.candidate_pruning import CandidatePruner, CandidateSchedule
from dssp.held_out import Measure
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def losses_by_value(supernet: Supernet) -> Measure:
    """Held-out losses that fall with every candidate offered: later ones are worth more, and more on later edges."""

    def losses() -> torch.Tensor:
        total = 0.0
        for i, type in enumerate(supernet.cell_types):
            offered = supernet.offered(type).double()
            value = torch.arange(1.0, offered.shape[1] + 1).double() + 0.01 * torch.arange(offered.shape[0])[:, None]
            total -= float((offered * value).sum()) * (i + 1)
        return torch.tensor([total])

    return losses


def test_schedule_passes_the_geometric_mean_at_two_thirds() -> None:
    schedule = CandidateSchedule(epochs=6, kept=2)
    assert [schedule.survivors(epoch, 8) for epoch in range(7)] == [None, None, None, 4, None, 2, None]
    assert schedule.survivors(3, 2) is None and schedule.survivors(5, 2) == 2
    assert [CandidateSchedule(epochs=1, kept=2).survivors(epoch, 8) for epoch in range(2)] == [2, None]


def test_what_costs_least_leaves_on_every_live_edge() -> None:
    supernet = small_supernet(nodes=2, light=False)
    supernet.remove_edge("normal:0->2")
    pruner = CandidatePruner(supernet, CandidateSchedule(epochs=2, kept=2), losses_by_value(supernet))
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
    pruner = CandidatePruner(supernet, CandidateSchedule(epochs=1, kept=2), losses_by_value(supernet))
    pruner.end_epoch(0, step=1)
    other = CandidatePruner(fresh, CandidateSchedule(epochs=1, kept=2), losses_by_value(fresh))
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
