"""The derived network is DARTS' evaluation network for the genotype."""

from __future__ import annotations

import pytest
import torch

from dssp.genotype import Genotype
from dssp.network import DerivedEdges, DerivedNetwork
from dssp.spaces import DARTS
from dssp.spaces.darts import DartsCell
from dssp.spaces.operations import FactorizedReduce, ReLUConvBN

DARTS_V2 = Genotype.from_text(
    "Genotype(normal=[('sep_conv_3x3', 0), ('sep_conv_3x3', 1), ('sep_conv_3x3', 0), ('sep_conv_3x3', 1), "
    "('sep_conv_3x3', 1), ('skip_connect', 0), ('skip_connect', 0), ('dil_conv_3x3', 2)], normal_concat=[2, 3, 4, 5], "
    "reduce=[('max_pool_3x3', 0), ('max_pool_3x3', 1), ('skip_connect', 2), ('max_pool_3x3', 1), ('max_pool_3x3', 0), "
    "('skip_connect', 2), ('skip_connect', 2), ('max_pool_3x3', 1)], reduce_concat=[2, 3, 4, 5])"
)
UNEVEN = Genotype(
    normal=((("sep_conv_3x3", 0),), (("skip_connect", 0), ("max_pool_3x3", 1), ("dil_conv_5x5", 2))),
    normal_concat=(3,),
    reduce=((("skip_connect", 1),), (("avg_pool_3x3", 2), ("skip_connect", 0))),
    reduce_concat=(2, 3),
)


def test_published_darts_network_has_its_published_size() -> None:
    network = DerivedNetwork(DARTS, DARTS_V2, channels=36, cells=20, classes=10)
    millions = sum(p.numel() for p in network.parameters()) / 1e6
    # The paper reports 3.3 M for DARTS (second order) on CIFAR-10: this cell at 36 channels and 20 cells.
    assert millions == pytest.approx(3.35, abs=0.005)


@pytest.mark.parametrize("genotype", [DARTS_V2, UNEVEN], ids=["darts_v2", "uneven"])
@pytest.mark.parametrize(
    ("image_channels", "size", "cells"),
    [(1, 8, 3), (3, 32, 3), (3, 17, 4), (1, 8, 1), (3, 4, 8)],
    ids=["digits", "cifar", "odd size", "one cell", "down to one pixel"],
)
def test_logits_for_every_image_size(genotype: Genotype, image_channels: int, size: int, cells: int) -> None:
    network = DerivedNetwork(DARTS, genotype, channels=4, cells=cells, classes=7, image_channels=image_channels)
    logits = network(torch.randn(2, image_channels, size, size))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None for p in network.classifier.parameters())


def test_reductions_double_channels_and_the_cell_after_reduces_its_older_input() -> None:
    network = DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=6, classes=10)
    widths = [cell.preprocess1.op[1].out_channels for cell in network.cells]
    assert widths == [4, 4, 8, 8, 16, 16]
    reduces = [isinstance(cell.preprocess0, FactorizedReduce) for cell in network.cells]
    assert reduces == [False, False, False, True, False, True]
    assert isinstance(network.cells[0].preprocess0, ReLUConvBN)


def test_state_dict_keys_are_those_of_darts() -> None:
    keys = set(DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=6, classes=10).state_dict())
    assert {
        "stem.0.weight",
        "stem.1.weight",
        "cells.0.preprocess0.op.1.weight",
        "cells.3.preprocess0.conv_1.weight",
        "cells.0._ops.7.op.1.weight",
        "cells.2._ops.2.conv_2.weight",
        "classifier.bias",
    } - keys == {"cells.2._ops.2.conv_2.weight"}  # that skip leaves state 2, where even a reduction cell has stride 1


def test_node_is_the_sum_of_its_edges_and_the_output_their_concatenation() -> None:
    def edges(cell_type: str, channels: int, stride: int = 1) -> DerivedEdges:
        return DerivedEdges(UNEVEN.normal, (3, 2), inputs=2, channels=channels, stride=stride)

    cell = DartsCell(
        edges, c_before=4, c_previous=4, channels=4, reduction=False, reduced_before=False, affine=True
    ).eval()
    s0, s1 = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    x0, x1, (sep, skip, pool, dil) = cell.preprocess0(s0), cell.preprocess1(s1), cell._ops
    node2 = sep(x0)
    node3 = skip(x0) + pool(x1) + dil(node2)
    torch.testing.assert_close(cell(s0, s1), torch.cat([node3, node2], dim=1))


def test_every_norm_has_parameters() -> None:
    network = DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=3, classes=10)
    assert all(m.affine for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d))


def test_channels_last_images_stay_channels_last() -> None:
    network = DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=3, classes=10).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    kept = []
    network.cells[-1].register_forward_hook(
        lambda module, inputs, output: kept.append(output.is_contiguous(memory_format=torch.channels_last))
    )
    network(images)
    assert kept == [True]


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="cells: got 0"):
        DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=0, classes=10)
    unknown = Genotype(((("conv_9x9", 0),),), (2,), ((("skip_connect", 0),),), (2,))
    with pytest.raises(ValueError, match="operation: got 'conv_9x9'"):
        DerivedNetwork(DARTS, unknown, channels=4, cells=3, classes=10)
