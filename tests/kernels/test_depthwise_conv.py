"""depthwise_conv2d through its public function: the C++ kernels and the reference against float64 and against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels.depthwise_conv.module import DepthwiseConv2d
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK


def eager(
    x: Tensor, weight: Tensor, *, stride: int = 1, padding: int = 0, dilation: int = 1, relu: bool = False
) -> Tensor:
    return F.conv2d(F.relu(x) if relu else x, weight, None, stride, padding, dilation, groups=x.shape[1])


def assert_as_exact_as_eager(x: Tensor, weight: Tensor, **arguments: int) -> None:
    assert_as_exact(depthwise_conv2d, eager, x, weight, **arguments)


@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
def test_darts_convolutions(backend: str, kernel: int, stride: int, dilation: int, relu: bool) -> None:
    x = LAYOUTS["channels_last"](normal(2, 16, 15, 22))
    padding = dilation * (kernel - 1) // 2
    weight = normal(16, 1, kernel, kernel)
    assert_as_exact_as_eager(x, weight, stride=stride, padding=padding, dilation=dilation, relu=relu)


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 17, 33])
def test_channels_layouts_and_dtypes(backend: str, channels: int, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(2, channels, 7, 9, dtype=dtype))
    assert_as_exact_as_eager(x, normal(channels, 1, 3, 3, dtype=dtype), stride=2, padding=1, relu=True)
    assert_as_exact_as_eager(x, normal(channels, 1, 5, 5, dtype=dtype), padding=2)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 9), (9, 1), (3, 40)], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("padding", [4, 5, 11])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_images_smaller_than_kernel_and_padding(backend: str, size: tuple[int, int], padding: int, stride: int) -> None:
    x = LAYOUTS["channels_last"](normal(3, 5, *size))
    assert_as_exact_as_eager(x, normal(5, 1, 5, 5), stride=stride, padding=padding, dilation=2, relu=True)


@pytest.mark.parametrize("batch", [0, 1, 40])
@pytest.mark.parametrize("size", [1, 6, 48])
def test_batches_from_none_to_many(backend: str, batch: int, size: int) -> None:
    x = LAYOUTS["channels_last"](normal(batch, 3, size, size))
    assert_as_exact_as_eager(x, normal(3, 1, 3, 3), padding=1, relu=True)


def test_many_channels_on_a_wide_image(backend: str) -> None:
    assert_as_exact_as_eager(
        LAYOUTS["channels_last"](normal(1, 70, 6, 150)), normal(70, 1, 5, 5), padding=4, dilation=2
    )


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_convolution(data: st.DataObject) -> None:
    def integers(least: int, most: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=count, max_size=count))

    batch, channels, height, width = integers(0, 2, 1) + integers(1, 10, 3)
    kernel, stride, dilation, padding = integers(1, 4, 2), integers(1, 3, 2), integers(1, 3, 2), integers(0, 4, 2)
    for size, k, d, p in zip((height, width), kernel, dilation, padding, strict=True):
        assume(size + 2 * p >= d * (k - 1) + 1)
    x = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))](normal(batch, channels, height, width, dtype=torch.float64))
    weight = normal(channels, 1, *kernel, dtype=torch.float64)
    arguments = {"stride": tuple(stride), "padding": tuple(padding), "dilation": tuple(dilation)}
    assert_as_exact_as_eager(x, weight, **arguments, relu=data.draw(st.booleans()))


def test_weight_in_any_layout(backend: str) -> None:
    x, weight = normal(2, 4, 6, 6), normal(3, 5, 4, 1).permute(2, 3, 1, 0)[:, :, ::2]
    assert weight.shape == (4, 1, 3, 3) and not weight.is_contiguous()
    assert_as_exact_as_eager(x, weight, padding=1)


def test_expanded_input_and_gradient(backend: str) -> None:
    x, weight = normal(1, 4, 1, 6).expand(3, 4, 5, 6), normal(4, 1, 3, 3)
    for convolution in (depthwise_conv2d, eager):
        leaf = weight.clone().requires_grad_()
        convolution(x, leaf, padding=1, relu=True).sum().backward()
        if convolution is depthwise_conv2d:
            found = leaf.grad
    torch.testing.assert_close(found, leaf.grad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [8, 1])
def test_output_and_gradient_keep_the_layout(backend: str, layout: str, size: int) -> None:
    x = LAYOUTS[layout](normal(2, 16, size, size))
    y, d_x, _ = run(depthwise_conv2d, x, normal(16, 1, 3, 3), padding=1, relu=True)
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    assert y.is_contiguous(memory_format=memory_format) and d_x.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
def test_nan_and_inf_in_x_propagate_as_in_eager(backend: str, value: float, relu: bool) -> None:
    x, weight = LAYOUTS["channels_last"](normal(2, 9, 8, 8)), normal(9, 1, 3, 3)
    x[1, 8, 3, 4] = value
    found, expected = (run(convolution, x, weight, padding=1, relu=relu) for convolution in (depthwise_conv2d, eager))
    for ours, eagers in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, eagers, equal_nan=True, rtol=1e-4, atol=1e-5)


def test_gradient_is_zero_where_x_is_zero_or_negative(backend: str) -> None:
    x = torch.tensor([-1.0, -0.0, 0.0, 1.0]).reshape(1, 1, 1, 4)
    _, d_x, _ = run(depthwise_conv2d, x, torch.ones(1, 1, 1, 1), relu=True)
    assert d_x.flatten()[:3].tolist() == [0.0, 0.0, 0.0] and d_x.flatten()[3] != 0


@with_cpu_kernels
@pytest.mark.parametrize("relu", [False, True], ids=["plain", "relu"])
@pytest.mark.parametrize("stride", [1, 2])
def test_gradcheck_and_gradgradcheck(stride: int, relu: bool) -> None:
    x = normal(1, 3, 4, 5, dtype=torch.float64).requires_grad_()
    weight = normal(3, 1, 3, 3, dtype=torch.float64).requires_grad_()

    def convolve(x: Tensor, weight: Tensor) -> Tensor:
        return depthwise_conv2d(x, weight, stride=stride, padding=2, dilation=2, relu=relu)

    assert_differentiable_twice(convolve, (x, weight))


@with_cpu_kernels
def test_second_derivative_when_the_weight_depends_on_x() -> None:
    x = normal(1, 2, 3, 3, dtype=torch.float64).requires_grad_()
    assert gradgradcheck(lambda x: depthwise_conv2d(x, x.sin().reshape(2, 1, 3, 3), padding=1, relu=True), (x,))


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (1, 24, 64, 64), (70, 8, 8, 8)], ids=str)
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, int, int, int]
) -> None:
    x, weight = LAYOUTS["channels_last"](normal(*shape)), normal(shape[1], 1, 5, 5)
    results = []
    for count in (2, 2, 1, 3):
        threads(count)
        results.append(run(depthwise_conv2d, x, weight, padding=2, relu=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@with_cpu_kernels
def test_relu_of_x_is_not_kept_for_backward() -> None:
    saved: list[int] = []
    x, weight = normal(1, 4, 8, 8).requires_grad_(), normal(4, 1, 3, 3).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        depthwise_conv2d(x, weight, relu=True)
    assert saved == [x.data_ptr(), weight.data_ptr()]


@pytest.mark.parametrize(("needs_input", "needs_weight"), [(True, True), (True, False), (False, True)])
def test_only_the_gradients_needed_are_computed(backend: str, needs_input: bool, needs_weight: bool) -> None:
    x, weight = normal(2, 3, 6, 6), normal(3, 1, 3, 3)
    _, d_x, d_weight = run(depthwise_conv2d, x, weight, padding=1, relu=True)
    x.requires_grad_(needs_input)
    weight.requires_grad_(needs_weight)
    y = depthwise_conv2d(x, weight, padding=1, relu=True)
    y.backward(normal(*y.shape, seed=1))
    assert torch.equal(x.grad, d_x) if needs_input else x.grad is None
    assert torch.equal(weight.grad, d_weight) if needs_weight else weight.grad is None


@pytest.mark.parametrize(
    ("layout", "needs"),
    [("contiguous", (True, True)), ("channels_last", (False, True)), ("sliced channels", (True, False))],
    ids=str,
)
def test_opcheck(layout: str, needs: tuple[bool, bool]) -> None:
    x, weight = LAYOUTS[layout](normal(2, 5, 7, 6)), normal(5, 1, 3, 3)
    arguments = ([2, 1], [1, 2], [1, 2], True)
    opcheck(torch.ops.dssp_kernels.depthwise_conv2d_forward, (x, weight, *arguments))
    grad = normal(*depthwise_conv2d(x, weight, stride=(2, 1), padding=(1, 2), dilation=(1, 2)).shape)
    opcheck(torch.ops.dssp_kernels.depthwise_conv2d_backward, (grad, x, weight, *arguments, *needs))


def test_compiles_without_graph_breaks() -> None:
    x, weight = LAYOUTS["channels_last"](normal(2, 8, 6, 6)), normal(8, 1, 3, 3)
    compiled = torch.compile(depthwise_conv2d, fullgraph=True)
    found, expected = (run(f, x, weight, stride=2, padding=1, relu=True) for f in (compiled, depthwise_conv2d))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_autocast_runs_in_the_autocast_dtype(backend: str) -> None:
    x, weight = normal(2, 8, 6, 6).requires_grad_(), normal(8, 1, 3, 3).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = depthwise_conv2d(x, weight, padding=1, relu=True)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype is torch.float32 and weight.grad.dtype is torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert depthwise_conv2d(x.double(), weight.double()).dtype is torch.float64


def test_counts_the_flops_torch_counts() -> None:
    x, weight = normal(2, 4, 9, 8).requires_grad_(), normal(4, 1, 3, 3).requires_grad_()
    totals = []
    for convolution in (depthwise_conv2d, eager):
        with FlopCounterMode(display=False) as counter:
            convolution(x, weight, stride=2, padding=1)
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] == 2 * (2 * 4 * 5 * 4) * 9
    with FlopCounterMode(display=False) as counter:
        depthwise_conv2d(x, weight, stride=2, padding=1).sum().backward()
    assert counter.get_total_flops() == 3 * totals[0]


X, WEIGHT = torch.zeros(2, 3, 4, 5), torch.zeros(3, 1, 3, 3)


@pytest.mark.parametrize(
    ("error", "words", "x", "weight", "arguments"),
    [
        (TypeError, r"x: expected a tensor, got list", [1.0], WEIGHT, {}),
        (TypeError, r"weight: expected a tensor, got NoneType", X, None, {}),
        (TypeError, r"x: expected .*float64, got torch.int64", X.long(), WEIGHT, {}),
        (TypeError, r"x: .*got layout torch.sparse_coo", X.to_sparse(), WEIGHT, {}),
        (TypeError, r"weight: expected x's dtype torch.float32, got torch.float64", X, WEIGHT.double(), {}),
        (ValueError, r"x: expected 4 dimensions \[B, C, H, W\], got shape \[3, 4, 5\]", X[0], WEIGHT, {}),
        (ValueError, r"x: expected at least one channel, got shape \[2, 0, 4, 5\]", X[:, :0], WEIGHT[:0], {}),
        (ValueError, r"weight: .*with C = 3 as in x, got \[2, 1, 3, 3\]", X, WEIGHT[:2], {}),
        (ValueError, r"weight: .*with C = 3 as in x, got \[3, 3, 3, 3\]", X, WEIGHT.expand(3, 3, 3, 3), {}),
        (ValueError, r"weight: .*got \[3, 1, 0, 3\]", X, WEIGHT[:, :, :0], {}),
        (ValueError, r"weight: expected x's device cpu, got meta", X, WEIGHT.to("meta"), {}),
        (ValueError, r"stride: expected at least 1, got 0", X, WEIGHT, {"stride": 0}),
        (ValueError, r"padding: expected at least 0, got \(1, -1\)", X, WEIGHT, {"padding": (1, -1)}),
        (TypeError, r"padding: expected an integer or a pair.*'same'", X, WEIGHT, {"padding": "same"}),
        (TypeError, r"dilation: .*got \(1, 2, 3\)", X, WEIGHT, {"dilation": (1, 2, 3)}),
        (TypeError, r"stride: .*got 1.5", X, WEIGHT, {"stride": 1.5}),
        (ValueError, r"x: .*\[4, 5\] for a kernel of \[3, 3\] .*dilation \[2, 2\]", X, WEIGHT, {"dilation": 2}),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, x: Tensor, weight: Tensor, arguments: dict) -> None:
    with pytest.raises(error, match=words):
        depthwise_conv2d(x, weight, **arguments)


def test_module_is_a_drop_in_for_relu_and_conv2d(backend: str) -> None:
    torch.manual_seed(0)
    stock = nn.Conv2d(6, 6, 3, stride=2, padding=2, dilation=2, groups=6, bias=False)
    torch.manual_seed(0)
    ours = DepthwiseConv2d(6, 3, stride=2, padding=2, dilation=2, relu=True)
    assert list(ours.state_dict()) == ["weight"] and torch.equal(ours.weight, stock.weight)
    x = normal(2, 6, 9, 9)
    torch.testing.assert_close(ours(x), stock(x.relu()))
    torch.testing.assert_close(copy.deepcopy(ours)(x), stock(x.relu()))
    assert "groups=6" in repr(ours) and "relu=True" in repr(ours)


@with_cpu_kernels
def test_module_knows_its_output_on_the_meta_device(recwarn: pytest.WarningsRecorder) -> None:
    module = DepthwiseConv2d(4, 5, stride=2, padding=2, relu=True).to("meta")
    assert module(torch.empty(2, 4, 9, 9, device="meta")).shape == (2, 4, 5, 5)
    assert not recwarn
