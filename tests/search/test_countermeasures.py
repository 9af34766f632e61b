"""What options add to a bilevel method against its collapse into skip connections."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dssp import early_stopping
from dssp.arch_genotype import OPERATIONS, ArchGenotype
from dssp.config import SearchConfig
from dssp.derived.derivation import derive
from dssp.early_stopping import EarlyStopping, dominant_eigenvalue
from dssp.engine import Callback, Engine
from dssp.methods.base import beta_loss
from dssp.options import ConfigError
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


# ---- early stopping --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["darts", "pc-darts", "fair-darts"])
def test_dominant_eigenvalue_is_that_of_the_whole_hessian(method: str) -> None:
    search = small_search(method=method, nodes=1, channels=4)
    search.supernet.double()
    alphas = list(search.supernet.alpha.values())
    with torch.no_grad():
        for alpha in alphas:
            alpha.normal_(generator=torch.Generator().manual_seed(0))
    images, labels = torch.randn(6, 3, 8, 8, dtype=torch.float64), torch.arange(6)
    loss = F.cross_entropy(search._logits(images), labels)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss, alphas, create_graph=True)])
    rows = [torch.autograd.grad(entry, alphas, retain_graph=True) for entry in gradient]
    hessian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    assert dominant_eigenvalue(loss, alphas) == pytest.approx(
        float(torch.linalg.eigvalsh(hessian).abs().max()), rel=0.02
    )


def test_eigenvalue_of_an_indefinite_form_is_the_largest_magnitude() -> None:
    x = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    form = 0.5 * (torch.tensor([3.0, -5.0, 4.9]) * x.square()).sum()
    assert dominant_eigenvalue(form, [x]) == pytest.approx(5.0, rel=0.02)


def genotype_of(number: int) -> ArchGenotype:
    names = [OPERATIONS[number // 5**i % 5] for i in range(3)]
    nodes = [tuple((names[state - 1], source) for source in range(state)) for state in (1, 2, 3)]
    return ArchGenotype(tuple(nodes))


def stopped_at(eigenvalues: list[float]) -> tuple[int | None, EarlyStopping]:
    stopping = EarlyStopping()
    for epoch, value in enumerate(eigenvalues):
        if stopping.update(epoch, value, genotype_of(epoch)):
            return epoch, stopping
    return None, stopping


def test_search_stops_when_the_average_grew_by_a_third_over_five_epochs() -> None:
    assert stopped_at([1.0] * 5 + [1.3] * 20)[0] is None  # 1 / 1.3 > 0.75
    epoch, stopping = stopped_at([1.0] * 5 + [1.4] * 20)
    assert epoch == 9 and stopping.genotype == genotype_of(4) and stopping.stopped_after == 10
    assert stopped_at([5.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0])[0] is None
    assert stopped_at([1.0, 9.0, 9.0, 9.0])[0] is None  # nothing to compare with yet


def test_early_stopping_continues_from_its_state() -> None:
    values = [1.0] * 6 + [1.5] * 10
    expected, _ = stopped_at(values)
    stopping = EarlyStopping()
    for epoch, value in enumerate(values):
        restored = EarlyStopping()
        restored.load_state_dict(stopping.state_dict())
        stopping = restored
        if stopping.update(epoch, value, genotype_of(epoch)):
            break
    assert epoch == expected and stopping.genotype == genotype_of(expected - 5)


def test_stopped_search_ends_and_derives_the_cell_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(early_stopping, "WINDOW", 1)
    monkeypatch.setattr(early_stopping, "RATIO", 1e9)  # any growth at all is too much
    settings: dict[str, Any] = {"method": "darts", "nodes": 1, "warmup_epochs": 1, "early_stop": True}
    search, derived = small_search(**settings), []
    rows: list[dict[str, Any]] = []

    class Watching(Callback):
        def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
            rows.append(row)
            derived.append(search.method.derived())

    engine = Engine(search, [Watching()])
    engine.fit()
    assert [row["phase"] for row in rows] == [
        "warm-up",
        "search",
        "search",
    ] and search.epochs == 3 < search.config.epochs
    assert "alpha_eigenvalue" not in rows[0] and all(row["alpha_eigenvalue"] > 0 for row in rows[1:])
    assert search.derived() == derived[1]
    again = small_search(**settings)
    resumed = Engine(again, [])
    resumed.load_state_dict(engine.state_dict())
    resumed.fit()  # nothing is left to do
    assert resumed.epoch == 3 and again.derived() == derived[1]


def test_looking_at_the_eigenvalue_changes_nothing_else() -> None:
    plain, looking = (small_search(method="darts", nodes=1, early_stop=early_stop) for early_stop in (False, True))
    for search in (plain, looking):
        for epoch in range(2):
            for batch in search.batches(epoch):
                search.step(batch, epoch)
            search.end_epoch(epoch)
    for name, value in plain.supernet.state_dict().items():
        assert torch.equal(value, looking.supernet.state_dict()[name]), name


# ---- which methods have them -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "method"),
    [
        ({"beta_decay": 1.0}, "random"),
        ({"max_skips": 0}, "dssp"),
        ({"max_skips": 2}, "random"),
        ({"early_stop": True}, "snas"),
        ({"early_stop": True}, "dssp-paper"),
        ({"raw_gates": True}, "dssp-paper"),
        ({"raw_gates": True}, "darts"),
        ({"offer_none": True}, "dssp-paper"),
        ({"offer_none": True}, "random"),
    ],
)
def test_option_that_a_method_cannot_have_is_refused(option: dict[str, float], method: str) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(option))}: expected method .*, got {method}"):
        SearchConfig(method=method, **option)  # type: ignore[arg-type]
