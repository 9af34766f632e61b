"""CellSums: the share of pools and skip connections in the nodes of a cell, summed state by state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dssp_kernels.depthwise_conv.arguments import Pair, pair
from dssp_kernels.folding import is_watched
from dssp_kernels.modules import FusedMixedEdge
from dssp_kernels.parameter_free_sums.op import is_served, output_shape, parameter_free_sums
from dssp_kernels.parameter_free_sums.reference import AVERAGE, IDENTITY, MAX, Functions, Sums
from dssp_kernels.running_statistics import update_running_statistics
from dssp_kernels.sharing import pool_of, settings_of


class CellSums:
    """What candidates without parameters give to the nodes of a cell during one forward pass.

    On all edges that leave a state, a pool or a skip connection makes the same of it, and only its weight differs. So,
    as soon as a state is there, enter() adds what these make of it to the sums of the nodes that it has edges to, in
    one operator; `runs` says which candidates are left to the nodes themselves. That happens on CPU tensors that the
    C++ kernels take (channels_last, float32 or float64), in training, to pools and nn.Identity that nobody watches;
    everywhere else everything is left to the nodes.

    Args:
        edges: (source, node, edge) of each edge of the cell, in the order of the weights' rows; one edge per pair.
        weights: [E, K], of each candidate on each edge, gate included.
        runs: which candidates run at all, [E][K]; None: all.
    """

    def __init__(
        self,
        edges: Sequence[tuple[int, int, FusedMixedEdge]],
        weights: Tensor,
        runs: Sequence[Sequence[bool]] | None = None,
    ) -> None:
        self._edges, self._weights = edges, weights
        self.runs = [[True] * weights.shape[1]] * len(edges) if runs is None else list(runs)
        self.sums: dict[int, Tensor] = {}

    def enter(self, source: int, x: Tensor) -> None:
        """A state is there. Sums of the nodes that its edges enter, and `runs`, are replaced."""
        if not is_served(x) or _has_any_global_hook():
            return
        given = {row: self._given(row) for row, (start, _, _) in enumerate(self._edges) if start == source}
        functions: dict[int, _Function] = {}  # by the position of the candidate; of edges that differ, the first one's
        for of_edge in given.values():
            functions = {position: one.function for position, one in of_edge.items()} | functions
        if not functions or not _fit(x, list(functions.values())):
            return
        positions = sorted(functions)
        taken = {
            row: {p: one.norm for p, one in of_edge.items() if one.function == functions[p]}
            for row, of_edge in given.items()
            if of_edge
        }
        results, *statistics = parameter_free_sums(
            x,
            self._weights,
            [self.sums.get(self._edges[row][1]) for row in taken],
            Sums(list(taken), positions, [position in norms for norms in taken.values() for position in positions]),
            _joined([functions[position] for position in positions]),
        )
        normalised = [position for position in positions if functions[position].eps is not None]
        of_position = dict(zip(normalised, zip(*statistics, strict=True), strict=True))
        for (row, norms), result in zip(taken.items(), results, strict=True):
            self.sums[self._edges[row][1]] = result
            self.runs[row] = [run and position not in norms for position, run in enumerate(self.runs[row])]
        update_running_statistics(
            (norm, *of_position[p]) for norms in taken.values() for p, norm in norms.items() if norm is not None
        )

    def _given(self, row: int) -> dict[int, _Given]:
        """The candidates of an edge that run and are functions of the state alone, by their position."""
        edge = self._edges[row][2]
        if edge.is_pruned or not edge.training:
            return {}
        found = {}
        for position, (candidate, runs) in enumerate(zip(edge.unshared_candidates(), self.runs[row], strict=True)):
            given = _function_of(candidate) if runs and candidate is not None else None
            if given is not None:
                found[position] = given
        return found


class _Function(NamedTuple):
    kind: int
    kernel_size: Pair = (1, 1)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    count_include_pad: bool = True
    eps: float | None = None
    """Of the norm; None: it has none."""


class _Given(NamedTuple):
    function: _Function
    norm: nn.BatchNorm2d | None = None


def _function_of(candidate: nn.Module) -> _Given | None:
    """What a candidate is if it is a function of its input alone, and nobody watches it."""
    if isinstance(candidate, nn.Identity):
        is_plain = type(candidate).forward is nn.Identity.forward and not is_watched(candidate)
        return _Given(_Function(IDENTITY)) if is_plain else None
    found = pool_of(candidate)
    settings = None if found is None else settings_of(found[0])
    if found is None or settings is None:
        return None
    pool, norm = found
    if norm is not None and not (norm.training and norm.weight is None and norm.momentum is not None):
        return None
    kernel_size, stride, padding = (pair(name, settings[name], 0) for name in ("kernel_size", "stride", "padding"))
    kind, counts = MAX if type(pool) is nn.MaxPool2d else AVERAGE, settings.get("count_include_pad", True)
    return _Given(_Function(kind, kernel_size, stride, padding, counts, None if norm is None else norm.eps), norm)


def _fit(x: Tensor, functions: Sequence[_Function]) -> bool:
    """Whether the functions' results have one shape, and that is none that they complain about themselves."""
    joined = _joined(functions)
    shapes = {output_shape(x.shape, joined, k) for k in range(len(functions))}
    [(batch, _, rows, columns), *others] = shapes
    return (
        not others
        and min(rows, columns) > 0
        and batch * rows * columns > 1
        # a byte says which pixel of a window was the largest
        and all(f.kernel_size[0] * f.kernel_size[1] <= 256 for f in functions)
        and all(2 * p <= k for f in functions for p, k in zip(f.padding, f.kernel_size, strict=True))
    )


def _joined(functions: Sequence[_Function]) -> Functions:
    kinds, *sizes, count_include_pad, eps = zip(*functions, strict=True)
    kernel_sizes, strides, paddings = ([size for of_one in of_all for size in of_one] for of_all in sizes)
    normalised, known = [e is not None for e in eps], [0.0 if e is None else e for e in eps]
    return Functions(list(kinds), kernel_sizes, strides, paddings, list(count_include_pad), normalised, known)
