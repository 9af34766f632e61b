"""What the tests of convolutions share: random tensors, and the comparison with eager and float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.kernels.tensors import SLACK


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(convolution: Callable[..., Tensor], *tensors: Tensor, **arguments: int) -> list[Tensor]:
    """The result and the gradients of all tensors, for a random gradient of the result."""
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = convolution(*leaves, **arguments)
    return [y.detach(), *torch.autograd.grad(y, leaves, normal(*y.shape, dtype=y.dtype, seed=1))]


def exact_results(eager: Callable[..., Tensor], *tensors: Tensor, **arguments: int) -> list[Tensor]:
    """What run() should give, in float64 throughout; the gradient of the result is rounded as run() rounds it."""
    doubles = tuple(tensor.double() for tensor in tensors)
    y = eager(*doubles, **arguments)
    grad = normal(*y.shape, dtype=tensors[0].dtype, seed=1).double()
    return [y, *torch.autograd.functional.vjp(lambda *t: eager(*t, **arguments), doubles, grad)[1]]


def assert_as_exact(
    convolution: Callable[..., Tensor], eager: Callable[..., Tensor], *tensors: Tensor, **arguments: int
) -> None:
    """Error against float64 at most twice eager's own, plus a slack relative to the tensor's largest value."""
    dtype, exact = tensors[0].dtype, exact_results(eager, *tensors, **arguments)
    found, theirs = run(convolution, *tensors, **arguments), run(eager, *tensors, **arguments)
    for i, (ours, eagers, true) in enumerate(zip(found, theirs, exact, strict=True)):
        name = f"gradient {i}" if i else "y"
        assert ours.shape == true.shape and ours.dtype is dtype, name
        if true.numel():
            error, allowed = ((value.double() - true).abs().max() for value in (ours, eagers))
            scale = max(1.0, float(true.abs().max()))
            assert error <= 2 * allowed + SLACK[dtype] * scale, f"{name}: error {error:.3g}, eager has {allowed:.3g}"


def run_group(
    compute: Callable[..., list[Tensor]],
    kinds: Sequence[Any],
    tensors: Sequence[Tensor],
    *,
    needed: Sequence[bool] | None = None,
    used: Sequence[bool] | None = None,
    double: bool = False,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """compute(kinds, *tensors): the results, and the gradients of all tensors for random ones of the results used."""
    needed, used = needed or [True] * len(tensors), used or [True] * len(kinds)
    dtype = torch.float64 if double else tensors[0].dtype
    leaves = [tensor.detach().to(dtype).requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
    results = compute(kinds, *leaves)
    grads = [normal(*y.shape, dtype=tensors[0].dtype, seed=k).to(dtype) for k, y in enumerate(results)]
    chosen = [k for k, (y, use) in enumerate(zip(results, used, strict=True)) if use and y.requires_grad]
    torch.autograd.backward([results[k] for k in chosen], [grads[k] for k in chosen])
    return [y.detach() for y in results], [leaf.grad for leaf in leaves]
