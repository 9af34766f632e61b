"""depthwise_conv2d on a CUDA device: claims of tests/kernels/test_depthwise_conv.py, and those only a GPU can show."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck

from dssp_kernels import depthwise_conv2d, separable_conv2d
from tests.kernels.convolutions import exact_results, normal
from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.tensors import LAYOUTS
from tests.kernels.test_depthwise_conv import eager

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Largest error relative to the tensor's largest value: rounding of the stored type, or of float32 sums.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}
channels_last = LAYOUTS["channels_last"]


def on_gpu(t: Tensor) -> Tensor:
    """The same strides on the device, gaps and overlaps included."""
    if 0 in t.shape:
        return t.cuda()
    size = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.as_strided((size,), (1,)).cuda().as_strided(t.shape, t.stride())


def run(x: Tensor, weight: Tensor, **arguments: Any) -> list[Tensor]:
    """The result and both gradients, for the gradient of the result that exact_results() takes."""
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    y = depthwise_conv2d(*leaves, **arguments)
    grad = normal(*y.shape, dtype=y.dtype, seed=1).cuda()
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def assert_matches_float64(x: Tensor, weight: Tensor, **arguments: Any) -> None:
    found = run(on_gpu(x), weight.cuda(), **arguments)
    for ours, true in zip(found, exact_results(eager, x, weight, **arguments), strict=True):
        scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
        assert ours.dtype is x.dtype
        torch.testing.assert_close(ours.cpu().double(), true, rtol=0, atol=TOLERANCE[x.dtype] * scale)


@contextmanager
def launches() -> Iterator[list[str]]:
    """Names of the kernels launched inside."""
    names: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        yield names
        torch.cuda.synchronize()
    names += [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), list(itertools.product((3, 5, 7), (1, 2), (1, 2))), ids=str)
def test_darts_convolutions(kernel: int, stride: int, dilation: int, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(8, 16, 31, 34, dtype=dtype))
    weight = normal(16, 1, kernel, kernel, dtype=dtype)
    padding = dilation * (kernel // 2)
    assert_matches_float64(x, weight, stride=stride, padding=padding, dilation=dilation, relu=True)


@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("channels", [1, 3, 8, 17, 24, 36, 40, 64, 65, 200])
def test_channels_and_layouts(channels: int, layout: str) -> None:
    x = LAYOUTS[layout](normal(3, channels, 9, 7, dtype=torch.bfloat16))
    weight = normal(channels, 1, 3, 3, dtype=torch.bfloat16)
    assert_matches_float64(x, weight, stride=2, padding=1, relu=True)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (3, 40), (7, 7), (224, 5)], ids=str)
@pytest.mark.parametrize("stride", [1, 2, 3, (2, 1), (1, 3)], ids=str)
def test_odd_sizes_and_strides(size: tuple[int, int], stride: int | tuple[int, int]) -> None:
    for kernel, padding, dilation in (((5, 5), 4, 2), ((2, 4), 3, (3, 1)), ((7, 1), (9, 0), 3), ((1, 7), (0, 3), 1)):
        x, weight = channels_last(normal(2, 12, *size)), normal(12, 1, *kernel)
        assert_matches_float64(x, weight, stride=stride, padding=padding, dilation=dilation, relu=True)


@pytest.mark.parametrize("shape", [(0, 4, 5, 5), (64, 16, 32, 32), (96, 36, 32, 32), (16, 48, 112, 112)], ids=str)
def test_batches_from_none_to_many(shape: tuple[int, ...]) -> None:
    assert_matches_float64(channels_last(normal(*shape)), normal(shape[1], 1, 5, 5), padding=2, relu=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_at_most_twice_those_of_eager(dtype: torch.dtype) -> None:
    x, weight = channels_last(normal(32, 32, 33, 31, dtype=dtype)), normal(32, 1, 5, 5, dtype=dtype)
    found = run(x.cuda(), weight.cuda(), padding=2, relu=True)
    leaves = [x.cuda().requires_grad_(), weight.cuda().requires_grad_()]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        y = eager(*leaves, padding=2, relu=True)
        theirs = [y, *torch.autograd.grad(y, leaves, normal(*y.shape, dtype=dtype, seed=1).cuda())]
    for ours, eagers, true in zip(found, theirs, exact_results(eager, x, weight, padding=2, relu=True), strict=True):
        error, allowed = ((value.cpu().double() - true).abs().max() for value in (ours, eagers))
        assert error <= 2 * allowed + 1e-6 * true.abs().max()


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1)])
def test_nothing_beside_the_arguments_is_read_or_written(stride: int, dilation: int, layout: str) -> None:
    x, weight = LAYOUTS[layout](normal(3, 17, 13, 11)).cuda(), normal(17, 1, 5, 5).cuda()
    arguments = {"stride": stride, "padding": 2 * dilation, "dilation": dilation, "relu": True}
    expected = run(x, weight, **arguments)
    surrounded = [in_margins(tensor, torch.nan)[0] for tensor in (x, weight)]
    with guarded_allocations():  # which also start as NaN
        found = run(*surrounded, **arguments)
    assert all(map(torch.equal, found, expected))


def test_tensors_that_start_between_16_bytes() -> None:
    x, weight = normal(2, 16, 8, 8, dtype=torch.bfloat16).cuda(), normal(16, 1, 3, 3, dtype=torch.bfloat16).cuda()
    x = channels_last(x)
    buffer = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")
    shifted = buffer.as_strided(x.shape, x.stride(), 1).copy_(x)
    assert all(map(torch.equal, run(shifted, weight, padding=1), run(x, weight, padding=1)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_nan_and_inf_in_x_propagate_as_in_eager(stride: int, relu: bool, value: float) -> None:
    x, weight = channels_last(normal(2, 9, 8, 8)), normal(9, 1, 3, 3)
    x[1, 8, 3, 4] = value
    found = run(x.cuda(), weight.cuda(), stride=stride, padding=1, relu=relu)
    for ours, true in zip(found, exact_results(eager, x, weight, stride=stride, padding=1, relu=relu), strict=True):
        torch.testing.assert_close(ours.cpu().double(), true, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_gradient_is_zero_where_x_is_zero_or_negative() -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0, torch.nan], device="cuda").reshape(1, 1, 1, 5).requires_grad_()
    depthwise_conv2d(x, torch.ones(1, 1, 1, 1, device="cuda"), relu=True).sum().backward()
    assert x.grad.flatten().tolist() == [0.0, 0.0, 0.0, 1.0, 1.0]


@pytest.mark.parametrize("layout", ["channels_last", "contiguous"])
def test_two_runs_are_bit_equal(layout: str) -> None:
    x, weight = LAYOUTS[layout](normal(64, 36, 33, 33, dtype=torch.bfloat16)), normal(36, 1, 5, 5, dtype=torch.bfloat16)
    first, second = (run(x.cuda(), weight.cuda(), padding=2, relu=True) for _ in range(2))
    assert all(map(torch.equal, first, second))


def test_one_launch_forward_and_three_backward() -> None:
    x = channels_last(normal(4, 16, 16, 16)).cuda().requires_grad_()
    weight = normal(16, 1, 3, 3).cuda().requires_grad_()
    depthwise_conv2d(x, weight, padding=1, relu=True).square().sum().backward()  # compiles
    with launches() as names:
        y = depthwise_conv2d(x, weight, padding=1, relu=True)
        torch.autograd.grad(y, (x, weight), torch.empty_like(y))
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    assert sorted(names) == [
        f"depthwise_conv2d_{k}_kernel" for k in ("bwd_input", "bwd_weight", "bwd_weight_finish", "fwd")
    ]


def test_larger_kernels_go_to_the_reference() -> None:
    x, weight = normal(2, 4, 16, 16), normal(4, 1, 9, 9)
    y = depthwise_conv2d(x.cuda().requires_grad_(), weight.cuda(), padding=4, relu=True)
    assert y.grad_fn.name().startswith("Convolution")
    assert_matches_float64(x, weight, padding=4, relu=True)


def test_result_keeps_the_layout() -> None:
    for memory_format in (torch.channels_last, torch.contiguous_format):
        x = normal(2, 16, 8, 8).cuda().to(memory_format=memory_format)
        y, d_x, _ = run(x, normal(16, 1, 3, 3).cuda(), padding=1)
        assert y.is_contiguous(memory_format=memory_format) and d_x.is_contiguous(memory_format=memory_format)


def test_gradient_of_another_layout() -> None:
    x, weight = channels_last(normal(2, 16, 8, 8)).cuda(), normal(16, 1, 3, 3).cuda().requires_grad_()
    grad = normal(2, 16, 8, 8, seed=1).cuda()
    found = [
        torch.autograd.grad(depthwise_conv2d(x, weight, padding=1), weight, g)[0] for g in (grad, channels_last(grad))
    ]
    assert torch.equal(*found)
    (of_expanded,) = torch.autograd.grad(depthwise_conv2d(x, weight, padding=1).sum(), weight)
    torch.testing.assert_close(of_expanded, torch.autograd.grad(eager(x, weight, padding=1).sum(), weight)[0])


def test_more_than_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GB of free device memory")
    x = torch.zeros(2**11 + 1, 128, 128, 64, dtype=torch.bfloat16, device="cuda").permute(0, 3, 1, 2)
    x[-1] = 1.0
    weight = torch.ones(64, 1, 3, 3, dtype=torch.bfloat16, device="cuda").requires_grad_()
    y = depthwise_conv2d(x.requires_grad_(), weight, padding=1, relu=True)
    assert (y[-1, :, 1:-1, 1:-1] == 9).all() and not y[:-1].any()
    d_x, d_weight = torch.autograd.grad(y, (x, weight), x.detach())
    assert (d_x[-1, :, 1:-1, 1:-1] == 9).all() and not d_x[:-1].any()
    assert (d_weight[:, 0, 1, 1] == 128 * 128).all()


def test_no_host_synchronisation() -> None:
    x, weight = channels_last(normal(4, 16, 16, 16)).cuda(), normal(16, 1, 3, 3).cuda().requires_grad_()
    depthwise_conv2d(x, weight, padding=1).sum().backward()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        depthwise_conv2d(x, weight, padding=1).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_replays() -> None:
    x, weight = channels_last(normal(4, 16, 16, 16)).cuda(), normal(16, 1, 5, 5).cuda().requires_grad_()
    leaf, grad = x.clone().requires_grad_(), channels_last(normal(4, 16, 16, 16, seed=1).cuda())

    def step() -> list[Tensor]:
        y = depthwise_conv2d(leaf, weight, padding=2, relu=True)
        return [y, *torch.autograd.grad(y, (leaf, weight), grad)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        leaf.copy_(-x)
    graph.replay()
    assert all(map(torch.equal, captured, step()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_tensors_device_not_the_current_one() -> None:
    x, weight = normal(2, 4, 8, 8), normal(4, 1, 3, 3)
    y = depthwise_conv2d(x.to("cuda:1"), weight.to("cuda:1"), padding=1)
    torch.testing.assert_close(y.cpu(), eager(x, weight, padding=1))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced channels"])
def test_opcheck(layout: str) -> None:
    x, weight = on_gpu(LAYOUTS[layout](normal(2, 5, 7, 6))), normal(5, 1, 3, 3).cuda()
    arguments = ([2, 1], [1, 2], [1, 2], True)
    opcheck(torch.ops.dssp_kernels.depthwise_conv2d_forward, (x, weight, *arguments))
    grad = torch.randn_like(depthwise_conv2d(x, weight, stride=(2, 1), padding=(1, 2), dilation=(1, 2)))
    opcheck(torch.ops.dssp_kernels.depthwise_conv2d_backward, (grad, x, weight, *arguments, True, True))


def test_compiles_without_graph_breaks() -> None:
    x, weight = channels_last(normal(2, 8, 6, 6)).cuda(), normal(8, 1, 3, 3).cuda().requires_grad_()
    compiled = torch.compile(depthwise_conv2d, fullgraph=True)
    found, expected = (f(x, weight, stride=2, padding=1, relu=True) for f in (compiled, depthwise_conv2d))
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(y.square().sum(), weight)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients)


def test_autocast_runs_in_the_autocast_dtype() -> None:
    x, weight = normal(2, 8, 6, 6).cuda(), normal(8, 1, 3, 3).cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16):
        y = depthwise_conv2d(x, weight, padding=1, relu=True)
    y.sum().backward()
    assert y.dtype is torch.bfloat16 and weight.grad.dtype is torch.float32


def test_second_derivative() -> None:
    x = normal(1, 3, 4, 5, dtype=torch.float64).cuda().requires_grad_()
    weight = normal(3, 1, 3, 3, dtype=torch.float64).cuda().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda *t: depthwise_conv2d(*t, stride=2, padding=1, relu=True), (x, weight))


def test_separable_convolution_runs_on_them() -> None:
    x, depthwise, pointwise = channels_last(normal(2, 16, 8, 8)), normal(16, 1, 3, 3), normal(24, 16, 1, 1)
    y = separable_conv2d(x.cuda(), depthwise.cuda(), pointwise.cuda(), padding=1, relu=True)
    expected = torch.conv2d(eager(x, depthwise, padding=1, relu=True), pointwise)
    torch.testing.assert_close(y.cpu(), expected, rtol=1e-2, atol=1e-2)  # cuDNN may take TF32
