"""A supernet of fused edges under what PyTorch does to models: compile, export, autocast, checkpointing, copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from dssp_kernels import (
    FusedMixedEdge,
    FusedMixedNode,
    SeparableConvolution,
    SeparablePair,
    batch_norm_mixed_sum,
    depthwise_conv2d,
    mixed_sum,
    pointwise_batch_norm,
    pointwise_batch_norm_group,
    pool_batch_norm,
    separable_conv2d,
    separable_conv2d_group,
)
from dssp_kernels.backend import WHY_NO_CPU_KERNELS

pytestmark = pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")


class Zero(nn.Module):
    """The zero op: returns None."""

    def forward(self, x: Tensor) -> None:
        return None


def candidates() -> list[nn.Module]:
    """Normalised and not, with a depthwise convolution, one that gives nothing."""
    depthwise = nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False)
    return [
        nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)),
        nn.Identity(),
        Zero(),
        nn.Sequential(nn.ReLU(), depthwise, nn.Conv2d(4, 4, 1, bias=False), nn.BatchNorm2d(4, affine=False)),
    ]


class Supernet(nn.Module):
    """A stem, an edge, a node of two edges, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.edge = FusedMixedEdge(candidates())
        self.node = FusedMixedNode(FusedMixedEdge(candidates()) for _ in range(2))
        self.classifier = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        return self.classifier(self.node([first, self.edge(first)]).mean((2, 3)))


class StockSupernet(Supernet):
    """The same with every edge as DARTS writes it."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.stem(x)
        node = sum(
            stock_edge(e, s) for e, s in zip(self.node.edges, (first, stock_edge(self.edge, first)), strict=True)
        )
        return self.classifier(node.mean((2, 3)))


def stock_edge(edge: FusedMixedEdge, x: Tensor) -> Tensor:
    outputs = [op(x) for op in edge._ops]
    weights = edge.alpha.softmax(-1)
    return edge.mask.sigmoid() * sum(w * o for w, o in zip(weights, outputs, strict=True) if o is not None)


@pytest.fixture
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet().to(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def compiles_afresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def images(batch: int = 6) -> Tensor:
    x = torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch))
    return x.contiguous(memory_format=torch.channels_last)


def stock(supernet: Supernet) -> StockSupernet:
    other = StockSupernet()
    other.load_state_dict(supernet.state_dict())
    return other.train(supernet.training)


Step = Callable[[nn.Module, Tensor], Tensor]


def step(model: nn.Module, forward: Step = lambda model, x: model(x), x: Tensor | None = None) -> dict[str, Tensor]:
    """The result, the gradients and the buffers after one training step."""
    y = forward(model, images() if x is None else x)
    y.float().square().sum().backward()
    gradients = {f"d {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | gradients | dict(model.named_buffers())


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


on_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


# ---- torch.compile and torch.export ----------------------------------------------------------------------------------


@pytest.mark.slow
@on_modes
def test_inductor_takes_the_whole_step_in_one_graph(supernet: Supernet, training: bool) -> None:
    supernet.train(training)
    other = stock(supernet)
    compiled = torch.compile(supernet, fullgraph=True)
    assert_same(step(supernet, lambda _, x: compiled(x)), step(other))


CHANGES: dict[str, Callable[[Supernet], None]] = {
    "nothing": lambda supernet: None,
    "edge pruned": lambda supernet: supernet.edge.prune(),
    "edge removed": lambda supernet: supernet.edge.remove(),
    "half a node removed": lambda supernet: supernet.node.edges[0].remove(),
    "node removed": lambda supernet: [edge.remove() for edge in supernet.node.edges] and None,
}


@pytest.mark.parametrize(
    ("change", "training"),
    [
        ("nothing", True),
        pytest.param("edge pruned", False, marks=pytest.mark.slow),
        pytest.param("nothing", False, marks=pytest.mark.slow),
        pytest.param("edge removed", True, marks=pytest.mark.slow),
    ],
)
def test_one_graph_serves_every_batch_size(supernet: Supernet, change: str, training: bool) -> None:
    CHANGES[change](supernet.train(training))
    other = copy.deepcopy(supernet)
    counters.clear()
    compiled = torch.compile(supernet, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (6, 3, 5):
        x = images(batch)
        assert_same(step(supernet, lambda _, x: compiled(x), x), step(other, x=x))
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
def test_pruning_between_steps_compiles_again(supernet: Supernet) -> None:
    compiled = torch.compile(supernet, fullgraph=True, backend="aot_eager")
    for change in CHANGES.values():
        change(supernet)
        other = copy.deepcopy(supernet)
        assert_same(step(supernet, lambda _, x: compiled(x)), step(other))
        supernet.zero_grad()


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@on_modes
@pytest.mark.parametrize("strict", [pytest.param(True, marks=pytest.mark.slow), False], ids=["strict", "non-strict"])
def test_exported_program_computes_the_same_for_any_batch(
    supernet: Supernet, change: Callable[[Supernet], None], training: bool, strict: bool
) -> None:
    change(supernet.train(training))
    other = copy.deepcopy(supernet)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(supernet, (images(),), dynamic_shapes=({0: batch},), strict=strict).module()
    for size in (6, 4):
        torch.testing.assert_close(program(images(size)), other(images(size)))
    buffers = dict(program.named_buffers())
    for name, buffer in other.named_buffers():
        torch.testing.assert_close(buffers.get(name, buffer), buffer)


# ---- autocast --------------------------------------------------------------------------------------------------------


def autocast_step(model: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


@on_modes
def test_autocast_is_as_exact_as_it_is_for_the_stock_supernet(supernet: Supernet, training: bool) -> None:
    supernet.train(training)
    expected = step(stock(supernet).double(), x=images().double())
    theirs, ours = step(stock(supernet), autocast_step), step(supernet, autocast_step)
    assert ours.keys() == expected.keys()
    for name, exact in expected.items():
        error, allowed = ((tensor.double() - exact).abs().max() for tensor in (ours[name], theirs[name]))
        scale = max(1.0, float(exact.abs().max()))
        assert error <= 2 * allowed + 1e-2 * scale, f"{name}: error {error:.3g}, stock has {allowed:.3g}"
        assert ours[name].dtype is theirs[name].dtype


# ---- recomputed and moved activations --------------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_gives_the_gradients_and_statistics_it_gives_the_stock_supernet(
    supernet: Supernet, use_reentrant: bool
) -> None:
    def forward(model: nn.Module, x: Tensor) -> Tensor:
        return checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)

    other = stock(supernet)
    found = step(supernet, forward)
    assert_same(found, step(other, forward))
    assert found["edge._ops.0.1.num_batches_tracked"] == 2  # the recomputation counts, as torch has it


def to_bytes(tensor: Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.save(tensor, buffer)
    return buffer.getvalue()


def contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def channels_last_copy(tensor: Tensor) -> Tensor:
    memory_format = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.detach().clone(memory_format=memory_format)


def gapped_copy(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach()] * 2, dim=-1)[..., 0]


HOOKS: dict[str, Callable[[], torch.autograd.graph.saved_tensors_hooks]] = {
    "save_on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "bytes": lambda: torch.autograd.graph.saved_tensors_hooks(to_bytes, lambda saved: torch.load(io.BytesIO(saved))),
    "contiguous": lambda: torch.autograd.graph.saved_tensors_hooks(contiguous_copy, lambda saved: saved),
    "channels_last": lambda: torch.autograd.graph.saved_tensors_hooks(channels_last_copy, lambda saved: saved),
    "with gaps": lambda: torch.autograd.graph.saved_tensors_hooks(gapped_copy, lambda saved: saved),
}


def operator(name: str, layout: torch.memory_format) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """An operator as a function of the tensors it is differentiated by."""
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 4, 5, 6, generator=generator).contiguous(memory_format=layout) for _ in range(3)]
    alpha, mask = torch.randn(3, generator=generator), torch.randn(1, generator=generator)
    depthwise, pointwise = torch.randn(4, 1, 3, 3, generator=generator), torch.randn(7, 4, 1, 1, generator=generator)
    second = torch.randn(7, 1, 3, 3, generator=generator), torch.randn(4, 7, 1, 1, generator=generator)
    norms = [nn.BatchNorm2d(4), None, nn.BatchNorm2d(4, affine=False)]
    return {
        "mixed_sum": (lambda alpha, mask, *x: mixed_sum(x, alpha, mask), [alpha, mask, *x]),
        "batch_norm_mixed_sum": (
            lambda alpha, mask, *x: batch_norm_mixed_sum(x, alpha, mask, norms=norms, training=True),
            [alpha, mask, *x],
        ),
        "depthwise_conv2d": (lambda *t: depthwise_conv2d(*t, padding=1, relu=True), [x[0], depthwise]),
        "separable_conv2d": (lambda *t: separable_conv2d(*t, padding=1, relu=True), [x[0], depthwise, pointwise]),
        "separable_conv2d_group": (
            lambda x, *weights: sum(separable_conv2d_group(x, [SeparableConvolution(*weights, 1, 1)] * 2)),
            [x[0], depthwise, pointwise],
        ),
        "separable_conv2d_group, pair": (
            lambda x, depthwise, pointwise, *second: separable_conv2d_group(
                x,
                [
                    SeparablePair(
                        SeparableConvolution(depthwise, pointwise, 1, 1),
                        nn.BatchNorm2d(7, affine=False),
                        SeparableConvolution(*second, 1, 1, relu=True),
                    )
                ],
            )[0],
            [x[0], depthwise, pointwise, *second],
        ),
        "pointwise_batch_norm": (
            lambda x, weight: pointwise_batch_norm(x, weight, relu=True)[0],
            [
                torch.cat([x[0], x[1]], 1).contiguous(memory_format=torch.channels_last),
                torch.cat([pointwise, pointwise], 1)[[0] * 8],
            ],
        ),
        "pointwise_batch_norm_group": (
            lambda x, other, weight: pointwise_batch_norm_group([x, other], [weight, -weight])[1][0],
            [
                *(t.repeat(1, 2, 1, 1).contiguous(memory_format=torch.channels_last) for t in (x[0], x[1])),
                torch.cat([pointwise] * 4, 1)[[0] * 8],
            ],
        ),
        "pool_batch_norm": (lambda x: pool_batch_norm(x, "max", 3, stride=2, padding=1)[0], [x[0]]),
    }[name]


OPERATORS = [
    *("mixed_sum", "batch_norm_mixed_sum", "depthwise_conv2d", "separable_conv2d", "separable_conv2d_group"),
    *("separable_conv2d_group, pair", "pointwise_batch_norm", "pointwise_batch_norm_group", "pool_batch_norm"),
]


def differentiate(compute: Callable[..., Tensor], tensors: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    y = compute(*leaves)
    return torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel()).reshape(y.shape))


@pytest.mark.parametrize("hooks", HOOKS.values(), ids=HOOKS)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("name", OPERATORS)
def test_saved_tensors_may_come_back_in_other_memory(
    name: str, layout: torch.memory_format, hooks: Callable[[], torch.autograd.graph.saved_tensors_hooks]
) -> None:
    compute, tensors = operator(name, layout)

    def hooked(*leaves: Tensor) -> Tensor:
        with hooks():
            return compute(*leaves)

    by_torch = name == "pool_batch_norm" and layout is torch.contiguous_format  # whose sums follow the memory
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if by_torch else {"rtol": 0, "atol": 0}
    for ours, expected in zip(differentiate(hooked, tensors), differentiate(compute, tensors), strict=True):
        torch.testing.assert_close(ours, expected, **tolerance)


# ---- copies ----------------------------------------------------------------------------------------------------------


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_a_file(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("clone", [copy.deepcopy, through_pickle, through_a_file], ids=lambda clone: clone.__name__)
def test_copies_of_pruned_supernets_train_alike_and_apart(
    supernet: Supernet, change: Callable[[Supernet], None], clone: Callable[[nn.Module], nn.Module]
) -> None:
    change(supernet)
    supernet(images())  # whatever a forward pass leaves behind is copied as well
    other = clone(supernet)
    with torch.no_grad():
        for parameter in clone(supernet).parameters():
            parameter.fill_(torch.nan)  # of another copy: nothing is shared
    assert_same(step(other), step(supernet), tolerance=0)


def test_copy_of_a_pruned_edge_can_be_restored(supernet: Supernet) -> None:
    supernet.eval()
    expected = supernet(images())
    supernet.edge.prune()
    other = through_pickle(supernet)
    other.edge.restore()
    assert torch.equal(other(images()), expected)
    assert supernet.edge.is_pruned and not torch.equal(supernet(images()), expected)


def test_functional_call_reads_and_updates_what_it_is_given(supernet: Supernet) -> None:
    other = copy.deepcopy(supernet)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    before = copy.deepcopy(supernet.state_dict())
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    buffers = {name: b.clone() for name, b in other.named_buffers()}
    y = torch.func.functional_call(supernet, given | buffers, (images(),))
    gradients = torch.autograd.grad(y.square().sum(), list(given.values()))
    found = {f"d {name}": gradient for name, gradient in zip(given, gradients, strict=True)}
    assert_same({"y": y.detach()} | found | buffers, step(other), tolerance=0)
    assert all(torch.equal(supernet.state_dict()[name], tensor) for name, tensor in before.items())


def test_inference_mode_computes_the_same_and_counts_the_batch(supernet: Supernet) -> None:
    other = copy.deepcopy(supernet)
    with torch.inference_mode():
        y = supernet(images())
    assert torch.equal(y, other(images()))
    assert all(map(torch.equal, supernet.buffers(), other.buffers()))
