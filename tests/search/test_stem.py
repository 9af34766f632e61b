"""The ImageNet stem: DARTS' NetworkImageNet, name for name and pixel for pixel, and when it is chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from dssp.config import ConfigError, RetrainConfig, SearchConfig
from dssp.cost import count_parameters
from dssp.derived.exporting import export_network
from dssp.derived.trained import load_trained, save_trained
from dssp.genotype import AnyGenotype
from dssp.network import DerivedNetwork
from dssp.retrain import retrain
from dssp.spaces import CHAIN, DARTS, NASBENCH201
from dssp.spaces.auxiliary import AuxiliaryHeadImageNet
from dssp.supernet import Supernet
from tests.search.small import small_data
from tests.search.test_chain import SMALL
from tests.search.test_network import DARTS_V2
from tests.search.trained import EVERY_OPERATION, small_trained


def imagenet_network(**options: Any) -> DerivedNetwork:
    return DerivedNetwork(DARTS, DARTS_V2, channels=4, cells=6, classes=10, stem="imagenet", **options)


def test_published_imagenet_network_has_its_published_size() -> None:
    with torch.device("meta"):
        network = DerivedNetwork(DARTS, DARTS_V2, channels=48, cells=14, classes=1000, stem="imagenet")
    assert count_parameters(network) / 1e6 == pytest.approx(4.7, abs=0.05)  # the paper's table 3


def test_state_dict_keys_are_those_of_networkimagenet() -> None:
    state = imagenet_network(auxiliary=True).state_dict()
    weights = {key: list(value.shape) for key, value in state.items() if "stem" in key or "auxiliary" in key}
    weights = {key: shape for key, shape in weights.items() if key.endswith("weight")}
    assert weights == {
        "stem0.0.weight": [2, 3, 3, 3],
        "stem0.1.weight": [2],
        "stem0.3.weight": [4, 2, 3, 3],
        "stem0.4.weight": [4],
        "stem1.1.weight": [4, 4, 3, 3],
        "stem1.2.weight": [4],
        "auxiliary_head.features.2.weight": [128, 64, 1, 1],
        "auxiliary_head.features.3.weight": [128],
        "auxiliary_head.features.5.weight": [768, 128, 2, 2],
        "auxiliary_head.classifier.weight": [10, 768],
    }
    assert "cells.0.preprocess0.conv_1.weight" in state  # reduction_prev: the older input is still twice as large


@pytest.mark.parametrize("size", [64, 45], ids=["even", "odd"])
def test_first_cell_takes_both_stems(size: int) -> None:
    network = imagenet_network().eval()
    taken: list[Any] = []
    network.cells[0].register_forward_hook(lambda module, inputs, output: taken.extend(inputs))
    images = torch.randn(2, 3, size, size)
    network(images)
    s0 = network.get_submodule("stem0")(images)
    s1 = network.get_submodule("stem1")(s0)
    assert torch.equal(taken[0], s0) and torch.equal(taken[1], s1)
    assert [tensor.shape[-1] for tensor in taken] == [-(-size // 4), -(-size // 8)]


def test_auxiliary_head_computes_that_of_darts_for_imagenet() -> None:
    head, x = AuxiliaryHeadImageNet(6, 5), torch.randn(3, 6, 7, 7)
    _, _, narrow, norm, _, wide, _ = head.features
    y = nn.functional.avg_pool2d(x.relu(), 5, stride=2, count_include_pad=False)
    y = wide(norm(narrow(y)).relu()).relu()
    assert y.shape == (3, 768, 1, 1)
    torch.testing.assert_close(head(x), head.classifier(y.flatten(1)))


def test_auxiliary_head_reads_maps_of_7x7_of_images_of_224x224() -> None:
    network = imagenet_network(auxiliary=True)
    assert network.tap is not None and 224 // 2**network.tap.halvings == AuxiliaryHeadImageNet.smallest


def test_retraining_images_too_small_for_the_head_is_refused(tmp_path: Path) -> None:
    config = RetrainConfig(
        genotype="-", dataset="fake", image_size=8, space="darts", stem="imagenet", cells=3, auxiliary_weight=0.4
    ).resolve()
    with pytest.raises(ConfigError, match="needs 7x7 pixels where it is, images of fake have 1x1 there"):
        retrain(
            *(DARTS, DARTS_V2, small_data(), config),
            **{"folder": tmp_path, "device": torch.device("cpu"), "console": Console(quiet=True)},
        )


@pytest.mark.parametrize("space", [DARTS, CHAIN], ids=lambda space: space.name)
def test_supernet_has_the_stem_too(space: Any) -> None:
    net = Supernet(space, channels=2, cells=2, classes=3, stem="imagenet")
    first: list[Any] = []
    net.cells[0].register_forward_hook(lambda module, inputs, output: first.append(inputs[-1].shape[-1]))
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 3)
    assert first == [{"darts": 4, "chain": 16}[space.name]]


@pytest.mark.parametrize("genotype", [EVERY_OPERATION, SMALL], ids=["darts", "chain"])
def test_file_of_a_trained_network_keeps_the_stem(genotype: AnyGenotype, tmp_path: Path) -> None:
    saved, images = small_trained(genotype, size=32, stem="imagenet"), torch.randn(4, 3, 32, 32)
    save_trained(tmp_path / "network.pt", saved)
    found = load_trained(tmp_path / "network.pt")
    assert found.stem == "imagenet" and torch.equal(found.network(images), saved.network(images))


@pytest.mark.parametrize("genotype", [EVERY_OPERATION, SMALL], ids=["darts", "chain"])
def test_exported_program_computes_the_network_behind_its_stem(genotype: AnyGenotype) -> None:
    export_network(small_trained(genotype, size=32, stem="imagenet"), "torch")  # raises if logits are not the network's


def test_default_follows_the_size_of_the_images() -> None:
    def resolved(**settings: Any) -> SearchConfig:
        return SearchConfig(dataset="imagefolder", **settings).resolve()

    assert [resolved(image_size=size).stem for size in (None, 64, 127, 128, 224)] == ["cifar"] * 3 + ["imagenet"] * 2
    assert resolved(image_size=224, stem="cifar").stem == resolved(image_size=224, space="nasbench201").stem == "cifar"
    large = resolved(image_size=224)
    assert (large.cells, large.retrain_channels, large.retrain_cells) == (8, 48, 14)
    config = RetrainConfig(genotype="-", dataset="imagefolder", space="darts", stem="imagenet").resolve()
    assert (config.channels, config.cells) == (48, 14)


def test_stem_that_a_space_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="stem: space nasbench201 has cifar only"):
        SearchConfig(space="nasbench201", stem="imagenet")
    with pytest.raises(ValueError, match="stem: space nasbench201 has cifar only"):
        Supernet(NASBENCH201, channels=2, cells=1, classes=3, stem="imagenet")
    with pytest.raises(ValueError, match="stem: got 'alexnet', expected one of cifar, imagenet"):
        Supernet(DARTS, channels=2, cells=3, classes=3, stem="alexnet")
