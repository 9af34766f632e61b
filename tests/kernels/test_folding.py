"""The BatchNorm2d a candidate ends in moves into the mix: where that is certain, and nowhere else."""

from __future__ import annotations

import copy
import pickle
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bench import stock_darts
from bench.stock_darts import FactorizedReduce
from dssp.spaces import DARTS
from dssp.spaces.operations import Zero, build_candidate
from dssp_kernels import FusedMixedEdge, FusedMixedNode
from dssp_kernels.backend import WHY_NO_CPU_KERNELS
from dssp_kernels.folding import Parts, parts_of

X = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last)

pytestmark = pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")


def conv_norm(affine: bool = False) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, affine=affine))


def darts_candidates(stride: int = 1) -> list[nn.Module]:
    return [build_candidate(name, 8, stride) for name in DARTS.operations]


def unfused(edge: FusedMixedEdge, x: Tensor) -> Tensor:
    """The edge as DARTS writes it."""
    outputs = [None if op is None else op(x) for op in edge._ops]
    weights = edge.alpha.softmax(-1)
    return edge.mask.sigmoid() * sum(w * o for w, o in zip(weights, outputs, strict=True) if o is not None)


def norms_left_to_the_mix(edge: FusedMixedEdge, x: Tensor = X) -> list[int]:
    norms = edge.candidate_outputs(x, edge.training)[1]
    return [i for i, norm in enumerate(norms) if norm is not None]


def assert_same(
    ours: nn.Module, theirs: nn.Module, run_ours: Callable[[], Tensor], run_theirs: Callable[[], Tensor]
) -> None:
    """Same outputs, gradients of every parameter, and buffers."""
    a, b = run_ours(), run_theirs()
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    grad = torch.randn(a.shape)
    a.backward(grad)
    b.backward(grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    for (name, p), q in zip(ours.named_buffers(), theirs.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_folded_darts_edge_computes_what_its_candidates_do(stride: int, training: bool) -> None:
    edge = FusedMixedEdge(darts_candidates(stride)).train(training)
    other = copy.deepcopy(edge)
    # none and, at stride 1, the skip connection have no norm
    assert norms_left_to_the_mix(copy.deepcopy(edge)) == [i for i in range(8) if i != 0 and (i != 3 or stride == 2)]
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))


def test_folded_node_computes_what_its_edges_do() -> None:
    edges = nn.ModuleList(FusedMixedEdge(darts_candidates()) for _ in range(3))
    edges[1].prune()
    other = copy.deepcopy(edges)
    states = [torch.randn_like(X) for _ in edges]
    node = FusedMixedNode(edges)
    live, other_live = nn.ModuleList([edges[0], edges[2]]), nn.ModuleList([other[0], other[2]])
    assert_same(
        *(live, other_live),
        lambda: node(states),
        lambda: unfused(other[0], states[0]) + unfused(other[2], states[2]),
    )


def test_state_dict_keys_are_those_of_the_candidates() -> None:
    edge = FusedMixedEdge(darts_candidates(), alpha=False, mask=False)
    assert set(edge.state_dict()) == {f"_ops.{key}" for key in nn.ModuleList(darts_candidates()).state_dict()}


def test_repr_says_what_is_folded() -> None:
    edge = FusedMixedEdge([conv_norm(), Zero(), nn.Sequential(nn.Conv2d(8, 8, 1))])
    assert "BatchNorm folded: 0\n" in repr(edge)
    assert "BatchNorm folded: none\n" in repr(FusedMixedEdge([nn.Identity()]))


class _Subclass(nn.BatchNorm2d):
    pass


class _Protocol(nn.Module):
    """A candidate that says what it ends in."""

    def __init__(self) -> None:
        super().__init__()
        self.op = conv_norm()

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)

    def body_and_norm(self) -> tuple[list, nn.BatchNorm2d]:
        return [self.op[0]], self.op[1]


class _Noisy(_Protocol):
    """Inherits what its forward() no longer does."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


class _Wrapper(nn.Module):
    """DARTS' convolutions: forward() hands over to op."""

    def __init__(self, op: nn.Module | None = None) -> None:
        super().__init__()
        self.op = conv_norm() if op is None else op

    def forward(self, input: Tensor) -> Tensor:
        """Not what it is called, nor a docstring, makes a difference."""
        return self.op(input)


class _Doubled(_Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.op(self.op(x))


class _Renamed(_Wrapper):
    def forward(self, x: Tensor) -> Tensor:
        return self.po(x)

    def po(self, x: Tensor) -> Tensor:
        return self.op(x) + 1


class _Callable(_Wrapper):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) + 1


class _Authors(FactorizedReduce):
    """Spelled as in DARTS' operations.py."""

    def forward(self, x: Tensor) -> Tensor:
        """The stock one of the benchmark is a line shorter, and has no docstring."""
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        out = self.bn(out)
        return out


class _Unshifted(FactorizedReduce):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 0:, 1:])], dim=1)
        return self.bn(out)


class _Swapped(FactorizedReduce):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        out = torch.cat([self.conv_2(x), self.conv_1(x[:, :, 1:, 1:])], dim=1)
        return self.bn(out)


class _ClassAttribute(FactorizedReduce):
    relu = staticmethod(nn.functional.leaky_relu)  # what self.relu finds


class _OtherTorch(FactorizedReduce):
    """Its forward() has another `torch` among its globals."""

    forward = types.FunctionType(
        FactorizedReduce.forward.__code__,
        {"torch": types.SimpleNamespace(cat=lambda halves, dim: torch.cat(halves[::-1], dim))},
    )


def _with(change: Callable[[nn.Module], object], make: Callable[[], nn.Module] = conv_norm) -> nn.Module:
    candidate = make()
    change(candidate)
    return candidate


def _hook(*_arguments: object) -> None:
    return None


def _replace_norm(norm: nn.Module) -> Callable[[nn.Module], object]:
    return lambda candidate: candidate.__setitem__(1, norm)  # type: ignore[operator]


NOT_FOLDED = {
    "hook on the norm": (lambda: _with(lambda c: c[1].register_forward_hook(_hook)), "its norm has hooks"),
    "pre-hook on the norm": (lambda: _with(lambda c: c[1].register_forward_pre_hook(_hook)), "its norm has hooks"),
    "backward hook on the norm": (
        lambda: _with(lambda c: c[1].register_full_backward_hook(_hook)),
        "its norm has hooks",
    ),
    "hook on the candidate": (lambda: _with(lambda c: c.register_forward_hook(_hook)), "it has hooks"),
    "hook on what is taken apart": (
        lambda: _with(lambda c: c.op.register_forward_hook(_hook), _Protocol),
        "it has hooks",
    ),
    "SyncBatchNorm": (lambda: _with(_replace_norm(nn.SyncBatchNorm(8))), "its norm is a SyncBatchNorm"),
    "subclass": (lambda: _with(_replace_norm(_Subclass(8))), "its norm is a _Subclass"),
    "overridden forward": (_Noisy, "_Noisy changes forward()"),
    "instance forward": (lambda: _with(lambda c: setattr(c, "forward", c.forward)), "it has hooks"),
    "hook on the wrapped": (lambda: _with(lambda c: c.op.register_forward_hook(_hook), _Wrapper), "it has hooks"),
    "op twice": (_Doubled, None),
    "not op": (_Renamed, None),
    "another call": (_Callable, None),
    "subclass of Sequential": (lambda: type("Custom", (nn.Sequential,), {})(*conv_norm()), None),
    "no norm": (lambda: nn.Sequential(nn.Conv2d(8, 8, 1)), None),
}


@pytest.mark.parametrize(("make", "reason"), NOT_FOLDED.values(), ids=NOT_FOLDED)
def test_falls_back_and_says_why(make: Callable[[], nn.Module], reason: str | None) -> None:
    edge = FusedMixedEdge([conv_norm(), make()]).eval()  # nn.SyncBatchNorm trains on GPUs only
    assert norms_left_to_the_mix(edge) == [0]
    torch.testing.assert_close(edge(X), unfused(edge, X))
    if reason:
        assert f"1 not folded: {reason}" in repr(edge)
    else:
        assert "not folded" not in repr(edge)


def test_protocol_is_followed() -> None:
    edge = FusedMixedEdge([_Protocol(), conv_norm()])
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge)) == [0, 1]
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))


def depthwise_norm(relu: nn.Module | None = None, **changes: object) -> nn.Sequential:
    arguments = {"padding": 2, "dilation": 2, "groups": 8, "bias": False} | changes
    relu = nn.ReLU() if relu is None else relu
    return nn.Sequential(relu, nn.Conv2d(8, 8, 3, **arguments), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8, affine=False))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_wrapped_sequence_computes_what_its_forward_does(training: bool) -> None:
    edge = FusedMixedEdge([_Wrapper(), _Wrapper(depthwise_norm())]).train(training)
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge)) == [0, 1]
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))


def _operators_run(candidate: nn.Module, x: Tensor) -> set[str]:
    with torch.profiler.profile() as profile:
        FusedMixedEdge([candidate])(x)
    return {event.key for event in profile.key_averages()}


DEPTHWISE = "dssp_kernels::depthwise_conv2d_forward"
SEPARABLE = "dssp_kernels::separable_conv2d_group_forward"


def separable_norm(relu: nn.Module | None = None, **changes: object) -> nn.Sequential:
    """DARTS' DilConv: its pointwise convolution has no bias."""
    candidate = depthwise_norm(relu)
    candidate[2] = nn.Conv2d(8, 8, 1, **{"bias": False} | changes)
    return candidate


@pytest.mark.parametrize("wrap", [_Wrapper, lambda op: op], ids=["wrapped", "plain"])
def test_depthwise_convolution_runs_with_its_relu_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    found = _operators_run(wrap(depthwise_norm()), X)
    assert DEPTHWISE in found and "aten::relu" not in found


@pytest.mark.parametrize("wrap", [_Wrapper, lambda op: op], ids=["wrapped", "plain"])
def test_relu_depthwise_and_pointwise_convolution_run_in_one_kernel(wrap: Callable[[nn.Module], nn.Module]) -> None:
    found = _operators_run(wrap(separable_norm()), X)
    assert SEPARABLE in found and found.isdisjoint({DEPTHWISE, "aten::relu", "aten::conv2d"})


@pytest.mark.parametrize("name", ["sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["channels_last", "contiguous"])
def test_convolutions_of_darts_compute_what_their_forward_does(
    name: str, stride: int, layout: torch.memory_format
) -> None:
    edge = FusedMixedEdge([stock_darts.OPS[name](8, stride)])
    other = copy.deepcopy(edge)
    x = X.contiguous(memory_format=layout)
    assert_same(edge, other, lambda: edge(x), lambda: unfused(other, x))


NOT_POINTWISE = {
    "bias": lambda: separable_norm(bias=True),
    "strided": lambda: separable_norm(stride=2),
    "padded": lambda: separable_norm(padding=1),
    "grouped": lambda: separable_norm(groups=2),
    "hook": lambda: _with(lambda c: c[2].register_forward_hook(_hook), separable_norm),
}


@pytest.mark.parametrize("make", NOT_POINTWISE.values(), ids=NOT_POINTWISE)
def test_other_convolutions_after_a_depthwise_one_run_as_they_are(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)  # the gradient of a bias before a BatchNorm is nothing but rounding, large for unlucky weights
    edge = FusedMixedEdge([make()])
    other = copy.deepcopy(edge)
    found = _operators_run(copy.deepcopy(edge)._ops[0], X)
    assert SEPARABLE not in found and found >= {DEPTHWISE, "aten::conv2d"}
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))


# ---- DARTS' FactorizedReduce -----------------------------------------------------------------------------------------

WIDE = torch.randn(4, 16, 6, 6).contiguous(memory_format=torch.channels_last)  # see the test of few channels


@pytest.mark.parametrize("make", [_Authors, FactorizedReduce], ids=["authors", "shorter"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_factorized_reduce_computes_what_its_forward_does(make: type[nn.Module], training: bool) -> None:
    edge = FusedMixedEdge([make(16, 8), make(16, 8)]).train(training)
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge), WIDE) == [0, 1]
    assert_same(edge, other, lambda: edge(WIDE), lambda: unfused(other, WIDE))


@pytest.mark.parametrize("channels", [2, 4, 6])
def test_factorized_reduce_of_few_channels_is_safe_in_channels_last(channels: int) -> None:
    """There torch's own gradient of a strided 1x1 convolution writes out of bounds: oneDNN issue 6035."""
    edge = FusedMixedEdge([FactorizedReduce(channels, 8)]).to(memory_format=torch.channels_last)
    other = copy.deepcopy(edge).to(memory_format=torch.contiguous_format)
    leaves = [X[:, :channels].contiguous(memory_format=torch.channels_last), X[:, :channels].contiguous()]
    x, y = (leaf.requires_grad_() for leaf in leaves)
    assert_same(edge, other, lambda: edge(x), lambda: unfused(other, y))
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [_Unshifted, _Swapped, _ClassAttribute, _OtherTorch])
def test_reduction_that_is_spelled_otherwise_runs_as_it_is(make: type[nn.Module]) -> None:
    edge = FusedMixedEdge([FactorizedReduce(16, 8), make(16, 8)])
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge), WIDE) == [0]
    assert_same(edge, other, lambda: edge(WIDE), lambda: unfused(other, WIDE))


def _set(**children: nn.Module) -> Callable[[], nn.Module]:
    return lambda: _with(
        lambda c: [setattr(c, name, child) for name, child in children.items()], lambda: FactorizedReduce(16, 8)
    )


OTHER_CHILDREN = {
    "leaky": _set(relu=nn.LeakyReLU()),
    "biased": _set(conv_1=nn.Conv2d(16, 4, 1, stride=2)),
    "dense": _set(conv_1=nn.Conv2d(16, 4, 1, bias=False), conv_2=nn.Conv2d(16, 4, 2, padding=(1, 1), bias=False)),
    "larger": _set(**{f"conv_{i}": nn.Conv2d(16, 4, 3, stride=2, padding=1, bias=False) for i in (1, 2)}),
}


@pytest.mark.parametrize("make", OTHER_CHILDREN.values(), ids=OTHER_CHILDREN)
def test_reduction_with_other_children_computes_what_its_forward_does(make: Callable[[], nn.Module]) -> None:
    edge = FusedMixedEdge([make()])
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge), WIDE) == [0]
    assert_same(edge, other, lambda: edge(WIDE), lambda: unfused(other, WIDE))


def test_hook_on_a_half_of_a_reduction_still_sees_it() -> None:
    seen: list[Tensor] = []
    candidate = FactorizedReduce(16, 8)
    candidate.conv_2.register_forward_hook(lambda module, inputs, output: seen.append(output))
    edge = FusedMixedEdge([candidate])
    assert norms_left_to_the_mix(edge, WIDE) == [0]
    torch.testing.assert_close(seen[0], candidate.conv_2(WIDE.relu()[:, :, 1:, 1:]))


# ---- convolutions that are not as in DARTS ---------------------------------------------------------------------------

ORDINARY = {
    "bias": (lambda: depthwise_norm(bias=True), X),
    "grouped": (lambda: depthwise_norm(groups=4), X),
    "reflected borders": (lambda: depthwise_norm(padding_mode="reflect"), X),
    "padding by name": (lambda: depthwise_norm(padding="same"), X),
    "contiguous": (depthwise_norm, X.contiguous()),
    "hook": (lambda: _with(lambda c: c[1].register_forward_hook(_hook), depthwise_norm), X),
    "parametrized": (
        lambda: _with(lambda c: torch.nn.utils.parametrizations.weight_norm(c[1]), depthwise_norm),
        X,
    ),
}


@pytest.mark.parametrize(("make", "x"), ORDINARY.values(), ids=ORDINARY)
def test_other_convolutions_run_as_they_are(make: Callable[[], nn.Module], x: Tensor) -> None:
    edge = FusedMixedEdge([make()])
    other = copy.deepcopy(edge)
    assert DEPTHWISE not in _operators_run(copy.deepcopy(edge)._ops[0], x)
    torch.testing.assert_close(edge(x), unfused(other, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: nn.ReLU(inplace=True), nn.LeakyReLU], ids=["in place", "leaky"])
def test_other_activations_stay_before_the_depthwise_convolution(make: Callable[[], nn.Module]) -> None:
    edge = FusedMixedEdge([depthwise_norm(make())])
    other = copy.deepcopy(edge)
    torch.testing.assert_close(edge(X.clone()), unfused(other, X.clone()), rtol=1e-5, atol=1e-5)


def test_hook_on_the_relu_still_sees_it() -> None:
    seen: list[Tensor] = []
    candidate = depthwise_norm()
    candidate[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert DEPTHWISE in _operators_run(candidate, X)
    assert torch.equal(seen[0], X.relu())


def test_shared_norm_is_not_folded() -> None:
    one, two, three = conv_norm(), conv_norm(), conv_norm()
    two[1] = one[1]
    edge = FusedMixedEdge([one, two, three])
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge)) == [2]
    assert "0 not folded: another candidate has the same norm" in repr(edge)
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))


def test_hooks_are_seen_when_they_come_and_go() -> None:
    edge = FusedMixedEdge([conv_norm()])
    seen: list[torch.Size] = []
    handle = edge._ops[0][1].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    edge(X)
    assert seen == [X.shape]
    handle.remove()
    edge(X)
    assert seen == [X.shape] and norms_left_to_the_mix(edge) == [0]
    with torch.nn.modules.module.register_module_forward_hook(_hook):
        assert norms_left_to_the_mix(edge) == []


def test_converting_to_sync_batch_norm_ends_the_folding() -> None:
    edge = FusedMixedEdge([_Protocol()])
    nn.SyncBatchNorm.convert_sync_batchnorm(edge)
    assert not isinstance(parts_of(edge._ops[0]), Parts)


def test_frozen_norm_keeps_its_statistics() -> None:
    edge = FusedMixedEdge([conv_norm(affine=True), conv_norm()])
    edge._ops[0][1].eval()
    other = copy.deepcopy(edge)
    assert norms_left_to_the_mix(copy.deepcopy(edge)) == [1]
    assert_same(edge, other, lambda: edge(X), lambda: unfused(other, X))
    assert edge._ops[0][1].num_batches_tracked == 0


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_fold_as_well(clone: Callable[[nn.Module], FusedMixedEdge]) -> None:
    edge = FusedMixedEdge(darts_candidates())
    copied = clone(edge)
    assert torch.equal(copied(X), edge(X))
    assert norms_left_to_the_mix(copied) == norms_left_to_the_mix(edge)


def _bytes_saved(compute: Callable[[], Tensor]) -> int:
    storages: dict[int, int] = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: storages.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        result = compute()
    del result
    return sum(storages.values())


def test_folded_edge_saves_little_more_than_half_of_what_eager_saves() -> None:
    x = torch.randn(8, 8, 16, 16, requires_grad=True)
    edge = FusedMixedEdge([conv_norm() for _ in range(7)])
    assert _bytes_saved(lambda: edge(x)) <= 0.55 * _bytes_saved(lambda: unfused(edge, x))


def test_folded_edge_compiles_without_graph_breaks() -> None:
    edge = FusedMixedEdge([conv_norm(), _Protocol(), nn.Identity(), _Wrapper(depthwise_norm()), separable_norm()])
    other = copy.deepcopy(edge)
    torch._dynamo.reset()
    compiled = torch.compile(edge, fullgraph=True)
    assert_same(edge, other, lambda: compiled(X), lambda: other(X))


def test_folded_reduction_compiles_without_graph_breaks() -> None:
    edge = FusedMixedEdge([_Authors(16, 8), FactorizedReduce(16, 8)])
    other = copy.deepcopy(edge)
    torch._dynamo.reset()
    compiled = torch.compile(edge, fullgraph=True, backend="aot_eager")
    assert_same(edge, other, lambda: compiled(WIDE), lambda: other(WIDE))


def test_autocast_mixes_what_the_bodies_give() -> None:
    edge = FusedMixedEdge([conv_norm(), nn.Sequential(nn.Identity(), nn.BatchNorm2d(8))])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = edge(X)
    assert y.dtype is torch.float32  # bfloat16 from the convolution, float32 from the identity
    y.sum().backward()
    assert edge._ops[0][0].weight.grad.isfinite().all()
