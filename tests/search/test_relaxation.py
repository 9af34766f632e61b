"""Weights of a mix: softmax over what is left, gates compared inside their node."""

from __future__ import annotations

import pytest
import torch

from dssp.pruning.edges import normalised_gates as scores_of
from dssp.relaxation import Mixture, normalised_gates, softmax_over


def test_softmax_runs_over_the_candidates_that_are_left() -> None:
    alpha = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    offered = torch.tensor([[True] * 4, [True, False, True, False], [False, False, False, True]])
    weights = softmax_over(alpha, offered)
    torch.testing.assert_close(weights[0], alpha[0].softmax(0))
    torch.testing.assert_close(weights[1, ::2], alpha[1, ::2].softmax(0))
    assert weights[1, 1::2].tolist() == [0, 0] and weights[2].tolist() == [0, 0, 0, 1]
    weights.square().sum().backward()
    assert alpha.grad is not None and alpha.grad.isfinite().all() and not alpha.grad[~offered].any()


def test_gates_are_what_pruning_compares_and_average_to_one_in_every_node() -> None:
    mask = torch.randn(9, dtype=torch.float64)
    nodes, live = torch.tensor([2, 2, 3, 3, 3, 4, 4, 4, 4]), torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1]).bool()
    gates = normalised_gates(mask, live, nodes)
    assert gates.tolist() == pytest.approx(scores_of(mask.sigmoid().tolist(), nodes.tolist(), live.tolist()))
    for node in (2, 3, 4):
        assert gates[live & (nodes == node)].mean().item() == pytest.approx(1)


def test_a_common_shift_of_small_gates_has_no_gradient() -> None:
    mask = torch.full((3,), -20.0, dtype=torch.float64, requires_grad=True)  # sigmoid is exp here: a shift is a factor
    gates = normalised_gates(mask, torch.ones(3, dtype=torch.bool), torch.zeros(3))
    (gates * torch.tensor([1.0, 2.0, 5.0])).sum().backward()
    assert mask.grad is not None and abs(float(mask.grad.sum())) < 1e-7 and mask.grad.abs().max() > 0.1


def test_mixture_splits_into_its_nodes() -> None:
    runs = [[True, False], [False, True], [True, True]]
    first, second = Mixture(torch.arange(6.0).reshape(3, 2), runs).split([1, 2])
    assert first.weights.tolist() == [[0, 1]] and first.runs == runs[:1]
    assert second.weights.tolist() == [[2, 3], [4, 5]] and second.runs == runs[1:]
    assert Mixture(torch.zeros(3, 2)).split([1, 2])[1].runs is None
