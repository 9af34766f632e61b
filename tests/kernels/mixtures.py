"""Mixtures to test with, and what the float64 oracle and eager PyTorch make of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dssp_kernels.mixed_sum.reference import mixed_sum_reference

Mix = Callable[..., Tensor]


@dataclass(frozen=True)
class Mixture:
    """Arguments of mixed_sum and a gradient for its result."""

    outputs: tuple[Tensor | None, ...]
    alpha: Tensor
    mask: Tensor | None
    active: Tensor | None
    relaxation: str
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Mixture:
        """The same with every floating-point tensor in another dtype."""

        def cast(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(dtype)

        outputs = tuple(cast(output) for output in self.outputs)
        return replace(self, outputs=outputs, alpha=cast(self.alpha), mask=cast(self.mask), grad=cast(self.grad))


def mixture(
    shape: Sequence[int],
    *,
    edges: int = 1,
    candidates: int = 3,
    dtype: torch.dtype = torch.float32,
    absent: Sequence[int] = (),
    gated: bool = True,
    inactive: Sequence[int] | None = None,
    relaxation: str = "softmax",
    layout: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    seed: int = 0,
) -> Mixture:
    """Random entries of one shape; ``absent`` are None, ``inactive`` edges are switched off."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    outputs = tuple(None if i in absent else layout(normal(*shape).to(dtype)) for i in range(edges * candidates))
    active = None if inactive is None else torch.tensor([edge not in inactive for edge in range(edges)])
    return Mixture(
        outputs,
        alpha=normal(edges, candidates),
        mask=normal(edges) if gated else None,
        active=active,
        relaxation=relaxation,
        grad=normal(*shape).to(dtype),
    )


def run(mix: Mix, m: Mixture) -> list[Tensor]:
    """The result and the gradients of alpha, mask and every entry, by a function with mixed_sum's arguments."""
    alpha, mask = m.alpha.detach().requires_grad_(), None if m.mask is None else m.mask.detach().requires_grad_()
    outputs = [None if output is None else output.detach().requires_grad_() for output in m.outputs]
    y = mix(outputs, alpha, mask, relaxation=m.relaxation, active=m.active)
    wanted = [tensor for tensor in (alpha, mask, *outputs) if tensor is not None]
    return [y.detach(), *torch.autograd.grad(y, wanted, m.grad.to(y.dtype), materialize_grads=True)]


def oracle(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, *, relaxation: str, active: Tensor | None
) -> Tensor:
    """mixed_sum by the reference formula."""
    return mixed_sum_reference(outputs, alpha, mask, relaxation == "softmax", active)


def eager(
    outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None, *, relaxation: str, active: Tensor | None
) -> Tensor:
    """The mix as DARTS code writes it, in the entries' own precision."""
    dtype = next(output.dtype for output in outputs if output is not None)
    alpha = alpha.reshape(-1, alpha.shape[-1])
    weights = (alpha.softmax(-1) if relaxation == "softmax" else alpha).to(dtype)
    unused = 0.0 * (alpha.sum() + (0.0 if mask is None else mask.sum()))  # keeps both in the graph if no edge is active
    total = sum(torch.zeros_like(output) for output in outputs if output is not None) + unused.to(dtype)
    for edge in range(alpha.shape[0]):
        if active is not None and not active[edge]:
            continue
        row = outputs[edge * alpha.shape[1] : (edge + 1) * alpha.shape[1]]
        if all(output is None for output in row):
            continue
        mixed = sum(w * o for w, o in zip(weights[edge], row, strict=True) if o is not None)
        total = total + (mixed if mask is None else mask[edge].to(dtype).sigmoid() * mixed)
    return total


def assert_as_exact_as_eager(found: Sequence[Tensor], m: Mixture, slack: float = 1e-6) -> None:
    """Error against float64 at most twice eager's own, plus ``slack`` relative to the tensor's largest value."""
    exact = run(oracle, m.to(torch.float64))
    for name, ours, theirs, true in zip(range(len(exact)), found, run(eager, m), exact, strict=True):
        assert ours.shape == true.shape
        error = (ours.double() - true).abs().max() if true.numel() else torch.tensor(0.0)
        allowed = 2 * (theirs.double() - true).abs().max() if true.numel() else torch.tensor(0.0)
        scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
        assert float(error) <= float(allowed) + slack * scale, (
            f"tensor {name}: error {error:.3g}, eager has {allowed / 2:.3g}"
        )
