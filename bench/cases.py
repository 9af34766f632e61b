"""What is measured: the cases (shape, layout, dtype, K, E, pruned share), their inputs and the bytes they must move."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

DARTS_SHAPES = ((64, 16, 32, 32), (64, 32, 16, 16), (64, 64, 8, 8))
LARGE_SHAPE = (128, 64, 64, 64)  # 64 MiB per tensor in 16 bits, 128 MiB in 32: larger than any cache
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One mix: `edges` edges of `candidates` outputs each, all of one shape; the first `pruned_edges` edges are pruned.

    `flagged` says how an edge is pruned: by the device flag (its candidates still ran) or, if False, by removal
    (its candidates never ran: None in their place).
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"
    candidates: int = 7
    edges: int = 1
    pruned_edges: int = 0
    flagged: bool = False

    @property
    def pruned_inputs(self) -> int:
        return self.pruned_edges * self.candidates

    @property
    def active_inputs(self) -> int:
        return self.edges * self.candidates - self.pruned_inputs

    @property
    def tensor_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    def minimum_bytes(self, backward: bool) -> int:
        """Fewest bytes through memory: each active input read and the output written; with `backward` also the output's
        gradient and each active input read and each active gradient written, plus the zeros a flagged edge owes."""
        tensors = self.active_inputs + 1
        if backward:
            tensors += 2 * self.active_inputs + 1 + (self.pruned_inputs if self.flagged else 0)
        return tensors * self.tensor_bytes

    def __str__(self) -> str:
        pruned = f", {self.pruned_edges} {'flagged' if self.flagged else 'removed'}" if self.pruned_edges else ""
        node = f" E={self.edges}{pruned}" if self.edges > 1 else ""
        return f"{'x'.join(map(str, self.shape))} {self.layout} {self.dtype} K={self.candidates}{node}"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one mix and the gradient that comes back to its output."""

    outputs: list[Tensor | None]
    alpha: Tensor  # [K], or [E, K] for a node
    mask: Tensor  # [], or [E] for a node
    active: Tensor | None  # bool [E]; None where nothing is pruned
    grad: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [*(output for output in self.outputs if output is not None), self.alpha, self.mask]

    def without(self, pruned: int) -> Inputs:
        """The same mix after its first `pruned` candidates were removed."""
        return replace(self, outputs=[*[None] * pruned, *self.outputs[pruned:]])

    def to(self, *, dtype: torch.dtype | None = None, layout: str | None = None) -> Inputs:
        """Copy with fresh leaves. `dtype` converts everything; `layout` lays out the activations only."""

        def copy(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
            return tensor.detach().to(dtype=dtype, memory_format=memory_format, copy=True).requires_grad_()

        activations = LAYOUTS[layout] if layout else torch.preserve_format
        return Inputs(
            outputs=[None if output is None else copy(output, activations) for output in self.outputs],
            alpha=copy(self.alpha, torch.preserve_format),
            mask=copy(self.mask, torch.preserve_format),
            active=self.active,
            grad=copy(self.grad, activations).detach(),
        )


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs of a case, as a network has them before any edge is removed.

    Candidates have different means and the gradient is not centred, so <gradient, output> is no sum that cancels to
    almost nothing: the relative error of such a sum says more about the draw than about the code that computed it.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def activation(mean: float) -> Tensor:
        values = torch.randn(case.shape, generator=generator, device=device) + mean
        return values.to(dtype=DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])

    def parameters(*shape: int) -> Tensor:
        dtype = torch.float64 if case.dtype == "float64" else torch.float32
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_()

    node = (case.edges,) if case.edges > 1 else ()
    means = torch.linspace(-1, 1, case.edges * case.candidates).tolist()
    flags = torch.arange(case.edges, device=device) >= case.pruned_edges
    return Inputs(
        outputs=[activation(mean).requires_grad_() for mean in means],
        alpha=parameters(*node, case.candidates),
        mask=parameters(*node),
        active=flags if case.pruned_edges else None,
        grad=activation(1.0),
    )


def make_cases(
    shapes: list[tuple[int, ...]],
    layouts: list[str],
    dtypes: list[str],
    candidates: list[int],
    edges: int,
    pruned: list[float],
    quick: bool,
) -> list[Case]:
    """Every combination as a single edge, then a node of `edges` edges for each pruned share.

    The node is measured at the smallest shape, first dtype and first K: its pruned share is what varies there. `quick`
    keeps one layout of the node and leaves out the flagged form.
    """
    cases = [Case(*values) for values in product(shapes, layouts, dtypes, candidates)]
    smallest = min(shapes, key=lambda shape: torch.Size(shape).numel())
    for layout, share in product(layouts[:1] if quick else layouts, pruned):
        node = Case(smallest, layout, dtypes[0], candidates[0], edges, pruned_edges=round(share * edges))
        cases.append(node)
        if node.pruned_edges and not quick:
            cases.append(replace(node, flagged=True))
    return cases
