"""First and second derivatives in float64 against differences, and the two ways to a first one against each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck


def assert_differentiable_twice(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
    """gradcheck, gradgradcheck, and that gradients which can be differentiated are those which cannot.

    gradgradcheck alone would not notice if the former were the gradients of another function.
    """
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)
    y = function(*inputs)
    grad = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    plain = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y, inputs, grad, create_graph=True), plain)
