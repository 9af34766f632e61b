"""pool_batch_norm through its public function: the C++ kernels and the reference against float64 and against eager."""

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

from dssp_kernels import pool_batch_norm
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.convolutions import assert_as_exact, normal, run
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.tensors import LAYOUTS, SLACK

channels_last = LAYOUTS["channels_last"]


def ours(x: Tensor, pool: str, kernel: int, **arguments: object) -> Tensor:
    return pool_batch_norm(x, pool, kernel, **arguments)[0]  # type: ignore[arg-type]


def eager(
    x: Tensor,
    pool: str,
    kernel: int,
    *,
    stride: int | None = None,
    padding: int = 0,
    count_include_pad: bool = True,
    eps: float = 1e-5,
) -> Tensor:
    if pool == "max":
        pooled = F.max_pool2d(x, kernel, stride, padding)
    else:
        pooled = F.avg_pool2d(x, kernel, stride, padding, count_include_pad=count_include_pad)
    return F.batch_norm(pooled, None, None, training=True, eps=eps)


def check(x: Tensor, pool: str, kernel: int, **arguments: object) -> None:
    assert_as_exact(partial(ours, pool=pool, kernel=kernel), partial(eager, pool=pool, kernel=kernel), x, **arguments)


@pytest.fixture(params=["max", "avg"])
def pool(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (9, 14), (3, 3)], ids=str)
@pytest.mark.parametrize("channels", [16, 64])
def test_darts_pools(backend: str, pool: str, channels: int, size: tuple[int, int], stride: int) -> None:
    x = channels_last(normal(3, channels, *size))
    check(x, pool, 3, stride=stride, padding=1, count_include_pad=False)


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("channels", [2, 3, 8, 17])
def test_channels_layouts_and_dtypes(backend: str, pool: str, channels: int, layout: str, dtype: torch.dtype) -> None:
    check(LAYOUTS[layout](normal(2, channels, 7, 9, dtype=dtype)), pool, 3, stride=1, padding=1)


@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_any_pool(data: st.DataObject) -> None:
    def integers(least: int, most: int, count: int) -> list[int]:
        return data.draw(st.lists(st.integers(least, most), min_size=count, max_size=count))

    batch, channels, *kernel = integers(2, 4, 1) + integers(1, 10, 1) + integers(1, 5, 2)
    padding = [data.draw(st.integers(0, k // 2)) for k in kernel]
    size = [data.draw(st.integers(max(1, k - 2 * p), 12)) for k, p in zip(kernel, padding, strict=True)]
    layout = LAYOUTS[data.draw(st.sampled_from(["channels_last", "sliced channels", "sliced columns"]))]
    arguments = {"stride": tuple(integers(1, 4, 2)), "padding": tuple(padding)}
    x = layout(normal(batch, channels, *size, dtype=torch.float64))
    counts = data.draw(st.booleans())
    # eps: two images of one pixel may be so alike that no digit of the gradient would be left
    check(x, "max", tuple(kernel), **arguments, eps=0.1)  # type: ignore[arg-type]
    check(x, "avg", tuple(kernel), **arguments, eps=0.1, count_include_pad=counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [2, 3, 5])
def test_of_equal_pixels_the_first_gets_the_gradient(backend: str, kernel: int) -> None:
    x = channels_last(normal(2, 9, 8, 8).round())  # full of ties, as after a ReLU
    check(x, "max", kernel, stride=1, padding=kernel // 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("where", [(1, 8, 3, 4), (0, 8, 0, 0)], ids=str)
def test_nan_and_inf_propagate_as_in_eager(backend: str, pool: str, where: tuple[int, ...], value: float) -> None:
    x = channels_last(normal(2, 9, 8, 8))
    x[where] = value
    settings = {"pool": pool, "kernel": 3, "stride": 1, "padding": 1}
    found, expected = (run(partial(f, **settings), x) for f in (ours, eager))
    for mine, theirs in zip(found, expected, strict=True):
        other = torch.arange(9) != where[1]
        torch.testing.assert_close(mine[:, other], theirs[:, other], rtol=1e-4, atol=1e-5)
    assert torch.equal(found[0][:, where[1]].isfinite(), expected[0][:, where[1]].isfinite())


def test_statistics_are_those_that_running_ones_take_in(backend: str, pool: str) -> None:
    x = channels_last(normal(4, 12, 9, 9) + 100)  # far from zero
    _, mean, variance = pool_batch_norm(x, pool, 3, stride=2, padding=1, count_include_pad=False)
    pooled = (F.max_pool2d if pool == "max" else F.avg_pool2d)(
        x.double(), 3, 2, 1, **({} if pool == "max" else {"count_include_pad": False})
    )
    assert mean.dtype is variance.dtype is torch.float32 and not mean.requires_grad and not variance.requires_grad
    torch.testing.assert_close(mean.double(), pooled.mean((0, 2, 3)), rtol=1e-5, atol=0)
    torch.testing.assert_close(variance.double(), pooled.var((0, 2, 3)), rtol=1e-4, atol=0)


@with_cpu_kernels
def test_deviations_from_a_large_mean_keep_their_digits(pool: str) -> None:
    x = channels_last(normal(8, 16, 32, 32) + 100)
    exact = eager(x.double(), pool, 3, stride=1, padding=1, count_include_pad=False)
    y = ours(x, pool, 3, stride=1, padding=1, count_include_pad=False)
    theirs = eager(x, pool, 3, stride=1, padding=1, count_include_pad=False)
    assert (y - exact).abs().max() < 1e-4 < (theirs - exact).abs().max()


@with_cpu_kernels
def test_gradcheck_and_gradgradcheck(pool: str) -> None:
    x = channels_last(normal(2, 3, 4, 5, dtype=torch.float64)).requires_grad_()
    assert_differentiable_twice(lambda x: ours(x, pool, 3, stride=1, padding=1), [x])


@with_cpu_kernels
@pytest.mark.parametrize("shape", [(32, 16, 32, 32), (2, 24, 64, 64), (70, 9, 8, 8)], ids=str)
def test_two_runs_and_any_number_of_threads_are_bit_equal(
    threads: Callable[[int], None], pool: str, shape: tuple[int, int, int, int]
) -> None:
    x, results = channels_last(normal(*shape)), []
    for count in (2, 2, 1, 3):
        threads(count)
        results.append(run(partial(ours, pool=pool, kernel=3, stride=1, padding=1), x))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@with_cpu_kernels
def test_between_x_and_y_a_maximum_keeps_a_byte_per_element_and_an_average_nothing(pool: str) -> None:
    saved: dict[int, int] = {}
    x = channels_last(normal(4, 16, 8, 8)).requires_grad_()

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ours(x, pool, 3, stride=1, padding=1)
    kept = sum(size for pointer, size in saved.items() if pointer not in (x.data_ptr(), y.data_ptr()))
    assert kept == (x.numel() if pool == "max" else 0) + 4 * 16  # and the scale of each channel


@with_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced channels"])
def test_opcheck(pool: str, layout: str, dtype: torch.dtype) -> None:
    x = LAYOUTS[layout](normal(2, 5, 7, 6, dtype=dtype))
    arguments = (pool == "max", [3, 2], [2, 1], [1, 1], False)
    forward, backward = (
        getattr(torch.ops.dssp_kernels, f"pool_batch_norm_{pass_}") for pass_ in ("forward", "backward")
    )
    opcheck(forward, (x, *arguments, 1e-5))
    y, positions, _, _, scale = forward(x, *arguments, 1e-5)
    opcheck(backward, (torch.ones_like(y), x, y, positions, scale, *arguments))


def test_compiles_without_graph_breaks(pool: str) -> None:
    x = channels_last(normal(2, 8, 6, 6))
    function = partial(ours, pool=pool, kernel=3, stride=1, padding=1)
    found, expected = (run(f, x) for f in (torch.compile(function, fullgraph=True), function))
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)


X = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("error", "words", "arguments"),
    [
        (TypeError, "x: expected a tensor, got list", ([], "max", 3)),
        (TypeError, "x: expected float16, .*got torch.int64", (X.long(), "max", 3)),
        (ValueError, r"x: expected a dense tensor \[B, C, H, W\], got .* of shape \[3, 4, 5\]", (X[0], "max", 3)),
        (ValueError, "pool: expected one of max, avg, got 'min'", (X, "min", 3)),
        (ValueError, "kernel_size: expected at least 1, got 0", (X, "max", 0)),
        (TypeError, "kernel_size: expected an integer or a pair", (X, "max", 2.5)),
        (ValueError, "stride: expected at least 1, got 0", (X, "avg", 3, 0)),
        (ValueError, r"padding: expected at most half of kernel_size \(3, 3\), got 2", (X, "avg", 3, 1, 2)),
        (ValueError, r"x: expected an image no smaller than the kernel, got \[4, 5\]", (X, "avg", 6)),
        (ValueError, r"x: expected more than one value per channel", (X[:1], "avg", (4, 5))),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, arguments: tuple) -> None:
    x, pool, kernel, *rest = arguments
    with pytest.raises(error, match=words):
        pool_batch_norm(x, pool, kernel, **dict(zip(("stride", "padding"), rest, strict=False)))
