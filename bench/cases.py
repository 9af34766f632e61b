"""One thing to measure: a mix (shape, layout, dtype, K, E, pruned edges, norms), its inputs, the bytes it must move."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Case:
    """One mix: `edges` edges of `candidates` outputs each, all of one shape; the first `pruned_edges` edges are pruned.

    `flagged` says how an edge is pruned: by the device flag (its candidates still ran) or, if False, by removal
    (its candidates never ran: None in their place). `folded`: every output goes through a BatchNorm2d without affine
    parameters in training mode, DARTS' own, which our side computes inside the mix.
    """

    shape: tuple[int, ...]
    layout: str = "contiguous"
    dtype: str = "float32"
    candidates: int = 7
    edges: int = 1
    pruned_edges: int = 0
    flagged: bool = False
    folded: bool = False

    @property
    def pruned_inputs(self) -> int:
        return self.pruned_edges * self.candidates

    @property
    def active_inputs(self) -> int:
        return self.edges * self.candidates - self.pruned_inputs

    @property
    def is_possible(self) -> bool:
        """BatchNorm in training mode refuses a single value per channel."""
        return not self.folded or torch.Size(self.shape).numel() > self.shape[1]

    @property
    def tensor_bytes(self) -> int:
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize

    def minimum_bytes(self, backward: bool) -> int:
        """Fewest bytes through memory: each active input read and the output written; with `backward` also the output's
        gradient and each active input read and each active gradient written, plus the zeros a flagged edge owes.

        With BatchNorm everything that is read is read twice, in both directions: no element can be normalised (and no
        gradient be written) before the sums over its whole channel are known.
        """
        reads = 2 if self.folded else 1
        tensors = reads * self.active_inputs + 1
        if backward:
            tensors += reads * (self.active_inputs + 1) + self.active_inputs
            tensors += self.pruned_inputs if self.flagged else 0
        return tensors * self.tensor_bytes

    def __str__(self) -> str:
        pruned = f", {self.pruned_edges} {'flagged' if self.flagged else 'removed'}" if self.pruned_edges else ""
        node = f" E={self.edges}{pruned}" if self.edges > 1 else ""
        norm = " BatchNorm" if self.folded else ""
        return f"{'x'.join(map(str, self.shape))} {self.layout} {self.dtype} K={self.candidates}{node}{norm}"


@dataclass(frozen=True)
class Inputs:
    """Arguments of one mix and the gradient that comes back to its output."""

    outputs: list[Tensor | None]
    alpha: Tensor  # [K], or [E, K] for a node
    mask: Tensor  # [], or [E] for a node
    active: Tensor | None  # bool [E]; None where nothing is pruned
    grad: Tensor
    norms: list[nn.BatchNorm2d | None] | None = None

    @property
    def leaves(self) -> list[Tensor]:
        return [*(output for output in self.outputs if output is not None), self.alpha, self.mask]

    def without(self, pruned: int) -> Inputs:
        """The same mix after its first `pruned` candidates were removed."""
        norms = None if self.norms is None else [*[None] * pruned, *self.norms[pruned:]]
        return replace(self, outputs=[*[None] * pruned, *self.outputs[pruned:]], norms=norms)

    def to(self, *, dtype: torch.dtype | None = None, layout: str | None = None) -> Inputs:
        """Copy with fresh leaves and norms. `dtype` converts everything; `layout` lays out the activations only."""

        def fresh(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
            return tensor.detach().to(dtype=dtype, memory_format=memory_format, copy=True).requires_grad_()

        activations = LAYOUTS[layout] if layout else torch.preserve_format
        norms = copy.deepcopy(self.norms)
        for norm in norms or ():
            if norm is not None and dtype is not None:
                norm.to(dtype)
        return Inputs(
            outputs=[None if output is None else fresh(output, activations) for output in self.outputs],
            alpha=fresh(self.alpha, torch.preserve_format),
            mask=fresh(self.mask, torch.preserve_format),
            active=self.active,
            grad=fresh(self.grad, activations).detach(),
            norms=norms,
        )


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """Random inputs of a case, as a network has them before any edge is removed.

    No <gradient, output> is a sum that cancels to almost nothing: the relative error of such a sum says more about the
    draw than about the code that computed it. Candidates have different means and the gradient is not centred; where
    BatchNorm takes the means away, the gradient also holds a different share of every candidate.
    """
    generator = torch.Generator(device).manual_seed(seed)
    parameter_dtype = torch.float64 if case.dtype == "float64" else torch.float32

    def activation(mean: float) -> Tensor:
        return torch.randn(case.shape, generator=generator, device=device) + mean

    def stored(values: Tensor) -> Tensor:
        return values.to(dtype=DTYPES[case.dtype], memory_format=LAYOUTS[case.layout])

    def parameters(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=parameter_dtype).requires_grad_()

    node = (case.edges,) if case.edges > 1 else ()
    means = torch.linspace(-1, 1, case.edges * case.candidates).tolist()
    outputs = [stored(activation(mean)).requires_grad_() for mean in means]
    alpha, mask, grad = parameters(*node, case.candidates), parameters(*node), activation(1.0)
    norms: list[nn.BatchNorm2d | None] | None = None
    if case.folded:
        with torch.no_grad():
            grad += sum(mean * output for mean, output in zip(means, outputs, strict=True))
        new_norm = partial(nn.BatchNorm2d, case.shape[1], affine=False, device=device, dtype=parameter_dtype)
        norms = [new_norm() for _ in outputs]
    flags = torch.arange(case.edges, device=device) >= case.pruned_edges
    return Inputs(list(outputs), alpha, mask, flags if case.pruned_edges else None, stored(grad), norms)
