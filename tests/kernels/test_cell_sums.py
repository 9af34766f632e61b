"""CellSums: what is summed per state, what is left to the nodes, and that nothing else changes."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import CellSums, FusedMixedEdge, FusedMixedNode, SharedOutputs
from tests.kernels.backends import with_cpu_kernels

EDGES = [(0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
CHANNELS = 8


def candidates() -> list[nn.Module | None]:
    def norm() -> nn.BatchNorm2d:
        return nn.BatchNorm2d(CHANNELS, affine=False)

    return [
        None,
        nn.Sequential(nn.MaxPool2d(3, 1, 1), norm()),
        nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), norm()),
        nn.Identity(),
        nn.Sequential(nn.ReLU(), nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False), norm()),
        nn.AvgPool2d(3, 1, 1),
    ]


class SmallCell(nn.Module):
    """Two inputs and two nodes, with CellSums or without."""

    def __init__(self) -> None:
        super().__init__()
        self.edges = nn.ModuleList(
            FusedMixedEdge(candidates(), alpha=False, mask=False, relaxation="given") for _ in EDGES
        )

    def forward(
        self, inputs: list[Tensor], weights: Tensor, runs: list[list[bool]] | None, early: bool
    ) -> list[Tensor]:
        sums = CellSums([(*ends, edge) for ends, edge in zip(EDGES, self.edges, strict=True)], weights, runs)
        states, shared = [], SharedOutputs()
        for number in range(4):
            if number < 2:
                state = inputs[number]
            else:
                rows = [row for row, (_, node) in enumerate(EDGES) if node == number]
                sources = [states[EDGES[row][0]] for row in rows]
                node, of_node = FusedMixedNode(self.edges[row] for row in rows), weights[rows]
                state = node(sources, of_node, None, shared, [sums.runs[row] for row in rows], sums.sums.get(number))
            states.append(state)
            if early:
                sums.enter(number, state)
        self.left = sums.runs
        return states[2:]


def small_cell() -> tuple[SmallCell, list[Tensor], Tensor]:
    torch.manual_seed(0)
    cell = SmallCell()
    for i, norm in enumerate(m for m in cell.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.fill_(i / 10)  # every edge has a history of its own
    inputs = [torch.randn(3, CHANNELS, 6, 5).to(memory_format=torch.channels_last) for _ in range(2)]
    return cell.double(), [x.double() for x in inputs], torch.rand(len(EDGES), 6).double()


def results(
    cell: SmallCell, inputs: list[Tensor], weights: Tensor, runs: list[list[bool]] | None, early: bool
) -> list[Tensor]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (*inputs, weights)]
    states = cell(leaves[:-1], leaves[-1], runs, early)
    parameters = [p for p in cell.parameters() if p.requires_grad]
    direction = [torch.linspace(-1, 1, y.numel()).double().reshape(y.shape) for y in states]
    return [*states, *torch.autograd.grad(states, [*leaves, *parameters], direction, materialize_grads=True)]


ALL = [[True] * 6 for _ in EDGES]
LEFT = [True, False, False, False, True, False]  # zero op and convolution


def assert_the_same(change: Callable[[SmallCell], object], runs: list[list[bool]] | None = None) -> SmallCell:
    """With and without CellSums: states, gradients, buffers. The cell that ran with it."""
    alone, inputs, weights = small_cell()
    change(alone)
    early = copy.deepcopy(alone)
    for _ in range(2):
        expected, found = results(alone, inputs, weights, runs, False), results(early, inputs, weights, runs, True)
        torch.testing.assert_close(found, expected)
    torch.testing.assert_close(early.state_dict(), alone.state_dict())
    return early


@with_cpu_kernels
@pytest.mark.parametrize("runs", [None, ALL], ids=["no runs", "all run"])
def test_only_zero_ops_and_convolutions_are_left_to_the_nodes(runs: list[list[bool]] | None) -> None:
    assert assert_the_same(lambda cell: None, runs).left == [LEFT] * len(EDGES)


@with_cpu_kernels
def test_candidates_that_do_not_run_are_not_summed() -> None:
    runs = [[(row + k) % 3 > 0 for k in range(6)] for row in range(len(EDGES))]
    left = assert_the_same(lambda cell: None, runs).left
    assert left == [[run and keep for run, keep in zip(row, LEFT, strict=True)] for row in runs]


@with_cpu_kernels
def test_edge_with_nothing_but_functions_leaves_its_node_nothing() -> None:
    runs = [[k in (1, 3) for k in range(6)]] * len(EDGES)
    assert not any(map(any, assert_the_same(lambda cell: None, runs).left))


@with_cpu_kernels
@pytest.mark.parametrize(
    "change",
    [
        lambda cell: cell.edges[2].prune(),
        lambda cell: [cell.edges[row].remove() for row in (0, 2)],
        lambda cell: cell.edges[3].remove_candidate(1),
        lambda cell: [edge.remove_candidate(1) for edge in cell.edges],
    ],
    ids=["pruned", "a state without edges", "without a pool", "no such pool"],
)
def test_what_is_gone_is_not_summed(change: Callable[[SmallCell], object]) -> None:
    assert_the_same(change)


def _at(cell: SmallCell, position: int) -> nn.Module:
    return cell.edges[3]._ops[position]


class OtherIdentity(nn.Identity):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


OTHERS: dict[str, tuple[int, Callable[[SmallCell], object]]] = {
    "hook on a pool": (1, lambda cell: _at(cell, 1)[0].register_forward_hook(lambda *_: None)),
    "hook on a norm": (2, lambda cell: _at(cell, 2)[1].register_forward_hook(lambda *_: None)),
    "hook on a skip": (3, lambda cell: _at(cell, 3).register_forward_hook(lambda *_: None)),
    "affine": (1, lambda cell: _at(cell, 1).__setitem__(1, nn.BatchNorm2d(CHANNELS).double())),
    "cumulative average": (2, lambda cell: setattr(_at(cell, 2)[1], "momentum", None)),
    "evaluated norm": (2, lambda cell: _at(cell, 2)[1].eval()),
    "another identity": (3, lambda cell: cell.edges[3]._ops.__setitem__(3, OtherIdentity())),
    "ceil mode": (1, lambda cell: setattr(_at(cell, 1)[0], "ceil_mode", True)),
    "another eps": (1, lambda cell: setattr(_at(cell, 1)[1], "eps", 0.1)),
    "another kernel": (2, lambda cell: _at(cell, 2).__setitem__(0, nn.AvgPool2d(1))),
}


@with_cpu_kernels
@pytest.mark.parametrize("what", list(OTHERS))
def test_candidate_that_differs_is_left_to_its_node(what: str) -> None:
    position, change = OTHERS[what]
    left = assert_the_same(change).left
    assert left[3] == [keep or k == position for k, keep in enumerate(LEFT)]
    assert [row for i, row in enumerate(left) if i != 3] == [LEFT] * 4


@with_cpu_kernels
def test_norm_that_does_not_track_keeps_its_running_statistics() -> None:
    cell = assert_the_same(lambda cell: setattr(_at(cell, 1)[1], "track_running_stats", False))
    assert _at(cell, 1)[1].num_batches_tracked == 0 and _at(cell, 2)[1].num_batches_tracked == 2


@with_cpu_kernels
def test_evaluation_is_left_to_the_nodes() -> None:
    assert assert_the_same(lambda cell: cell.eval()).left == ALL


def test_other_layouts_are_left_to_the_nodes(backend: str) -> None:
    cell, inputs, weights = small_cell()
    contiguous = [x.contiguous() for x in inputs]
    expected = results(copy.deepcopy(cell), contiguous, weights, None, False)
    torch.testing.assert_close(results(cell, contiguous, weights, None, True), expected)
    assert cell.left == ALL


@with_cpu_kernels
def test_functions_of_several_shapes_are_left_to_the_nodes() -> None:
    cell, inputs, weights = small_cell()
    for edge in cell.edges:
        edge._ops[5] = nn.AvgPool2d(2, 2)
    sums = CellSums([(*ends, edge) for ends, edge in zip(EDGES, cell.edges, strict=True)], weights)
    sums.enter(0, inputs[0])
    assert sums.runs == ALL and not sums.sums
