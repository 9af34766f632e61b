"""separable_conv2d through its public function: the C++ kernels and the reference against float64 and against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import separable_conv2d
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK


def eager(
    x: Tensor,
    depthwise: Tensor,
    pointwise: Tensor,
    *,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    relu: bool = False,
) -> Tensor:
    x = F.relu(x) if relu else x
    return F.conv2d(F.conv2d(x, depthwise, None, stride, padding, dilation, groups=x.shape[1]), pointwise)


def weights(channels: int, outputs: int, kernel: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    depthwise = normal(channels, 1, kernel, kernel, dtype=dtype, seed=2)
    return depthwise, normal(outputs, channels, 1, 1, dtype=dtype, seed=3)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("channels", [16, 64])
def test_darts_convolutions(backend: str, channels: int, kernel: int, stride: int, dilation: int) -> None:
    x = LAYOUTS["channels_last"](normal(2, channels, 9, 14))
    arguments = {"stride": stride, "padding": dilation * (kernel - 1) // 2, "dilation": dilation, "relu": True}
    assert_as_exact(separable_conv2d, eager, x, *weights(channels, channels, kernel), **arguments)


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize(("channels", "outputs"), [(1, 1), (3, 8), (8, 3), (17, 24), (16, 40)])
def test_channels_layouts_and_dtypes(
    backend: str, channels: int, outputs: int, layout: str, dtype: torch.dtype
) -> None:
    x = LAYOUTS[layout](normal(2, channels, 7, 9, dtype=dtype))
    assert_as_exact(separable_conv2d, eager, x, *weights(channels, outputs, dtype=dtype), stride=2, padding=1)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    def integers(least: int, most: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=count, max_size=count))

    batch, channels, outputs, height, width = integers(0, 2, 1) + integers(1, 10, 4)
    kernel, stride, dilation, padding = integers(1, 4, 2), integers(1, 3, 2), integers(1, 3, 2), integers(0, 4, 2)
    for size, k, d, p in zip((height, width), kernel, dilation, padding, strict=True):
        assume(size + 2 * p >= d * (k - 1) + 1)
    x = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](normal(batch, channels, height, width, dtype=torch.float64))
    tensors = normal(channels, 1, *kernel, dtype=torch.float64), normal(outputs, channels, 1, 1, dtype=torch.float64)
    arguments = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    assert_as_exact(separable_conv2d, eager, x, *tensors, **arguments, relu=data.draw(st.booleans()))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_nan_and_inf_in_x_propagate_as_in_eager(backend: str, value: float) -> None:
    x = LAYOUTS["channels_last"](normal(2, 9, 8, 8))
    x[1, 8, 3, 4] = value
    found, expected = (run(f, x, *weights(9, 8), padding=1, relu=True) for f in (separable_conv2d, eager))
    for ours, eagers in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eagers, equal_nan=True, rtol=1e-4, atol=1e-4)


@with_cpu_kernels
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride: int) -> None:
    tensors = [normal(1, 3, 4, 5, dtype=torch.float64), *weights(3, 2, dtype=torch.float64)]
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def convolve(*tensors: Tensor) -> Tensor:
        return separable_conv2d(*tensors, stride=stride, padding=2, dilation=2, relu=True)

    assert_differentiable_twice(convolve, leaves)


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (1, 24, 64, 64), (70, 8, 8, 8)], ids=str)
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, int, int, int]
) -> None:
    x = LAYOUTS["channels_last"](normal(*shape))
    results = []
    for count in (2, 2, 1, 3):
        threads(count)
        results.append(run(separable_conv2d, x, *weights(shape[1], shape[1], 5), padding=2, relu=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@with_cpu_kernels
def test_nothing_but_the_arguments_is_kept_for_backward() -> None:
    saved: list[int] = []
    tensors = [tensor.requires_grad_() for tensor in (normal(1, 4, 8, 8), *weights(4, 4))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        separable_conv2d(*tensors, relu=True)
    assert saved == [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("needed", [(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0), (0, 1, 1)], ids=str)
def test_only_the_gradients_needed_are_computed(backend: str, needed: tuple[int, ...]) -> None:
    tensors = [normal(2, 3, 6, 6), *weights(3, 5)]
    _, *expected = run(separable_conv2d, *tensors, padding=1, relu=True)
    for tensor, need in zip(tensors, needed, strict=True):
        tensor.requires_grad_(bool(need))
    y = separable_conv2d(*tensors, padding=1, relu=True)
    y.backward(normal(*y.shape, seed=1))
    for tensor, gradient, need in zip(tensors, expected, needed, strict=True):
        assert torch.equal(tensor.grad, gradient) if need else tensor.grad is None


@pytest.mark.parametrize(
    ("layout", "needs"),
    [("contiguous", (True, True, True)), ("channels_last", (False, True, False)), ("sliced channels", (1, 0, 1))],
    ids=str,
)
def test_opcheck(layout: str, needs: tuple[bool, ...]) -> None:
    tensors = LAYOUTS[layout](normal(2, 5, 7, 6)), *weights(5, 4)
    x, depthwise, pointwise = tensors
    arguments = (x, [depthwise], [pointwise], [2, 1], [1, 2], [1, 2], [True], [-1], [0.0])
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_forward, arguments)
    grad = normal(*separable_conv2d(*tensors, stride=(2, 1), padding=(1, 2), dilation=(1, 2)).shape)
    needs_x, needs_depthwise, needs_pointwise = map(bool, needs)
    needed = (needs_x, [needs_depthwise], [needs_pointwise])
    arguments = [grad], x, [], [], [], *arguments[1:], *needed
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_backward, arguments)


def test_compiles_without_graph_breaks() -> None:
    tensors = LAYOUTS["channels_last"](normal(2, 8, 6, 6)), *weights(8, 8)
    compiled = torch.compile(separable_conv2d, fullgraph=True)
    found, expected = (run(f, *tensors, stride=2, padding=1, relu=True) for f in (compiled, separable_conv2d))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_in_the_autocast_dtype(backend: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 8, 6, 6), *weights(8, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        y = separable_conv2d(*tensors, padding=1, relu=True)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in tensors)


def test_counts_the_flops_of_both_convolutions() -> None:
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 4, 9, 8), *weights(4, 6))]
    totals = []
    for convolution in (separable_conv2d, eager):
        with FlopCounterMode(display=False) as counter:
            convolution(*tensors, stride=2, padding=1)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * (2 * 5 * 4) * (4 * 9 + 4 * 6)
    with FlopCounterMode(display=False) as counter:
        separable_conv2d(*tensors, stride=2, padding=1).sum().backward()
    assert counter.get_total_flops() == 3 * totals[0]


X, (DEPTHWISE, POINTWISE) = torch.zeros(2, 3, 4, 5), weights(3, 2)


@pytest.mark.parametrize(
    ("error", "words", "depthwise", "pointwise"),
    [
        (ValueError, r"weight: .*with C = 3 as in x, got \[2, 1, 3, 3\]", DEPTHWISE[:2], POINTWISE),
        (TypeError, r"depthwise: expected x's dtype torch.float32, got torch.float64", DEPTHWISE.double(), POINTWISE),
        (TypeError, r"pointwise: expected a tensor, got NoneType", DEPTHWISE, None),
        (TypeError, r"pointwise: expected x's dtype torch.float32, got torch.float64", DEPTHWISE, POINTWISE.double()),
        (ValueError, r"pointwise: .*with C = 3 as in x, got \[2, 1, 1, 1\]", DEPTHWISE, POINTWISE[:, :1]),
        (ValueError, r"pointwise: .*got \[0, 3, 1, 1\]", DEPTHWISE, POINTWISE[:0]),
        (ValueError, r"pointwise: .*device cpu, got torch.strided on meta", DEPTHWISE, POINTWISE.to("meta")),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, depthwise: Tensor, pointwise: Tensor) -> None:
    with pytest.raises(error, match=words):
        separable_conv2d(X, depthwise, pointwise)
