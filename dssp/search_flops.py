"""What a search computes: the FLOPs of its passes through the supernet, known without watching them.

torch's FlopCounterMode cannot stay around a search: it hooks every module, modules with hooks are not folded into the
fused kernels, and another order of sums moves the result. So one image goes through a copy on the CPU, once: that tells
what each candidate and the rest of the network run on, hence cost, and a pass costs what runs in it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dssp.cost import copy_of_shapes
from dssp.methods.base import Method, Noise
from dssp.relaxation import Mixture
from dssp.supernet import Supernet
from dssp_kernels import FusedMixedEdge

Pass = Literal["forward", "architecture", "weights", "second order"]
"""What is derived from a forward pass: nothing; the gradient of alpha and masks; of the weights; of alpha, from the
product of the weights' gradient with a vector (see dssp.steps.hypergradient)."""

EXACT: tuple[Pass, ...] = ("weights", "weights", "second order")
FINITE_DIFFERENCE: tuple[Pass, ...] = ("weights", "weights", "architecture", "architecture")


@dataclass(frozen=True)
class Part:
    """A candidate, or a layer outside of them: the size of its input, and whether that depends on alpha, on weights."""

    module: nn.Module
    size: torch.Size
    on_alpha: bool
    on_weights: bool

    def cost(self, kind: Pass) -> int:
        """The gradient by the input costs what the layer costs, and so does that by the weight."""
        flops = self._flops("forward", self._forward)
        if kind == "second order" and flops:
            return self._flops(f"{kind} {self.on_alpha} {self.on_weights}", self._second_order)
        return flops * {"architecture": 1 + self.on_alpha, "weights": 2 + self.on_weights}.get(kind, 1)

    def _flops(self, what: str, run: Callable[[nn.Module], object]) -> int:
        """Counted once for all modules that are alike."""
        known = (what, repr(self.module), self.size)
        if known not in _KNOWN:
            module = copy_of_shapes(self.module, "cpu").float().eval().requires_grad_()
            with FlopCounterMode(display=False) as counter:
                run(module)
            _KNOWN[known] = counter.get_total_flops()
        return _KNOWN[known]

    @torch.no_grad()
    def _forward(self, module: nn.Module) -> None:
        module(torch.zeros(1, *self.size))

    def _second_order(self, module: nn.Module) -> None:
        """Kernels that cannot be differentiated twice give way to formulas that compute more, so it is tried out."""
        x = torch.zeros(1, *self.size, requires_grad=self.on_weights).clone()  # no leaf: those the counter cannot take
        y = module(x)
        gradient = torch.ones_like(y, requires_grad=True)
        first = torch.autograd.grad(y, [*[x] * self.on_weights, *module.parameters()], gradient, create_graph=True)
        outputs = [*first, y]
        torch.autograd.grad(outputs, [gradient, *[x] * self.on_alpha], [torch.ones_like(o) for o in outputs])


_KNOWN: dict[tuple[str, str, torch.Size], int] = {}
"""FLOPs by what is counted, repr of the module and size of its input."""


@dataclass
class Costs:
    """FLOPs of a pass per image: of each edge's candidates, by their key in it, over all its cells; of all the rest."""

    candidates: list[dict[str, int]]
    rest: int = 0


class SearchFlops:
    """Adds up in `total` what a search by a method computes, on all ranks together.

    A multiplication and an addition count as two; convolutions and matrix products count, mixing, norms and pools do
    not. What a mixture leaves out does not run and does not count; what is computed of zeros, or read by nobody, does.
    """

    def __init__(self, supernet: Supernet, method: Method) -> None:
        self.supernet, self.method, self.total = supernet, method, 0
        self._edges = [supernet.mixed_edges(edge)[0] for edge in supernet.edges()]
        self._parts: dict[torch.Size, list[tuple[Owner | None, Part]]] = {}
        self._costs: dict[tuple[torch.Size, Pass], Costs] = {}

    def add(self, passes: Sequence[Pass], images: int, shape: Sequence[int], noise: Noise) -> None:
        """Passes of so many images, of this shape [C, H, W] before the method downsamples them."""
        seen = self.method.downsampled(torch.empty(1, *shape, device="meta")).shape[1:]
        running = self._running(noise)
        for kind in passes:
            costs = self._costs_of(seen, kind)
            mixed = sum(edge.get(k, 0) for edge, keys in zip(costs.candidates, running, strict=True) for k in keys)
            self.total += images * (costs.rest + mixed)

    def _running(self, noise: Noise) -> list[list[str]]:
        """The keys of each edge's candidates that run in a pass."""
        left = [list(_left(edge)) for edge in self._edges]
        mixtures = self.method.mixtures(noise) if self.method.on_host else {}
        runs = [row for type in mixtures for row in mixtures[type].runs or ()]
        return [[k for k in keys if row[int(k)]] for keys, row in zip(left, runs, strict=True)] if runs else left

    def _costs_of(self, shape: torch.Size, kind: Pass) -> Costs:
        if (shape, kind) not in self._costs:
            if shape not in self._parts:
                self._parts[shape] = _parts(self.supernet, shape)
            self._costs[shape, kind] = _costs(self._parts[shape], len(self._edges), kind)
        return self._costs[shape, kind]


Owner = tuple[int, str]
"""The position of an edge over all cell types, and the key of a candidate in it."""


def _costs(parts: list[tuple[Owner | None, Part]], edges: int, kind: Pass) -> Costs:
    costs = Costs([{} for _ in range(edges)])
    for owner, part in parts:
        cost = part.cost(kind)
        if owner is None:
            costs.rest += cost
        else:
            edge, key = owner
            costs.candidates[edge][key] = costs.candidates[edge].get(key, 0) + cost
    return costs


def _parts(supernet: Supernet, shape: Sequence[int]) -> list[tuple[Owner | None, Part]]:
    """Everything that a pass runs and that costs anything, with the candidate that it is, if it is one."""
    places = [(position, edge) for position, name in enumerate(supernet.edges()) for edge in supernet.mixed_edges(name)]
    # One candidate stands for all of an edge, which run on the same; not the first, as that may be `none`.
    spared = [op for _, edge in places for op in [*_left(edge).values()][:-1]]
    skeleton = copy_of_shapes(supernet, "cpu", without=spared).float().eval()
    twins = [edge for name in skeleton.edges() for edge in skeleton.mixed_edges(name)]
    stands_for: dict[nn.Module, list[tuple[Owner | None, nn.Module]]] = {}
    for (position, edge), twin in zip(places, twins, strict=True):
        for one in _left(twin).values():
            stands_for[one] = [((position, key), op) for key, op in _left(edge).items()]
    inside = {module for candidate in stands_for for module in candidate.modules()}
    layers = [m for m in skeleton.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m not in inside]
    stands_for |= {layer: [(None, layer)] for layer in layers}
    return [
        (owner, Part(module, size, on_alpha, on_weights))
        for met, size, on_alpha, on_weights in _inputs(skeleton, stands_for, shape)
        for owner, module in stands_for[met]
    ]


def _left(edge: FusedMixedEdge) -> dict[str, nn.Module]:
    """The candidates of an edge that a mixture without exceptions runs, by their keys in it."""
    return {} if edge.is_pruned else {key: op for key, op in edge._ops._modules.items() if op is not None}


def _inputs(
    supernet: Supernet, modules: Iterable[nn.Module], shape: Sequence[int]
) -> list[tuple[nn.Module, torch.Size, bool, bool]]:
    """Each of the modules that runs in a pass, its input's size, and whether that depends on alpha, and on weights."""
    met: list[tuple[nn.Module, torch.Size, bool]] = []

    def meet(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        met.append((module, inputs[0].shape[1:], inputs[0].requires_grad))

    for module in modules:
        module.register_forward_pre_hook(meet)  # a candidate with a hook is called, not folded
    space, passes = supernet.space, []
    for by_alpha in (True, False):
        for weight in supernet.weights():
            weight.requires_grad_(not by_alpha)
        weights = torch.ones(len(space.edges), len(space.operations), requires_grad=by_alpha)
        supernet(torch.zeros(1, *shape), {type: Mixture(weights) for type in supernet.cell_types})
        passes.append(list(met))
        met.clear()
    return [(module, size, a, w) for (module, size, a), (_, _, w) in zip(*passes, strict=True)]
