"""The architecture step follows d(L_valid + lambda * sum of sigmoid(m)) and leaves the weights alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.architect import Architect
from dssp.config import SearchConfig
from dssp.methods.dssp_paper import DsspPaper
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def problem(**settings: Any) -> tuple[Supernet, Tensor, Tensor]:
    torch.manual_seed(0)
    supernet = small_supernet(nodes=2, **settings).double()
    for parameter in supernet.architecture_parameters():
        nn.init.normal_(parameter)
    return supernet, torch.randn(6, 1, 8, 8, dtype=torch.float64), torch.arange(6) % 2


def architect(supernet: Supernet, **settings: float) -> Architect:
    config = SearchConfig(method="dssp-paper", lambda_prune=settings.pop("lambda_prune", 0.0)).resolve()
    method = DsspPaper(config, supernet, lambda: torch.zeros(1))
    rates = {"alpha_lr": 0.1, "alpha_weight_decay": 0.0, "mask_lr": 0.1, **settings}
    return Architect(supernet, method, precision="float32", **rates)


@pytest.mark.parametrize("lambda_prune", [0.0, 0.3])
def test_gradient_is_that_of_the_validation_loss_and_the_gates(lambda_prune: float) -> None:
    supernet, images, labels = problem(light=False)
    stepper = architect(supernet, lambda_prune=lambda_prune)
    stepper.step(images.flip(0), labels, {})  # leaves nothing behind for the next step's gradient
    reference = copy.deepcopy(supernet)
    gates = torch.cat([mask.sigmoid() for mask in reference.mask.values()])
    loss = F.cross_entropy(reference(images), labels)
    expected = torch.autograd.grad(loss + lambda_prune * gates.sum(), reference.architecture_parameters())

    values = stepper.step(images, labels, {})
    found = [parameter.grad for parameter in supernet.architecture_parameters()]
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(values["valid_loss"], loss.detach())
    torch.testing.assert_close(values["prune_loss"], gates.sum().detach())
    assert not any(value.requires_grad for value in values.values())


def test_weights_stay_and_alpha_and_masks_move() -> None:
    supernet, images, labels = problem(light=False)
    before = copy.deepcopy(supernet)
    architect(supernet).step(images, labels, {})
    for ours, theirs in zip(supernet.weights(), before.weights(), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(supernet.architecture_parameters(), before.architecture_parameters(), strict=True):
        assert not torch.equal(ours, theirs)


def test_penalty_closes_gates_that_are_nearly_closed_already() -> None:
    supernet, images, labels = problem()  # a penalty on |m| itself would push m = -2 back up, towards a gate of 0.5
    with torch.no_grad():
        for mask in supernet.mask.values():
            mask.fill_(-2.0)
    architect(supernet, lambda_prune=1e6).step(images, labels, {})
    assert all((mask < -2.0).all() for mask in supernet.mask.values())


def test_steps_lower_the_objective() -> None:
    supernet, images, labels = problem()
    stepper = architect(supernet, lambda_prune=0.1, alpha_lr=0.02, mask_lr=0.02)
    values = [stepper.step(images, labels, {}) for _ in range(15)]
    objective = [float(v["valid_loss"] + 0.1 * v["prune_loss"]) for v in values]
    assert objective[-1] < objective[0]


def test_masks_of_removed_edges_get_no_gradient() -> None:
    supernet, images, labels = problem()
    supernet.remove_edge("normal:1->3")
    architect(supernet, lambda_prune=1.0).step(images, labels, {})
    grad = supernet.mask["normal"].grad
    assert grad is not None and grad[3] == 0 and grad[[0, 1, 2, 4]].ne(0).all()
    assert supernet.alpha["normal"].grad[3].eq(0).all()


def test_learning_rates_are_those_of_alpha_and_masks() -> None:
    supernet, images, labels = problem()
    before = [parameter.detach().clone() for parameter in supernet.architecture_parameters()]
    architect(supernet, alpha_lr=0.01, mask_lr=0.05, lambda_prune=1.0).step(images, labels, {})
    moved = [
        float((p.detach() - b).abs().max()) for p, b in zip(supernet.architecture_parameters(), before, strict=True)
    ]
    assert moved == pytest.approx([0.01, 0.01, 0.05, 0.05], rel=1e-3)  # Adam's first step has the learning rate's size


def test_without_masks_alpha_alone_learns() -> None:
    supernet, images, labels = problem(gated=False)
    stepper = architect(supernet, lambda_prune=1.0)
    assert len(stepper.optimizer.param_groups) == 1
    assert stepper.step(images, labels, {})["prune_loss"] == 0
