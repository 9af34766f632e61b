"""Searches small enough for tests: fake images of 8x8, three cells, 48 images in each half."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from dssp.bilevel import BilevelSearch
from dssp.config import RetrainConfig, SearchConfig
from dssp.data import DataSet, load_data
from dssp.derived.retraining import Retraining
from dssp.network import DerivedNetwork
from dssp.search import build_supernet
from dssp.spaces import DARTS
from dssp.supernet import Supernet

BATCH = 24


@cache
def small_data() -> DataSet:
    """The fake data set, cut to 48 images in each split."""
    data = load_data("fake", image_size=8)
    names = ("train", "valid", "train_valid", "test")
    return replace(data, **{n: replace(getattr(data, n), indices=getattr(data, n).indices[:48]) for n in names})


def small_search(**settings: Any) -> BilevelSearch:
    """A search over two-node cells, two steps per epoch; by the paper's method unless told otherwise."""
    sizes = {"channels": 2, "cells": 3, "nodes": 2, "epochs": 4, "warmup_epochs": 1, "batch_size": BATCH}
    settings = {"method": "dssp-paper", "held_out": 48, **settings}
    config = SearchConfig(dataset="fake", image_size=8, **{**sizes, **settings}).resolve()
    return BilevelSearch(config, build_supernet(config, small_data(), torch.device("cpu")), small_data())


def small_retraining(**settings: Any) -> Retraining:
    """The retraining of a cell of two nodes, four steps per epoch."""
    derived = small_search().derived()
    torch.manual_seed(0)
    network = DerivedNetwork(DARTS, derived, channels=2, cells=3, classes=10)
    config = RetrainConfig(genotype="-", dataset="fake", image_size=8, **{"epochs": 2, "batch_size": 12, **settings})
    return Retraining(network, small_data().train, config.resolve())


def small_supernet(*, nodes: int = 3, gated: bool = True, light: bool = True, cells: int = 3) -> Supernet:
    """A supernet of two classes; ``light``: only candidates without parameters at stride 1."""
    operations = ("max_pool_3x3", "skip_connect") if light else tuple(n for n in DARTS.operations if n != "none")
    space = replace(DARTS, operations=operations, nodes=nodes)
    return Supernet(space, channels=2, cells=cells, classes=2, image_channels=1, gated=gated)


def set_gates(supernet: Supernet, gates: list[float]) -> None:
    """Give all edges, normal cells first, these gates."""
    logits = torch.tensor(gates, dtype=torch.float64).logit()
    with torch.no_grad():
        for mask, part in zip(supernet.mask.values(), logits.chunk(2), strict=True):
            mask.copy_(part)
