"""The C++ kernels write every element of their results and nothing else, and read nothing beside their arguments."""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import (
    SeparableConvolution,
    SeparablePair,
    batch_norm_mixed_sum,
    depthwise_conv2d,
    get_backend,
    mixed_sum,
    pointwise_batch_norm_group,
    pool_batch_norm,
    separable_conv2d,
    separable_conv2d_group,
    set_backend,
)
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.tensors import LAYOUTS

NAN_BYTES, ZERO_BYTES = 0x100, 0xFF  # M_PERTURB fills what malloc gives with the complement of the lowest byte
M_PERTURB = -6
CHECKING_MALLOC = "libc_malloc_debug.so.0"
ROOT = Path(__file__).parents[2]


@contextmanager
def fresh_memory_of(value: int) -> Iterator[None]:
    """glibc fills every allocation, those of the C++ kernels through LibTorch included."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_PERTURB, value)
    try:
        yield
    finally:
        libc.mallopt(M_PERTURB, 0)


def _can_be_filled() -> bool:
    if not hasattr(ctypes.CDLL(None), "mallopt"):
        return False
    with fresh_memory_of(NAN_BYTES):
        return bool(torch.empty(1001).isnan().all())


def _is_there(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


pytestmark = with_cpu_kernels
with_filled_memory = pytest.mark.skipif(
    not _can_be_filled(), reason="fresh memory cannot be filled: torch does not use glibc's malloc"
)


@pytest.fixture(autouse=True)
def cpu_kernels() -> Iterator[None]:
    before = get_backend()
    set_backend("cpu")
    yield
    set_backend(before)


# ---- what is run -----------------------------------------------------------------------------------------------------

Wrap = Callable[[Tensor], Tensor]
Run = Callable[[Wrap], list[Tensor]]


def gradients_of(y: Tensor, leaves: list[Tensor], wrap: Wrap) -> list[Tensor]:
    grad = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    grad = wrap(torch.empty_like(y).copy_(grad))
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def random(*shape: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous", seed: int = 0) -> Tensor:
    return LAYOUTS[layout](torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


def mixture(norms: list[nn.BatchNorm2d | None], shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Run:
    """Two edges of these candidates; the last entry is absent, and the whole second edge is inactive at the end."""

    def run(wrap: Wrap) -> list[Tensor]:
        found = []
        fresh = [None if norm is None else norm_with_statistics(norm, wrap, dtype) for norm in norms * 2]
        for active in (None, torch.tensor([True, False])):
            outputs = [wrap(random(*shape, dtype=dtype, layout=layout, seed=i)).requires_grad_() for i in range(5)]
            alpha, mask = random(2, 3, seed=6).requires_grad_(), random(2, seed=7).requires_grad_()
            present = [*outputs, None]
            if any(norms):
                y = batch_norm_mixed_sum(present, alpha, mask, norms=fresh, training=True, active=active)
            else:
                y = mixed_sum(present, alpha, mask, active=active)
            parameters = [p for norm in fresh[:5] if norm is not None for p in norm.parameters()]
            found += gradients_of(y, [alpha, mask, *outputs, *parameters], wrap)
        return found + [buffer for norm in fresh if norm is not None for buffer in norm.buffers()]

    return run


def norm_with_statistics(like: nn.BatchNorm2d, wrap: Wrap, dtype: torch.dtype) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(like.num_features, affine=like.affine).to(torch.promote_types(dtype, torch.float32))
    norm.running_mean, norm.running_var = wrap(norm.running_mean), wrap(norm.running_var)
    return norm


def convolution(
    convolve: Callable[..., Tensor],
    weights: list[tuple[int, ...]],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    layout: str,
) -> Run:
    def run(wrap: Wrap) -> list[Tensor]:
        found = []
        for arguments in ({"padding": 2, "dilation": 2, "relu": True}, {"stride": 2, "padding": 1}, {"stride": 3}):
            leaves = [random(*shape, dtype=dtype, layout=layout)]
            leaves += [random(*weight, dtype=dtype, seed=1) for weight in weights]
            leaves = [wrap(leaf).requires_grad_() for leaf in leaves]
            found += gradients_of(convolve(*leaves, **arguments), leaves, wrap)
        return found

    return run


def pools(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Run:
    def run(wrap: Wrap) -> list[Tensor]:
        found = []
        for pool, kernel, stride in (("max", 3, 1), ("avg", 3, 1), ("max", (2, 4), 3), ("avg", (2, 4), 3)):
            x = wrap(random(*shape, dtype=dtype, layout=layout)).requires_grad_()
            y, mean, variance = pool_batch_norm(x, pool, kernel, stride=stride, padding=1)
            found += [mean, variance, *gradients_of(y, [x], wrap)]
        return found

    return run


def pointwise_norms(shape: tuple[int, ...], dtype: torch.dtype, layout: str) -> Run:
    """With eight times the channels, as the kernels want them."""

    def run(wrap: Wrap) -> list[Tensor]:
        found = []
        for relu in (True, False):
            channels = 8 * shape[1], 24
            maps = [
                wrap(random(shape[0], of_map, *shape[2:], dtype=dtype, layout=layout)).requires_grad_()
                for of_map in channels
            ]
            weights = [wrap(random(c, sum(channels), 1, 1, dtype=dtype, seed=c)).requires_grad_() for c in (16, 8)]
            ys, means, variances = zip(*pointwise_batch_norm_group(maps, weights, relu=relu), strict=True)
            found += [*means, *variances, *gradients_of(torch.cat(ys, dim=1), [*maps, *weights], wrap)]
        return found

    return run


def group_in_one(x: Tensor, depthwise: Tensor, other: Tensor, pointwise: Tensor, **arguments: int) -> Tensor:
    """The results of two convolutions, of which only the second runs with the arguments."""
    group = [SeparableConvolution(depthwise, pointwise), SeparableConvolution(other, pointwise, **arguments)]
    return torch.cat([y.flatten() for y in separable_conv2d_group(x, group)])


def pair(x: Tensor, depthwise: Tensor, pointwise: Tensor, other: Tensor, last: Tensor, **arguments: int) -> Tensor:
    """Two convolutions with a norm between, of which only the first runs with the arguments."""
    first, second = (
        SeparableConvolution(depthwise, pointwise, **arguments),
        SeparableConvolution(other, last, padding=1),
    )
    return separable_conv2d_group(x, [SeparablePair(first, nn.BatchNorm2d(7, affine=False), second)])[0]


# Odd sizes: rests shorter than a vector, and bytes left over between the end of a tensor and of its memory.
SHAPES = {"5x17x5x3": (5, 17, 5, 3), "2x8x9x11": (2, 8, 9, 11), "1x3x61x43": (1, 3, 61, 43)}
DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
OPERATORS: dict[str, Callable[[tuple[int, ...], torch.dtype, str], Run]] = {
    "mixed_sum": lambda shape, dtype, layout: mixture([None] * 3, shape, dtype, layout),
    "batch_norm_mixed_sum": lambda shape, dtype, layout: mixture(
        [nn.BatchNorm2d(shape[1]), None, nn.BatchNorm2d(shape[1], affine=False)], shape, dtype, layout
    ),
    "depthwise_conv2d": lambda shape, dtype, layout: convolution(
        depthwise_conv2d, [(shape[1], 1, 3, 3)], shape, dtype, layout
    ),
    "separable_conv2d": lambda shape, dtype, layout: convolution(
        separable_conv2d, [(shape[1], 1, 3, 3), (7, shape[1], 1, 1)], shape, dtype, layout
    ),
    "pool_batch_norm": pools,
    "pointwise_batch_norm_group": pointwise_norms,
    "separable_conv2d_group": lambda shape, dtype, layout: convolution(
        group_in_one, [(shape[1], 1, 3, 3), (shape[1], 1, 2, 2), (7, shape[1], 1, 1)], shape, dtype, layout
    ),
    "separable_conv2d_group, pair": lambda shape, dtype, layout: convolution(
        pair, [(shape[1], 1, 3, 3), (7, shape[1], 1, 1), (7, 1, 2, 2), (3, 7, 1, 1)], shape, dtype, layout
    ),
}


@pytest.fixture(params=OPERATORS)
def operator(request: pytest.FixtureRequest) -> Callable[[tuple[int, ...], torch.dtype, str], Run]:
    return OPERATORS[request.param]


on_all = [
    pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES),
    pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES),
    pytest.mark.parametrize("layout", ["contiguous", "channels_last"]),
]


def on_all_arguments(test: Callable[..., None]) -> Callable[..., None]:
    for mark in on_all:
        test = mark(test)
    return test


# ---- claims ----------------------------------------------------------------------------------------------------------


@with_filled_memory
@on_all_arguments
def test_every_element_of_a_result_is_written(
    operator: Callable[..., Run], shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    run = operator(shape, dtype, layout)
    with fresh_memory_of(ZERO_BYTES):
        expected = run(torch.clone)
    with fresh_memory_of(NAN_BYTES):
        found = run(torch.clone)
    assert all(tensor.isfinite().all() for tensor in found)
    assert all(map(torch.equal, found, expected))


def run_everything_then_overrun() -> None:
    """For a process whose malloc checks, on every free, the byte behind what was asked for."""
    for make, shape, dtype, layout in itertools.product(OPERATORS.values(), SHAPES.values(), DTYPES.values(), LAYOUTS):
        make(shape, dtype, layout)(torch.clone)
    print("nothing was overrun", flush=True)
    overrun = torch.empty(1001)
    behind = ctypes.c_ubyte.from_address(overrun.data_ptr() + 4 * overrun.numel())
    behind.value ^= 0xFF  # whatever stands there: malloc's check is a byte that depends on the address
    del overrun


@pytest.mark.skipif(not _is_there(CHECKING_MALLOC), reason=f"{CHECKING_MALLOC} is not there")
@pytest.mark.skipif(
    "libasan" in os.environ.get("LD_PRELOAD", ""), reason="AddressSanitizer looks at every write itself"
)
def test_nothing_is_written_behind_a_result() -> None:
    environment = os.environ | {"LD_PRELOAD": CHECKING_MALLOC, "MALLOC_CHECK_": "3", "PYTHONPATH": str(ROOT)}
    code = "from tests.kernels.test_memory_safety import run_everything_then_overrun as run; run()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout == "nothing was overrun\n", done.stderr
    assert done.returncode == -signal.SIGABRT  # the overrun at the end was noticed


@on_all_arguments
def test_nothing_is_read_or_written_beside_the_arguments(
    operator: Callable[..., Run], shape: tuple[int, ...], dtype: torch.dtype, layout: str
) -> None:
    run = operator(shape, dtype, layout)
    margin = 65  # at an address that is a multiple of nothing but the element's size
    buffers: list[tuple[Tensor, Tensor]] = []

    def amid_nan(tensor: Tensor) -> Tensor:
        buffer = torch.full((tensor.numel() + 2 * margin,), torch.nan, dtype=tensor.dtype)
        view = buffer.as_strided(tensor.shape, tensor.stride(), margin).copy_(tensor)
        buffers.append((buffer, buffer.clone()))
        return view

    expected, found = run(torch.clone), run(amid_nan)
    assert all(map(torch.equal, found, expected))
    for buffer, before in buffers:
        is_running_statistic = buffer.numel() == shape[1] + 2 * margin
        for part in (slice(margin), slice(-margin, None)) if is_running_statistic else (slice(None),):
            assert torch.equal(buffer[part].view(torch.uint8), before[part].view(torch.uint8))
