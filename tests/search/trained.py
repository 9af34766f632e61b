"""A trained network small enough for tests, and not trained."""

from __future__ import annotations

import torch
from torch import nn

from dssp.arch_genotype import ArchGenotype
from dssp.derived.trained import TrainedNetwork
from dssp.genotype import AnyGenotype, Genotype
from dssp.network import DerivedNetwork
from dssp.spaces import get_space

EVERY_OPERATION = Genotype(
    normal=((("sep_conv_3x3", 0), ("avg_pool_3x3", 1)), (("skip_connect", 1), ("dil_conv_5x5", 2))),
    normal_concat=(2, 3),
    reduce=((("skip_connect", 0), ("max_pool_3x3", 1)), (("sep_conv_5x5", 0), ("dil_conv_3x3", 2))),
    reduce_concat=(2, 3),
)
ARCH = ArchGenotype.from_text("|nor_conv_3x3~0|+|none~0|avg_pool_3x3~1|+|skip_connect~0|nor_conv_1x1~1|none~2|")


def small_trained(
    genotype: AnyGenotype = EVERY_OPERATION, size: int = 9, seed: int = 0, stem: str = "cifar"
) -> TrainedNetwork:
    """Random weights, and norms with the statistics of a batch: with their first ones little reaches the logits."""
    torch.manual_seed(seed)
    cells = 3 if genotype.space == "darts" else len(genotype.cells)
    network = DerivedNetwork(get_space(genotype.space), genotype, channels=4, cells=cells, classes=3, stem=stem)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network(torch.randn(16, 3, size, size))
    mean, std = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0])
    classes, shape = ("ant", "bee", "cat"), (3, size, size)
    return TrainedNetwork(network.eval(), genotype.space, genotype, 4, cells, stem, classes, shape, mean, std)
