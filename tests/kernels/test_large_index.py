"""Tensors of more than 2^31 elements: where the kernels compute places in memory, nothing wraps around.

Memory that nobody has written costs nothing: a tensor of zeros with a few values at its end takes no space. Triton's
interpreter is made to run the first and last programs only; the slow tests write whole results of 4 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import batch_norm_mixed_sum, depthwise_conv2d, get_backend, mixed_sum, separable_conv2d, set_backend
from dssp_kernels.backend import HAS_TRITON, WHY_NO_CPU_KERNELS

with_cpu_kernels = pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")
with_interpreter = pytest.mark.skipif(
    not HAS_TRITON or os.environ.get("TRITON_INTERPRET") != "1", reason="Triton's interpreter is not there"
)
FREE = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
with_memory = pytest.mark.skipif(FREE < 10, reason=f"needs 10 GiB of free memory, there are {FREE:.1f}")


@pytest.fixture
def cpu_kernels() -> Iterator[None]:
    before = get_backend()
    set_backend("cpu")
    yield
    set_backend(before)


def zeros_but_for_the_end(*shape: int, end: int = 5000, seed: int = 0) -> Tensor:
    """Float16, channels_last where there are four dimensions. Memory fresh from the system is zero."""
    tensor = torch.empty(shape, dtype=torch.float16)
    if len(shape) == 4:
        batch, channels, height, width = shape
        tensor = tensor.view(batch, height, width, channels).permute(0, 3, 1, 2)
    assert tensor.numel() > 2**31
    flat(tensor)[-end:] = torch.randn(end, generator=torch.Generator().manual_seed(seed)).half()
    return tensor


def flat(tensor: Tensor) -> Tensor:
    """The elements as they lie in memory."""
    return tensor.as_strided((tensor.numel(),), (1,))


# ---- the interpreter's first and last programs -----------------------------------------------------------------------


def run_only(monkeypatch: pytest.MonkeyPatch, *programs: int) -> None:
    """Of every dimension of a grid with more than 100 programs; negative ones count from the end."""
    from triton.runtime import interpreter

    def some(*arguments: int) -> range | list[int]:
        count = arguments[0]
        return [p % count for p in programs] if len(arguments) == 1 and count > 100 else range(*arguments)

    monkeypatch.setattr(interpreter, "range", some, raising=False)


N = 2**31 + 4099  # whole vectors, and a rest


@with_interpreter
def test_triton_mixed_sum_reaches_the_last_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    from dssp_kernels.mixed_sum import triton_launchers

    x, alpha = zeros_but_for_the_end(N), torch.tensor([[0.25, 2.0]])
    run_only(monkeypatch, 0, -5, -4, -3, -2, -1)
    y = triton_launchers.mixed_sum_forward([x, x], alpha, None, None, False)
    torch.testing.assert_close(y[-4000:], 2.25 * x[-4000:], rtol=2e-3, atol=2e-3)
    assert not y[:1000].any()


@with_interpreter
def test_triton_mixed_sum_writes_the_last_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    from dssp_kernels.mixed_sum import triton_launchers

    n = 2**31 + 3  # the interpreter's range() ends at 2^31, so what lies beyond is the rest shorter than a vector
    programs = 2**31 // triton_launchers._block(2, 2)[0] - 100  # so that the first 100 make two steps
    monkeypatch.setattr(triton_launchers, "PROGRAMS", programs)
    run_only(monkeypatch, 0, 99, -1)
    x, grad, alpha = zeros_but_for_the_end(n), zeros_but_for_the_end(n, seed=1), torch.tensor([[0.25, 2.0]])
    d_outputs, _, _ = triton_launchers.mixed_sum_backward(
        grad, [x, None], alpha, None, None, False, [True, False], needs_parameter_grad=True
    )
    torch.testing.assert_close(d_outputs[0][-4000:], 0.25 * grad[-4000:])
    assert not d_outputs[0][:1000].any()


@with_interpreter
@pytest.mark.parametrize("channels", [8, 64])
def test_triton_batch_norm_mixed_sum_reaches_the_last_elements(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dssp_kernels.batch_norm_mixed_sum import reference, triton_launchers

    x = zeros_but_for_the_end(2**28 // channels + 1, channels, 4, 2)
    grad = zeros_but_for_the_end(2**28 // channels + 1, channels, 4, 2, seed=1)
    run_only(monkeypatch, 0, -2, -1)
    mean, variance = torch.linspace(-1, 1, channels), torch.linspace(0.5, 2, channels)
    mixture = ([x], torch.ones(1, 1), None, None, [], [])
    norms = ([reference.RUNNING], [0.0], False)
    y, *statistics = triton_launchers.batch_norm_mixed_sum_forward(*mixture, [mean], [variance], *norms)
    torch.testing.assert_close(
        y[-1:].float(), (x[-1:].float() - mean.view(-1, 1, 1)) / variance.sqrt().view(-1, 1, 1), rtol=2e-3, atol=2e-3
    )
    needs = [True], [False], [False], False
    d_outputs, _, _ = triton_launchers.batch_norm_mixed_sum_backward(grad, *mixture, *statistics, *norms, *needs)
    torch.testing.assert_close(
        d_outputs[0][-1:].float(), grad[-1:].float() / variance.sqrt().view(-1, 1, 1), rtol=2e-3, atol=2e-3
    )


# ---- C++ -------------------------------------------------------------------------------------------------------------


@with_cpu_kernels
@pytest.mark.parametrize("far", range(4), ids=["images", "channels", "rows", "columns"])
@pytest.mark.parametrize("name", ["depthwise_conv2d", "separable_conv2d"])
def test_convolutions_read_what_lies_far_apart(cpu_kernels: None, name: str, far: int) -> None:
    strides = [4, 2, 1]
    strides.insert(far, 2**31 + 1)
    x = torch.empty(2**31 + 16, dtype=torch.float16).as_strided((2, 2, 2, 2), strides)
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    weights = [torch.randn(2, 1, 3, 3).half(), torch.randn(3, 2, 1, 1).half()]
    convolve, weights = (depthwise_conv2d, weights[:1]) if name == "depthwise_conv2d" else (separable_conv2d, weights)

    def run(x: Tensor) -> list[Tensor]:
        leaves = [tensor.detach().requires_grad_() for tensor in (x, *weights)]
        y = convolve(*leaves, padding=1, relu=True)
        return [y, *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape).half())]

    assert all(map(torch.equal, run(x), run(x.contiguous())))


@pytest.mark.slow
@with_memory
@with_cpu_kernels
def test_mixed_sum_of_more_than_2_to_the_31_elements(cpu_kernels: None) -> None:
    x, grad = zeros_but_for_the_end(N).requires_grad_(), zeros_but_for_the_end(N, seed=1)
    alpha = torch.tensor([0.25, 2.0], requires_grad=True)
    y = mixed_sum([x.detach(), x], alpha, relaxation="given")
    torch.testing.assert_close(y.detach()[-5000:], 2.25 * x.detach()[-5000:], rtol=2e-3, atol=2e-3)
    assert not y[:5000].any()
    d_alpha, d_x = torch.autograd.grad(y, (alpha, x), grad)
    torch.testing.assert_close(d_x[-5000:], 2 * grad[-5000:])
    dot = grad[-5000:].double() @ x.detach()[-5000:].double()
    torch.testing.assert_close(d_alpha.double(), torch.stack([dot, dot]), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@with_memory
@with_cpu_kernels
def test_batch_norm_of_more_than_2_to_the_31_elements(cpu_kernels: None) -> None:
    batch, channels = 2**25 + 1, 16
    x, norm = zeros_but_for_the_end(batch, channels, 2, 2), nn.BatchNorm2d(channels, affine=False)
    end = x[-79:].double()  # all that is not zero: 5000 elements lie in the last 79 images
    y = batch_norm_mixed_sum([x], torch.ones(1), norms=[norm], training=True)
    count = 4 * batch
    mean = end.sum((0, 2, 3)) / count
    variance = end.square().sum((0, 2, 3)) / count - mean.square()
    torch.testing.assert_close(norm.running_mean.double(), 0.1 * mean, rtol=1e-4, atol=1e-9)
    expected = (end - mean.view(-1, 1, 1)) / (variance + norm.eps).sqrt().view(-1, 1, 1)
    torch.testing.assert_close(y[-79:].double(), expected, rtol=2e-3, atol=2e-3)


@pytest.mark.slow
@with_memory
@with_cpu_kernels
@pytest.mark.parametrize("name", ["depthwise_conv2d", "separable_conv2d"])
def test_convolutions_of_more_than_2_to_the_31_elements(cpu_kernels: None, name: str) -> None:
    rows, columns, channels = 2**14 + 1, 2**14, 8
    x = zeros_but_for_the_end(1, channels, rows, columns, end=3 * columns * channels)
    weights = [torch.randn(channels, 1, 3, 3).half(), torch.randn(channels, channels, 1, 1).half()]
    convolve: Callable[..., Tensor] = depthwise_conv2d
    if name == "depthwise_conv2d":
        weights = weights[:1]
    else:
        convolve = separable_conv2d
    y = convolve(x, *weights, padding=1)[:, :, -3:].clone()
    assert torch.equal(y, convolve(x[:, :, -4:], *weights, padding=1)[:, :, -3:])
