"""torch.func's transforms and batched backward passes: operators and edges as under plain autograd."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.func import functional_call, grad, jvp, vmap

from bench.stock_darts import MixedOp
from dssp_kernels import (
    FusedMixedEdge,
    SeparableConvolution,
    SeparablePair,
    batch_norm_mixed_sum,
    depthwise_conv2d,
    fuse_mixed_ops,
    mixed_sum,
    pointwise_batch_norm,
    pointwise_batch_norm_group,
    pool_batch_norm,
    separable_conv2d,
    separable_conv2d_group,
)

generator = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


ALPHA, DEPTHWISE, POINTWISE, SCALE = normal(3), normal(4, 1, 3, 3), normal(5, 4, 1, 1), normal(4, 1, 1)
GIVEN = SeparableConvolution(normal(4, 1, 3, 3), POINTWISE, padding=1, relu=True)
OTHER = SeparableConvolution(normal(5, 1, 3, 3), normal(4, 5, 1, 1), relu=True)
NORM = nn.BatchNorm2d(5, affine=False, track_running_stats=False)
NORMS = [nn.BatchNorm2d(4, affine=False).double(), None, nn.BatchNorm2d(4).double()]
IMAGES = normal(3, 2, 4, 5, 5)  # what is mapped over, then [B, C, H, W]


def pooled_with_statistics(x: Tensor) -> list[Tensor]:
    """All results of pool_batch_norm, as images."""
    y, mean, variance = pool_batch_norm(x, "avg", 3, padding=1, count_include_pad=False)
    return [y, *(statistic[None, :, None, None].expand_as(y[:1]) for statistic in (mean, variance))]


OPERATORS: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {  # of x and of a parameter
    "mixed_sum": (lambda x, alpha: mixed_sum([x, x.sin(), x * x], alpha), ALPHA),
    "batch_norm_mixed_sum": (
        lambda x, alpha: batch_norm_mixed_sum([x, x.sin(), x * x], alpha, norms=NORMS, training=False),
        ALPHA,
    ),
    "depthwise_conv2d": (lambda x, weight: depthwise_conv2d(x, weight, padding=1, relu=True), DEPTHWISE),
    "separable_conv2d": (lambda x, weight: separable_conv2d(x, weight, POINTWISE, stride=2, relu=True), DEPTHWISE),
    "separable_conv2d_group": (
        lambda x, weight: sum(separable_conv2d_group(x, [GIVEN._replace(depthwise=weight), GIVEN])),
        DEPTHWISE,
    ),
    "separable_conv2d_group, pair": (
        lambda x, weight: separable_conv2d_group(x, [SeparablePair(GIVEN._replace(depthwise=weight), NORM, OTHER)])[0],
        DEPTHWISE,
    ),
    "pointwise_batch_norm": (lambda x, weight: pointwise_batch_norm(x, weight, relu=True)[0], POINTWISE),
    "pointwise_batch_norm_group": (
        lambda x, weight: sum(
            y for y, *_ in pointwise_batch_norm_group([x, x.sin()], [torch.cat([weight, weight], 1)] * 2, relu=True)
        ),
        POINTWISE,
    ),
    "pool_batch_norm, max": (lambda x, scale: pool_batch_norm(x * scale, "max", 3, padding=1)[0], SCALE),
    "pool_batch_norm, avg": (lambda x, scale: torch.cat(pooled_with_statistics(x * scale)), SCALE),
}
operators = pytest.mark.parametrize(("compute", "parameter"), OPERATORS.values(), ids=OPERATORS)
LAYOUTS = {
    "contiguous": IMAGES,
    "channels_last": IMAGES.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3),
    "mapped over the last dimension": IMAGES.permute(1, 2, 3, 4, 0).contiguous().permute(4, 0, 1, 2, 3),
}
layouts = pytest.mark.parametrize("images", LAYOUTS.values(), ids=LAYOUTS)
pytestmark = pytest.mark.usefixtures("backend")


def edge() -> FusedMixedEdge:
    """DARTS' kinds of candidates, small."""
    torch.manual_seed(0)
    separable = [
        nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(4, 4, 3, padding=dilation, dilation=dilation, groups=4, bias=False),
            nn.Conv2d(4, 4, 1, bias=False),
            nn.BatchNorm2d(4),
        )
        for dilation in (1, 2)
    ]
    pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4, affine=False))
    return FusedMixedEdge([None, *separable, nn.Identity(), pool]).double()


def gradients_by_autograd(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad(module(x).square().sum(), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))


# ---- operators -------------------------------------------------------------------------------------------------------


@operators
def test_grad_of_a_grad_is_the_second_derivative(compute: Callable[..., Tensor], parameter: Tensor) -> None:
    def loss(value: Tensor) -> Tensor:
        return compute(IMAGES[0], value).square().sum()

    found = grad(lambda value: grad(loss)(value).square().sum())(parameter)
    leaf = parameter.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(first.square().sum(), leaf)[0])


@operators
def test_jvp_is_the_gradient_along_a_direction(compute: Callable[..., Tensor], parameter: Tensor) -> None:
    def loss(value: Tensor) -> Tensor:
        return compute(IMAGES[0], value).square().sum()

    direction = torch.ones_like(parameter)
    leaf = parameter.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    torch.testing.assert_close(jvp(loss, (parameter,), (direction,))[1], (gradient * direction).sum())


@operators
@layouts
def test_vmap_is_one_call_after_the_other(compute: Callable[..., Tensor], parameter: Tensor, images: Tensor) -> None:
    found = vmap(compute, (0, None))(images, parameter)
    torch.testing.assert_close(found, torch.stack([compute(x, parameter) for x in images]))


@operators
def test_batched_backward_pass_is_one_after_the_other(compute: Callable[..., Tensor], parameter: Tensor) -> None:
    def results(value: Tensor) -> Tensor:
        return compute(IMAGES[0], value)[0, 0]

    found = jacobian(results, parameter, vectorize=True)
    assert not found.requires_grad
    torch.testing.assert_close(found, jacobian(results, parameter))


@pytest.mark.parametrize("name", ["mixed_sum", "batch_norm_mixed_sum"])
def test_hessian_of_alpha_is_the_same_batched(name: str) -> None:
    def loss(alpha: Tensor) -> Tensor:
        return OPERATORS[name][0](IMAGES[0], alpha).square().sum()

    expected = hessian(loss, ALPHA)
    torch.testing.assert_close(hessian(loss, ALPHA, vectorize=True), expected)
    torch.testing.assert_close(torch.func.hessian(loss)(ALPHA), expected)


# ---- edges -----------------------------------------------------------------------------------------------------------


def test_grad_through_functional_call_is_that_of_autograd() -> None:
    module = edge().eval()
    found = grad(lambda parameters: functional_call(module, parameters, (IMAGES[0],)).square().sum())(
        {name: parameter.detach() for name, parameter in module.named_parameters()}
    )
    for name, expected in gradients_by_autograd(module, IMAGES[0]).items():
        torch.testing.assert_close(found[name], expected)


def test_training_edge_updates_the_buffers_it_is_called_with() -> None:
    module, other = edge(), edge()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def loss(parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        return functional_call(module, (parameters, buffers), (IMAGES[0],)).square().sum(), buffers

    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    found, updated = grad(loss, has_aux=True)(parameters, buffers)
    for name, expected in gradients_by_autograd(other, IMAGES[0]).items():
        torch.testing.assert_close(found[name], expected)
    for name, expected in other.named_buffers():
        torch.testing.assert_close(updated[name], expected)
        assert torch.equal(module.get_buffer(name), buffers[name])


@layouts
def test_gradients_per_image(images: Tensor) -> None:
    module = edge().eval()
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}

    def loss(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
        return functional_call(module, parameters, (image[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, images[:, 0])
    for i, image in enumerate(images[:, 0]):
        for name, expected in gradients_by_autograd(module, image[None]).items():
            torch.testing.assert_close(found[name][i], expected)


@layouts
def test_vmap_over_a_pruned_edge_gives_zeros(images: Tensor) -> None:
    module = edge()
    module.prune()
    assert torch.equal(vmap(module)(images), torch.zeros_like(images))
    assert not grad(lambda x: module(x).sum())(images[0]).any()


def test_converted_mixed_op_under_grad() -> None:
    torch.manual_seed(0)
    original = MixedOp(8, 1).double().eval()
    converted = MixedOp(8, 1).double().eval()
    converted.load_state_dict(original.state_dict())
    assert fuse_mixed_ops(converted) == 1
    x, weights = normal(2, 8, 5, 5), torch.softmax(normal(8), 0)
    found, expected = (grad(lambda w, m=m: m(x, w).square().sum())(weights) for m in (converted, original))
    torch.testing.assert_close(found, expected)
