"""The NAS-Bench-201 space: its networks compute what the benchmark's do, and a search goes through all its parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.arch_genotype import ArchGenotype
from dssp.cost import count_flops, count_parameters
from dssp.derived.derivation import derive
from dssp.genotype import Genotype
from dssp.network import DerivedNetwork
from dssp.pruning.edges import GateTable, Pruner, PruningRules
from dssp.spaces import DARTS, NASBENCH201, get_space
from dssp.spaces.nasbench201 import ResidualBlock
from dssp.supernet import Supernet

EDGES = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
MIXED = "|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|nor_conv_3x3~2|"
NO_NODE_1 = "|none~0|+|nor_conv_1x1~0|skip_connect~1|+|none~0|nor_conv_3x3~1|skip_connect~2|"
ALL_NONE = "|none~0|+|none~0|none~1|+|none~0|none~1|none~2|"
ALL_SKIP = ALL_NONE.replace("none", "skip_connect")
ALL_CONV = ALL_NONE.replace("none", "nor_conv_3x3")

# ---- the benchmark's network, as a function of its weights -----------------------------------------------------------

Weights = Mapping[str, Tensor]
Edge = Callable[[int, int, Tensor], Tensor]  # (position of the cell, of the edge, its source) -> what it adds


def norm(w: Weights, name: str, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, w.get(f"{name}.weight"), w.get(f"{name}.bias"), training=True)


def relu_conv_bn(w: Weights, name: str, x: Tensor, stride: int = 1) -> Tensor:
    kernel = w[f"{name}.op.1.weight"]
    return norm(w, f"{name}.op.2", F.conv2d(x.relu(), kernel, stride=stride, padding=kernel.shape[-1] // 2))


def operation(w: Weights, name: str, kind: str, x: Tensor) -> Tensor:
    if kind == "none":
        return x * 0
    if kind == "skip_connect":
        return x
    if kind == "avg_pool_3x3":
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    return relu_conv_bn(w, name, x)


def stock_network(w: Weights, images: Tensor, cells: int, edge: Edge) -> Tensor:
    """Stem, N cells, residual block, N cells, residual block, N cells, BN, ReLU, average, linear."""
    x = norm(w, "stem.1", F.conv2d(images, w["stem.0.weight"], padding=1))
    for position in range(3 * cells + 2):
        name = f"cells.{position}"
        if position in (cells, 2 * cells + 1):
            shortcut = F.conv2d(F.avg_pool2d(x, 2), w[f"{name}.downsample.1.weight"])
            x = shortcut + relu_conv_bn(w, f"{name}.conv_b", relu_conv_bn(w, f"{name}.conv_a", x, stride=2))
        else:
            nodes = [x]
            for node in (1, 2, 3):
                entering = [(e, source) for e, (source, target) in enumerate(EDGES) if target == node]
                nodes.append(torch.stack([edge(position, e, nodes[source]) for e, source in entering]).sum(0))
            x = nodes[-1]
    return F.linear(norm(w, "lastact.0", x).relu().mean((2, 3)), w["classifier.weight"], w["classifier.bias"])


def images(size: int = 8) -> Tensor:
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def random_supernet(*, gated: bool = True, cells: int = 1) -> Supernet:
    torch.manual_seed(0)
    supernet = Supernet(NASBENCH201, channels=3, cells=cells, classes=5, gated=gated).double()
    for parameter in supernet.architecture_parameters():
        nn.init.normal_(parameter)
    return supernet


@pytest.mark.parametrize("gated", [False, True], ids=["DARTS' formula", "with gates"])
@pytest.mark.parametrize("cells", [1, 2])
def test_supernet_and_its_gradients_are_those_of_the_benchmarks_skeleton(gated: bool, cells: int) -> None:
    supernet = random_supernet(gated=gated, cells=cells)
    weights = dict(supernet.named_parameters())
    mix = supernet.alpha["normal"].softmax(-1)
    mix = mix * supernet.mask["normal"].sigmoid()[:, None] if gated else mix

    def edge(position: int, e: int, x: Tensor) -> Tensor:
        name = f"cells.{position}._ops.{e}._ops"
        kinds = enumerate(NASBENCH201.operations)
        return torch.stack([mix[e, k] * operation(weights, f"{name}.{k}", kind, x) for k, kind in kinds]).sum(0)

    found, expected = supernet(images()), stock_network(weights, images(), cells, edge)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    ours, theirs = (torch.autograd.grad(y.square().sum(), list(weights.values())) for y in (found, expected))
    torch.testing.assert_close(list(ours), list(theirs), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("arch", [MIXED, NO_NODE_1, ALL_NONE, ALL_SKIP], ids=["mixed", "no node 1", "none", "skip"])
def test_derived_network_is_the_benchmarks(arch: str) -> None:
    torch.manual_seed(0)
    genotype = ArchGenotype.from_text(arch)
    network = DerivedNetwork(NASBENCH201, genotype, channels=3, cells=2, classes=5).double()
    kinds = [kind for node in genotype.normal for kind, _ in node]
    place = {e: i for i, e in enumerate(e for e, kind in enumerate(kinds) if kind != "none")}
    weights = dict(network.named_parameters())

    def edge(position: int, e: int, x: Tensor) -> Tensor:
        return operation(weights, f"cells.{position}._ops.{place.get(e)}", kinds[e], x)

    torch.testing.assert_close(network(images()), stock_network(weights, images(), 2, edge), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    ("arch", "parameters", "multiply_adds"),
    [(ALL_NONE, 73306, 7.78304e6), (ALL_SKIP, 73306, 7.78304e6), (ALL_CONV, 1531546, 220.11968e6)],
    ids=["smallest", "skips", "largest"],
)
def test_published_sizes_on_cifar10(arch: str, parameters: int, multiply_adds: float) -> None:
    # The benchmark gives 0.073306 and 1.531546 M parameters, 7.78305 and 220.11969 M FLOPs (multiply-adds).
    network = DerivedNetwork(NASBENCH201, ArchGenotype.from_text(arch), channels=16, cells=5, classes=10)
    assert count_parameters(network) == parameters
    assert count_flops(network, (3, 32, 32)) == 2 * multiply_adds


# ---- the space -------------------------------------------------------------------------------------------------------


def test_space_is_one_cell_of_six_edges_and_five_operations() -> None:
    assert get_space("nasbench201") is NASBENCH201
    assert list(NASBENCH201.edges) == EDGES and NASBENCH201.concat == (3,)
    assert NASBENCH201.operations == ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
    names = [f"normal:{source}->{node}" for source, node in EDGES]
    assert list(random_supernet().edges()) == names


def test_norms_of_cells_have_parameters_only_once_derived_and_those_outside_always() -> None:
    genotype = ArchGenotype.from_text(ALL_CONV)
    networks = random_supernet(), DerivedNetwork(NASBENCH201, genotype, channels=3, cells=1, classes=5)
    for network, affine in zip(networks, (False, True), strict=True):
        norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
        inside = {name for name in norms if "._ops." in name}
        assert {norms[name].affine for name in inside} == {affine}
        assert {norms[name].affine for name in norms.keys() - inside} == {True}
        assert {norm.track_running_stats for norm in norms.values()} == {True}


def test_supernet_has_no_norm_after_its_pools() -> None:
    edge = random_supernet().mixed_edges("normal:0->1")[0]
    assert [type(op) for op in edge._ops if isinstance(op, nn.AvgPool2d | nn.Sequential)] == [nn.AvgPool2d]


@pytest.mark.parametrize("size", [8, 7, 2, 1])
def test_residual_block_halves_rounding_up_and_doubles_channels(size: int) -> None:
    out = -(-size // 2)
    assert ResidualBlock(3)(torch.randn(2, 3, size, size)).shape == (2, 6, out, out)


@pytest.mark.parametrize(("image_channels", "size"), [(1, 8), (3, 17), (3, 2)])
def test_logits_for_every_image_size(image_channels: int, size: int) -> None:
    supernet = Supernet(NASBENCH201, channels=2, cells=1, classes=7, image_channels=image_channels)
    assert supernet(torch.randn(2, image_channels, size, size)).shape == (2, 7)


def test_genotype_of_another_space_is_refused() -> None:
    darts = Genotype(((("skip_connect", 0),),), (2,), ((("max_pool_3x3", 0),),), (2,))
    with pytest.raises(ValueError, match="space nasbench201 has cells normal, got normal and reduce"):
        DerivedNetwork(NASBENCH201, darts, channels=2, cells=1, classes=2)
    with pytest.raises(ValueError, match="space darts has cells normal and reduce, got normal"):
        DerivedNetwork(DARTS, ArchGenotype.from_text(MIXED), channels=2, cells=3, classes=2)


def test_more_output_nodes_than_nodes_are_refused() -> None:
    with pytest.raises(ValueError, match="output_nodes: got 4, expected 1 to 3"):
        replace(NASBENCH201, output_nodes=4)


# ---- searching it ----------------------------------------------------------------------------------------------------


def choose(supernet: Supernet, *names: str) -> None:
    """Alpha for these operations, edge by edge."""
    with torch.no_grad():
        supernet.alpha["normal"].zero_()
        for e, name in enumerate(names):
            supernet.alpha["normal"][e, supernet.space.operations.index(name)] = 1.0


def test_every_edge_derives_its_largest_alpha_none_included() -> None:
    supernet = random_supernet(gated=False)
    names = ("nor_conv_3x3", "none", "avg_pool_3x3", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")
    choose(supernet, *names)
    assert derive(supernet, max_edges_per_node=3) == ArchGenotype.from_text(MIXED)
    choose(supernet, *["none"] * 6)
    assert derive(supernet, max_edges_per_node=3) == ArchGenotype.from_text(ALL_NONE)


def test_removed_edge_is_derived_as_none_and_the_others_by_alpha() -> None:
    space = replace(NASBENCH201, operations=NASBENCH201.operations[1:])
    supernet = Supernet(space, channels=2, cells=1, classes=2)
    choose(supernet, "nor_conv_3x3", "avg_pool_3x3", "avg_pool_3x3", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")
    supernet.remove_edge("normal:0->2")
    assert derive(supernet, max_edges_per_node=3) == ArchGenotype.from_text(MIXED)


def test_pruning_keeps_an_edge_into_every_node_of_the_one_cell_type() -> None:
    supernet = random_supernet()
    rules = PruningRules("budget", threshold=0, min_edges=1, edge_budget=0, warmup_epochs=0, last_epoch=1, every=1)
    pruner = Pruner(supernet, rules, lambda: torch.zeros(1))
    for epoch in range(2):
        pruner.end_epoch(epoch, step=epoch)
    assert [edge.split(">")[1] for edge in supernet.live_edges()] == ["1", "2", "3"]
    assert len(GateTable.of(supernet).names) == 6
    assert supernet(images()).isfinite().all()
