"""The second-order hypergradient of DARTS: alpha's gradient through one virtual step of the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

DISTANCE = 1e-2  # how far the weights move for the finite difference, in norm (DARTS, section 2.3, footnote)


def unrolled_gradients(
    train_loss: Callable[[], Tensor],
    objective: Callable[[], Tensor],
    optimizer: torch.optim.SGD,
    architecture: Sequence[nn.Parameter],
) -> list[Tensor]:
    """d objective(w', alpha) / d alpha where w' = w - xi * (mu * v + d train_loss(w, alpha) / dw + decay * w).

    Liu et al. 2019 (arXiv:1806.09055), eq. 7 and 8: with g = d objective(w', alpha) / dw' and w+- = w +- eps * g,

        d objective / d alpha - xi * (d train_loss(w+, alpha) / d alpha - d train_loss(w-, alpha) / d alpha) / (2 eps)

    and eps = 0.01 / |g|. The virtual step is the optimizer's next one, but for clipping: its learning rate xi, its
    momentum mu with the velocity v, its weight decay (as in DARTS' code). The losses read weights and alpha where they
    are; afterwards the weights are those from before, to the bit. Nothing waits for the device.
    """
    (group,) = optimizer.param_groups
    weights, rate = group["params"], group["lr"]
    before = [weight.detach().clone() for weight in weights]
    try:
        _move(weights, before, _velocities(optimizer, _gradients(train_loss(), weights)), -rate)
        gradients = _gradients(objective(), [*architecture, *weights])
        direct, vector = gradients[: len(architecture)], gradients[len(architecture) :]
        distance = DISTANCE / nn.utils.get_total_norm(vector, foreach=True).clamp_min(1e-12)
        sides = []
        for sign in (1.0, -1.0):
            _move(weights, before, vector, sign * distance)
            sides.append(_gradients(train_loss(), architecture))
    finally:
        with torch.no_grad():
            torch._foreach_copy_(weights, before)
    return [d - rate * (plus - minus) / (2 * distance) for d, plus, minus in zip(direct, *sides, strict=True)]


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Zeros where the loss does not depend on a parameter."""
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


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
def _move(weights: list[Tensor], origin: list[Tensor], direction: list[Tensor], scale: float | Tensor) -> None:
    """weights = origin + scale * direction."""
    torch._foreach_copy_(weights, torch._foreach_add(origin, torch._foreach_mul(direction, scale)))
