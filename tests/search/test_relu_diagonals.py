"""relu_diagonals is the slicing it stands for, with its gradients, twice."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dssp.spaces.relu_diagonals import relu_diagonals

SIZES = pytest.mark.parametrize(("height", "width"), [(8, 6), (5, 4), (4, 7), (3, 3), (1, 1)])


def sliced(x: Tensor) -> Tensor:
    r = x.relu()
    shifted = F.pad(r[:, :, 1::2, 1::2], (0, x.shape[3] % 2, 0, x.shape[2] % 2))
    return torch.cat([r[:, :, ::2, ::2], shifted], 1)


@SIZES
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_gradients_and_layout_are_those_of_slicing(height: int, width: int, layout: torch.memory_format) -> None:
    x = torch.randn(2, 3, height, width).to(memory_format=layout).requires_grad_()
    found, expected = relu_diagonals(x), sliced(x)
    assert torch.equal(found, expected)
    direction = torch.randn_like(expected)
    d_found, d_expected = (torch.autograd.grad(y, x, direction)[0] for y in (found, expected))
    assert torch.equal(d_found, d_expected)
    assert found.is_contiguous(memory_format=layout) and d_found.is_contiguous(memory_format=layout)


@SIZES
def test_it_is_differentiable_twice(height: int, width: int) -> None:
    x = torch.randn(1, 2, height, width, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(relu_diagonals, x)
    assert torch.autograd.gradgradcheck(relu_diagonals, x)
