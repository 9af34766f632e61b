"""The second-order hypergradient of DARTS: alpha's gradient through one virtual step of the weights.

Measured on the digits supernet (8 channels, 3 cells, batch 64, one CPU thread): a step takes 9 times as long as the
first order and 280 MB more at its peak with the exact product, 3 times as long and 40 MB more with the finite
difference. But there the difference is no derivative: its error is 3 to 5 times the size of the product, at smaller
distances larger still (where neighbouring values tie or ReLUs sit at their kink, the gradient jumps however short the
way).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from dssp.distributed import average_tensors
from dssp.steps.optimization import frozen

DISTANCE = 1e-2  # how far the weights move for the finite difference, in norm (DARTS, section 2.3, footnote)


def unrolled_gradients(
    train_loss: Callable[[], Tensor],
    objective: Callable[[], Tensor],
    optimizer: torch.optim.SGD,
    architecture: Sequence[nn.Parameter],
    *,
    exact: bool,
) -> list[Tensor]:
    """d objective(w', alpha) / d alpha where w' = w - xi * (mu * v + d train_loss(w, alpha) / dw + decay * w).

    Liu et al. 2019 (arXiv:1806.09055), eq. 7: with g = d objective(w', alpha) / dw',

        d objective / d alpha - xi * (d^2 train_loss(w, alpha) / d alpha dw) g

    The virtual step is the optimizer's next one, but for clipping: its learning rate xi, its momentum mu with the
    velocity v, its weight decay (as in DARTS' code). The product with the second derivative is `exact`, by
    differentiating the backward pass, or DARTS' finite difference (eq. 8): with w+- = w +- eps * g, eps = 0.01 / |g|,

        (d train_loss(w+, alpha) / d alpha - d train_loss(w-, alpha) / d alpha) / (2 eps)

    The losses read weights and alpha where they are; afterwards the weights are those from before, to the bit. Nothing
    waits for the device. Of several ranks, which give the losses of their batches, the virtual step and g are those of
    the mean losses, and the mean over the ranks of what is returned is the derivative of the mean objective.
    """
    (group,) = optimizer.param_groups
    weights, rate = group["params"], group["lr"]
    before = [weight.detach().clone() for weight in weights]
    try:
        descent = average_tensors(_gradients(train_loss(), weights))
        _move(weights, before, _velocities(optimizer, descent), -rate)
        gradients = _gradients(objective(), [*architecture, *weights])
        direct, vector = gradients[: len(architecture)], average_tensors(gradients[len(architecture) :])
        if exact:
            _move(weights, before)
            products = _exact_products(train_loss, weights, architecture, vector)
        else:
            products = _finite_differences(train_loss, weights, architecture, vector, before)
    finally:
        _move(weights, before)
    return [d - rate * product for d, product in zip(direct, products, strict=True)]


def _exact_products(
    loss: Callable[[], Tensor], weights: list[Tensor], architecture: Sequence[Tensor], vector: list[Tensor]
) -> list[Tensor]:
    """(d^2 loss / d alpha dw) vector, by autograd through the backward pass."""
    gradients = torch.autograd.grad(loss(), weights, create_graph=True, allow_unused=True)
    pairs = [(g, v) for g, v in zip(gradients, vector, strict=True) if g is not None and g.requires_grad]
    outputs, directions = zip(*pairs, strict=True)
    return _gradients(outputs, architecture, directions)


def _finite_differences(
    loss: Callable[[], Tensor],
    weights: list[nn.Parameter],
    architecture: Sequence[Tensor],
    vector: list[Tensor],
    origin: list[Tensor],
) -> list[Tensor]:
    """The same, from the gradients at two points; leaves the weights at one of them."""
    distance = DISTANCE / nn.utils.get_total_norm(vector, foreach=True).clamp_min(1e-12)
    sides = []
    for sign in (1.0, -1.0):
        _move(weights, origin, vector, sign * distance)
        with frozen(weights):
            sides.append(_gradients(loss(), architecture))
    return [(plus - minus) / (2 * distance) for plus, minus in zip(*sides, strict=True)]


def _gradients(
    outputs: Tensor | Sequence[Tensor], parameters: Sequence[Tensor], directions: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Zeros where the outputs do not depend on a parameter."""
    found = torch.autograd.grad(outputs, parameters, directions, allow_unused=True, materialize_grads=True)
    return list(found)


def _velocities(optimizer: torch.optim.SGD, gradients: list[Tensor]) -> list[Tensor]:
    """What the optimizer's next step multiplies by the learning rate."""
    (group,) = optimizer.param_groups
    weights = [weight.detach() for weight in group["params"]]
    velocities = list(torch._foreach_add(gradients, weights, alpha=group["weight_decay"]))
    for i, weight in enumerate(group["params"]):
        buffer = optimizer.state.get(weight, {}).get("momentum_buffer")  # none before the first step
        if buffer is not None:
            velocities[i] = velocities[i] + group["momentum"] * buffer
    return velocities


@torch.no_grad()
def _move(
    weights: Sequence[Tensor],
    origin: list[Tensor],
    direction: list[Tensor] | None = None,
    scale: float | Tensor = 0.0,
) -> None:
    """weights = origin + scale * direction; without a direction, the origin."""
    target = origin if direction is None else torch._foreach_add(origin, torch._foreach_mul(direction, scale))
    torch._foreach_copy_([*weights], target)
