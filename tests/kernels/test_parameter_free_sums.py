"""parameter_free_sums: the C++ kernels against float64, against torch's own operators and against the reference."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels.parameter_free_sums.op import is_served, output_shape, parameter_free_sums
from dssp_kernels.parameter_free_sums.reference import (
    AVERAGE,
    IDENTITY,
    MAX,
    Functions,
    Sums,
    parameter_free_sums_reference,
)
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS

channels_last = LAYOUTS["channels_last"]
pytestmark = with_cpu_kernels
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def darts(stride: int = 1) -> Functions:
    """DARTS' pools, normalised, and where the stride allows it the skip connection."""
    count = 3 if stride == 1 else 2
    kinds, kernels, paddings = [MAX, AVERAGE, IDENTITY], [3, 3, 3, 3, 1, 1], [1, 1, 1, 1, 0, 0]
    return Functions(
        kinds[:count],
        kernels[: 2 * count],
        [stride] * 2 * count,
        paddings[: 2 * count],
        [False] * count,
        [True, True, False][:count],
        [1e-5, 0.1, 0.0][:count],
    )


FIVE = Functions(  # more than are read at once, of several sizes, some without a norm
    [AVERAGE, MAX, IDENTITY, AVERAGE, MAX],
    [3, 3, 5, 1, 1, 1, 1, 5, 3, 3],
    [1] * 10,
    [1, 1, 2, 0, 0, 0, 0, 2, 1, 1],
    [True, True, True, False, True],
    [False, True, False, True, False],
    [0.0, 0.1, 0.0, 1e-3, 0.0],
)


def sums_of(functions: Functions, edges: list[int], candidates: list[int], missing: tuple[int, ...] = ()) -> Sums:
    count = len(edges) * len(functions.kinds)
    return Sums(edges, candidates, [i not in missing for i in range(count)])


THREE = partial(sums_of, edges=[4, 0, 2])


def ours(x: Tensor, weights: Tensor, *addends: Tensor, sums: Sums, functions: Functions) -> Tensor:
    given = [*addends, *[None] * (len(sums.edges) - len(addends))]
    return torch.stack(parameter_free_sums(x, weights, given, sums, functions)[0])


def eager(x: Tensor, weights: Tensor, *addends: Tensor, sums: Sums, functions: Functions) -> Tensor:
    """Written once more, as DARTS' MixedOp has it."""
    values = []
    for k, kind in enumerate(functions.kinds):
        kernel, stride, padding = functions.geometry(k)
        counts = functions.count_include_pad[k]
        y = {
            MAX: lambda k=kernel, s=stride, p=padding: F.max_pool2d(x, k, s, p),
            AVERAGE: lambda k=kernel, s=stride, p=padding, c=counts: F.avg_pool2d(x, k, s, p, count_include_pad=c),
            IDENTITY: lambda: x,
        }[kind]()
        if functions.normalised[k]:
            y = F.batch_norm(y, None, None, training=True, eps=functions.eps[k])
        values.append(y)
    totals = []
    for j, edge in enumerate(sums.edges):
        taken = [k for k in range(len(values)) if sums.takes[j * len(values) + k]]
        total = sum((weights[edge, sums.candidates[k]] * values[k] for k in taken), start=torch.zeros_like(values[0]))
        totals.append(total + addends[j] if j < len(addends) else total)
    return torch.stack(totals)


def tensors_for(shape: tuple[int, ...], functions: Functions, addends: int, dtype: torch.dtype) -> list[Tensor]:
    given = [normal(*output_shape(shape, functions, 0), dtype=dtype, seed=10 + j) for j in range(addends)]
    x, weights = channels_last(normal(*shape, dtype=dtype)), normal(5, 7, dtype=dtype, seed=1)
    return [x, weights, *map(channels_last, given)]


def check(shape: tuple[int, ...], functions: Functions, sums: Sums, addends: int, dtype: torch.dtype) -> None:
    tensors = tensors_for(shape, functions, addends, dtype)
    assert is_served(tensors[0])
    assert_as_exact(*(partial(f, sums=sums, functions=functions) for f in (ours, eager)), *tensors)


@DTYPES
@pytest.mark.parametrize("addends", [0, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 16, 8, 8), (2, 8, 9, 14), (5, 24, 3, 3), (1, 32, 7, 1)], ids=str)
def test_darts_candidates(shape: tuple[int, ...], stride: int, addends: int, dtype: torch.dtype) -> None:
    functions = darts(stride)
    sums = THREE(functions, candidates=[1, 6, 3][: len(functions.kinds)])
    check(shape, functions, sums, addends, dtype)


@DTYPES
@pytest.mark.parametrize("missing", [(), (0,), (1, 2, 5), (0, 3, 6)], ids=str)
def test_sums_that_lack_some_functions(missing: tuple[int, ...], dtype: torch.dtype) -> None:
    functions = darts()
    check((3, 8, 6, 5), functions, THREE(functions, candidates=[2, 1, 0], missing=missing), 1, dtype)


@DTYPES
@pytest.mark.parametrize("edges", [[0], [3, 1, 2, 0, 4]], ids=len)
def test_more_functions_than_are_read_at_once_of_any_kind(edges: list[int], dtype: torch.dtype) -> None:
    check((2, 16, 7, 6), FIVE, sums_of(FIVE, edges, [0, 6, 2, 3, 5], missing=(3,)), 1, dtype)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_pools(data: st.DataObject) -> None:
    def integers(least: int, most: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=count, max_size=count))

    kernel, stride = integers(1, 5, 2), integers(1, 3, 2)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = [data.draw(st.integers(max(1, k - 2 * p), 12)) for k, p in zip(kernel, padding, strict=True)]
    shape = (data.draw(st.integers(2, 4)), 4 * data.draw(st.integers(1, 4)), *size)
    counts, normalised = (data.draw(st.lists(st.booleans(), min_size=2, max_size=2)) for _ in range(2))
    functions = Functions([MAX, AVERAGE], kernel * 2, stride * 2, padding * 2, counts, normalised, [0.1, 0.2])
    count = data.draw(st.integers(1, 4))
    missing = data.draw(st.sets(st.integers(1, 2 * count - 1)))
    sums = sums_of(functions, list(range(count)), [4, 0], missing=tuple(missing))
    check(shape, functions, sums, data.draw(st.integers(0, count)), torch.float64)


def test_weights_and_addends_in_any_memory_and_a_column_of_any_stride() -> None:
    x = torch.empty_strided((3, 8, 6, 1), (48, 1, 8, 1)).copy_(normal(3, 8, 6, 1))  # the stride of one column is any
    assert is_served(x) and x.stride(3) == 1
    weights, addend = normal(7, 5, seed=1).t(), normal(3, 8, 6, 1, seed=2)
    given = {"sums": THREE(darts(), candidates=[0, 1, 2]), "functions": darts()}
    assert_as_exact(partial(ours, **given), partial(eager, **given), x, weights, addend)


def test_of_equal_pixels_the_first_gets_the_gradient() -> None:
    x, weights = channels_last(normal(2, 8, 8, 8).round()), normal(5, 7, seed=1)  # full of ties, as after a ReLU
    given = {"sums": THREE(darts(), candidates=[0, 1, 2]), "functions": darts()}
    assert_as_exact(partial(ours, **given), partial(eager, **given), x, weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_nan_and_inf_stay_in_their_channel(value: float) -> None:
    x, weights = channels_last(normal(2, 8, 6, 6)), normal(5, 7, seed=1)
    x[1, 3, 2, 5] = value
    given = {"sums": THREE(darts(), candidates=[0, 1, 2]), "functions": darts()}
    (mine, *_), (theirs, *_) = (run(partial(f, **given), x, weights) for f in (ours, eager))
    assert torch.equal(mine[:, :, 3].isfinite(), theirs[:, :, 3].isfinite())
    other = torch.arange(8) != 3
    torch.testing.assert_close(mine[:, :, other], theirs[:, :, other], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (5, 1)])
def test_maxima_and_their_pixels_are_torchs_with_ties_and_nan(kernel: int, stride: int) -> None:
    """Without a norm, which would spread a NaN over its channel."""
    functions = Functions([MAX], [kernel] * 2, [stride] * 2, [kernel // 2] * 2, [True], [False], [0.0])
    x = normal(4, 8, 9, 9).round()
    x[torch.rand(x.shape, generator=torch.Generator().manual_seed(2)) < 0.1] = float("nan")
    given = {"sums": sums_of(functions, [0], [0]), "functions": functions}
    tensors = channels_last(x), torch.ones(1, 1)
    for mine, theirs in zip(*(run(partial(f, **given), *tensors) for f in (ours, eager)), strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@DTYPES
def test_statistics_are_those_that_running_ones_take_in(dtype: torch.dtype) -> None:
    x = channels_last(normal(4, 8, 9, 9, dtype=dtype) + 100)  # far from zero
    sums = sums_of(FIVE, [0], [0, 1, 2, 3, 4])
    _, means, variances = parameter_free_sums(x, normal(1, 5, dtype=dtype), [None], sums, FIVE)
    pooled = [
        F.max_pool2d(x.double(), (5, 1), 1, (2, 0)),
        F.avg_pool2d(x.double(), (1, 5), 1, (0, 2), count_include_pad=False),
    ]
    assert len(means) == len(variances) == len(pooled)
    for p, mean, variance in zip(pooled, means, variances, strict=True):
        assert mean.dtype is variance.dtype is dtype and not mean.requires_grad and not variance.requires_grad
        torch.testing.assert_close(mean.double(), p.mean((0, 2, 3)), rtol=1e-6, atol=0)
        torch.testing.assert_close(variance.double(), p.var((0, 2, 3)), rtol=1e-4, atol=0)


def test_gradcheck_and_gradgradcheck() -> None:
    tensors = tensors_for((2, 4, 3, 4), darts(), 1, torch.float64)
    given = {"sums": sums_of(darts(), [1, 3], [0, 1, 2], missing=(4,)), "functions": darts()}
    assert_differentiable_twice(partial(ours, **given), [tensor.requires_grad_() for tensor in tensors])


@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (3, 8, 9, 14)], ids=str)
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], shape: tuple[int, ...]
) -> None:
    tensors, results = tensors_for(shape, darts(), 2, torch.float32), []
    compute = partial(ours, sums=THREE(darts(), candidates=[0, 1, 2]), functions=darts())
    for count in (2, 2, 1, 3):
        threads(count)
        results.append(run(compute, *tensors))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("frozen", range(4))
def test_only_the_gradients_needed_are_computed(frozen: int) -> None:
    tensors = tensors_for((3, 8, 6, 5), darts(), 2, torch.float32)
    compute = partial(ours, sums=THREE(darts(), candidates=[0, 1, 2]), functions=darts())
    _, *expected = run(compute, *tensors)
    leaves = [tensor.clone().requires_grad_(i != frozen) for i, tensor in enumerate(tensors)]
    y = compute(*leaves)
    y.backward(normal(*y.shape, seed=1))
    for i, (leaf, gradient) in enumerate(zip(leaves, expected, strict=True)):
        assert leaf.grad is None if i == frozen else torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("used", [0, 2])
def test_sums_that_nobody_used_add_nothing(used: int) -> None:
    tensors = tensors_for((3, 8, 6, 5), darts(), 3, torch.float64)
    given = {"sums": THREE(darts(), candidates=[0, 1, 2]), "functions": darts()}
    found = run(lambda *t: ours(*t, **given)[used] * 1.0, *tensors)  # stack would hand zeros to the others
    x, weights, *addends = (tensor.clone().requires_grad_() for tensor in tensors)
    results, _, _ = parameter_free_sums(x, weights, addends, given["sums"], darts())
    grad = normal(*results[used].shape, dtype=torch.float64, seed=1)
    alone = torch.autograd.grad(results[used], [x, weights, *addends], grad, allow_unused=True)
    for mine, expected in zip(alone, found[1:], strict=True):
        torch.testing.assert_close(torch.zeros_like(expected) if mine is None else mine, expected)


def test_gradients_of_addends_are_those_of_the_sums_uncopied() -> None:
    x, weights, addend = (t.requires_grad_() for t in tensors_for((2, 8, 4, 4), darts(), 1, torch.float32))
    [y], _, _ = parameter_free_sums(x, weights, [addend], sums_of(darts(), [0], [0, 1, 2]), darts())
    grad = torch.ones_like(y)
    assert torch.autograd.grad(y, addend, grad)[0].data_ptr() == grad.data_ptr()


def test_kept_is_what_pools_give_and_a_byte_per_maximum() -> None:
    saved: list[tuple[torch.dtype, int]] = []
    x, weights = (t.requires_grad_() for t in tensors_for((2, 8, 6, 6), darts(), 0, torch.float32))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append((t.dtype, t.numel())) or t, lambda t: t):
        parameter_free_sums(x, weights, [None] * 3, THREE(darts(), candidates=[0, 1, 2]), darts())
    maps, norms = [(torch.float32, x.numel())] * 3, [(torch.float32, 8)] * 2
    expected = [*maps, (torch.uint8, x.numel()), (torch.float32, weights.numel()), *norms]
    assert sorted(saved, key=str) == sorted(expected, key=str)


def test_reference_is_the_same() -> None:
    tensors = tensors_for((3, 8, 6, 5), darts(), 2, torch.float64)
    sums = THREE(darts(), candidates=[0, 1, 2], missing=(4,))
    x, weights, *addends = tensors
    for mine, theirs in zip(
        parameter_free_sums(x, weights, [*addends, None], sums, darts()),
        parameter_free_sums_reference(x, weights, [*addends, None], sums, darts()),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("needs", [(True, True), (False, True), (True, False)], ids=str)
@pytest.mark.parametrize("functions", [darts(), darts(2), FIVE], ids=["darts", "stride 2", "five"])
def test_opcheck(functions: Functions, needs: tuple[bool, bool]) -> None:
    x, weights, addend = tensors_for((2, 8, 7, 6), functions, 1, torch.float32)
    what = (*THREE(functions, candidates=list(range(len(functions.kinds)))), *functions)
    operators = torch.ops.dssp_kernels
    opcheck(operators.parameter_free_sums_forward, (x, weights, [None, addend, None], *what))
    results, pooled, positions, _, _, scales = operators.parameter_free_sums_forward(x, weights, [None] * 3, *what)
    grads = [torch.ones_like(results[0]), None, torch.ones_like(results[0])]
    opcheck(operators.parameter_free_sums_backward, (grads, x, weights, pooled, positions, scales, *what, *needs))


def test_counts_flops_as_a_mix_does() -> None:
    x, weights = (t.requires_grad_() for t in tensors_for((2, 8, 6, 6), darts(), 0, torch.float32))
    sums = THREE(darts(), candidates=[0, 1, 2], missing=(0,))
    with FlopCounterMode(display=False) as counter:
        results, _, _ = parameter_free_sums(x, weights, [None] * 3, sums, darts())
        assert counter.get_total_flops() == 2 * 8 * x.numel()
        torch.stack(results).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 8 * x.numel()


def test_compiles_without_graph_breaks() -> None:
    tensors = tensors_for((2, 8, 6, 6), darts(), 2, torch.float32)
    compute = partial(ours, sums=THREE(darts(), candidates=[0, 1, 2]), functions=darts())
    found, expected = (run(f, *tensors) for f in (torch.compile(compute, fullgraph=True), compute))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 8, 4, 4),
        channels_last(torch.zeros(2, 6, 4, 4)),
        channels_last(torch.zeros(2, 8, 4, 4, dtype=torch.bfloat16)),
        channels_last(torch.zeros(0, 8, 4, 4)),
        torch.zeros(2, 8, 4, 4, device="meta"),
    ],
    ids=["contiguous", "channels", "bfloat16", "empty", "meta"],
)
def test_what_the_kernels_are_not_made_for(x: Tensor, recwarn: pytest.WarningsRecorder) -> None:
    assert not is_served(x)


def test_autocast_is_left_to_others() -> None:
    x = channels_last(torch.zeros(2, 8, 4, 4))
    assert is_served(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_served(x)
