"""Pairs of separable convolutions with a BatchNorm between, in a group: against float64 and against eager."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import SeparableConvolution, SeparablePair, separable_conv2d_group
from dssp_kernels.separable_conv.reference import batch_norm_reference, separable_conv2d_reference
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import normal
from tests.kernels.convolutions import run_group as run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK

Kind = tuple[int, int, int, bool]  # kernel, stride, dilation, relu
Entry = tuple[Kind, ...]  # of one convolution, or of the two of a pair

# An edge of DARTS' supernet.
EDGE: list[Entry] = [((3, 1, 1, True),) * 2, ((5, 1, 1, True),) * 2, ((3, 1, 2, True),), ((5, 1, 2, True),)]
REDUCING: list[Entry] = [((kernel, 2, dilation, relu), *rest) for (kernel, _, dilation, relu), *rest in EDGE]
# A follower that strides, one without a ReLU, an even kernel.
MIXTURE: list[Entry] = [((1, 3, 1, False),), ((3, 2, 1, True), (4, 2, 1, True)), ((3, 1, 2, False), (3, 1, 1, False))]
ONE: list[Entry] = EDGE[:1]
GROUPS = {"edge": EDGE, "reducing edge": REDUCING, "mixture": MIXTURE, "one": ONE}
groups = pytest.mark.parametrize("entries", GROUPS.values(), ids=GROUPS)


def weights(entries: Sequence[Entry], channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Depthwise and pointwise by turns; every convolution has another number of outputs."""
    found = []
    for k, entry in enumerate(entries):
        inputs = channels
        for half, (kernel, *_) in enumerate(entry):
            outputs = channels + 3 * k + half
            found.append(normal(inputs, 1, kernel, kernel, dtype=dtype, seed=10 + 2 * k + half))
            found.append(normal(outputs, inputs, 1, 1, dtype=dtype, seed=30 + 2 * k + half))
            inputs = outputs
    return found


def group_of(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> list[SeparableConvolution | SeparablePair]:
    left, group = list(tensors), []
    for entry in entries:
        convolutions = [
            SeparableConvolution(left.pop(0), left.pop(0), stride, dilation * (kernel - 1) // 2, dilation, relu)
            for kernel, stride, dilation, relu in entry
        ]
        if len(convolutions) == 1:
            group += convolutions
        else:
            norm = nn.BatchNorm2d(
                convolutions[0].pointwise.shape[0], affine=False, device=tensors[0].device, dtype=tensors[0].dtype
            )
            group.append(SeparablePair(convolutions[0], norm, convolutions[1]))
    return group


def together(entries: Sequence[Entry], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    return separable_conv2d_group(x, group_of(entries, tensors))


def apart(entries: Sequence[Entry], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    return [convolution(x) for convolution in group_of(entries, tensors)]


def eager(entries: Sequence[Entry], x: Tensor, *tensors: Tensor) -> list[Tensor]:
    """By PyTorch's own operators."""

    def convolve(x: Tensor, convolution: SeparableConvolution) -> Tensor:
        depthwise, pointwise, stride, padding, dilation, relu = convolution
        return separable_conv2d_reference(x, depthwise, pointwise, (stride,) * 2, (padding,) * 2, (dilation,) * 2, relu)  # type: ignore[arg-type]  # pairs wanted, numbers there

    return [
        convolve(entry.norm(convolve(x, entry.first)), entry.second)
        if isinstance(entry, SeparablePair)
        else convolve(x, entry)
        for entry in group_of(entries, tensors)
    ]


def relative_errors(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of every result and gradient, ours and eager's: the distance to float64 in units of the true norm."""
    exact, ours, theirs = (
        itertools.chain(*run(compute, entries, tensors, double=double))
        for compute, double in ((eager, True), (together, False), (eager, False))
    )
    return [
        tuple((value.double() - true).norm() / (true.norm() + 1e-30) for value in (a, b))  # type: ignore[misc]
        for true, a, b in zip(exact, ours, theirs, strict=True)
    ]


# ---- results and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "channels"), [(EDGE, 16), (REDUCING, 3), (MIXTURE, 17)], ids=["edge", "reducing edge", "mixture"]
)
@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_error_is_at_most_twice_that_of_eager(
    backend: str, entries: list[Entry], layout: str, dtype: torch.dtype, channels: int
) -> None:
    tensors = [LAYOUTS[layout](normal(3, channels, 9, 11, dtype=dtype)), *weights(entries, channels, dtype)]
    for ours, theirs in relative_errors(entries, tensors):
        assert ours <= 2 * theirs + SLACK[dtype]


@with_cpu_kernels
@groups
def test_many_parts_and_bands_agree_with_float64(entries: list[Entry]) -> None:
    tensors = [LAYOUTS["channels_last"](normal(3, 16, 40, 32)), *weights(entries, 16)]
    assert max(ours for ours, _ in relative_errors(entries, tensors)) < 2e-5


def shifted(mean: float) -> list[Tensor]:
    """x and weights whose map in the middle has this mean and a standard deviation of about 1."""
    x = normal(8, 8, 16, 16) + mean
    one_tap = torch.ones(8, 1, 1, 1)
    return [LAYOUTS["channels_last"](x), one_tap, torch.eye(8)[..., None, None], *weights([((3, 1, 1, True),)], 8)]


@with_cpu_kernels
def test_statistics_survive_a_mean_far_from_zero() -> None:
    entries: list[Entry] = [((1, 1, 1, False), (3, 1, 1, True))]
    for ours, theirs in relative_errors(entries, shifted(1e4)):
        assert ours <= 2 * theirs + 1e-6
    assert relative_errors(entries, shifted(100.0))[0][0] < 1e-5  # of the result


@groups
def test_running_statistics_are_those_of_batch_norm(backend: str, entries: list[Entry]) -> None:
    x, *tensors = LAYOUTS["channels_last"](normal(4, 8, 12, 12) + 1), *weights(entries, 8)
    group = group_of(entries, tensors)
    same = [copy.deepcopy(entry) for entry in group]
    for _ in range(2):
        separable_conv2d_group(x, group)
        for entry in same:
            entry(x)
    found, expected = ([e.norm for e in some if isinstance(e, SeparablePair)] for some in (group, same))
    assert found
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.running_mean, theirs.running_mean)
        torch.testing.assert_close(ours.running_var, theirs.running_var)
        assert ours.num_batches_tracked == theirs.num_batches_tracked == 2


def test_norm_without_running_statistics(backend: str) -> None:
    x, *tensors = normal(2, 4, 6, 6), *weights(ONE, 4)
    [pair] = group_of(ONE, tensors)
    norm = nn.BatchNorm2d(4, affine=False, track_running_stats=False, momentum=None)
    [y] = separable_conv2d_group(x, [pair._replace(norm=norm)])
    torch.testing.assert_close(y, apart(ONE, x, *tensors)[0])


@with_cpu_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_a_number_spreads_as_in_eager(value: float) -> None:
    x, *tensors = normal(2, 4, 6, 6), *weights(ONE, 4)
    x[1, 2, 3, 4] = value
    (ours, _), (theirs, _) = (run(compute, ONE, [x, *tensors]) for compute in (together, eager))
    assert torch.equal(ours[0].isnan(), theirs[0].isnan()) and ours[0].isnan().any()


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (1, 24, 33, 33), (70, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("entries", [EDGE, MIXTURE], ids=["edge", "mixture"])
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, ...], entries: list[Entry]
) -> None:
    tensors = [LAYOUTS["channels_last"](normal(*shape)), *weights(entries, shape[1])]
    runs = []
    for count in (2, 2, 1, 3):
        threads(count)
        results, gradients = run(together, entries, tensors)
        runs.append([*results, *gradients])
    for other in runs[1:]:
        assert all(map(torch.equal, runs[0], other))


@with_cpu_kernels
def test_gradcheck_and_gradgradcheck() -> None:
    entries: list[Entry] = [((2, 2, 2, False),), ((3, 1, 1, True), (3, 2, 1, True))]
    tensors = [normal(2, 2, 4, 5, dtype=torch.float64), *weights(entries, 2, torch.float64)]

    def one_result(*tensors: Tensor) -> Tensor:
        return torch.cat([y.flatten() for y in together(entries, *tensors)])

    assert_differentiable_twice(one_result, [tensor.requires_grad_() for tensor in tensors])


def test_oracle_of_the_norm_is_batch_norm() -> None:
    z = normal(3, 4, 5, 6, dtype=torch.float64) + 3
    norm = nn.BatchNorm2d(4, affine=False, momentum=1.0, dtype=torch.float64)
    y, mean, variance, scale = batch_norm_reference(z, norm.eps)
    torch.testing.assert_close(y, norm(z))
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)
    torch.testing.assert_close(y, (z - mean[:, None, None]) * scale[:, None, None])


# ---- only what is needed ---------------------------------------------------------------------------------------------

NUMBER = len(weights(EDGE, 5)) + 1  # x; of each of the two pairs four weights; of the others two


@pytest.mark.parametrize(
    "needed", [(0,), (1,), (2, 3), (4,), (3, 4), (1, 2), (0, 3, 9), (9, 10), tuple(range(NUMBER))], ids=str
)
def test_only_the_gradients_needed_are_computed(backend: str, needed: tuple[int, ...]) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    _, expected = run(apart, EDGE, tensors)
    flags = [i in needed for i in range(NUMBER)]
    for need, found, d in zip(flags, run(together, EDGE, tensors, needed=flags)[1], expected, strict=True):
        if need:
            torch.testing.assert_close(found, d, rtol=1e-4, atol=1e-4)
        else:
            assert found is None


@pytest.mark.parametrize("used", [(1, 0, 0, 0), (0, 1, 0, 1), (0, 0, 1, 1)], ids=str)
def test_results_that_nobody_used_get_no_gradients(backend: str, used: tuple[int, ...]) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    (_, found), (_, expected) = (run(compute, EDGE, tensors, used=used) for compute in (together, apart))
    assert [d is None for d in found] == [d is None for d in expected]
    for ours, theirs in zip(found, expected, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_results_of_frozen_weights_need_no_gradient(backend: str) -> None:
    tensors = [normal(2, 5, 7, 7), *weights(EDGE, 5)]
    tensors[1].requires_grad_()  # of the first pair's first half
    assert [y.requires_grad for y in together(EDGE, *tensors)] == [True, False, False, False]


@with_cpu_kernels
def test_of_each_pair_one_map_and_two_statistics_are_kept_for_backward() -> None:
    saved: list[tuple[int, ...]] = []
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 4, 8, 8), *weights(EDGE, 4))]
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(tuple(t.shape)) or t, lambda t: t):
        together(EDGE, *tensors)
    middle = [(2, 4, 8, 8), (2, 7, 8, 8), (4,), (4,), (7,), (7,)]
    assert sorted(saved) == sorted([*(tuple(tensor.shape) for tensor in tensors), *middle])


@with_cpu_kernels
@pytest.mark.parametrize("used", [(1, 1, 1), (0, 1, 0)], ids=str)
@pytest.mark.parametrize("frozen", [(), (0, 3, 4), (0, 3), (5, 6)], ids=str)
def test_counts_the_flops_of_its_convolutions(used: tuple[int, ...], frozen: tuple[int, ...]) -> None:
    counts = []
    for compute in (together, apart):
        tensors = [normal(2, 4, 9, 8), *weights(MIXTURE, 4)]
        leaves = [tensor.requires_grad_(i not in frozen) for i, tensor in enumerate(tensors)]
        with FlopCounterMode(display=False) as counter:
            results = compute(MIXTURE, *leaves)
            forward = counter.get_total_flops()
            sum(y.sum() for y, use in zip(results, used, strict=True) if use).backward()
        counts.append((forward, counter.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0


# ---- where it runs ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "frozen", "unused"),
    [("contiguous", (), ()), ("channels_last", (0, 3), ()), ("sliced channels", (2,), (2,))],
    ids=str,
)
def test_opcheck(layout: str, frozen: tuple[int, ...], unused: tuple[int, ...]) -> None:
    """Three convolutions: the third follows the second."""
    entries: list[Entry] = [((3, 1, 1, True),), ((3, 1, 1, True), (3, 1, 1, True))]
    x, tensors = LAYOUTS[layout](normal(2, 5, 7, 6)), weights(entries, 5)
    geometry = [2, 1, 1, 2, 1, 1], [1, 2, 0, 3, 1, 1], [1, 2, 2, 1, 1, 1], [True, False, True], [-1, -1, 1], [0, 0, 0.1]
    group: tuple[Any, ...] = tensors[::2], tensors[1::2], *geometry
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_forward, (x, *group))
    maps, means, _, scales = torch.ops.dssp_kernels.separable_conv2d_group_forward(x, *group)
    grads = [None if k in (1, *unused) else normal(*y.shape) for k, y in enumerate(maps)]
    dead = {1, 2} if 2 in unused else set()
    needs = [[2 * k + half not in frozen and k not in dead for k in range(3)] for half in range(2)]
    arguments = grads, x, [maps[1]], means, scales, *group, 0 not in frozen, *needs
    opcheck(torch.ops.dssp_kernels.separable_conv2d_group_backward, arguments)


@pytest.mark.parametrize("frozen", [(), (0, 1, 2, 8)], ids=["all gradients", "some frozen"])
def test_compiles_without_graph_breaks(frozen: tuple[int, ...]) -> None:
    tensors = [LAYOUTS["channels_last"](normal(2, 8, 6, 6)), *weights(EDGE, 8)]
    needed = [i not in frozen for i in range(len(tensors))]
    group = group_of(EDGE, tensors[1:])

    def compute(_: Sequence[Entry], x: Tensor, *tensors: Tensor) -> list[Tensor]:
        left = list(tensors)

        def with_weights(convolution: SeparableConvolution) -> SeparableConvolution:
            return convolution._replace(depthwise=left.pop(0), pointwise=left.pop(0))

        return separable_conv2d_group(
            x,
            [
                SeparablePair(with_weights(e.first), e.norm, with_weights(e.second))
                if isinstance(e, SeparablePair)
                else with_weights(e)
                for e in group
            ],
        )

    compiled = torch.compile(compute, fullgraph=True)
    found, expected = (run(some, EDGE, tensors, needed=needed) for some in (compiled, together))
    torch.testing.assert_close(found, expected)
    assert isinstance(group[0], SeparablePair) and group[0].norm.num_batches_tracked == 1


def test_autocast_runs_in_the_autocast_dtype(backend: str) -> None:
    tensors = [tensor.requires_grad_() for tensor in (normal(2, 8, 6, 6), *weights(EDGE, 8))]
    with torch.autocast("cpu", torch.bfloat16):
        results, singles = together(EDGE, *tensors), apart(EDGE, *tensors)
    for y, single in zip(results, singles, strict=True):
        assert y.dtype is torch.bfloat16
        assert (y - single).float().norm() <= 0.02 * single.float().norm()
    sum(y.sum() for y in results).backward()
    assert all(tensor.grad.dtype is torch.float32 for tensor in tensors)


def test_tensors_without_data_have_shapes() -> None:
    tensors = [tensor.to("meta") for tensor in (normal(2, 8, 6, 7), *weights(EDGE, 8))]
    assert [y.shape for y in together(EDGE, *tensors)] == [
        y.shape for y in apart(EDGE, normal(2, 8, 6, 7), *weights(EDGE, 8))
    ]


# ---- bad input -------------------------------------------------------------------------------------------------------

SINGLE = SeparableConvolution(torch.zeros(3, 1, 3, 3), torch.zeros(3, 3, 1, 1), padding=1)
GOOD = SeparablePair(SINGLE, nn.BatchNorm2d(3, affine=False), SINGLE)
WRONG: list[tuple[type[Exception], str, Any]] = [
    (TypeError, r"convolutions\[1\]: norm: expected an nn.BatchNorm2d, got Identity", {"norm": nn.Identity()}),
    (ValueError, r"convolutions\[1\]: norm: .*affine=True", {"norm": nn.BatchNorm2d(3)}),
    (ValueError, r"convolutions\[1\]: norm: .*training=False", {"norm": nn.BatchNorm2d(3, affine=False).eval()}),
    (ValueError, r"convolutions\[1\]: norm: .*momentum=None", {"norm": nn.BatchNorm2d(3, momentum=None, affine=False)}),
    (TypeError, r"convolutions\[1\]: expected a SeparableConvolution or a SeparablePair, got int", {"first": 1}),
    (TypeError, r"convolutions\[1\]: expected a SeparableConvolution or a SeparablePair, got int", {"second": 1}),
]


@pytest.mark.parametrize(("error", "words", "wrong"), WRONG)
def test_bad_input_is_named(backend: str, error: type[Exception], words: str, wrong: Any) -> None:
    with pytest.raises(error, match=words):
        separable_conv2d_group(torch.zeros(2, 3, 8, 8), [SINGLE, GOOD._replace(**wrong)])


@with_cpu_kernels
@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (r"convolutions\[0\]: norm: expected 3 features.*got 4", {"norm": nn.BatchNorm2d(4, affine=False)}),
        (r"convolutions\[0\].second: weight: .*C = 3", {"second": SINGLE._replace(depthwise=torch.zeros(4, 1, 3, 3))}),
        (r"convolutions\[0\].second: stride: ", {"second": SINGLE._replace(stride=0)}),
        (r"convolutions\[0\]: norm: .*more than one value", {"first": SINGLE._replace(stride=8)}),
    ],
)
def test_what_does_not_fit_together_is_named(words: str, wrong: Any) -> None:
    with pytest.raises(ValueError, match=words):
        separable_conv2d_group(torch.zeros(1, 3, 8, 8), [GOOD._replace(**wrong)])


@with_cpu_kernels
@pytest.mark.parametrize("follows", [[-1, 0, 0], [-1, 0, 1], [-1, 1, -1], [-1, 2, -1], [0, -1, -1]], ids=str)
def test_operator_refuses_followers_of_anything_but_a_convolution_that_reads_x(follows: list[int]) -> None:
    depthwise, pointwise = [torch.ones(3, 1, 1, 1)] * 3, [torch.ones(3, 3, 1, 1)] * 3
    geometry = [1] * 6, [0] * 6, [1] * 6, [True] * 3
    with pytest.raises(RuntimeError, match="follows: expected"):
        torch.ops.dssp_kernels.separable_conv2d_group_forward(
            torch.ones(2, 3, 4, 4), depthwise, pointwise, *geometry, follows, [0.1] * 3
        )
