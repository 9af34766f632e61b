"""Results so large that they are written past the cache (kStreamedBytes in cpu_vectors.h) equal those of small ones."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import batch_norm_mixed_sum, get_backend, mixed_sum, set_backend
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.tensors import LAYOUTS

pytestmark = with_cpu_kernels
STREAMED_BYTES = 4 << 20
IMAGES = 10


@pytest.fixture(autouse=True)
def cpu_kernels() -> Iterator[None]:
    before = get_backend()
    set_backend("cpu")
    yield
    set_backend(before)


def large(dtype: torch.dtype, layout: str, seed: int) -> Tensor:
    """Odd in every dimension but the images, which are small tensors each, and of more bytes than are kept near."""
    shape = (IMAGES, 11, 145, 143)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    assert images.nbytes > STREAMED_BYTES > images.nbytes * 3 / IMAGES  # the three gradients of an image are small
    return LAYOUTS[layout](images)


def results(outputs: list[Tensor], grad: Tensor, norms: list[nn.BatchNorm2d | None] | None) -> list[Tensor]:
    """y and the gradients of three outputs: one is normalised, one is not, one lies on an edge that is switched off."""
    alpha, mask = torch.tensor([[0.5], [-1.0], [2.0]]), torch.tensor([1.0, -0.5, 3.0])
    leaves = [output.detach().requires_grad_() for output in outputs]
    active = torch.tensor([True, True, False])
    if norms is None:
        y = mixed_sum(leaves, alpha, mask, relaxation="given", active=active)
    else:
        y = batch_norm_mixed_sum(leaves, alpha, mask, norms=norms, training=False, relaxation="given", active=active)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("normalised", [False, True], ids=["mixed_sum", "batch_norm_mixed_sum"])
def test_images_come_out_as_they_do_alone(normalised: bool, dtype: torch.dtype, layout: str) -> None:
    norms: list[nn.BatchNorm2d | None] | None = None
    if normalised:
        norms = [nn.BatchNorm2d(11), None, nn.BatchNorm2d(11)]
        for norm in (norms[0], norms[2]):
            norm.running_mean.uniform_(-1, 1)  # type: ignore[union-attr]
            norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    outputs, grad = [large(dtype, layout, seed) for seed in range(3)], large(dtype, layout, 3)
    together = results(outputs, grad, norms)
    for i in range(IMAGES):
        one = slice(i, i + 1)
        alone = results([output[one] for output in outputs], grad[one], norms)
        assert all(torch.equal(some, whole[one]) for some, whole in zip(alone, together, strict=True))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_and_gradients_of_a_large_batch_are_those_of_pytorch(layout: str) -> None:
    output = large(torch.float32, layout, 0).requires_grad_()
    grad, alpha, norm = large(torch.float32, layout, 1), torch.tensor([1.5], requires_grad=True), nn.BatchNorm2d(11)
    found_y = batch_norm_mixed_sum([output], alpha, norms=[norm], training=True, relaxation="given")
    found = [found_y, *torch.autograd.grad(found_y, [output, alpha, norm.weight, norm.bias], grad)]
    norm = nn.BatchNorm2d(11).double()
    exact = output.detach().double().requires_grad_()
    alpha = alpha.detach().double().requires_grad_()
    y = alpha * norm(exact)
    expected = [y, *torch.autograd.grad(y, [exact, alpha, norm.weight, norm.bias], grad.double())]
    for some, right in zip(found, expected, strict=True):
        torch.testing.assert_close(some.double(), right, rtol=1e-5, atol=1e-5 * float(right.detach().abs().max()))
