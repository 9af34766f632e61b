"""The modules that drop into a supernet: FusedMixedEdge, FusedMixedNode, PruningMask, and prune_matrix()."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dssp_kernels.arguments import RELAXATIONS
from dssp_kernels.backend import implementation_for, transforms_are_active
from dssp_kernels.batch_norm_mixed_sum.op import batch_norm_mixed_sum
from dssp_kernels.folding import Begun, Parts, describe, norms_shared, parts_of
from dssp_kernels.mixed_sum.op import mixed_sum
from dssp_kernels.separable_conv.op import separable_conv2d_group
from dssp_kernels.sharing import SharedOutputs

Candidates = tuple[list[Tensor | None], list[nn.BatchNorm2d | None]]
"""What the candidates give, and the norms that are still to be applied to it, or None."""


def run_candidates(
    ops: Iterable[nn.Module | None],
    norm_is_shared: Sequence[bool],
    x: Tensor,
    training: bool,
    shared: SharedOutputs | None = None,
    runs: Sequence[bool] | None = None,
) -> Candidates:
    """What the candidates make of x, and the norms left to the mix; see FusedMixedEdge.candidate_outputs()."""
    folds = implementation_for(x.device) != "reference"
    ops = list(ops) if runs is None else [op if run else None for op, run in zip(ops, runs, strict=True)]
    apart = ["" if is_shared else parts_of(op) for op, is_shared in zip(ops, norm_is_shared, strict=True)]
    folded = {
        k: parts
        for k, parts in enumerate(apart)
        if folds and isinstance(parts, Parts) and parts.norm.training == training
    }
    begun = _run_first_steps(folded, x, shared)
    outputs: list[Tensor | None] = []
    norms: list[nn.BatchNorm2d | None] = []
    for k, (op, is_shared, parts) in enumerate(zip(ops, norm_is_shared, apart, strict=True)):
        found = None if shared is None or is_shared else shared.of(op, x, parts)
        if found is not None:
            output, norm = found
            if norm is not None and not (folds and norm.training == training):
                output, norm = norm(output), None
            outputs.append(output)
            norms.append(norm)
        elif k in folded:
            outputs.append(folded[k].before_norm(x, begun.get(k)))
            norms.append(folded[k].norm)
        else:
            outputs.append(None if op is None else op(x))
            norms.append(None)
    return outputs, norms


def _run_first_steps(bodies: dict[int, Parts], x: Tensor, shared: SharedOutputs | None) -> dict[int, Begun]:
    """What x is after the first steps of those bodies that need not take them alone.

    Separable convolutions run as one operation; what `shared` holds already is not run again.
    """
    starts = {k: parts.separable_start(x) for k, parts in bodies.items()}
    separable = {k: convolution for k, (convolution, _) in starts.items() if convolution is not None}
    begun: dict[int, Begun] = {}
    if separable:
        outputs = separable_conv2d_group(x, list(separable.values()))
        begun = {k: Begun(output, starts[k][1]) for k, output in zip(separable, outputs, strict=True)}
    if shared is not None:
        for k, parts in bodies.items():
            if (after := shared.after_first_step(parts, x)) is not None:
                begun[k] = Begun(after, 1)
    return begun


def mix(candidates: Candidates, training: bool, alpha: Tensor, mask: Tensor | None, relaxation: str) -> Tensor:
    """One kernel over what run_candidates() gave."""
    outputs, norms = candidates
    if any(norm is not None for norm in norms):
        return batch_norm_mixed_sum(outputs, alpha, mask, norms=norms, training=training, relaxation=relaxation)
    return mixed_sum(outputs, alpha, mask, relaxation=relaxation)


class FusedMixedEdge(nn.Module):
    """One edge of a supernet: sigmoid(mask) * sum_k softmax(alpha)_k * ops[k](x), mixed in one kernel.

    Replaces DARTS' MixedOp (Liu et al. 2019, eq. 2). The candidates live in ``_ops`` as they do there, so checkpoints
    of the candidates load both ways. A BatchNorm2d that a candidate ends in is computed inside the mix wherever that is
    certain to be the same (see dssp_kernels.folding); repr() tells which candidates that leaves out, and why.

    Args:
        ops: the K candidate operations. None, or a module that returns None, is the zero op.
        alpha: architecture parameters [K]; a Parameter is registered, any other tensor is only referred to. By default
            the edge owns a Parameter drawn from 1e-3 * N(0, 1), as DARTS does. False: it has none, forward() gets it.
        mask: gate logit [1]. By default the edge owns a Parameter initialised to 1. False: it has none, and no gate
            unless forward() is given one.
        relaxation: ``"softmax"`` over alpha, or ``"given"``: alpha holds the weights themselves.

    Whether an edge is pruned is not part of its state_dict.
    """

    alpha: Tensor | None
    mask: Tensor | None

    def __init__(
        self,
        ops: Iterable[nn.Module | None],
        *,
        alpha: Tensor | Literal[False] | None = None,
        mask: Tensor | Literal[False] | None = None,
        relaxation: str = "softmax",
    ) -> None:
        super().__init__()
        self._ops = nn.ModuleList(ops)  # type: ignore[arg-type]  # entries may be None, as in nn.Module itself
        if not any(op is not None for op in self._ops):
            raise ValueError(f"ops: expected at least one module, got {len(self._ops)} entries without any")
        if relaxation not in RELAXATIONS:
            raise ValueError(f"relaxation: expected one of {', '.join(RELAXATIONS)}, got {relaxation!r}")
        for name, value in (("alpha", alpha), ("mask", mask)):
            if value is not None and value is not False and not isinstance(value, Tensor):
                raise TypeError(
                    f"{name}: expected a tensor, None (own one) or False (none), got {type(value).__name__}"
                )
        self.relaxation = relaxation
        self.candidates = len(self._ops)
        self._norm_is_shared = norms_shared(self._ops)
        self.alpha = (
            nn.Parameter(1e-3 * torch.randn(self.candidates)) if alpha is None else None if alpha is False else alpha
        )
        self.mask = nn.Parameter(torch.ones(1)) if mask is None else None if mask is False else mask
        self._pruned = self._removed = False
        self._dataless: list[nn.Module | None] = []  # copies of the candidates that hold no memory, once pruned
        self._output_shapes: dict[torch.Size, torch.Size] = {}

    @property
    def is_pruned(self) -> bool:
        """True if the edge runs no candidate and its output is zero."""
        return self._pruned

    def prune(self) -> None:
        """Close the edge: no candidate runs, the output is zeros. restore() opens it again."""
        self._pruned = True
        self._dataless = self._dataless or _without_data(self._ops)  # now, because torch.compile copies no modules

    def restore(self) -> None:
        """Open a pruned edge again. Raises RuntimeError after remove()."""
        if self._removed:
            raise RuntimeError("restore: the edge was removed for good, its candidates no longer exist")
        self._pruned = False  # the copies stay: whoever measures an edge closes and opens it again and again

    def remove(self) -> None:
        """Prune for good: the candidates and their memory are given up."""
        self.prune()
        self._removed = True
        self._ops._modules.clear()

    def remove_candidate(self, position: int) -> None:
        """Give up one candidate and its memory: from now on it is the zero op. Its alpha stays where it is.

        Raises ValueError if it is gone already or the last one.
        """
        left = [k for k, op in enumerate(self._ops) if op is not None]
        if position not in left or len(left) == 1:
            raise ValueError(f"position: expected one of the candidates {left}, and not the last one, got {position}")
        self._ops[position] = None  # type: ignore[assignment]  # as in __init__
        if self._dataless:
            self._dataless[position] = None

    def unshared_candidates(self) -> list[nn.Module | None]:
        """The candidates [K]; None for zero ops and for those that have their last norm in common with another one."""
        ops = self._ops._modules.values()  # a tenth of the time that iterating over a ModuleList takes
        return [None if is_shared else op for op, is_shared in zip(ops, self._norm_is_shared, strict=True)]

    def candidate_outputs(
        self,
        x: Tensor,
        training: bool,
        shared: SharedOutputs | None = None,
        runs: Sequence[bool] | None = None,
    ) -> Candidates:
        """What the candidates make of x, and the norms left to the mix: K entries each, all None when pruned.

        Norms in another mode than the one given are applied at once (frozen ones, say), and all where no kernel would.
        Pools that `shared` holds already are not run again. Candidates that are False in `runs` [K] do not run.
        """
        if self._pruned:
            return [None] * self.candidates, [None] * self.candidates
        return run_candidates(self._ops, self._norm_is_shared, x, training, shared, runs)

    def forward(self, x: Tensor, alpha: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Mix the candidates' outputs; alpha [K] and mask [1] default to the edge's own."""
        if self._pruned:
            return self.zero_output(x)
        alpha = self.alpha if alpha is None else alpha
        if alpha is None:
            raise ValueError("alpha: this edge owns none (alpha=False), expected a tensor [K] in forward()")
        mask = self.mask if mask is None else mask
        return mix(self.candidate_outputs(x, self.training), self.training, alpha, mask, self.relaxation)

    def zero_output(self, x: Tensor) -> Tensor:
        """Zeros in the shape the candidates would give for x, found once per shape on copies without data."""
        if torch.compiler.is_compiling():  # a look-up would tie the graph to one batch size
            shape = self._output_shape(x)
        else:
            if x.shape not in self._output_shapes:
                self._output_shapes[x.shape] = self._output_shape(x)
            shape = self._output_shapes[x.shape]
        channels_last = (
            x.dim() == 4
            and not transforms_are_active()  # vmap has no layouts
            and x.is_contiguous(memory_format=torch.channels_last)
        )
        memory_format = torch.channels_last if channels_last and len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format).zero_()

    def _output_shape(self, x: Tensor) -> torch.Size:
        with torch.no_grad():
            for op in self._dataless or _without_data(self._ops):
                y = None if op is None else op(torch.empty(x.shape, dtype=x.dtype, device="meta"))
                if y is not None:
                    return y.shape
        raise ValueError("ops: every candidate returned None, so the shape of the edge's output is unknown")

    def extra_repr(self) -> str:
        """What repr() shows besides the candidates."""
        gate = "no gate" if self.mask is None else "gated"
        text = f"candidates={self.candidates}, {self.relaxation}, {gate}{', pruned' if self._pruned else ''}"
        return text if self._removed else f"{text}; {describe(self._ops, self._norm_is_shared)}"


def _without_data(ops: Iterable[nn.Module | None]) -> list[nn.Module | None]:
    """Copies that hold no memory but still know what shape they make of an input; no norm of them counts batches."""
    return [None if op is None else copy.deepcopy(op).to("meta").eval() for op in ops]


class FusedMixedNode(nn.Module):
    """A node of a cell: the sum of its E incoming mixed edges, all E*K candidates in one kernel.

    Args:
        edges: E FusedMixedEdge with the same number of candidates and the same relaxation.
    """

    def __init__(self, edges: Iterable[FusedMixedEdge]) -> None:
        super().__init__()
        self.edges = nn.ModuleList(edges)
        if not len(self.edges):
            raise ValueError("edges: expected at least one edge, got none")
        for i, edge in enumerate(self.edges):
            if not isinstance(edge, FusedMixedEdge):
                raise TypeError(f"edges[{i}]: expected a FusedMixedEdge, got {type(edge).__name__}")
            first: FusedMixedEdge = self.edges[0]  # type: ignore[assignment]  # ModuleList yields Module
            if (edge.candidates, edge.relaxation) != (first.candidates, first.relaxation):
                raise ValueError(
                    f"edges[{i}]: expected {first.candidates} candidates under {first.relaxation!r} like the first "
                    f"edge, got {edge.candidates} under {edge.relaxation!r}"
                )
            if (edge.mask is None, edge.alpha is None) != (first.mask is None, first.alpha is None):
                raise ValueError(f"edges[{i}]: either every edge of a node owns alpha (and a mask) or none does")
        self.relaxation = first.relaxation

    def forward(
        self,
        states: Sequence[Tensor],
        alpha: Tensor | None = None,
        mask: Tensor | None = None,
        shared: SharedOutputs | None = None,
        runs: Sequence[Sequence[bool]] | None = None,
        addend: Tensor | None = None,
    ) -> Tensor:
        """Sum over the edges; ``states[e]`` enters edge e. alpha [E, K] and mask [E] default to the edges' own.

        Nodes that are given one `shared` in the same forward pass run a pool once per state, not once per edge.
        Candidates that are False in `runs` [E, K] do not run: they are zero ops in this pass. `addend`, of the result's
        shape, is added: what has been computed elsewhere.
        """
        if len(states) != len(self.edges):
            raise ValueError(f"states: expected one tensor per edge ({len(self.edges)}), got {len(states)}")
        training = self.edges[0].training  # of the edges: the node itself may be a mere grouping of them
        outputs: list[Tensor | None] = []
        norms: list[nn.BatchNorm2d | None] = []
        for e, (edge, state) in enumerate(zip(self.edges, states, strict=True)):
            chosen = None if runs is None else runs[e]
            edge_outputs, edge_norms = edge.candidate_outputs(state, training, shared, chosen)  # type: ignore[operator]
            outputs += edge_outputs
            norms += edge_norms
        if all(output is None for output in outputs):
            return self.edges[0].zero_output(states[0]) if addend is None else addend  # type: ignore[operator]
        if alpha is None:
            if self.edges[0].alpha is None:
                raise ValueError("alpha: the edges own none (alpha=False), expected a tensor [E, K] in forward()")
            alpha = torch.stack([edge.alpha for edge in self.edges])  # type: ignore[misc]
        if mask is None and self.edges[0].mask is not None:
            mask = torch.cat([edge.mask.reshape(1) for edge in self.edges])  # type: ignore[operator]
        mixed = mix((outputs, norms), training, alpha, mask, self.relaxation)
        return mixed if addend is None else mixed.add_(addend)  # no backward pass reads the mix


class PruningMask(nn.Module):
    """A learnable gate: sigmoid(mask) * x, with mask [1] initialised to 1."""

    def __init__(self) -> None:
        super().__init__()
        self.mask = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.mask).to(x.dtype) * x


def prune_matrix(matrix: Tensor, mask: Tensor) -> Tensor:
    """matrix where mask is 1, zero where it is 0 (whatever the matrix holds there, NaN included).

    Args:
        matrix: any shape, for example an adjacency or weight matrix.
        mask: the same shape; bool, or numbers that are all 0 or 1.

    Raises:
        ValueError: naming both shapes if they differ, or when the mask holds anything but 0 and 1.
    """
    if matrix.shape != mask.shape:
        raise ValueError(f"mask: expected the matrix's shape {list(matrix.shape)}, got {list(mask.shape)}")
    if mask.dtype is not torch.bool:
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ValueError("mask: expected only 0 and 1, got other values")
        mask = mask != 0
    return torch.where(mask, matrix, 0)
