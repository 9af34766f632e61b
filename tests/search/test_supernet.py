"""The supernet computes what DARTS' supernet computes, times the gates, and edges can leave it."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.spaces import DARTS, CellSpace
from dssp.supernet import Supernet
from tests.search.small import small_supernet

# ---- DARTS' model_search.py, as short as it gets ---------------------------------------------------------------------


class StockOp(nn.Module):
    """ReLU, convolutions and a BatchNorm without parameters, under the name `op`."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class StockReduce(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.conv_2 = nn.Conv2d(c_in, c_out // 2, 1, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class StockZero(nn.Module):
    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :: self.stride, :: self.stride].mul(0.0)


def conv_bn(c_in: int, c_out: int) -> StockOp:
    return StockOp(nn.ReLU(), nn.Conv2d(c_in, c_out, 1, bias=False), nn.BatchNorm2d(c_out, affine=False))


def separable(c: int, kernel: int, stride: int, dilation: int = 1) -> list[nn.Module]:
    padding = dilation * (kernel // 2)
    depthwise = nn.Conv2d(c, c, kernel, stride, padding, dilation, groups=c, bias=False)
    return [nn.ReLU(), depthwise, nn.Conv2d(c, c, 1, bias=False), nn.BatchNorm2d(c, affine=False)]


def stock_op(name: str, c: int, stride: int) -> nn.Module:
    kernel = int(name[-1]) if name[-1].isdigit() else 0
    if name == "none":
        return StockZero(stride)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else StockReduce(c, c)
    if name.startswith("sep"):
        return StockOp(*separable(c, kernel, stride), *separable(c, kernel, 1))
    if name.startswith("dil"):
        return StockOp(*separable(c, kernel, stride, dilation=2))
    pool = nn.MaxPool2d(3, stride, 1) if name.startswith("max") else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
    return nn.Sequential(pool, nn.BatchNorm2d(c, affine=False))


class StockMixedOp(nn.Module):
    def __init__(self, names: tuple[str, ...], c: int, stride: int) -> None:
        super().__init__()
        self._ops = nn.ModuleList(stock_op(name, c, stride) for name in names)

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class StockCell(nn.Module):
    def __init__(
        self, space: CellSpace, c_before: int, c_previous: int, c: int, reduction: bool, reduced_before: bool
    ) -> None:
        super().__init__()
        self.reduction, self.nodes = reduction, space.nodes
        self.preprocess0 = StockReduce(c_before, c) if reduced_before else conv_bn(c_before, c)
        self.preprocess1 = conv_bn(c_previous, c)
        self._ops = nn.ModuleList(
            StockMixedOp(space.operations, c, 2 if reduction and j < 2 else 1)
            for i in range(space.nodes)
            for j in range(2 + i)
        )

    def forward(self, s0: Tensor, s1: Tensor, weights: Tensor) -> Tensor:
        states, offset = [self.preprocess0(s0), self.preprocess1(s1)], 0
        for _ in range(self.nodes):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-self.nodes :], dim=1)


class StockNetwork(nn.Module):
    def __init__(self, space: CellSpace, c: int, cells: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 3 * c, 3, padding=1, bias=False), nn.BatchNorm2d(3 * c))
        self.cells = nn.ModuleList()
        c_before, c_previous, reduced_before = 3 * c, 3 * c, False
        for i in range(cells):
            reduction = i in (cells // 3, 2 * cells // 3)
            c *= 2 if reduction else 1
            self.cells.append(StockCell(space, c_before, c_previous, c, reduction, reduced_before))
            c_before, c_previous, reduced_before = c_previous, space.nodes * c, reduction
        self.classifier = nn.Linear(c_previous, classes)

    def forward(self, x: Tensor, normal: Tensor, reduce: Tensor) -> Tensor:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, reduce if cell.reduction else normal)
        return self.classifier(F.adaptive_avg_pool2d(s1, 1).flatten(1))


# ---- claims ----------------------------------------------------------------------------------------------------------

SPACE = replace(DARTS, nodes=2)
FEW = replace(DARTS, operations=("max_pool_3x3", "skip_connect", "dil_conv_3x3"), nodes=2)


def batch(channels: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, channels, 8, 8, generator=generator, dtype=dtype), torch.tensor([0, 1, 1, 0])


def random_supernet(*, gated: bool = True, space: CellSpace = SPACE) -> Supernet:
    """Four cells with random alpha and masks in float64."""
    torch.manual_seed(0)
    supernet = Supernet(space, channels=2, cells=4, classes=5, gated=gated).double()
    for parameter in supernet.architecture_parameters():
        nn.init.normal_(parameter)
    return supernet


def twins(*, gated: bool) -> tuple[Supernet, StockNetwork]:
    """A supernet and DARTS' with the same weights."""
    supernet = random_supernet(gated=gated)
    stock = StockNetwork(SPACE, 2, 4, 5).double()
    weights = {k: v for k, v in supernet.state_dict().items() if not k.startswith(("alpha.", "mask."))}
    stock.load_state_dict(weights, strict=True)
    return supernet, stock


def stock_weights(supernet: Supernet) -> list[Tensor]:
    """softmax(alpha), times sigmoid(mask) where there are masks: what DARTS' network is given."""
    weights = [supernet.alpha[type].softmax(-1) for type in supernet.cell_types]
    if supernet.mask:
        weights = [
            w * supernet.mask[type].sigmoid()[:, None] for w, type in zip(weights, supernet.cell_types, strict=True)
        ]
    return weights


@pytest.mark.parametrize("gated", [False, True], ids=["DARTS' formula", "with gates"])
def test_loss_statistics_and_gradients_are_those_of_darts(gated: bool) -> None:
    supernet, stock = twins(gated=gated)
    images, labels = batch()
    loss = F.cross_entropy(supernet(images), labels)
    architecture = supernet.architecture_parameters()
    ours = dict(zip([name for name, _ in supernet.named_parameters()], supernet.parameters(), strict=True))
    found = torch.autograd.grad(loss, [*architecture, *(ours[name] for name, _ in stock.named_parameters())])
    stock_loss = F.cross_entropy(stock(images, *stock_weights(supernet)), labels)
    expected = torch.autograd.grad(stock_loss, [*architecture, *stock.parameters()])
    torch.testing.assert_close(loss, stock_loss, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(list(found), list(expected), rtol=1e-8, atol=1e-10)
    for name, buffer in stock.named_buffers():
        torch.testing.assert_close(supernet.get_buffer(name), buffer, rtol=1e-10, atol=1e-12)


def test_checkpoint_of_darts_loads_and_lacks_only_the_architecture() -> None:
    supernet, stock = twins(gated=True)
    missing, unexpected = supernet.load_state_dict(stock.state_dict(), strict=False)
    assert sorted(missing) == ["alpha.normal", "alpha.reduce", "mask.normal", "mask.reduce"] and not unexpected


def test_gates_start_at_sigmoid_of_one_and_alpha_nearly_uniform() -> None:
    supernet = small_supernet()
    assert all(torch.equal(mask, torch.ones(9)) for mask in supernet.mask.values())
    assert all(0 < alpha.abs().max() < 0.01 for alpha in supernet.alpha.values())


def test_edges_are_named_in_darts_order() -> None:
    supernet = small_supernet(nodes=2)
    normal = ["normal:0->2", "normal:1->2", "normal:0->3", "normal:1->3", "normal:2->3"]
    assert list(supernet.edges()) == [*normal, *(edge.replace("normal", "reduce") for edge in normal)]
    assert supernet.locate("reduce:1->3") == ("reduce", 3)
    with pytest.raises(ValueError, match=r"edge: expected one of normal:0->2 \.\.\. reduce:2->3, got 'normal:3->2'"):
        supernet.locate("normal:3->2")


def test_edge_has_one_mixed_op_in_every_cell_of_its_type() -> None:
    supernet = small_supernet(cells=6)
    assert len(supernet.mixed_edges("normal:0->2")) == 4 and len(supernet.mixed_edges("reduce:0->2")) == 2


@pytest.mark.parametrize("edge", ["normal:1->2", "reduce:0->3", "reduce:2->3"])
def test_removed_edge_is_an_edge_whose_gate_is_zero(edge: str) -> None:
    supernet = random_supernet(space=FEW)
    masked, (images, labels) = copy.deepcopy(supernet), batch()
    cell_type, position = masked.locate(edge)
    with torch.no_grad():
        masked.mask[cell_type][position] = -1e4  # a gate of exactly 0
    supernet.remove_edge(edge)
    torch.testing.assert_close(supernet(images), masked(images), rtol=1e-12, atol=1e-12)
    for network in (supernet, masked):
        F.cross_entropy(network(images), labels).backward()
    theirs = dict(masked.named_parameters())
    for name, parameter in supernet.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-9, atol=1e-12)


def test_removed_edge_frees_its_parameters() -> None:
    supernet = small_supernet(light=False)
    edge = supernet.mixed_edges("reduce:1->3")[0]
    held = [weakref.ref(parameter) for parameter in edge.parameters()]
    before = sum(parameter.numel() for parameter in supernet.weights())
    size = sum(p.numel() for mixed_edge in supernet.mixed_edges("reduce:1->3") for p in mixed_edge.parameters())
    assert held and size > 0
    supernet.remove_edge("reduce:1->3")
    gc.collect()
    assert not any(reference() is not None for reference in held)
    assert sum(parameter.numel() for parameter in supernet.weights()) == before - size
    assert not [key for key in supernet.state_dict() if key.startswith("cells.1._ops.3.")]


def test_live_edges_are_those_that_were_not_removed() -> None:
    supernet = small_supernet(nodes=2)
    supernet.remove_edge("reduce:0->2")
    supernet.remove_edge("reduce:0->2")
    assert set(supernet.edges()) - set(supernet.live_edges()) == {"reduce:0->2"}
    assert supernet.active("reduce").tolist() == [False, True, True, True, True]


def test_penalty_sums_the_gates_of_live_edges_only() -> None:
    supernet = small_supernet(nodes=1)
    gates = torch.cat([supernet.gates(type) for type in supernet.cell_types])
    torch.testing.assert_close(supernet.gate_sum().detach(), gates.sum())
    supernet.remove_edge("normal:1->2")
    penalty = supernet.gate_sum()
    torch.testing.assert_close(penalty.detach(), gates[[0, 2, 3]].sum())
    penalty.backward()
    gate = torch.ones(()).sigmoid()
    torch.testing.assert_close(supernet.mask["normal"].grad, torch.stack([gate * (1 - gate), torch.zeros(())]))


def test_supernet_without_masks_has_no_penalty() -> None:
    supernet = small_supernet(gated=False)
    assert not supernet.mask and len(supernet.architecture_parameters()) == 2
    assert supernet.gate_sum() == 0 and supernet.gates("normal").eq(1).all()


def test_weights_and_architecture_parameters_are_all_parameters() -> None:
    supernet = small_supernet(light=False)
    parts = [*supernet.weights(), *supernet.architecture_parameters()]
    assert {id(p) for p in parts} == {id(p) for p in supernet.parameters()} and len(parts) == len(
        {id(p) for p in parts}
    )


def test_channels_last_changes_the_layout_and_not_the_result() -> None:
    supernet = random_supernet(space=FEW)
    images, _ = batch()
    expected = supernet(images)
    kept = []
    supernet.to(memory_format=torch.channels_last).cells[-1].register_forward_hook(
        lambda module, inputs, output: kept.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    found = supernet(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert kept == [True]
