"""The Triton launchers of depthwise_conv2d under Triton's interpreter, against float64 and against eager."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dssp_kernels import get_backend, set_backend
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.separable_conv.op import separable_conv2d
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.tensors import LAYOUTS, SLACK

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, where NaN is due
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: tests/gpu has the claims for compiled kernels", allow_module_level=True)

from dssp_kernels.depthwise_conv import triton_launchers  # noqa: E402  # imports triton, which may be absent

channels_last = LAYOUTS["channels_last"]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The interpreter's time goes with the number of programs."""
    monkeypatch.setattr(triton_launchers, "PROGRAMS", 1)
    before = get_backend()
    set_backend("triton")
    yield
    set_backend(before)


def eager(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, dilation: int = 1, relu: bool = False
) -> Tensor:
    return F.conv2d(F.relu(x) if relu else x, weight, None, stride, padding, dilation, groups=x.shape[1])


def assert_as_exact_as_eager(x: Tensor, weight: Tensor, **arguments: Any) -> None:
    with guarded_allocations():
        assert_as_exact(depthwise_conv2d, eager, x, weight, **arguments)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, pytest.param(7, marks=pytest.mark.slow)])
def test_darts_convolutions(kernel: int, stride: int, dilation: int) -> None:
    padding = dilation * (kernel - 1) // 2
    x, weight = channels_last(normal(2, 4, 6, 5)), normal(4, 1, kernel, kernel)
    assert_as_exact_as_eager(x, weight, stride=stride, padding=padding, dilation=dilation, relu=stride == 1)


def test_seven_by_seven() -> None:
    assert_as_exact_as_eager(channels_last(normal(1, 4, 4, 7)), normal(4, 1, 7, 7), padding=3, relu=True)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [(layout, torch.float32) for layout in LAYOUTS if layout != "channels_last"]
    + [("channels_last", dtype) for dtype in SLACK]
    + [("contiguous", torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_layouts_and_dtypes(layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(2, 2, 4, 5, dtype=dtype))
    assert_as_exact_as_eager(x, normal(2, 1, 3, 3, dtype=dtype), stride=2, padding=1, relu=True)


@pytest.mark.parametrize(
    ("channels", "dtype"),
    [(1, torch.float32), (3, torch.bfloat16), (16, torch.float32), (36, torch.bfloat16)],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_any_number_of_channels(channels: int, dtype: torch.dtype) -> None:
    x = channels_last(normal(1, channels, 2, 6, dtype=dtype))
    assert_as_exact_as_eager(x, normal(channels, 1, 1, 3, dtype=dtype), padding=(0, 1), relu=True)


@pytest.mark.parametrize(
    ("size", "kernel", "geometry"),
    [
        ((1, 1), (3, 3), {"padding": 1}),
        ((1, 9), (5, 5), {"padding": 4, "dilation": 2, "stride": 3}),
        ((9, 1), (5, 5), {"padding": 5, "dilation": 2, "stride": 2}),
        ((7, 6), (7, 1), {"padding": (3, 0), "stride": (2, 1)}),
        ((6, 7), (1, 7), {"padding": (0, 3), "stride": (1, 2)}),
        ((6, 5), (2, 4), {"padding": (1, 3), "stride": (3, 2), "dilation": (3, 1)}),
        ((11, 12), (3, 3), {"stride": 3, "dilation": 5}),
        ((3, 5), (3, 3), {"padding": 7, "stride": 3}),
    ],
    ids=str,
)
def test_odd_geometries(size: tuple[int, int], kernel: tuple[int, int], geometry: dict[str, Any]) -> None:
    assert_as_exact_as_eager(channels_last(normal(2, 3, *size)), normal(3, 1, *kernel), relu=True, **geometry)


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_images_of_many_blocks_and_shares(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launchers, "THREADS", 4)  # 16 lanes of 2 channels or of one
    monkeypatch.setattr(triton_launchers, "PROGRAMS", 4)
    monkeypatch.setattr(triton_launchers, "FINISH_ROWS", 2)
    x, weight = LAYOUTS[layout](normal(3, 2, 4, 7)), normal(2, 1, 2, 2)
    assert_as_exact_as_eager(x, weight, padding=1, relu=True)


def test_empty_batch() -> None:
    assert_as_exact_as_eager(channels_last(normal(0, 3, 5, 5)), normal(3, 1, 3, 3), padding=1, relu=True)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_output_and_gradient_keep_the_layout(layout: str) -> None:
    y, d_x, _ = run(depthwise_conv2d, LAYOUTS[layout](normal(2, 3, 4, 4)), normal(3, 1, 3, 3), padding=1, relu=True)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format) and d_x.is_contiguous(memory_format=memory_format)


def test_expanded_input_and_gradient() -> None:
    x, weight = normal(1, 2, 1, 4).expand(2, 2, 3, 4), normal(2, 1, 3, 3)
    gradients = []
    for convolution in (depthwise_conv2d, eager):
        leaf = weight.clone().requires_grad_()
        convolution(x, leaf, padding=1, relu=True).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("layout", "stride"), [("channels_last", 1), ("contiguous", 2)])
def test_nothing_beside_the_arguments_is_read(layout: str, stride: int) -> None:
    """NaN lies around x, weight and the gradient."""
    x, weight = LAYOUTS[layout](normal(2, 2, 4, 5)), normal(2, 1, 3, 3)
    geometry = ((stride, stride), (1, 1), (1, 1), True)
    y = triton_launchers.depthwise_conv2d_forward(x, weight, *geometry)
    grad = LAYOUTS[layout](normal(*y.shape, seed=1))
    found = triton_launchers.depthwise_conv2d_backward(grad, x, weight, *geometry, True, True)
    x, weight, grad = (in_margins(tensor, torch.nan)[0] for tensor in (x, weight, grad))
    assert torch.equal(triton_launchers.depthwise_conv2d_forward(x, weight, *geometry), y)
    surrounded = triton_launchers.depthwise_conv2d_backward(grad, x, weight, *geometry, True, True)
    assert all(map(torch.equal, surrounded, found)) and all(tensor.isfinite().all() for tensor in found)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("place", ["x", "gradient"])
def test_nan_and_inf_propagate_as_in_eager(place: str, relu: bool, value: float) -> None:
    x, weight = channels_last(normal(1, 3, 7, 7)), normal(3, 1, 3, 3)
    grad = channels_last(normal(1, 3, 4, 4, seed=1))
    (x if place == "x" else grad)[0, 1, 1, 2] = value
    results = []
    for convolution in (depthwise_conv2d, eager):
        leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
        y = convolution(*leaves, stride=2, padding=1, relu=relu)
        results.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    for ours, eagers in zip(*results, strict=True):
        torch.testing.assert_close(ours, eagers, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_gradient_is_zero_where_x_is_zero_or_negative() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, torch.nan]).reshape(1, 1, 1, 5)
    _, d_x, _ = run(depthwise_conv2d, x, torch.ones(1, 1, 1, 1), relu=True)
    assert d_x.flatten()[:3].tolist() == [0.0, 0.0, 0.0] and (d_x.flatten()[3:] != 0).all()


@pytest.mark.parametrize(("needs_input", "needs_weight"), [(True, False), (False, True)])
def test_only_the_gradients_needed_are_computed(needs_input: bool, needs_weight: bool) -> None:
    x, weight = normal(1, 2, 4, 4), normal(2, 1, 3, 3)
    _, d_x, d_weight = run(depthwise_conv2d, x, weight, padding=1)
    x.requires_grad_(needs_input)
    weight.requires_grad_(needs_weight)
    y = depthwise_conv2d(x, weight, padding=1)
    y.backward(normal(*y.shape, seed=1))
    assert torch.equal(x.grad, d_x) if needs_input else x.grad is None
    assert torch.equal(weight.grad, d_weight) if needs_weight else weight.grad is None


def test_second_derivative() -> None:
    x = normal(1, 1, 2, 3, dtype=torch.float64).requires_grad_()
    weight = normal(1, 1, 2, 2, dtype=torch.float64).requires_grad_()
    convolve = partial(depthwise_conv2d, padding=1, relu=True)
    assert torch.autograd.gradgradcheck(convolve, (x, weight), fast_mode=True)


def test_two_runs_are_bit_equal() -> None:
    x, weight = channels_last(normal(2, 4, 4, 4)), normal(4, 1, 3, 3)
    first, second = (run(depthwise_conv2d, x, weight, padding=1, relu=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_separable_convolution_runs_on_them() -> None:
    x, depthwise, pointwise = channels_last(normal(1, 4, 4, 4)), normal(4, 1, 3, 3), normal(5, 4, 1, 1)
    found = run(lambda *t: separable_conv2d(*t, padding=1, relu=True), x, depthwise, pointwise)
    expected = run(lambda x, d, p: torch.conv2d(eager(x, d, padding=1, relu=True), p), x, depthwise, pointwise)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(9, 1), (3, 4)])
def test_larger_kernels_and_strides_go_to_the_reference(kernel: int, stride: int) -> None:
    x, weight = normal(1, 2, 9, 9), normal(2, 1, kernel, kernel)
    y = depthwise_conv2d(x.requires_grad_(), weight, stride=stride, padding=4, relu=True)
    assert y.grad_fn.name().startswith("Convolution")
    torch.testing.assert_close(y, eager(x, weight, stride=stride, padding=4, relu=True))
