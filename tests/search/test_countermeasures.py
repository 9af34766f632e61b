"""What options add to a bilevel method against its collapse into skip connections."""

from __future__ import annotations

import pytest
import torch

from dssp.config import ConfigError, SearchConfig
from dssp.derivation import derive
from dssp.methods.base import beta_loss
from dssp.spaces import DARTS
from dssp.supernet import Supernet
from tests.search.small import small_search, small_supernet

# ---- beta decay ------------------------------------------------------------------------------------------------------


def test_beta_loss_is_the_mean_of_logsumexp_and_its_gradient_the_softmax() -> None:
    supernet = small_supernet(nodes=2, light=False)
    alphas = list(supernet.alpha.values())
    stacked = torch.cat([alpha.detach() for alpha in alphas])
    loss = beta_loss(supernet)
    torch.testing.assert_close(loss.detach(), stacked.exp().sum(1).log().mean())
    found = torch.cat(torch.autograd.grad(loss, alphas))
    torch.testing.assert_close(found, stacked.softmax(1) / len(stacked))


def test_beta_loss_does_not_see_what_is_gone() -> None:
    supernet = small_supernet(nodes=1, light=False)
    supernet.remove_edge("normal:0->2")
    supernet.remove_candidate("normal:1->2", "skip_connect")
    gone = DARTS.operations.index("skip_connect") - 1  # `none` is not offered
    loss = beta_loss(supernet)
    rows = torch.cat([supernet.alpha["normal"].detach()[1:], supernet.alpha["reduce"].detach()])
    rows[0, gone] = -torch.inf
    torch.testing.assert_close(loss.detach(), rows.logsumexp(1).mean())
    gradient = torch.autograd.grad(loss, supernet.alpha["normal"])[0]
    assert gradient.isfinite().all() and gradient[0].eq(0).all() and gradient[1, gone] == 0


@pytest.mark.parametrize("method", ["darts", "snas", "dssp-paper"])
def test_beta_decay_grows_linearly_over_the_epochs(method: str) -> None:
    plain, decaying = (small_search(method=method, nodes=1, beta_decay=weight).method for weight in (0.0, 8.0))
    added = []
    for epoch in range(4):
        for one in (plain, decaying):
            one.start_epoch(epoch)
        added.append(float((decaying.penalty() - plain.penalty()).detach()))
    loss = float(beta_loss(decaying.supernet).detach())
    assert added == pytest.approx([8.0 * epoch / 4 * loss for epoch in range(4)], rel=1e-4, abs=1e-6)


# ---- a limit on skip connections -------------------------------------------------------------------------------------


def skipping(weights: list[float], others: list[float]) -> Supernet:
    """Two nodes, five edges; both cells weigh skip_connect by `weights` and max_pool_3x3 by `others`."""
    supernet = small_supernet(nodes=2, gated=False)
    with torch.no_grad():
        for alpha in supernet.alpha.values():
            alpha.copy_(torch.tensor([others, weights]).T.log())
    return supernet


def test_weakest_skip_connections_give_way_in_the_normal_cell_only() -> None:
    supernet = skipping([0.9, 0.7, 0.8, 0.6, 0.95], [0.1, 0.3, 0.2, 0.4, 0.05])
    genotype = derive(supernet, max_edges_per_node=2, max_skips=2)
    unlimited = derive(supernet, max_edges_per_node=2)
    skip, pool = "skip_connect", "max_pool_3x3"
    assert unlimited.cells["normal"][0] == (((skip, 0), (skip, 1)), ((skip, 0), (skip, 2)))
    # 1->2 (0.7) becomes a pool; 0->3 (0.8) leaves to 1->3, a skip as well (0.6), which becomes a pool then.
    assert genotype.cells["normal"][0] == (((skip, 0), (pool, 1)), ((pool, 1), (skip, 2)))
    assert genotype.cells["reduce"] == unlimited.cells["reduce"]


@pytest.mark.parametrize("limit", [0, 1, 4])
def test_no_more_skip_connections_than_allowed(limit: int) -> None:
    supernet = skipping([0.9, 0.7, 0.8, 0.6, 0.95], [0.1, 0.3, 0.2, 0.4, 0.05])
    nodes = derive(supernet, max_edges_per_node=2, max_skips=limit).cells["normal"][0]
    assert sum(name == "skip_connect" for node in nodes for name, _ in node) == limit
    assert all(len(node) == 2 for node in nodes)


# ---- which methods have them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "method"), [({"beta_decay": 1.0}, "random"), ({"max_skips": 0}, "dssp"), ({"max_skips": 2}, "random")]
)
def test_option_that_a_method_cannot_have_is_refused(option: dict[str, float], method: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: expected method .*, got {method}"):
        SearchConfig(method=method, **option)  # type: ignore[arg-type]
