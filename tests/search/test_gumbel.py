"""Sampled relaxations: snas mixes by softmax((alpha + Gumbel) / tau), gdas runs one candidate and learns through it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dssp.methods.gdas import Gdas
from dssp.methods.gumbel import GumbelMethod
from dssp.methods.snas import Snas
from tests.search.small import small_search

ALPHA = torch.tensor([2.0, 0.0, 1.0, -1.0, 0.5, -0.5, 0.0, 1.5])


def sampling(method: str, **settings: float) -> GumbelMethod:
    """With the same alpha on every edge."""
    made = small_search(method=method, nodes=1, warmup_epochs=0, **settings).method
    assert isinstance(made, GumbelMethod)
    with torch.no_grad():
        for alpha in made.supernet.alpha.values():
            alpha.copy_(ALPHA)
    return made


def test_largest_perturbed_alpha_is_a_draw_from_the_softmax() -> None:
    method, generator = sampling("gdas"), torch.Generator().manual_seed(0)
    counts = torch.zeros(8)
    for _ in range(1000):
        for mixture in method.mixtures(method.noise(generator, 0)).values():
            counts += mixture.weights.detach().sum(0)
    torch.testing.assert_close(counts / counts.sum(), ALPHA.softmax(0), atol=0.03, rtol=0)


def test_noise_depends_on_the_generator_alone() -> None:
    method = sampling("snas")
    one, two, other = (method.noise(torch.Generator().manual_seed(seed), 1) for seed in (3, 3, 4))
    assert one.keys() == two.keys() == {"temperature", "normal", "reduce"}
    assert all(torch.equal(one[name], two[name]) for name in one) and not torch.equal(one["normal"], other["normal"])
    assert all(value.device.type == "cpu" for value in one.values())


@pytest.mark.parametrize(("method", "start"), [("snas", 1.0), ("gdas", 10.0)])
def test_temperature_falls_linearly_from_the_preset_to_a_tenth(method: str, start: float) -> None:
    made = sampling(method, epochs=5)
    falls = [float(made.noise(torch.Generator(), epoch)["temperature"]) for epoch in range(5)]
    assert falls == pytest.approx([start + (0.1 - start) * epoch / 4 for epoch in range(5)])


def test_snas_is_the_concrete_relaxation_and_one_hot_where_it_is_cold() -> None:
    method = sampling("snas")
    gumbel = torch.randn(2, 8)
    weights = method.sampled("normal", gumbel, torch.tensor(0.7)).weights
    expected = torch.exp((ALPHA + gumbel) / 0.7)
    torch.testing.assert_close(weights, expected / expected.sum(1, keepdim=True))
    cold = method.sampled("normal", gumbel, torch.tensor(1e-3)).weights
    torch.testing.assert_close(cold, torch.nn.functional.one_hot((ALPHA + gumbel).argmax(1), 8).float())


def test_snas_learns_alpha_and_weights_from_the_training_batch() -> None:
    search = small_search(method="snas", nodes=1)
    train, valid, noise = next(search.batches(1))
    assert valid is None and isinstance(search.method, Snas)
    before = [parameter.detach().clone() for parameter in search.supernet.parameters()]
    search.step((train, valid, noise), 1)
    assert not any(torch.equal(now, was) for now, was in zip(search.supernet.parameters(), before, strict=True))


def test_snas_learns_alpha_from_the_penalty_too() -> None:
    gradients = []
    for beta_decay in (0.0, 8.0):
        search = small_search(method="snas", nodes=1, beta_decay=beta_decay)
        batch = next(search.batches(1))
        penalty, alpha = search.method.penalty(), search.supernet.alpha["normal"]
        search.step(batch, 1)
        gradients.append(alpha.grad)
    (expected,) = torch.autograd.grad(penalty, alpha)
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradients[1] - gradients[0], expected, atol=1e-5, rtol=1e-4)


def straight_through(method: GumbelMethod, gumbel: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by alpha of the sum of weights * outputs on the first edge, as the mix computes them."""
    alpha, mixture = method.supernet.alpha["normal"], method.sampled("normal", gumbel, torch.tensor(2.0))
    assert mixture.runs is not None
    value = (mixture.weights[0] * outputs)[torch.tensor(mixture.runs[0])].sum()
    return value, torch.autograd.grad(value, alpha)[0][0]


def test_gdas_goes_forward_hard_and_back_through_the_weight_of_what_ran() -> None:
    method, gumbel, outputs = sampling("gdas"), torch.randn(2, 8), torch.randn(8)
    value, gradient = straight_through(method, gumbel, outputs)
    soft = ((ALPHA + gumbel[0]) / 2.0).softmax(0)
    chosen = int(soft.argmax())
    assert value == outputs[chosen]  # its weight is exactly 1
    jacobian = soft[chosen] * (torch.eye(8)[chosen] - soft) / 2.0  # d h_chosen / d alpha
    torch.testing.assert_close(gradient, outputs[chosen] * jacobian)


def test_gdas_runs_one_candidate_per_edge_and_none_that_is_gone() -> None:
    search = small_search(method="gdas", nodes=2)
    search.supernet.remove_edge("normal:0->3")
    for edge in search.supernet.live_edges():
        search.supernet.remove_candidate(edge, "sep_conv_5x5")
    ran: list[str] = []
    for edge in search.supernet.live_edges():
        for k, candidate in enumerate(search.supernet.mixed_edges(edge)[0]._ops):
            if candidate is not None:
                candidate.register_forward_hook(lambda *_, name=f"{edge}/{k}": ran.append(name))
    train, _, noise = next(search.batches(1))
    search.step((train, None, noise), 1)
    assert isinstance(search.method, Gdas)
    assert sorted(name.split("/")[0] for name in ran) == sorted(search.supernet.live_edges())


def test_gdas_survives_none_on_every_edge() -> None:
    search = small_search(method="gdas", nodes=1)
    train, valid, noise = next(search.batches(1))
    for type in search.supernet.cell_types:
        noise[type][:, 0] += 100.0  # `none`
    values = search.step((train, valid, noise), 1)
    assert all(value.isfinite() for value in values.values())
