"""fuse_mixed_ops: the mixed ops of DARTS, P-DARTS, PC-DARTS and Fair-DARTS, fused where they stand."""

from __future__ import annotations

import copy
import functools
import gc
import importlib.util
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dssp_kernels import FusedMixedEdge, FusedMixedNode, fuse_mixed_ops
from dssp_kernels.backend import WHY_NO_CPU_KERNELS

# ---- DARTS' operations.py and model_search.py, small -----------------------------------------------------------------


class ReLUConvBN(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class DilConv(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, dilation, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, dilation, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class SepConv(nn.Module):
    def __init__(self, C_in, C_out, kernel_size, stride, padding, affine=True):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, stride, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_in, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_in, affine=affine),
            nn.ReLU(inplace=False),
            nn.Conv2d(C_in, C_in, kernel_size, 1, padding, groups=C_in, bias=False),
            nn.Conv2d(C_in, C_out, kernel_size=1, padding=0, bias=False),
            nn.BatchNorm2d(C_out, affine=affine),
        )

    def forward(self, x):
        return self.op(x)


class Identity(nn.Module):
    def forward(self, x):
        return x


class Zero(nn.Module):
    def __init__(self, stride):
        super().__init__()
        self.stride = stride

    def forward(self, x):
        if self.stride == 1:
            return x.mul(0.0)
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


class FactorizedReduce(nn.Module):
    def __init__(self, C_in, C_out, affine=True):
        super().__init__()
        self.relu = nn.ReLU(inplace=False)
        self.conv_1 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.conv_2 = nn.Conv2d(C_in, C_out // 2, 1, stride=2, padding=0, bias=False)
        self.bn = nn.BatchNorm2d(C_out, affine=affine)

    def forward(self, x):
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        out = self.bn(out)
        return out


OPS = {
    "none": lambda C, stride: Zero(stride),
    "max_pool_3x3": lambda C, stride: nn.MaxPool2d(3, stride=stride, padding=1),
    "avg_pool_3x3": lambda C, stride: nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False),
    "skip_connect": lambda C, stride: Identity() if stride == 1 else FactorizedReduce(C, C, affine=False),
    "sep_conv_3x3": lambda C, stride: SepConv(C, C, 3, stride, 1, affine=False),
    "sep_conv_5x5": lambda C, stride: SepConv(C, C, 5, stride, 2, affine=False),
    "dil_conv_3x3": lambda C, stride: DilConv(C, C, 3, stride, 2, 2, affine=False),
    "dil_conv_5x5": lambda C, stride: DilConv(C, C, 5, stride, 4, 2, affine=False),
}


def candidate(primitive: str, C: int, stride: int) -> nn.Module:
    op = OPS[primitive](C, stride)
    return nn.Sequential(op, nn.BatchNorm2d(C, affine=False)) if "pool" in primitive else op


class MixedOp(nn.Module):
    """DARTS, and Fair-DARTS, whose network passes sigmoids."""

    def __init__(self, C, stride):
        super().__init__()
        self._ops = nn.ModuleList()
        for primitive in OPS:
            self._ops.append(candidate(primitive, C, stride))

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))  # noqa: B905  # as DARTS has it


class PMixedOp(nn.Module):
    """P-DARTS: candidates are switched off between its stages, dropout follows the skip connections."""

    def __init__(self, C, stride, switch=(True, True, False, True, True, False, True, True), p=0.3):
        super().__init__()
        self.m_ops = nn.ModuleList()
        self.p = p
        for primitive in (name for name, on in zip(OPS, switch, strict=True) if on):
            op = candidate(primitive, C, stride)
            if isinstance(op, Identity) and p > 0:
                op = nn.Sequential(op, nn.Dropout(self.p))
            self.m_ops.append(op)

    def update_p(self):
        for op in self.m_ops:
            if isinstance(op, nn.Sequential) and isinstance(op[0], Identity):
                op[1].p = self.p

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self.m_ops))  # noqa: B905


def channel_shuffle(x, groups):
    batchsize, num_channels, height, width = x.data.size()
    channels_per_group = num_channels // groups
    x = x.view(batchsize, groups, channels_per_group, height, width)
    x = torch.transpose(x, 1, 2).contiguous()
    return x.view(batchsize, -1, height, width)


class PCMixedOp(nn.Module):
    """PC-DARTS: one channel in k is mixed."""

    def __init__(self, C, stride, k=4):
        super().__init__()
        self._ops = nn.ModuleList()
        self.mp = nn.MaxPool2d(2, 2)
        self.k = k
        for primitive in OPS:
            self._ops.append(candidate(primitive, C // self.k, stride))

    def forward(self, x, weights):
        # channel proportion k=4
        dim_2 = x.shape[1]
        xtemp = x[:, : dim_2 // self.k, :, :]
        xtemp2 = x[:, dim_2 // self.k :, :, :]
        temp1 = sum(w * op(xtemp) for w, op in zip(weights, self._ops))  # noqa: B905
        # reduction cell needs pooling before concat
        if temp1.shape[2] == x.shape[2]:
            ans = torch.cat([temp1, xtemp2], dim=1)
        else:
            ans = torch.cat([temp1, self.mp(xtemp2)], dim=1)
        ans = channel_shuffle(ans, self.k)
        return ans


class Cell(nn.Module):
    def __init__(self, mixed_op, C_prev_prev, C_prev, C, reduction, reduction_prev):
        super().__init__()
        self.preprocess0 = (
            FactorizedReduce(C_prev_prev, C, affine=False)
            if reduction_prev
            else ReLUConvBN(C_prev_prev, C, 1, 1, 0, affine=False)
        )
        self.preprocess1 = ReLUConvBN(C_prev, C, 1, 1, 0, affine=False)
        self.reduction = reduction
        self._ops = nn.ModuleList()
        for i in range(2):
            for j in range(2 + i):
                self._ops.append(mixed_op(C, 2 if reduction and j < 2 else 1))

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(2):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[2:], dim=1)


def softmax(alphas):
    return F.softmax(alphas, dim=-1)


class Network(nn.Module):
    def __init__(self, mixed_op=MixedOp, relax=softmax, C=16, candidates=8):
        super().__init__()
        self.relax = relax
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * C, 3, padding=1, bias=False), nn.BatchNorm2d(3 * C))
        self.cells = nn.ModuleList(
            [
                Cell(mixed_op, 3 * C, 3 * C, C, True, False),
                Cell(mixed_op, 3 * C, 2 * C, C, False, True),
            ]
        )
        self.classifier = nn.Linear(2 * C, 10)
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(5, candidates))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(5, candidates))

    def forward(self, input):
        s0 = s1 = self.stem(input)
        for cell in self.cells:
            weights = self.relax(self.alphas_reduce if cell.reduction else self.alphas_normal)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.classifier(s1.mean((2, 3)))


EDGES = 10
FORMS: dict[str, Callable[[], Network]] = {
    "DARTS": Network,
    "Fair-DARTS": lambda: Network(relax=torch.sigmoid),
    "P-DARTS": lambda: Network(PMixedOp, candidates=6),
    "PC-DARTS": lambda: Network(PCMixedOp, C=64),
    "PC-DARTS, k=2": lambda: Network(functools.partial(PCMixedOp, k=2), C=32),
}  # at least 16 channels enter FactorizedReduce: with fewer its backward writes out of bounds (oneDNN issue 6035)
forms = pytest.mark.parametrize("make", FORMS.values(), ids=FORMS)
MIXED_OPS = (MixedOp, PMixedOp, PCMixedOp)

IMAGES = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)).contiguous(
    memory_format=torch.channels_last
)
TARGETS = torch.arange(8) % 10
X = torch.randn(4, 8, 6, 6, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)


@pytest.fixture(autouse=True)
def _seed_and_no_warnings() -> Iterator[None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fuse_mixed_ops")
        yield


def both(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    """A model, and a copy of it with fused mixed ops; in channels_last."""
    original = make().to(memory_format=torch.channels_last)
    fused = copy.deepcopy(original)
    assert fuse_mixed_ops(fused) == sum(isinstance(module, MIXED_OPS) for module in original.modules()) > 0
    return original, fused


def loss(model: nn.Module, images: Tensor = IMAGES) -> Tensor:
    torch.manual_seed(1)  # dropout
    return F.cross_entropy(model(images), TARGETS)


def assert_same_state(ours: nn.Module, theirs: nn.Module, rtol: float = 1e-4, atol: float = 1e-6) -> None:
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


# ---- the forms -------------------------------------------------------------------------------------------------------


@forms
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_fused_supernet_has_the_loss_the_gradients_and_the_statistics_of_the_original(
    make: Callable[[], Network], training: bool
) -> None:
    original, fused = both(make)
    ours, theirs = loss(fused.train(training)), loss(original.train(training))
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    ours.backward()
    theirs.backward()
    for (name, p), q in zip(fused.named_parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_state(fused, original)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_is_taken(memory_format: torch.memory_format) -> None:
    original, fused = both(Network)
    images = IMAGES.contiguous(memory_format=memory_format)
    original, fused = original.to(memory_format=memory_format), fused.to(memory_format=memory_format)
    torch.testing.assert_close(loss(fused, images), loss(original, images), rtol=1e-6, atol=0)


@forms
def test_state_dicts_load_both_ways(make: Callable[[], Network]) -> None:
    original, fused = both(make)
    loss(fused)
    original.load_state_dict(fused.state_dict())
    assert_same_state(fused, original, rtol=0, atol=0)
    other = make()
    fused.load_state_dict(other.state_dict())
    assert_same_state(fused, other, rtol=0, atol=0)


@pytest.mark.parametrize("make", [FORMS["DARTS"], FORMS["PC-DARTS"]], ids=["DARTS", "PC-DARTS"])
def test_optimizer_made_before_keeps_training(make: Callable[[], Network]) -> None:
    original = make()
    models = original, copy.deepcopy(original)
    optimizers = [torch.optim.SGD(model.parameters(), 0.02, momentum=0.9) for model in models]
    fuse_mixed_ops(models[1])
    before = {name: p.detach().clone() for name, p in models[1].named_parameters()}
    for _ in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    moved = [name for name, p in models[1].named_parameters() if not torch.equal(p, before[name])]
    assert len(moved) == len(before)
    torch.testing.assert_close(loss(models[1]), loss(models[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("cls", MIXED_OPS)
@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_are_fused_and_independent(cls: type[nn.Module], clone: Callable[[nn.Module], nn.Module]) -> None:
    fused = both(lambda: cls(8, 1))[1].eval()
    copied = clone(fused)
    weights = torch.rand(6 if cls is PMixedOp else 8)
    expected = fused(X, weights)
    assert torch.equal(copied(X, weights), expected) and fuse_mixed_ops(copied) == 0
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1)
    assert torch.equal(fused(X, weights), expected) and not torch.equal(copied(X, weights), expected)


@forms
def test_bfloat16_autocast_stays_close_to_the_original(make: Callable[[], Network]) -> None:
    original, fused = both(make)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = loss(fused), loss(original)
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)
    ours.backward()
    assert all(parameter.grad.isfinite().all() for parameter in fused.parameters())


def test_second_order_gradients_are_those_of_the_original() -> None:
    gradients = []
    for model in both(lambda: MixedOp(8, 1)):
        weights = torch.full((8,), 0.125, requires_grad=True)
        (first,) = torch.autograd.grad(model(X, weights).square().mean(), weights, create_graph=True)
        gradients.append(torch.autograd.grad(first.square().sum(), weights)[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_fused_mixed_op_compiles_without_graph_breaks() -> None:
    original = Strict()
    fused = copy.deepcopy(original)
    fuse_mixed_ops(fused)
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    assert_mixes_as(compiled, original, torch.rand(3, requires_grad=True))


# ---- what stays ------------------------------------------------------------------------------------------------------


def test_modules_references_and_hooks_stay() -> None:
    model = Network()
    mixed_op = model.cells[0]._ops[0]
    candidates, parameters = list(mixed_op._ops), list(model.parameters())
    seen: list[torch.Size] = []
    mixed_op.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    mixed_op.eval()
    assert fuse_mixed_ops(model) == EDGES
    assert model.cells[0]._ops[0] is mixed_op and isinstance(mixed_op, MixedOp) and not mixed_op.training
    assert all(a is b for a, b in zip(mixed_op._ops, candidates, strict=True))
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    model(IMAGES)
    assert seen == [torch.Size([8, 16, 4, 4])]


def test_converting_twice_converts_nothing() -> None:
    model = Network()
    assert (fuse_mixed_ops(model), fuse_mixed_ops(model)) == (EDGES, 0)


def test_mixed_op_with_two_parents_counts_once() -> None:
    shared = MixedOp(8, 1)
    model = nn.ModuleDict({"first": nn.Sequential(shared), "second": nn.ModuleList([shared])})
    assert fuse_mixed_ops(model) == 1 and model["first"][0] is model["second"][0]


def test_mixed_op_can_be_the_model_itself() -> None:
    original, fused = both(lambda: MixedOp(8, 2))
    weights = torch.rand(8)
    torch.testing.assert_close(fused(x=X, weights=weights), original(X, weights), rtol=1e-5, atol=1e-5)


def test_p_darts_still_reaches_its_own_methods() -> None:
    mixed_op = both(lambda: PMixedOp(8, 1))[1]
    mixed_op.p = 0.7
    mixed_op.update_p()
    assert [op[1].p for op in mixed_op.m_ops if isinstance(op, nn.Sequential) and isinstance(op[1], nn.Dropout)] == [
        0.7
    ]


def test_candidates_may_be_replaced_later() -> None:
    original, fused = both(lambda: PMixedOp(8, 1, p=0.0))
    for model in (original, fused):
        del model.m_ops[2]
        model.m_ops[3] = model.m_ops[4]  # one norm twice: it must not move into the mix any more
    weights = torch.rand(5)
    torch.testing.assert_close(fused(X, weights), original(X, weights), rtol=1e-5, atol=1e-5)
    assert_same_state(fused, original)


@pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")
def test_darts_convolutions_are_folded() -> None:
    assert "BatchNorm folded: 1, 2, 4, 5, 6, 7" in repr(both(lambda: MixedOp(8, 1))[1])
    assert "BatchNorm folded: 1, 2, 3, 4, 5, 6, 7" in repr(both(lambda: MixedOp(8, 2))[1])


# ---- a mixed op that is nothing but the sum is a FusedMixedEdge ------------------------------------------------------


@pytest.mark.parametrize("make", [lambda: MixedOp(8, 2), lambda: PMixedOp(8, 2)], ids=["_ops", "m_ops"])
def test_fused_mixed_op_can_be_pruned_and_removed(make: Callable[[], nn.Module]) -> None:
    fused = both(make)[1].eval()
    assert isinstance(fused, FusedMixedEdge)
    weights = torch.rand(fused.candidates)
    before = fused(X, weights)
    fused.prune()
    assert fused(X, weights).shape == before.shape and not fused(X, weights).any()
    fused.restore()
    assert torch.equal(fused(X, weights), before)
    convolution = weakref.ref(next(module for module in fused.modules() if isinstance(module, nn.Conv2d)))
    fused.remove()
    gc.collect()
    assert convolution() is None and not list(fused.parameters()) and not fused(X, weights).any()


def test_fused_mixed_ops_can_be_grouped_into_a_node() -> None:
    edges = [both(lambda: MixedOp(8, 1))[1].eval() for _ in range(2)]
    weights = torch.rand(2, 8)
    expected = edges[0](X, weights[0]) + edges[1](X, weights[1])
    torch.testing.assert_close(FusedMixedNode(edges)([X, X], weights), expected, rtol=1e-5, atol=1e-5)


class MaskedMixedOp(MixedOp):
    """Uses a name of FusedMixedEdge for something else."""

    def __init__(self, C, stride):
        super().__init__(C, stride)
        self.mask = "mine"


@pytest.mark.parametrize("make", [lambda: MaskedMixedOp(8, 1), lambda: PCMixedOp(16, 1)], ids=["name taken", "partial"])
def test_others_are_fused_but_are_no_fused_mixed_edge(make: Callable[[], nn.Module]) -> None:
    fused = both(make)[1]
    assert not isinstance(fused, FusedMixedEdge) and getattr(fused, "mask", "mine") == "mine"


# ---- spellings -------------------------------------------------------------------------------------------------------


class Host(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self._ops = nn.ModuleList([nn.Conv2d(8, 8, 1), candidate("dil_conv_3x3", 8, 1), nn.Identity()])
        self.alpha = nn.Parameter(torch.randn(3))


class Strict(Host):
    def forward(self, x, weights):
        """With a docstring."""
        return sum((w * op(x) for w, op in zip(weights, self._ops, strict=True)))


class Listed(Host):
    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum([op(x) * w for op, w in zip(self._ops, weights)])  # noqa: B905


class Enumerated(Host):
    def forward(self, x, weights):
        out = sum(weights[i] * op(x) for i, op in enumerate(self._ops))
        return out


class Prepared(Host):
    def forward(self, x, weights):
        weights = weights.view(-1)
        return F.relu(sum(w * op(x) for w, op in zip(weights, self._ops)))  # noqa: B905


class Relaxing(Host):
    def forward(self, x, weights, scale=1.0, *, shift=0.0):
        return scale * sum(w * op(x) for w, op in zip(F.softmax(self.alpha + weights, 0), self._ops)) + shift  # noqa: B905


def _keep(function: Callable) -> Callable:
    return function


class Registered(Host):
    @_keep
    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops))  # noqa: B905


@pytest.mark.parametrize("cls", [Strict, Listed, Enumerated, Prepared, Relaxing, Registered])
def test_usual_spellings_are_recognised(cls: type[nn.Module]) -> None:
    original = cls()
    fused = copy.deepcopy(original)
    weights = torch.rand(3, requires_grad=True)
    assert fuse_mixed_ops(fused) == 1
    assert_mixes_as(fused, original, weights)


def assert_mixes_as(fused: nn.Module, original: nn.Module, weights: Tensor) -> None:
    ours, theirs = fused(X, weights), original(X, weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        *(torch.autograd.grad(y.square().sum(), weights)[0] for y in (ours, theirs)), rtol=1e-4, atol=1e-4
    )


def test_forward_may_use_variables_around_its_class() -> None:
    def local() -> type[nn.Module]:
        offset, scale = torch.ones(()), 2.0

        class Local(Host):
            def forward(self, x, weights):
                super().train(self.training)
                return scale * sum(w * op(x) for w, op in zip(weights, self._ops)) + offset  # noqa: B905

        return Local

    original = local()()
    fused = copy.deepcopy(original)
    assert fuse_mixed_ops(fused) == 1
    assert_mixes_as(fused, original, torch.rand(3, requires_grad=True))


CALLS: dict[str, Callable[[], object]] = {
    "floats": lambda: [0.1, 0.2, 0.3],
    "list of tensors": lambda: list(torch.rand(3)),
    "fewer than candidates": lambda: torch.rand(2),
    "per image": lambda: torch.rand(3, 4, 1, 1, 1),
    "integers": lambda: torch.tensor([1, 2, 3]),
}


@pytest.mark.parametrize("weights", CALLS.values(), ids=CALLS)
def test_weights_of_another_kind_are_summed_as_before(weights: Callable[[], object]) -> None:
    given = weights()
    original = Listed()
    fused = copy.deepcopy(original)
    fuse_mixed_ops(fused)
    torch.testing.assert_close(fused(X, given), original(X, given), rtol=0, atol=0)


def test_weights_that_do_not_fit_fail_as_before() -> None:
    for cls, error in ((Strict, ValueError), (Enumerated, IndexError)):
        fused = cls()
        fuse_mixed_ops(fused)
        with pytest.raises(error):
            fused(X, torch.rand(2))


def test_candidates_of_different_shapes_are_summed_as_before() -> None:
    original = Listed()
    original._ops[0] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8))
    fused = copy.deepcopy(original)
    fuse_mixed_ops(fused)
    assert_mixes_as(fused, original, torch.rand(3, requires_grad=True))
    assert_same_state(fused, original)


# ---- what is not recognised ------------------------------------------------------------------------------------------


class Thresholded(Host):
    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops) if w > 0.1)  # noqa: B905


class Noisy(Host):
    def forward(self, x, weights):
        return sum(w * op(F.dropout(x)) for w, op in zip(weights, self._ops))  # noqa: B905


class Squared(Host):
    def forward(self, x, weights):
        return sum(w * w * op(x) for w, op in zip(weights, self._ops))  # noqa: B905


class Added(Host):
    def forward(self, x, weights):
        return sum(w + op(x) for w, op in zip(weights, self._ops))  # noqa: B905


class Started(Host):
    def forward(self, x, weights):
        return sum((w * op(x) for w, op in zip(weights, self._ops)), start=x)  # noqa: B905


class Shadowed(Host):
    def forward(self, x, weights, *, zip=lambda *sequences: reversed(list(zip(*sequences)))):  # noqa: B905
        sum = max
        return sum(w * op(x) for w, op in zip(weights, self._ops))


class Elsewhere(Host):
    def forward(self, x, weights):
        self = self.other
        return sum(w * op(x) for w, op in zip(weights, self._ops))  # noqa: B905


class Doubled(Host):
    @functools.wraps(MixedOp.forward)
    def forward(self, x, weights):
        return 2 * MixedOp.forward(self, x, weights)


class Stacked(Host):
    def forward(self, x, weights):
        return torch.einsum("k,kbchw->bchw", weights, torch.stack([op(x) for op in self._ops]))


class Nested(Host):
    def forward(self, x, weights):
        return (lambda self: sum(w * op(x) for w, op in zip(weights, self._ops)))(self.other)  # noqa: B905


def _on_the_instance() -> nn.Module:
    host = Strict()
    host.forward = lambda x, weights: x
    return host


NOT_RECOGNISED: dict[str, Callable[[], nn.Module]] = {
    **{cls.__name__: cls for cls in (Thresholded, Noisy, Squared, Added, Started, Elsewhere, Doubled, Stacked, Nested)},
    "instance": _on_the_instance,
}


@pytest.mark.parametrize("make", NOT_RECOGNISED.values(), ids=NOT_RECOGNISED)
def test_anything_else_is_left_alone_with_a_warning_that_names_it(make: Callable[[], nn.Module]) -> None:
    model = nn.Sequential(make(), make())
    cls = type(model[0])
    with pytest.warns(UserWarning, match=rf"2 of class .*{cls.__qualname__} left as they are: its forward.*matcher="):
        assert fuse_mixed_ops(model) == 0
    assert type(model[0]) is cls


def test_names_that_are_not_the_builtins_are_not_recognised() -> None:
    assert fuse_mixed_ops(Shadowed()) == 0  # two arguments and one by keyword: it does not even look like a mixed op


def test_cells_and_ordinary_modules_are_no_look_alikes() -> None:
    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self._ops = nn.ModuleList([MixedOp(8, 1), MixedOp(8, 1)])

        def forward(self, x, weights):
            for i, op in enumerate(self._ops):
                x = op(x, weights[i])
            return x

    assert fuse_mixed_ops(Chain()) == 2
    assert fuse_mixed_ops(nn.Sequential(nn.Conv2d(3, 8, 1), nn.MultiheadAttention(8, 2))) == 0


def _module_from(path: Path) -> object:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def test_source_that_is_not_what_runs_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    lines = (
        "from torch import nn",
        "class Edited(nn.Module):",
        "    def __init__(self, ops):",
        "        super().__init__()",
        "        self._ops = nn.ModuleList(ops)",
        "    def forward(self, x, weights):",
        "        return sum(w * op(x) for w, op in zip(weights, self._ops)) + 1",
    )
    path = tmp_path / "edited_mixed_op.py"
    path.write_text("\n".join(lines))
    module = _module_from(path)
    path.write_text("\n".join(lines).replace(" + 1", ""))
    with pytest.warns(UserWarning, match="source has changed"):
        assert fuse_mixed_ops(module.Edited([nn.Identity()])) == 0


def _without_source(returned: str) -> nn.Module:
    namespace: dict[str, type] = {"Host": Host}
    exec(f"class Typed(Host):\n    def forward(me, s, weights):\n        return {returned}", namespace)
    return namespace["Typed"]()


def test_darts_spelling_is_recognised_without_a_file_and_others_are_not() -> None:
    original = _without_source("sum(p * o(s) for p, o in zip(weights, me._ops))")
    fused = copy.deepcopy(original)
    assert fuse_mixed_ops(fused) == 1
    assert_mixes_as(fused, original, torch.rand(3, requires_grad=True))
    for other in (
        "sum(p * o(s) for p, o in zip(weights, me._ops)) + 1",
        "sum(p - o(s) for p, o in zip(weights, me._ops))",
    ):
        with pytest.warns(UserWarning, match="cannot be read"):
            assert fuse_mixed_ops(_without_source(other)) == 0


# ---- matcher ---------------------------------------------------------------------------------------------------------


class Gathered(nn.Module):
    """Neither an attribute nor an expression that could be recognised: keeps a dictionary, takes x last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({"one": nn.Conv2d(8, 8, 1), "two": candidate("sep_conv_3x3", 8, 1)})

    def forward(self, alpha: Tensor, x: Tensor) -> Tensor:
        weights = alpha.softmax(0)
        y = torch.zeros_like(x)
        for i, name in enumerate(self.layers):
            y = y + weights[i] * self.layers[name](x)
        return y


def read_gathered(module: Gathered, alpha: Tensor, x: Tensor) -> tuple[Iterable[nn.Module], Tensor, Tensor]:
    return module.layers.values(), alpha.softmax(0), x


def match_gathered(module: nn.Module) -> Callable | None:
    return read_gathered if type(module) is Gathered else None


def test_matcher_brings_other_forms_in() -> None:
    original = nn.ModuleList([Gathered(), MixedOp(8, 1)])
    fused = copy.deepcopy(original)
    assert fuse_mixed_ops(fused, matcher=match_gathered) == 2
    alpha = torch.randn(2, requires_grad=True)
    for other in (fused, copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        ours, theirs = other[0](alpha, x=X), copy.deepcopy(original)[0](alpha, X)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(
            *(torch.autograd.grad(y.square().sum(), alpha)[0] for y in (ours, theirs)), rtol=1e-4, atol=1e-4
        )
    fused.load_state_dict(original.state_dict())


def test_matcher_is_asked_before_anything_is_recognised() -> None:
    def read(module: MixedOp, x: Tensor, weights: Tensor) -> tuple[Iterable[nn.Module], Tensor, Tensor]:
        return list(module._ops)[3:4], weights[3:4], x

    fused = MixedOp(8, 1)
    assert fuse_mixed_ops(fused, matcher=lambda module: read if isinstance(module, MixedOp) else None) == 1
    torch.testing.assert_close(fused(X, torch.full((8,), 2.0)), 2 * X)


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("model: expected an nn.Module, got list", lambda: fuse_mixed_ops([MixedOp(8, 1)])),
        ("matcher: expected a function of a module, got str", lambda: fuse_mixed_ops(MixedOp(8, 1), matcher="_ops")),
        (
            "matcher: expected it to return a function or None, got bool",
            lambda: fuse_mixed_ops(MixedOp(8, 1), matcher=lambda module: True),
        ),
    ],
)
def test_bad_input_is_named(words: str, call: Callable[[], int]) -> None:
    with pytest.raises(TypeError, match=words):
        call()
