"""The FLOPs of a search are those that torch's counter sees, which cannot be there, and those of a hand count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.methods.darts import Darts
from dssp.search_flops import SearchFlops
from dssp.spaces import DARTS
from dssp.supernet import Supernet
from tests.search.small import small_search


def run(search: BilevelSearch) -> None:
    for epoch in range(search.epochs):
        for batch in search.batches(epoch):
            search.step(batch, epoch)
        search.end_epoch(epoch)


def counted(search: BilevelSearch, work: Callable[[], object]) -> tuple[int, int]:
    """What the search counts of a piece of its work, and what FlopCounterMode does, but for the mixing."""
    for shape in {(3, 8, 8), tuple(search.method.downsampled(torch.zeros(1, 3, 8, 8)).shape[1:])}:
        search.flops.add(["forward", "architecture", "weights", "second order"], 0, shape, {})  # the look at the parts
    before = search.flops.total
    with FlopCounterMode(display=False) as counter:
        work()
    operators = counter.get_flop_counts()["Global"].items()
    return search.flops.total - before, sum(flops for op, flops in operators if "mixed_sum" not in str(op))


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "darts"},
        {"method": "darts", "unrolled": True},
        {"method": "darts", "unrolled": True, "finite_difference": True},
        {"method": "darts", "space": "nasbench201", "nodes": 3, "cells": 1},
        {"method": "darts", "downsample": 2},
        {"method": "pc-darts", "channels": 4},
        {"method": "gdas", "alpha_lr": 0.0},  # or the weights may get other candidates than alpha did
        {"method": "snas"},
        {"method": "random"},
    ],
    ids=lambda settings: "-".join(str(value) for value in settings.values()),
)
def test_flops_of_a_step_are_those_that_torch_counts(settings: dict[str, Any]) -> None:
    search = small_search(**{"nodes": 1, **settings})
    batch = next(search.batches(1))
    found, expected = counted(search, lambda: search.step(batch, 1))
    assert found == expected > 0


def test_flops_of_a_whole_search_are_those_that_torch_counts() -> None:
    """Warm-up, bilevel steps, measured candidates, hard paths and their comparison."""
    search = small_search(
        method="dssp", nodes=1, epochs=3, warmup_epochs=1, path_epochs=1, scored_paths=3, edge_budget=1.0, held_out=12
    )
    found, expected = counted(search, lambda: run(search))
    assert len(search.flops._running({})[0]) < 7 and search.method.phase(2) == "paths"  # candidates have left
    assert found == expected > 0


def tiny() -> tuple[Supernet, SearchFlops]:
    """Three cells of one node; an edge offers a skip connection and a dilated convolution 3x3."""
    space = replace(DARTS, operations=("skip_connect", "dil_conv_3x3"), nodes=1)
    supernet = Supernet(space, channels=2, cells=3, classes=5, image_channels=1, gated=False)
    config = SearchConfig(method="darts", space="darts").resolve()
    return supernet, SearchFlops(supernet, Darts(config, supernet, lambda *, comparing=False: torch.zeros(1)))


def test_flops_of_a_tiny_supernet_by_hand() -> None:
    """Images of 8x8 on one channel, which the stem makes 6; a normal cell of 2, reductions of 4 at 4x4 and 8 at 2x2."""

    def dil_conv(channels: int, pixels: int) -> int:
        return channels * (9 + channels) * pixels

    candidates = [
        2 * dil_conv(2, 64),
        2 * (dil_conv(4, 16) + 4 * 4 * 16),  # a skip connection of stride 2: two convolutions of half the channels
        2 * (dil_conv(8, 4) + 8 * 8 * 4),
    ]
    stem = 1 * 6 * 9 * 64
    prepared = [6 * 2 * 64, 6 * 2 * 64, 6 * 4 * 64, 2 * 4 * 64, 2 * 8 * 16, 4 * 8 * 16]
    classifier = 8 * 5
    forward = 2 * (sum(candidates) + stem + sum(prepared) + classifier)
    _, flops = tiny()
    flops.add(["forward"], 3, (1, 8, 8), {})
    assert flops.total == 3 * forward
    flops.total = 0
    flops.add(["weights"], 1, (1, 8, 8), {})
    assert flops.total == 3 * forward - 2 * stem  # all but the images' gradient


def test_what_leaves_is_not_paid_for_any_more() -> None:
    supernet, flops = tiny()

    def cost() -> int:
        before = flops.total
        flops.add(["forward"], 1, (1, 8, 8), {})
        return flops.total - before

    convolution = 2 * 2 * (9 + 2) * 64
    whole = cost()
    supernet.remove_candidate("normal:0->2", "dil_conv_3x3")
    assert cost() == whole - convolution
    supernet.remove_edge("normal:1->2")
    assert cost() == whole - 2 * convolution
    (closed,) = supernet.mixed_edges("normal:0->2")
    closed.prune()
    assert cost() == whole - 2 * convolution  # a skip connection is for nothing
    assert flops.total == 4 * whole - 5 * convolution


def test_counting_touches_neither_network_nor_chance() -> None:
    supernet, flops = tiny()
    before, state = {k: v.clone() for k, v in supernet.state_dict().items()}, torch.get_rng_state()
    flops.add(["forward", "architecture", "weights", "second order"], 1, (1, 8, 8), {})
    assert torch.equal(torch.get_rng_state(), state) and supernet.training
    assert all(torch.equal(now, before[name]) for name, now in supernet.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in supernet.parameters())
    assert not any(module._forward_pre_hooks for module in supernet.modules())
