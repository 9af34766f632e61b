"""The second-order hypergradient is the derivative through one step of the weights' optimizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from dssp.config import SearchConfig
from dssp.distributed import average_tensors, rank, ranks
from dssp.options import ConfigError
from dssp.spaces import DARTS
from dssp.steps import hypergradient
from dssp.steps.hypergradient import unrolled_gradients
from dssp.steps.optimization import sgd
from dssp.steps.sync_batch_norm import synchronise_norms
from dssp.supernet import Supernet
from tests.search.ranks import results_of_ranks
from tests.search.small import small_search

Batch = tuple[Tensor, Tensor]
RATE, MOMENTUM, DECAY = 0.1, 0.9, 0.05


def problem() -> tuple[Supernet, torch.optim.SGD, Batch, Batch]:
    """A supernet in float64 whose weights have taken a step, so that there is a velocity; two batches."""
    torch.manual_seed(0)
    space = replace(DARTS, operations=("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3"), nodes=1)
    supernet = Supernet(space, channels=2, cells=3, classes=3, image_channels=1, gated=False).double()
    for alpha in supernet.alpha.values():
        nn.init.normal_(alpha)
    images, labels = torch.randn(2, 8, 1, 8, 8, dtype=torch.float64), torch.randint(3, (2, 8))
    optimizer = sgd(supernet.weights(), lr=RATE, momentum=MOMENTUM, weight_decay=DECAY)
    F.cross_entropy(supernet(images[0].flip(0)), labels[0]).backward()
    optimizer.step()
    return supernet, optimizer, (images[0], labels[0]), (images[1], labels[1])


def brute_force(supernet: Supernet, optimizer: torch.optim.SGD, train: Batch, valid: Batch) -> list[Tensor]:
    """Autograd through w' = w - rate * (momentum * v + gradient + decay * w)."""
    names = {id(parameter): name for name, parameter in supernet.named_parameters()}
    weights = supernet.weights()
    gradients = torch.autograd.grad(F.cross_entropy(supernet(train[0]), train[1]), weights, create_graph=True)
    moved = {
        names[id(w)]: w - RATE * (MOMENTUM * optimizer.state[w]["momentum_buffer"] + g + DECAY * w)
        for w, g in zip(weights, gradients, strict=True)
    }
    loss = F.cross_entropy(functional_call(supernet, moved, (valid[0],)), valid[1])
    return list(torch.autograd.grad(loss, supernet.architecture_parameters()))


def unrolled(
    supernet: Supernet, optimizer: torch.optim.SGD, train: Batch, valid: Batch, *, exact: bool = True
) -> list[Tensor]:
    return unrolled_gradients(
        lambda: F.cross_entropy(supernet(train[0]), train[1]),
        lambda: F.cross_entropy(supernet(valid[0]), valid[1]),
        optimizer,
        supernet.architecture_parameters(),
        exact=exact,
    )


in_both_ways = pytest.mark.parametrize("exact", [True, False], ids=["exact", "finite difference"])


@in_both_ways
def test_hypergradient_is_that_of_the_unrolled_step(exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # At DARTS' 0.01, a network as small as this one has ReLUs that change sides between the two points.
    monkeypatch.setattr(hypergradient, "DISTANCE", 1e-5)
    supernet, optimizer, train, valid = problem()
    expected = brute_force(supernet, optimizer, train, valid)
    tolerance = {"rtol": 1e-12, "atol": 1e-14} if exact else {"rtol": 1e-7, "atol": 1e-9}
    torch.testing.assert_close(unrolled(supernet, optimizer, train, valid, exact=exact), expected, **tolerance)
    for setting in ("lr", "momentum", "weight_decay"):  # none of them is a trifle here
        value, optimizer.param_groups[0][setting] = optimizer.param_groups[0][setting], 0.0
        without = unrolled(supernet, optimizer, train, valid, exact=exact)
        assert max(float((a - b).abs().max()) for a, b in zip(without, expected, strict=True)) > 1e-4
        optimizer.param_groups[0][setting] = value


@in_both_ways
def test_without_a_step_it_is_the_first_order(exact: bool) -> None:
    supernet, optimizer, train, valid = problem()
    optimizer.param_groups[0]["lr"] = 0.0
    found = unrolled(supernet, optimizer, train, valid, exact=exact)
    loss = F.cross_entropy(supernet(valid[0]), valid[1])
    torch.testing.assert_close(found, list(torch.autograd.grad(loss, supernet.architecture_parameters())))


@in_both_ways
def test_weights_are_left_as_they_were_also_by_an_error(exact: bool) -> None:
    supernet, optimizer, train, valid = problem()
    before = [weight.detach().clone() for weight in supernet.weights()]
    unrolled(supernet, optimizer, train, valid, exact=exact)
    with pytest.raises(ZeroDivisionError):
        unrolled_gradients(
            lambda: F.cross_entropy(supernet(train[0]), train[1]),
            lambda: 1 / 0,
            optimizer,
            list(supernet.alpha.values()),
            exact=exact,
        )
    assert all(torch.equal(now, was) for now, was in zip(supernet.weights(), before, strict=True))
    assert all(weight.grad is not None for weight in supernet.weights())  # that of the step before: no new one


@pytest.mark.parametrize("method", ["darts", "fair-darts", "dssp-paper"])
def test_unrolled_search_steps_alpha_otherwise(method: str) -> None:
    first, second = (small_search(method=method, nodes=1, unrolled=unrolled) for unrolled in (False, True))
    for search in (first, second):
        batches = list(search.batches(1))
        search.step(batches[0], 1)  # a velocity for the next
        values = search.step(batches[1], 1)
        assert all(value.isfinite() for value in values.values()) and len(values) == 5
    ours, theirs = (torch.cat([alpha.detach() for alpha in s.supernet.alpha.values()]) for s in (first, second))
    assert not torch.equal(ours, theirs)


def test_step_that_looks_ahead_leaves_the_statistics_to_the_weights_step() -> None:
    first, second = (small_search(method="darts", nodes=1, unrolled=unrolled) for unrolled in (False, True))
    for search in (first, second):
        train, valid, noise = next(search.batches(1))
        if search is first:
            search.step((train, None, noise), 1)
        else:
            search.architect.step(*valid, noise, train)  # type: ignore[misc]  # a batch, in this phase
            search.step((train, None, noise), 1)
    for (name, ours), theirs in zip(first.supernet.named_buffers(), second.supernet.buffers(), strict=True):
        if "num_batches_tracked" in name:
            assert int(ours) == int(theirs) == 1, name


# ---- ranks -----------------------------------------------------------------------------------------------------------


def shared(exact: bool) -> list[Tensor]:
    """The mean over the ranks of what each finds with its share of both batches, normalised over all."""
    supernet, optimizer, *batches = problem()
    if ranks() > 1:
        synchronise_norms(supernet)
    train, valid = ((images[rank() :: ranks()], labels[rank() :: ranks()]) for images, labels in batches)
    return average_tensors(unrolled(supernet, optimizer, train, valid, exact=exact))


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_mean_over_two_ranks_is_that_of_the_whole_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hypergradient, "DISTANCE", 1e-5)
    expected = [shared(exact) for exact in (True, False)]
    for found in results_of_ranks(2, lambda: [shared(exact) for exact in (True, False)], tmp_path):
        torch.testing.assert_close(found[0], expected[0], rtol=1e-11, atol=1e-13)
        torch.testing.assert_close(found[1], expected[1], rtol=1e-6, atol=1e-8)


# ---- the flags -------------------------------------------------------------------------------------------------------


def test_finite_difference_belongs_to_the_second_order() -> None:
    with pytest.raises(ConfigError, match="finite_difference: the first order has no second derivative"):
        SearchConfig(method="darts", finite_difference=True)


@pytest.mark.parametrize("method", ["snas", "gdas", "random"])
def test_methods_that_sample_have_no_second_order(method: str) -> None:
    with pytest.raises(ConfigError, match=f"unrolled: expected method dssp, .*, got {method}"):
        SearchConfig(method=method, unrolled=True)  # type: ignore[arg-type]
