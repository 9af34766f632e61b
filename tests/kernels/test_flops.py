"""FLOPs that torch.utils.flop_counter finds in the four operators, forward and backward, against their formulas."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import FusedMixedEdge, batch_norm_mixed_sum, depthwise_conv2d, mixed_sum, separable_conv2d
from dssp_kernels.backend import WHY_NO_CPU_KERNELS

pytestmark = pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")

SHAPE = (2, 4, 9, 8)
N = 2 * 4 * 9 * 8
PIXELS = 2 * 5 * 4  # of the output: stride 2, padding 1, 3x3


def counts(compute: Callable[..., Tensor], tensors: Sequence[Tensor], needed: Sequence[int]) -> tuple[int, int]:
    """FLOPs of the forward and of the backward pass, where some of the tensors need a gradient."""
    leaves = [tensor.detach().requires_grad_(i in needed) for i, tensor in enumerate(tensors)]
    with FlopCounterMode(display=False) as forward:
        y = compute(*leaves)
    with FlopCounterMode(display=False) as backward:
        if needed:
            y.backward(torch.ones_like(y))
    return forward.get_total_flops(), backward.get_total_flops()


def entries(count: int) -> list[Tensor]:
    return [torch.randn(SHAPE) for _ in range(count)]


@pytest.mark.parametrize(
    ("needed", "backward"),
    [
        ((), 0),
        ((0,), 2 * 3 * N),  # alpha: a product with each of three entries
        ((2, 3, 4), 3 * N),  # every entry's gradient
        ((2,), N),
        ((0, 1, 2, 3, 4), (3 + 2 * 3) * N),
    ],
    ids=["none", "alpha", "entries", "one entry", "all"],
)
def test_mixed_sum(needed: tuple[int, ...], backward: int) -> None:
    def mix(alpha: Tensor, mask: Tensor, *outputs: Tensor) -> Tensor:
        return mixed_sum([*outputs, None], alpha, mask)

    assert counts(mix, [torch.zeros(4), torch.zeros(1), *entries(3)], needed) == (2 * 3 * N, backward)


@pytest.mark.parametrize(
    ("training", "needed", "forward", "backward"),
    [
        (True, (), (5 + 5 + 2) * N, 0),
        (False, (), 3 * 2 * N, 0),
        (True, (2, 3, 4), (5 + 5 + 2) * N, (2 * 2 + 4 + 4 + 1) * N),
        (False, (2, 3, 4), 3 * 2 * N, 3 * N),
        (True, (0,), (5 + 5 + 2) * N, 3 * 2 * N),
        (True, (0, 1, 2, 3, 4), (5 + 5 + 2) * N, (3 * 2 + 4 + 4 + 1) * N),
    ],
    ids=str,
)
def test_batch_norm_mixed_sum(training: bool, needed: tuple[int, ...], forward: int, backward: int) -> None:
    norms = [nn.BatchNorm2d(4, affine=False), nn.BatchNorm2d(4, affine=False), None, None]

    def mix(alpha: Tensor, mask: Tensor, *outputs: Tensor) -> Tensor:
        return batch_norm_mixed_sum([*outputs, None], alpha, mask, norms=norms, training=training)

    assert counts(mix, [torch.zeros(4), torch.zeros(1), *entries(3)], needed) == (forward, backward)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("needed", [(), (0,), (1,), (0, 1)], ids=str)
def test_depthwise_conv2d(needed: tuple[int, ...], relu: bool) -> None:
    forward = 2 * PIXELS * 4 * 9
    found = counts(
        lambda x, weight: depthwise_conv2d(x, weight, stride=2, padding=1, relu=relu),
        [torch.randn(SHAPE), torch.randn(4, 1, 3, 3)],
        needed,
    )
    assert found == (forward, len(needed) * forward)


@pytest.mark.parametrize(
    ("needed", "passes"),
    [((), (0, 0)), ((0,), (1, 1)), ((1,), (1, 1)), ((2,), (0, 1)), ((0, 1), (2, 1)), ((0, 1, 2), (2, 2))],
    ids=str,
)
def test_separable_conv2d(needed: tuple[int, ...], passes: tuple[int, int]) -> None:
    depthwise, pointwise = 2 * PIXELS * 4 * 9, 2 * PIXELS * 4 * 6
    found = counts(
        lambda *tensors: separable_conv2d(*tensors, stride=2, padding=1),
        [torch.randn(SHAPE), torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1)],
        needed,
    )
    assert found == (depthwise + pointwise, passes[0] * depthwise + passes[1] * pointwise)


def test_pruned_edge_costs_nothing() -> None:
    edge = FusedMixedEdge([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()])
    x = torch.randn(SHAPE)
    with FlopCounterMode(display=False) as counter:
        edge(x)
    assert counter.get_total_flops() == 2 * 9 * 4 * N + 2 * 2 * N
    edge.prune()
    edge(x)  # the first pass finds the shape of the output, on tensors without data
    with FlopCounterMode(display=False) as counter:
        edge(x)
    assert counter.get_total_flops() == 0
