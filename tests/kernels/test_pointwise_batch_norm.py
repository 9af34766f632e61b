"""pointwise_batch_norm and its group: kernels and reference against float64 and eager; the modules they stand for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import pointwise_batch_norm, pointwise_batch_norm_group, relu_pointwise_norms
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK

channels_last = LAYOUTS["channels_last"]


def ours(x: Tensor, weight: Tensor, relu: bool = True, eps: float = 1e-5) -> Tensor:
    return pointwise_batch_norm(x, weight, relu=relu, eps=eps)[0]


def eager(x: Tensor, weight: Tensor, relu: bool = True, eps: float = 1e-5) -> Tensor:
    return F.batch_norm(F.conv2d(F.relu(x) if relu else x, weight), None, None, training=True, eps=eps)


def check(x: Tensor, weight: Tensor, **arguments: Any) -> None:
    assert_as_exact(partial(ours, **arguments), partial(eager, **arguments), x, weight)


# Rests of a chunk of pixels, several images to a part and several parts to an image.
SHAPES = [(4, 16, 9, 14), (70, 8, 5, 5), (1, 24, 33, 33)]


@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("outputs", [8, 40])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_the_kernels_are_made_for(backend: str, shape: tuple[int, ...], outputs: int, relu: bool) -> None:
    check(channels_last(normal(*shape)), normal(outputs, shape[1], 1, 1, seed=1), relu=relu, eps=0.1)


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("channels", "outputs"), [(16, 8), (12, 20), (3, 8), (8, 5)])
def test_channels_layouts_and_dtypes(
    backend: str, channels: int, outputs: int, layout: str, dtype: torch.dtype
) -> None:
    x = LAYOUTS[layout](normal(2, channels, 7, 9, dtype=dtype))
    check(x, normal(outputs, channels, 1, 1, dtype=dtype, seed=1))


def test_column_of_any_stride(backend: str) -> None:
    x = torch.empty_strided((3, 8, 6, 1), (48, 1, 8, 1)).copy_(normal(3, 8, 6, 1))
    check(x, normal(16, 8, 1, 1, seed=1))


@with_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_kernels_run_where_they_are_said_to(dtype: torch.dtype) -> None:
    def node(x: Tensor, outputs: int) -> str:
        y = ours(x.to(dtype).requires_grad_(), normal(outputs, x.shape[1], 1, 1, dtype=dtype))
        return y.grad_fn.name()

    assert node(channels_last(normal(2, 8, 3, 3)), 16) == "_PointwiseBatchNormBackward"
    for x, outputs in ((normal(2, 8, 3, 3), 16), (channels_last(normal(2, 8, 3, 3)), 7)):
        assert node(x, outputs) == "NativeBatchNormBackward0"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_propagate_as_in_eager(backend: str, value: float) -> None:
    x, weight = channels_last(normal(2, 8, 6, 6)), normal(8, 8, 1, 1, seed=1)
    x[1, 3, 2, 5] = value
    weight[:4, 3] = 0.0
    for mine, theirs in zip(run(ours, x, weight), run(eager, x, weight), strict=True):
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_statistics_are_those_that_running_ones_take_in(backend: str) -> None:
    x, weight = channels_last(normal(4, 8, 9, 9) + 100), normal(16, 8, 1, 1, seed=1)  # far from zero
    _, mean, variance = pointwise_batch_norm(x, weight, relu=True)
    z = F.conv2d(x.double().relu(), weight.double())
    assert mean.dtype is variance.dtype is torch.float32 and not mean.requires_grad and not variance.requires_grad
    torch.testing.assert_close(mean.double(), z.mean((0, 2, 3)), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(variance.double(), z.var((0, 2, 3)), rtol=1e-4, atol=0)


@with_cpu_kernels
def test_gradcheck_and_gradgradcheck() -> None:
    x = channels_last(normal(2, 4, 3, 4, dtype=torch.float64)).requires_grad_()
    weight = normal(8, 4, 1, 1, dtype=torch.float64, seed=1).requires_grad_()
    assert ours(x, weight).grad_fn.name() == "_PointwiseBatchNormBackward"
    assert_differentiable_twice(ours, [x, weight])


@with_cpu_kernels
@pytest.mark.parametrize("frozen", [0, 1])
def test_second_derivative_where_only_one_needs_a_gradient(frozen: int) -> None:
    found = []
    for compute in (ours, eager):
        leaves = [
            channels_last(normal(2, 8, 3, 4, dtype=torch.float64)),
            normal(8, 8, 1, 1, dtype=torch.float64, seed=1),
        ]
        leaf = leaves[1 - frozen].requires_grad_()
        [first] = torch.autograd.grad(compute(*leaves).sin().sum(), [leaf], create_graph=True)
        found.append([first.detach(), *torch.autograd.grad(first.square().sum(), [leaf])])
    torch.testing.assert_close(*found)


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), *SHAPES], ids=str)
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, ...]
) -> None:
    x, weight, results = channels_last(normal(*shape)), normal(16, shape[1], 1, 1, seed=1), []
    for count in (2, 2, 1, 3):
        threads(count)
        results.append(run(ours, x, weight))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("needed", [(True, False), (False, True)], ids=str)
def test_only_the_gradients_needed_are_computed(backend: str, needed: tuple[bool, bool]) -> None:
    tensors = channels_last(normal(2, 8, 6, 6)), normal(16, 8, 1, 1, seed=1)
    _, *expected = run(ours, *tensors)
    leaves = [tensor.clone().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    y = ours(*leaves)
    y.backward(normal(*y.shape, seed=1))
    for leaf, gradient, need in zip(leaves, expected, needed, strict=True):
        assert torch.equal(leaf.grad, gradient) if need else leaf.grad is None


@with_cpu_kernels
def test_nothing_but_x_y_the_weight_and_a_scale_is_kept() -> None:
    saved: list[tuple[int, ...]] = []
    x, weight = channels_last(normal(2, 8, 6, 6)).requires_grad_(), normal(16, 8, 1, 1).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        y = ours(x, weight)
    assert sorted(saved) == sorted([tuple(x.shape), tuple(weight.shape), tuple(y.shape), (16,)])


@with_cpu_kernels
def test_counts_the_flops_of_its_convolution() -> None:
    counts = []
    for compute in (ours, eager):
        leaves = channels_last(normal(2, 8, 6, 6)).requires_grad_(), normal(16, 8, 1, 1).requires_grad_()
        with FlopCounterMode(display=False) as counter:
            y = compute(*leaves)
            forward = counter.get_total_flops()
            y.sum().backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0


@with_cpu_kernels
@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=str)
def test_opcheck(needs: tuple[bool, bool]) -> None:
    maps, weights = MAPS, WEIGHTS
    operators = torch.ops.dssp_kernels
    opcheck(operators.pointwise_batch_norm_forward, (maps, weights, True, [1e-5, 0.1]))
    ys, _, _, scales = operators.pointwise_batch_norm_forward(maps, weights, True, [1e-5, 0.1])
    grads = list(map(torch.ones_like, ys))
    opcheck(operators.pointwise_batch_norm_backward, (grads, maps, ys, scales, weights, True, *needs))


def test_compiles_without_graph_breaks() -> None:
    tensors = channels_last(normal(2, 8, 6, 6)), normal(16, 8, 1, 1, seed=1)
    found, expected = (run(f, *tensors) for f in (torch.compile(ours, fullgraph=True), ours))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_autocast_runs_in_the_autocast_dtype(backend: str) -> None:
    x, weight = channels_last(normal(2, 8, 6, 6)), normal(16, 8, 1, 1, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        y = ours(x, weight)
    assert y.dtype is torch.bfloat16 and (y - eager(x, weight)).abs().max() < 0.1


# ---- several weights, maps side by side -----------------------------------------------------------------------------

MAPS = [channels_last(normal(3, channels, 7, 6, seed=channels)) for channels in (8, 24, 16)]
WEIGHTS = [normal(outputs, 48, 1, 1, seed=outputs) for outputs in (16, 40)]


def grouped(*tensors: Tensor, maps: int = 3, **arguments: Any) -> Tensor:
    results = pointwise_batch_norm_group(tensors[:maps], tensors[maps:], **arguments)
    return torch.cat([y for y, _, _ in results], dim=1)


def one_by_one(*tensors: Tensor, maps: int = 3, relu: bool = False, eps: tuple[float, ...] = (1e-5,) * 3) -> Tensor:
    x = torch.cat(tensors[:maps], dim=1)
    return torch.cat([eager(x, w, relu, e) for w, e in zip(tensors[maps:], eps)], dim=1)  # noqa: B905  # fewer weights


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("relu", [True, False])
def test_group_is_its_members_on_the_maps_side_by_side(backend: str, relu: bool, dtype: torch.dtype) -> None:
    tensors = [tensor.to(dtype) for tensor in (*MAPS, *WEIGHTS)]
    arguments: dict[str, Any] = {"relu": relu, "eps": (0.1, 1e-3)}
    assert_as_exact(partial(grouped, **arguments), partial(one_by_one, **arguments), *tensors)


@pytest.mark.parametrize("maps", [1, 2])
@pytest.mark.parametrize("channels", [8, 12])
def test_groups_of_every_size(backend: str, channels: int, maps: int) -> None:
    """12 channels: no kernel is made for them."""
    tensors = [channels_last(normal(2, channels, 5, 9, seed=m)) for m in range(maps)]
    for weights in (1, 2, 3):
        tensors.append(normal(8, maps * channels, 1, 1, seed=10 + weights))
        assert_as_exact(partial(grouped, maps=maps), partial(one_by_one, maps=maps), *tensors)


def test_statistics_of_a_group_are_each_ones_own(backend: str) -> None:
    x = torch.cat(MAPS, dim=1)
    for (_, *found), weight in zip(pointwise_batch_norm_group(MAPS, WEIGHTS, relu=True), WEIGHTS, strict=True):
        for mine, alone in zip(found, pointwise_batch_norm(x, weight, relu=True)[1:], strict=True):
            torch.testing.assert_close(mine, alone)


@with_cpu_kernels
def test_kernels_run_on_maps_that_they_are_made_for() -> None:
    def node(*maps: Tensor) -> str:
        leaf = maps[0].requires_grad_()
        weight = normal(8, sum(x.shape[1] for x in maps), 1, 1)
        return pointwise_batch_norm_group([leaf, *maps[1:]], [weight])[0][0].grad_fn.name()

    fits = channels_last(normal(2, 8, 3, 3))
    assert node(fits, fits.clone()) == "_PointwiseBatchNormBackward"
    for other in (normal(2, 8, 3, 3), channels_last(normal(2, 9, 3, 3))):
        assert node(fits, other) == "NativeBatchNormBackward0"


@with_cpu_kernels
def test_gradcheck_and_gradgradcheck_of_a_group() -> None:
    maps = [channels_last(normal(2, 4, 3, 2, dtype=torch.float64, seed=m)).requires_grad_() for m in range(2)]
    weights = [normal(4, 8, 1, 1, dtype=torch.float64, seed=2 + k).requires_grad_() for k in range(2)]
    assert_differentiable_twice(partial(grouped, maps=2, relu=True), [*maps, *weights])


@with_cpu_kernels
def test_group_is_bit_equal_on_any_number_of_threads(threads: Callable[[int], None]) -> None:
    maps = [channels_last(normal(8, 16, 32, 32, seed=m)) for m in range(3)]
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(run(grouped, *maps, *WEIGHTS))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("frozen", range(5))
def test_only_the_gradients_of_a_group_that_are_needed_come(backend: str, frozen: int) -> None:
    _, *expected = run(grouped, *MAPS, *WEIGHTS)
    leaves = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate((*MAPS, *WEIGHTS))]
    y = grouped(*leaves)
    y.backward(normal(*y.shape, seed=1))
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, gradient)


def test_result_that_nobody_used_adds_nothing(backend: str) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (*MAPS, *WEIGHTS)]
    [_, (y, _, _)] = pointwise_batch_norm_group(leaves[:3], leaves[3:])
    y.square().sum().backward()
    alone = [tensor.clone().requires_grad_() for tensor in (*MAPS, WEIGHTS[1])]
    eager(torch.cat(alone[:3], dim=1), alone[3], relu=False).square().sum().backward()
    for leaf, other in zip([*leaves[:3], leaves[4]], alone, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-4, atol=1e-4)
    assert leaves[3].grad is None or not leaves[3].grad.any()


@with_cpu_kernels
def test_flops_of_a_group_are_those_of_its_members() -> None:
    counts = []
    for compute in (grouped, one_by_one):
        leaves = [tensor.clone().requires_grad_() for tensor in (*MAPS, *WEIGHTS)]
        with FlopCounterMode(display=False) as counter:
            compute(*leaves).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_group_compiles_without_graph_breaks() -> None:
    found, expected = (run(f, *MAPS, *WEIGHTS) for f in (torch.compile(grouped, fullgraph=True), grouped))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


# ---- bad input -------------------------------------------------------------------------------------------------------

X, W, W_2 = torch.zeros(2, 3, 4, 5), torch.zeros(7, 3, 1, 1), torch.zeros(7, 6, 1, 1)


@pytest.mark.parametrize(
    ("error", "words", "x", "weight"),
    [
        (TypeError, "x: expected a tensor, got list", [], W),
        (TypeError, "weight: expected a tensor, got NoneType", X, None),
        (TypeError, "x: expected float16, .*got torch.int64", X.long(), W),
        (TypeError, "weight: expected x's dtype torch.float32, got torch.float64", X, W.double()),
        (ValueError, r"x: expected a dense tensor \[B, C, H, W\], got .* of \[3, 4, 5\]", X[0], W),
        (ValueError, r"weight: expected shape .* C = 3 as in x, got \[7, 2, 1, 1\]", X, W[:, :2]),
        (ValueError, r"weight: expected shape .*, got \[7, 3, 2, 1\]", X, W.expand(7, 3, 2, 1)),
        (ValueError, "weight: expected x's device cpu, got meta", X, W.to("meta")),
        (ValueError, "x: expected more than one value per channel", X[:1, :, :1, :1], W),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, x: Any, weight: Any) -> None:
    with pytest.raises(error, match=words):
        pointwise_batch_norm(x, weight)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "maps: expected a list or tuple of tensors, got Tensor", {"maps": X}),
        (ValueError, "weights: expected at least one tensor, got none", {"weights": []}),
        (TypeError, r"maps\[1\]: expected a tensor, got int", {"maps": [X, 3]}),
        (ValueError, r"maps\[1\]: expected \(B, H, W.*as of maps\[0\], got \(2, 4, 4", {"maps": [X, X[..., :4]]}),
        (ValueError, r"maps\[1\]: expected .*torch.float32.*got .*torch.float64", {"maps": [X, X.double()]}),
        (ValueError, r"weights\[1\]: expected shape .* C = 6 as in x, got \[7, 3, 1, 1\]", {"weights": [W_2, W]}),
        (TypeError, r"weights\[0\]: expected x's dtype torch.float32, got", {"weights": [W_2.double()]}),
        (ValueError, r"eps: expected one per weight \(1\), got 2", {"eps": [0.1, 0.2]}),
    ],
)
def test_bad_input_of_a_group_is_named(error: type[Exception], words: str, arguments: dict[str, Any]) -> None:
    with pytest.raises(error, match=words):
        pointwise_batch_norm_group(**{"maps": [X, X], "weights": [W_2], **arguments})


# ---- the modules they stand for --------------------------------------------------------------------------------------


def modules(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.ReLU(), nn.Conv2d(channels, 16, 1, bias=False), nn.BatchNorm2d(16, affine=False))


def watched(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, output: None)
    return module


OTHERS: dict[str, Callable[[nn.Sequential], object]] = {
    "evaluation": lambda net: net[2].eval(),
    "affine": lambda net: net.__setitem__(2, nn.BatchNorm2d(16)),
    "cumulative average": lambda net: setattr(net[2], "momentum", None),
    "another norm": lambda net: net.__setitem__(2, nn.GroupNorm(2, 16)),
    "bias": lambda net: net.__setitem__(1, nn.Conv2d(8, 16, 1)),
    "stride": lambda net: net.__setitem__(1, nn.Conv2d(8, 16, 1, stride=2, bias=False)),
    "another activation": lambda net: net.__setitem__(0, nn.SiLU()),
    **{f"hook {i}": lambda net, i=i: watched(net[i]) for i in range(3)},  # type: ignore[misc]
}


def run_modules(net: nn.Sequential, x: Tensor) -> Tensor:
    return relu_pointwise_norms([tuple(net)], [x])[0]


def node_of(net: nn.Sequential, x: Tensor) -> str:
    return run_modules(net, x.clone(memory_format=torch.preserve_format).requires_grad_()).grad_fn.name()


@with_cpu_kernels
@pytest.mark.parametrize("change", [None, *OTHERS])
def test_modules_run_by_themselves_unless_it_is_certain_to_be_the_same(change: str | None) -> None:
    net, x = modules(), channels_last(normal(2, 8, 6, 6))
    if change is not None:
        OTHERS[change](net)
    same = copy.deepcopy(net)
    assert (node_of(net, x) == "_PointwiseBatchNormBackward") == (change is None)
    torch.testing.assert_close(run_modules(net, x), same(x))
    same(x)  # as often as the other
    torch.testing.assert_close(net.state_dict(), same.state_dict())


@pytest.mark.parametrize("change", [None, "affine", "hook 1"])
def test_modules_that_read_maps_together_are_each_themselves(backend: str, change: str | None) -> None:
    nets, maps = [modules(16) for _ in range(3)], [channels_last(normal(2, 8, 6, 6, seed=m)) for m in range(2)]
    nets[2][2].momentum = 0.3
    if change is not None:
        OTHERS[change](nets[1])
    copies, x = copy.deepcopy(nets), torch.cat(maps, dim=1)
    results = relu_pointwise_norms([tuple(net) for net in nets], maps)
    for net, same, y in zip(nets, copies, results, strict=True):
        torch.testing.assert_close(y, same(x))
        torch.testing.assert_close(net.state_dict(), same.state_dict())
