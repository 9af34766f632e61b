"""Parameters and FLOPs agree with a count by hand, and counting changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dssp.cost import count_flops, count_parameters
from dssp.genotype import Genotype
from dssp.network import DerivedNetwork
from dssp.spaces import DARTS
from dssp.spaces.operations import SepConv

SMALL = Genotype(((("skip_connect", 0),),), (2,), ((("max_pool_3x3", 0),),), (2,))


def test_parameters_of_a_separable_convolution() -> None:
    # two depthwise 5x5, two pointwise 6x6, two BatchNorms of weight and bias
    assert count_parameters(SepConv(6, 6, 5, 1, 2)) == 2 * 6 * 25 + 2 * 6 * 6 + 2 * 2 * 6


def test_shared_parameters_count_once() -> None:
    layer = nn.Linear(3, 5)
    assert count_parameters(nn.ModuleList([layer, layer])) == 3 * 5 + 5


@pytest.mark.parametrize(("height", "width"), [(8, 8), (7, 5)])
def test_flops_count_multiply_and_add_as_two(height: int, width: int) -> None:
    per_pixel = 2 * 6 * 25 + 2 * 6 * 6  # multiply-adds of the two pairs; groups make a depthwise channel see one input
    assert count_flops(SepConv(6, 6, 5, 1, 2), (6, height, width)) == 2 * per_pixel * height * width


def test_flops_of_a_derived_network() -> None:
    c, cells = 2, 3  # normal at 8x8, reductions to 4x4 and 2x2
    maps = [8 * 8 * 3 * c * 9]  # stem, one image channel
    maps += [8 * 8 * (3 * c) * c * 2]  # cell 0: both inputs are the stem
    maps += [8 * 8 * (3 * c) * (2 * c) + 8 * 8 * c * (2 * c)]  # cell 1 doubles; its inputs are still 8x8
    maps += [4 * 4 * c * (4 * c) + 4 * 4 * (2 * c) * (4 * c)]  # cell 2; preprocess0 reduces 8x8 to 4x4
    maps += [4 * c * 10]  # linear
    network = DerivedNetwork(DARTS, SMALL, channels=c, cells=cells, classes=10, image_channels=1)
    assert count_flops(network, (1, 8, 8)) == 2 * sum(maps)


def test_counting_leaves_the_network_as_it_was() -> None:
    network = DerivedNetwork(DARTS, SMALL, channels=2, cells=3, classes=10).train()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    storages = [p.data_ptr() for p in network.parameters()]
    random_state = torch.get_rng_state()
    count_flops(network, (3, 8, 8))
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert storages == [p.data_ptr() for p in network.parameters()]
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)


def test_network_too_large_for_memory_can_be_counted() -> None:
    with torch.device("meta"):
        layer = nn.Linear(10**6, 10**6, bias=False)
    assert count_parameters(layer) == 10**12
    assert count_flops(nn.Sequential(nn.Flatten(), layer), (1, 1000, 1000)) == 2 * 10**12
