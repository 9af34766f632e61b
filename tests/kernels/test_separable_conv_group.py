"""separable_conv2d_group: against float64, and against its convolutions one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import SeparableConvolution, separable_conv2d_group
from dssp_kernels.separable_conv.reference import separable_conv2d_reference
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import normal
from tests.kernels.convolutions import run_group as run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK

Kind = tuple[int, int, int, bool]  # kernel, stride, dilation, relu

EDGE: list[Kind] = [(3, 1, 1, True), (5, 1, 1, True), (3, 1, 2, True), (5, 1, 2, True)]
REDUCING_EDGE: list[Kind] = [(kernel, 2, dilation, relu) for kernel, _, dilation, relu in EDGE]
MIXTURE: list[Kind] = [(3, 2, 1, True), (4, 1, 2, False), (1, 3, 1, True), (7, 1, 1, False)]
GROUPS = {"edge": EDGE, "reducing edge": REDUCING_EDGE, "mixture": MIXTURE, "one": EDGE[:1]}
groups = pytest.mark.parametrize("kinds", GROUPS.values(), ids=GROUPS)


def weights(kinds: Sequence[Kind], channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Depthwise and pointwise by turns; every convolution has another number of outputs, the first x's own."""
    found = []
    for k, (kernel, *_) in enumerate(kinds):
        found.append(normal(channels, 1, kernel, kernel, dtype=dtype, seed=10 + k))
        found.append(normal(channels + 3 * k, channels, 1, 1, dtype=dtype, seed=20 + k))
    return found


def group_of(kinds: Sequence[Kind], tensors: Sequence[Tensor]) -> list[SeparableConvolution]:
    return [
        SeparableConvolution(depthwise, pointwise, stride, dilation * (kernel - 1) // 2, dilation, relu)
        for (kernel, stride, dilation, relu), depthwise, pointwise in zip(
            kinds, tensors[::2], tensors[1::2], strict=True
        )
    ]


def together(kinds: Sequence[Kind], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    return separable_conv2d_group(x, group_of(kinds, tensors))


def apart(kinds: Sequence[Kind], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [convolution(x) for convolution in group_of(kinds, tensors)]


def reference(kinds: Sequence[Kind], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [
        separable_conv2d_reference(x, depthwise, pointwise, (stride,) * 2, (padding,) * 2, (dilation,) * 2, relu)  # type: ignore[arg-type]  # pairs wanted, numbers there
        for depthwise, pointwise, stride, padding, dilation, relu in group_of(kinds, tensors)
    ]


# ---- results and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "channels"), [(EDGE, 16), (REDUCING_EDGE, 3), (MIXTURE, 17)], ids=["edge", "reducing edge", "mixture"]
)
@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_error_is_at_most_twice_that_of_one_by_one_in_eager(
    backend: str, kinds: list[Kind], layout: str, dtype: torch.dtype, channels: int
) -> None:
    tensors = [LAYOUTS[layout](normal(2, channels, 9, 11, dtype=dtype)), *weights(kinds, channels, dtype)]
    exact, found, eager = (
        itertools.chain(*run(compute, kinds, tensors, double=double))
        for compute, double in ((reference, True), (together, False), (reference, False))
    )
    for true, ours, theirs in zip(exact, found, eager, strict=True):
        assert ours.shape == true.shape and ours.dtype is dtype
        error, allowed = ((value.double() - true).abs().max() for value in (ours, theirs))
        assert error <= 2 * allowed + SLACK[dtype] * max(1.0, float(true.abs().max()))


@groups
@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_results_are_those_of_the_convolutions_bit_for_bit(
    backend: str, kinds: list[Kind], layout: str, dtype: torch.dtype
) -> None:
    tensors = [LAYOUTS[layout](normal(3, 17, 9, 11, dtype=dtype)), *weights(kinds, 17, dtype)]
    for y, single in zip(together(kinds, *tensors), apart(kinds, *tensors), strict=True):
        assert torch.equal(y, single) and y.stride() == single.stride()


@with_cpu_kernels
@pytest.mark.parametrize("channels", [8, 17])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_of_x_is_the_sum_in_order_bit_for_bit(layout: str, channels: int, dtype: torch.dtype) -> None:
    tensors = [LAYOUTS[layout](normal(2, channels, 9, 11, dtype=dtype)), *weights(MIXTURE, channels, dtype)]
    _, (found, *_) = run(together, MIXTURE, tensors)
    of_each = [
        run(together, MIXTURE, tensors, used=[i == k for i in range(len(MIXTURE))])[1][0] for k in range(len(MIXTURE))
    ]
    assert torch.equal(found, sum(of_each[1:], of_each[0]))


@with_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_x_is_no_less_exact_than_autograds_sum(dtype: torch.dtype) -> None:
    tensors = [LAYOUTS["channels_last"](normal(4, 16, 16, 16, dtype=dtype)), *weights(EDGE, 16, dtype)]
    exact, found, summed = (
        run(compute, EDGE, tensors, double=double)[1][0].double()
        for compute, double in ((reference, True), (together, False), (apart, False))
    )
    assert (found - exact).square().mean() < (summed - exact).square().mean()


def test_empty_batch_has_empty_results_and_zero_gradients(backend: str) -> None:
    results, (d_x, *d_weights) = run(together, EDGE, [torch.zeros(0, 4, 6, 6), *weights(EDGE, 4)])
    assert [y.shape[0] for y in results] == [0] * 4 and d_x.shape == (0, 4, 6, 6)
    assert not any(d_weight.any() for d_weight in d_weights)


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (1, 24, 33, 33), (70, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("kinds", [EDGE, MIXTURE], ids=["edge", "mixture"])
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, ...], kinds: list[Kind]
) -> None:
    tensors = [LAYOUTS["channels_last"](normal(*shape)), *weights(kinds, shape[1])]
    runs = []
    for count in (2, 2, 1, 3):
        threads(count)
        results, gradients = run(together, kinds, tensors)
        runs.append([*results, *gradients])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@with_cpu_kernels
def test_gradcheck_and_gradgradcheck() -> None:
    kinds: list[Kind] = [(3, 1, 1, True), (2, 2, 2, False)]
    tensors = [normal(1, 2, 4, 5, dtype=torch.float64), *weights(kinds, 2, torch.float64)]

    def one_result(*tensors: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in together(kinds, *tensors)])

    assert_differentiable_twice(one_result, [tensor.requires_grad_() for tensor in tensors])


@with_cpu_kernels
def test_second_derivative_of_one_of_the_results() -> None:
    tensors = [normal(1, 4, 6, 6, dtype=torch.float64), *weights(EDGE, 4, torch.float64)]
    found = []
    for compute in (together, reference):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        y = compute(EDGE, *leaves)[1]
        first = torch.autograd.grad(y.square().sum(), [leaves[0], leaves[3]], create_graph=True)
        second = torch.autograd.grad(sum(d.square().sum() for d in first), leaves, allow_unused=True)
        assert [d is not None for d in second] == [i in (0, 3, 4) for i in range(9)]
        found.append([d for d in second if d is not None])
    torch.testing.assert_close(*found)


# ---- only what is needed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unneeded", [(0,), (1,), (2, 3), (0, 1, 2), (0, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4, 5, 6, 7, 8)])
def test_only_the_gradients_needed_are_computed(backend: str, unneeded: tuple[int, ...]) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    needed = [i not in unneeded for i in range(len(tensors))]
    _, expected = run(apart, EDGE, tensors)
    for need, found, d in zip(needed, run(together, EDGE, tensors, needed=needed)[1], expected, strict=True):
        if need:
            torch.testing.assert_close(found, d, rtol=1e-5, atol=1e-5)
        else:
            assert found is None


@pytest.mark.parametrize("used", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1)], ids=str)
def test_results_that_nobody_used_get_no_gradients(backend: str, used: tuple[int, ...]) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    (_, found), (_, expected) = (run(compute, EDGE, tensors, used=used) for compute in (together, apart))
    assert [d is None for d in found] == [False] + [not use for use in used for _ in range(2)]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_results_of_frozen_weights_need_no_gradient(backend: str) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    tensors[1].requires_grad_()
    tensors[6].requires_grad_()
    assert [y.requires_grad for y in together(EDGE, *tensors)] == [True, False, True, False]


@with_cpu_kernels
def test_nothing_but_the_arguments_is_kept_for_backward() -> None:
    saved: list[int] = []
    tensors = [tensor.requires_grad_() for tensor in (normal(1, 4, 8, 8), *weights(EDGE, 4))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        together(EDGE, *tensors)
    assert sorted(saved) == sorted(tensor.data_ptr() for tensor in tensors)


@with_cpu_kernels
@pytest.mark.parametrize("used", [(1, 1, 1, 1), (0, 1, 0, 1)], ids=str)
def test_counts_the_flops_of_its_convolutions(used: tuple[int, ...]) -> None:
    counts = []
    for compute in (together, apart):
        leaves = [tensor.requires_grad_() for tensor in (normal(2, 4, 9, 8), *weights(MIXTURE, 4))]
        leaves[1].requires_grad_(False)
        with FlopCounterMode(display=False) as counter:
            results = compute(MIXTURE, *leaves)
            forward = counter.get_total_flops()
            sum(y.sum() for y, use in zip(results, used, strict=True) if use).backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0


# ---- where it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "frozen", "unused"),
    [("contiguous", (), ()), ("channels_last", (0, 3), ()), ("sliced channels", (2,), (0,))],
    ids=str,
)
def test_opcheck(layout: str, frozen: tuple[int, ...], unused: tuple[int, ...]) -> None:
    x, tensors = LAYOUTS[layout](normal(2, 5, 7, 6)), weights(MIXTURE[:2], 5)
    arguments: tuple[Any, ...] = (
        x,
        tensors[::2],
        tensors[1::2],
        [2, 1, 1, 2],
        [1, 2, 0, 3],
        [1, 2, 2, 1],
        [True, False],
        [-1, -1],
        [0.0, 0.0],
    )
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_forward, arguments)
    results, *_ = torch.ops.dssp_kernels.separable_conv2d_group_forward(*arguments)
    grads = [None if k in unused else normal(*y.shape) for k, y in enumerate(results)]
    needs = [[2 * k + half not in frozen and k not in unused for k in range(2)] for half in range(2)]
    arguments = grads, x, [], [], [], *arguments[1:], 0 not in frozen, *needs
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_backward, arguments)


@pytest.mark.parametrize("frozen", [(), (0, 1, 2, 8)], ids=["all gradients", "some frozen"])
def test_compiles_without_graph_breaks(frozen: tuple[int, ...]) -> None:
    tensors = [LAYOUTS["channels_last"](normal(2, 8, 6, 6)), *weights(EDGE, 8)]
    needed = [i not in frozen for i in range(len(tensors))]
    compiled = torch.compile(together, fullgraph=True)
    found, expected = (run(compute, EDGE, tensors, needed=needed) for compute in (compiled, together))
    torch.testing.assert_close(found, expected)


def test_autocast_runs_in_the_autocast_dtype(backend: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 8, 6, 6), *weights(EDGE, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        results, singles = together(EDGE, *tensors), apart(EDGE, *tensors)
    for y, single in zip(results, singles, strict=True):
        assert y.dtype is torch.bfloat16 and torch.equal(y, single)
    sum(y.sum() for y in results).backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in tensors)


def test_tensors_without_data_have_shapes() -> None:
    tensors = [tensor.to("meta") for tensor in (normal(2, 8, 6, 7), *weights(MIXTURE, 8))]
    assert [y.shape for y in together(MIXTURE, *tensors)] == [
        y.shape for y in apart(MIXTURE, normal(2, 8, 6, 7), *weights(MIXTURE, 8))
    ]


# ---- bad input -------------------------------------------------------------------------------------------------------

IMAGES = torch.zeros(2, 3, 8, 8)
GOOD = SeparableConvolution(torch.zeros(3, 1, 3, 3), torch.zeros(2, 3, 1, 1))


@pytest.mark.parametrize(
    ("error", "words", "x", "convolutions"),
    [
        (TypeError, r"x: expected a tensor, got list", [1.0], [GOOD]),
        (TypeError, r"convolutions: expected a list or tuple of them, got SeparableConvolution", IMAGES, GOOD),
        (ValueError, r"convolutions: expected at least one, got none", IMAGES, []),
        (
            TypeError,
            r"convolutions\[1\]: expected a SeparableConvolution or a SeparablePair, got Tensor",
            IMAGES,
            [GOOD, IMAGES],
        ),
        (
            ValueError,
            r"convolutions\[1\]: .*got \[2, 1, 1, 1\]",
            IMAGES,
            [GOOD, GOOD._replace(pointwise=GOOD[1][:, :1])],
        ),
        (TypeError, r"convolutions\[0\]: depthwise: .*float64", IMAGES, [GOOD._replace(depthwise=GOOD[0].double())]),
        (TypeError, r"convolutions\[0\]: pointwise: .*float64", IMAGES, [GOOD._replace(pointwise=GOOD[1].double())]),
        (ValueError, r"convolutions\[1\]: stride: expected at least 1, got 0", IMAGES, [GOOD, GOOD._replace(stride=0)]),
        (ValueError, r"convolutions\[0\]: x: expected 4 dimensions", IMAGES[0], [GOOD]),
    ],
)
def test_bad_input_is_named(backend: str, error: type[Exception], words: str, x: Any, convolutions: Any) -> None:
    with pytest.raises(error, match=words):
        separable_conv2d_group(x, convolutions)
