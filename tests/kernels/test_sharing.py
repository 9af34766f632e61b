"""Shared pools: one run per state, and everything else as if each edge had run its own."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dssp_kernels import FusedMixedEdge, FusedMixedNode, SharedOutputs, parameter_free
from tests.kernels.backends import with_cpu_kernels


class CountedMaxPool(nn.MaxPool2d):
    """Of another class than nn.MaxPool2d: it may compute anything."""


def candidates(affine: bool = False, momentum: float | None = 0.1) -> list[nn.Module]:
    return [
        nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.BatchNorm2d(4, affine=affine, momentum=momentum)),
        nn.Sequential(nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.BatchNorm2d(4, affine=affine)),
        nn.AvgPool2d(3, 1, 1),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)),
    ]


def two_nodes(**settings: object) -> list[FusedMixedNode]:
    return [FusedMixedNode(FusedMixedEdge(candidates(**settings)) for _ in range(2)) for _ in range(2)]  # type: ignore[arg-type]


def run(nodes: list[FusedMixedNode], states: list[Tensor], share: bool) -> tuple[Tensor, ...]:
    shared = SharedOutputs() if share else None
    y = torch.stack([node(states, shared=shared) for node in nodes])
    parameters = [p for node in nodes for p in node.parameters()]
    direction = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    return y, *torch.autograd.grad(y, [*states, *parameters], direction)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("settings", [{}, {"affine": True}, {"momentum": None}])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_shared_nodes_give_the_same_outputs_gradients_and_buffers(
    layout: torch.memory_format, training: bool, settings: dict
) -> None:
    alone = nn.ModuleList(two_nodes(**settings)).train(training)
    for i, norm in enumerate(m for m in alone.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.fill_(i / 10)  # every edge has a history of its own
        norm.running_var.fill_(1 + i / 10)
    together = copy.deepcopy(alone)
    states = [torch.randn(3, 4, 5, 6).contiguous(memory_format=layout).requires_grad_() for _ in range(2)]
    for _ in range(2):
        expected, found = run(list(alone), states, share=False), run(list(together), states, share=True)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(together.state_dict(), alone.state_dict())


def test_a_norm_that_does_not_track_keeps_its_running_statistics() -> None:
    node = two_nodes()[0]
    norm = node.edges[0]._ops[0][1]
    norm.track_running_stats = False
    node([torch.randn(2, 4, 5, 5) for _ in range(2)], shared=SharedOutputs())
    assert torch.equal(norm.running_mean, torch.zeros(4)) and norm.num_batches_tracked == 0
    assert node.edges[1]._ops[0][1].num_batches_tracked == 1


class MaxPools(TorchDispatchMode):
    """Counts the operators that find maxima, alone or with the norm after them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        is_pool = func is torch.ops.dssp_kernels.pool_batch_norm_forward.default and args[1]
        self.count += bool(is_pool or func is torch.ops.aten.max_pool2d_with_indices.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_pool_runs_once_per_state(layout: torch.memory_format) -> None:
    states = [torch.randn(2, 4, 5, 5).contiguous(memory_format=layout) for _ in range(2)]
    states = [state.requires_grad_() for state in states]  # without gradients torch takes other operators
    run_twice = two_nodes()
    for share, expected in ((False, 4), (True, 2)):
        shared = SharedOutputs() if share else None
        with MaxPools() as pools:
            for node in run_twice:
                node(states, shared=shared)
        assert pools.count == expected


@pytest.mark.parametrize(
    "odd",
    [nn.MaxPool2d(5, 1, 2), nn.MaxPool2d(3, 1, 1, ceil_mode=True), nn.AvgPool2d(3, 1, 1), CountedMaxPool(3, 1, 1)],
)
def test_only_pools_of_the_same_settings_are_shared(odd: nn.Module) -> None:
    shared, x = SharedOutputs(), torch.randn(2, 4, 5, 5)
    first = shared.of(nn.MaxPool2d(3, 1, 1), x)
    again, other = shared.of(nn.MaxPool2d(3, 1, 1), x), shared.of(odd, x)
    assert first is not None and again is not None and again[0] is first[0]
    assert other is None or other[0] is not first[0]


@pytest.mark.parametrize(
    "pool",
    [nn.MaxPool2d(3, 1, 1, dilation=2), nn.AvgPool2d(2, 2, divisor_override=3), nn.AvgPool2d(3, 2, ceil_mode=True)],
)
def test_pools_of_unusual_settings_are_normalised_too(pool: nn.Module) -> None:
    x = torch.randn(2, 4, 6, 6).contiguous(memory_format=torch.channels_last)
    found = SharedOutputs().of(nn.Sequential(pool, nn.BatchNorm2d(4, affine=False)), x)
    assert found is not None and found[1] is None
    torch.testing.assert_close(found[0], nn.BatchNorm2d(4, affine=False)(pool(x)))


def test_a_pool_that_is_watched_runs_for_its_own_edge() -> None:
    pool, seen = nn.MaxPool2d(3, 1, 1), []
    pool.register_forward_hook(lambda *arguments: seen.append(1))
    assert SharedOutputs().of(pool, torch.randn(1, 4, 5, 5)) is None
    assert SharedOutputs().of(nn.Sequential(pool, nn.BatchNorm2d(4)), torch.randn(1, 4, 5, 5)) is None


def test_states_that_look_alike_are_not_mixed_up() -> None:
    shared, pool = SharedOutputs(), nn.MaxPool2d(3, 1, 1)
    for _ in range(5):  # each input dies after its turn: its id() may come again
        x = torch.randn(1, 4, 5, 5)
        found = shared.of(pool, x)
        assert found is not None and torch.equal(found[0], pool(x))


# ---- first steps -----------------------------------------------------------------------------------------------------


class CountedReLU(nn.ReLU):
    """Of another class than nn.ReLU: it may compute anything."""


def starting_with(*first: nn.Module) -> list[FusedMixedNode]:
    """Two nodes of one edge each, whose candidates start with these modules."""

    def edge() -> FusedMixedEdge:
        return FusedMixedEdge(
            nn.Sequential(step, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)) for step in copy.deepcopy(first)
        )

    return [FusedMixedNode([edge()]) for _ in range(2)]


class ReLUs(TorchDispatchMode):
    """Counts them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += func in (torch.ops.aten.relu.default, torch.ops.aten.clamp_min.default)
        return func(*args, **(kwargs or {}))


def relus_run(nodes: list[FusedMixedNode]) -> int:
    x, shared = torch.randn(2, 4, 5, 5), SharedOutputs()
    with ReLUs() as relus:
        for node in nodes:
            node([x], shared=shared)
    return relus.count


@with_cpu_kernels
def test_a_relu_that_candidates_start_with_runs_once_per_state() -> None:
    assert relus_run(starting_with(nn.ReLU(), nn.ReLU())) == 1
    assert relus_run(starting_with(nn.ReLU(), CountedReLU())) == 1 + 2
    watched = starting_with(nn.ReLU(), nn.ReLU())
    watched[0].edges[0]._ops[0][0].register_forward_hook(lambda *_: None)
    assert relus_run(watched) == 1 + 1


@with_cpu_kernels
def test_shared_first_steps_give_the_same_outputs_and_gradients() -> None:
    alone = nn.ModuleList(starting_with(nn.ReLU(), nn.ReLU()))
    together = copy.deepcopy(alone)
    states = [torch.randn(3, 4, 5, 6).requires_grad_()]
    expected, found = run(list(alone), states, share=False), run(list(together), states, share=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(together.state_dict(), alone.state_dict())


@with_cpu_kernels
def test_a_function_marked_as_parameter_free_runs_once_per_state() -> None:
    runs: list[int] = []

    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.conv(double(x)))

        def body_and_norm(self) -> tuple[list, nn.Module]:
            return [double, self.conv], self.bn

    @parameter_free
    def double(x: Tensor) -> Tensor:
        runs.append(id(x))
        return 2 * x

    node, x = FusedMixedNode([FusedMixedEdge([Doubled(), Doubled()])]), torch.randn(2, 4, 5, 5)
    y = node([x], shared=SharedOutputs())
    assert len(runs) == 1
    torch.testing.assert_close(y, node([x]))
    assert len(runs) == 3
