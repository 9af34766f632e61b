"""Fair DARTS: sigmoids that do not compete, a loss that pushes them to 0 or 1, a threshold that decides."""

from __future__ import annotations

from typing import Any

import torch

from dssp.methods.fair_darts import FairDarts
from tests.search.small import small_search


def fair(**settings: Any) -> FairDarts:
    method = small_search(method="fair-darts", **settings).method
    assert isinstance(method, FairDarts)
    torch.manual_seed(0)
    with torch.no_grad():
        for alpha in method.supernet.alpha.values():
            alpha.copy_(torch.randn_like(alpha))
    return method


def set_sigmoids(method: FairDarts, cell_type: str, values: dict[tuple[int, str], float]) -> None:
    """0.1 everywhere but where `values` says otherwise, by edge and operation."""
    sigmoids = torch.full_like(method.supernet.alpha[cell_type], 0.1)
    for (edge, operation), value in values.items():
        sigmoids[edge, method.supernet.space.operations.index(operation)] = value
    with torch.no_grad():
        method.supernet.alpha[cell_type].copy_(sigmoids.logit())


def test_candidates_are_weighed_by_their_own_sigmoids_and_none_is_not_among_them() -> None:
    method = fair()
    assert "none" not in method.supernet.space.operations
    method.supernet.remove_candidate("normal:0->2", "skip_connect")
    expected = method.supernet.alpha["normal"].sigmoid().detach().clone()
    expected[0, method.supernet.space.operations.index("skip_connect")] = 0
    torch.testing.assert_close(method.mixture("normal").weights.detach(), expected)


def test_zero_one_loss_is_the_mean_square_distance_from_a_half() -> None:
    method = fair(zero_one_weight=3.0)
    alphas = list(method.supernet.alpha.values())
    everything = torch.cat([alpha.detach().flatten() for alpha in alphas])
    sigmoids = everything.sigmoid()
    torch.testing.assert_close(method.zero_one_loss().detach(), -(sigmoids - 0.5).square().mean())
    found = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(method.penalty(), alphas)])
    by_hand = -3.0 * 2 * (sigmoids - 0.5) * sigmoids * (1 - sigmoids) / len(everything)
    torch.testing.assert_close(found, by_hand)
    assert (found.sign() == -everything.sign()).all()  # descent takes every sigmoid away from a half


def test_what_is_gone_has_no_part_in_the_zero_one_loss() -> None:
    method = fair()
    method.supernet.remove_edge("reduce:0->2")
    method.supernet.remove_candidate("normal:0->2", "max_pool_3x3")
    gradients = torch.autograd.grad(method.zero_one_loss(), list(method.supernet.alpha.values()))
    zeros = sum(int((gradient == 0).sum()) for gradient in gradients)
    assert zeros == 7 + 1


def test_derived_is_what_reaches_the_threshold_and_one_edge_per_node_at_least() -> None:
    method = fair(sigmoid_threshold=0.8)  # edges: 0->2, 1->2, 0->3, 1->3, 2->3
    above = {(0, "sep_conv_3x3"): 0.9, (0, "skip_connect"): 0.95, (1, "sep_conv_5x5"): 0.79}
    set_sigmoids(method, "normal", {**above, (3, "dil_conv_5x5"): 0.3, (4, "sep_conv_3x3"): 0.2})
    set_sigmoids(method, "reduce", {(2, "dil_conv_3x3"): 0.85, (3, "max_pool_3x3"): 0.9, (4, "skip_connect"): 0.99})
    method.supernet.remove_edge("reduce:0->2")
    genotype = method.derived()
    assert genotype.cells["normal"][0] == ((("skip_connect", 0),), (("dil_conv_5x5", 1),))
    assert genotype.cells["reduce"][0][1] == (("max_pool_3x3", 1), ("skip_connect", 2))
    assert [source for _, source in genotype.cells["reduce"][0][0]] == [1]
    assert method.end_epoch(0, 2)["over_threshold"] == 5
