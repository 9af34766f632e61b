"""Under a budget the strongest that fits is derived, and what is counted is what is retrained."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dssp.bilevel import BilevelSearch
from dssp.config import ConfigError
from dssp.cost import count_flops, count_parameters
from dssp.derived import budget as budgets
from dssp.derived.budget import Budget
from dssp.derived.derivation import derive
from dssp.genotype import AnyGenotype
from dssp.methods import METHODS
from dssp.methods.dssp import Dssp
from dssp.network import DerivedNetwork
from dssp.paths.affordable import AffordablePaths
from dssp.paths.scores import score, score_random
from dssp.paths.space import PathSpace
from dssp.spaces import CHAIN, DARTS, NASBENCH201, CellSpace
from dssp.supernet import Supernet
from tests.search.small import small_search
from tests.search.test_methods import run

SPACES = {
    "darts": (replace(DARTS, nodes=2), {"cells": 4}),
    "darts-imagenet": (DARTS, {"cells": 3, "stem": "imagenet"}),
    "nasbench201": (NASBENCH201, {"cells": 2}),
    "chain": (CHAIN, {"cells": 2}),
}
IN_EVERY_SPACE = pytest.mark.parametrize("name", SPACES)
BOTH = {"max_params": 10**9, "max_flops": 10**12}


def sizes(name: str) -> dict[str, Any]:
    return {"channels": 4, "stem": "cifar", **SPACES[name][1]}


def supernet(space: CellSpace, seed: int = 0, cells: int = 3) -> Supernet:
    torch.manual_seed(seed)
    net = Supernet(space, channels=2, cells=cells, classes=3, gated=False)
    for parameter in net.architecture_parameters():
        nn.init.normal_(parameter)
    return net


def budget_of(name: str, limits: dict[str, int], side: int = 13) -> Budget:
    return Budget.of(SPACES[name][0], limits, classes=3, image_shape=(3, side, side), **sizes(name))


def counted(name: str, genotype: AnyGenotype, side: int = 13) -> tuple[int, int]:
    network = DerivedNetwork(SPACES[name][0], genotype, classes=3, **sizes(name))
    return count_parameters(network), count_flops(network, (3, side, side))


@IN_EVERY_SPACE
@pytest.mark.parametrize("side", [8, 13])
def test_costs_add_up_to_those_of_the_derived_network(name: str, side: int) -> None:
    space = SPACES[name][0]
    paths = PathSpace(supernet(space, cells=sizes(name)["cells"]), 2)
    both = budget_of(name, BOTH, side)
    for seed in range(3):
        genotype = paths.genotype(paths.draw(torch.Generator().manual_seed(seed)))
        assert both.cost(space, genotype) == counted(name, genotype, side)


def within(net: Supernet, max_edges: int, room: Budget) -> Iterator[tuple[float, AnyGenotype]]:
    """Everything that fits and its strength: the sum of softmax(alpha) over its edges, `none` included."""
    space = net.space
    weights = torch.cat([net.mixture(type).weights for type in net.cell_types]).tolist()
    offered = torch.cat([net.offered(type) for type in net.cell_types]).tolist()
    names = [k for k, name in enumerate(space.operations) if name != "none" or space.derives_none]
    for i, _ in enumerate(net.cell_types):
        assert len(net.cell_types) == 1, i  # enumerated here for one type only
    per_node = []
    for node in space.node_states:
        ways = []
        for count in range(0 if space.has_shortcut(node) else 1, max_edges + 1):
            for edges in itertools.combinations(space.edges_into(node), count):
                for chosen in itertools.product(*([(e, k) for k in names if offered[e][k]] for e in edges)):
                    ways.append(chosen)
        per_node.append(ways)
    paths = PathSpace(net, max_edges)
    for nodes in itertools.product(*per_node):
        chosen = dict(pair for node in nodes for pair in node)
        genotype = paths.genotype(tuple(chosen.get(e) for e in range(len(space.edges))))
        if room.admits(space, genotype):
            yield sum(weights[e][k] for e, k in chosen.items()), genotype


ONE_TYPE = {
    "nasbench201": (replace(NASBENCH201, operations=("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3")), 3, 1),
    "chain": (CHAIN, 1, 1),
}


@pytest.mark.parametrize("limited", [("max_params",), ("max_flops",), ("max_params", "max_flops")], ids="+".join)
@pytest.mark.parametrize(("name", "seed"), [("nasbench201", 0), ("chain", 0), ("chain", 1)])
def test_the_strongest_that_fits_is_derived(name: str, limited: tuple[str, ...], seed: int) -> None:
    space, max_edges, cells = ONE_TYPE[name]
    net = supernet(space, seed, cells)
    shape: dict[str, Any] = {"channels": 4, "cells": cells, "classes": 3, "image_shape": (3, 8, 8), "stem": "cifar"}
    free = derive(net, max_edges_per_node=max_edges)
    room = Budget.of(space, {name: BOTH[name] for name in limited}, **shape)
    costs = zip(limited, room.fixed, room.cost(space, free), strict=True)
    room = replace(room, limits={limit: fixed + int(0.6 * (cost - fixed)) for limit, fixed, cost in costs})
    found = derive(net, max_edges_per_node=max_edges, budget=room)
    best, wanted = max(within(net, max_edges, room), key=lambda pair: pair[0])
    assert found == wanted != free and best > 0
    assert room.admits(space, found) and not room.admits(space, free)


def test_budget_that_admits_the_strongest_changes_nothing() -> None:
    net = supernet(SPACES["darts"][0])
    free = derive(net, max_edges_per_node=2)
    exactly = budget_of("darts", dict(zip(BOTH, counted("darts", free), strict=True)))
    assert derive(net, max_edges_per_node=2, budget=exactly) == free
    assert derive(net, max_edges_per_node=2) == free


def test_smallest_network_is_named_and_fits() -> None:
    net = supernet(SPACES["chain"][0], cells=2)
    with pytest.raises(ConfigError, match="no network that is left fits: the smallest has") as caught:
        derive(net, max_edges_per_node=1, budget=budget_of("chain", {"max_params": 10}))
    assert caught.value.field == "max_params" and "parameters, got 10" in caught.value.reason
    least = int(caught.value.reason.split("has ")[1].split(" ")[0].replace(",", ""))
    smallest = derive(net, max_edges_per_node=1, budget=budget_of("chain", {"max_params": least}))
    assert counted("chain", smallest)[0] == least
    assert smallest.cells["stage1"][0] == ((("mb_conv_3x3_e3", 0),), (), ())
    with pytest.raises(ConfigError, match="the smallest has"):
        derive(net, max_edges_per_node=1, budget=budget_of("chain", {"max_params": least - 1}))


def test_of_too_many_choices_a_strong_one_that_fits_is_derived(monkeypatch: pytest.MonkeyPatch) -> None:
    net = supernet(SPACES["chain"][0], cells=2)
    free = counted("chain", derive(net, max_edges_per_node=1))
    room = budget_of("chain", {limit: int(0.8 * cost) for limit, cost in zip(BOTH, free, strict=True)})
    exact = derive(net, max_edges_per_node=1, budget=room)
    monkeypatch.setattr(budgets, "EXACT", 100)
    thinned = derive(net, max_edges_per_node=1, budget=room)
    weights = {type: net.mixture(type).weights.detach() for type in net.cell_types}

    def strength(genotype: AnyGenotype) -> float:
        total = 0.0
        for type, (nodes, _) in genotype.cells.items():
            for e, node in enumerate(nodes):
                total += float(weights[type][e, net.space.operations.index(node[0][0] if node else "none")])
        return total

    assert room.admits(net.space, thinned)
    assert 0.9 * strength(exact) < strength(thinned) <= strength(exact)


def test_skip_limit_holds_under_a_budget() -> None:
    net = supernet(SPACES["darts"][0])
    with torch.no_grad():
        net.alpha["normal"][:, DARTS.operations.index("skip_connect")] = 5.0
    free = counted("darts", derive(net, max_edges_per_node=2, max_skips=1))
    room = budget_of("darts", {"max_params": free[0] - 1})
    found = derive(net, max_edges_per_node=2, max_skips=1, budget=room)
    names = [name for node in found.cells["normal"][0] for name, _ in node]
    assert names.count("skip_connect") == 1 and room.admits(net.space, found)


# ---- hard paths ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_paths() -> tuple[PathSpace, AffordablePaths]:
    """Paths of one stage of three layers, a third of which fit."""
    net = supernet(CHAIN, cells=1)
    shape: dict[str, Any] = {"channels": 4, "cells": 1, "classes": 3, "image_shape": (3, 8, 8), "stem": "cifar"}
    every, room = PathSpace(net, 1), Budget.of(CHAIN, {"max_params": 1}, **shape)
    costs = sorted(room.cost(CHAIN, every.genotype(path)) for path in every)
    return every, AffordablePaths(net, 1, replace(room, limits={"max_params": costs[len(costs) // 3][0]}))


def test_paths_that_fit_are_compared_and_no_others(small_paths: tuple[PathSpace, AffordablePaths]) -> None:
    every, affordable = small_paths
    fitting = {path for path in every if affordable.fits(path)}
    assert set(affordable) == fitting and 0 < len(fitting) < len(every)
    for judge in (score, score_random):
        for limit in (10, len(every)):
            found = judge(affordable, lambda path: torch.rand(2), limit=limit, seed=0)
            assert found and set(found) <= fitting and len(found) <= limit
        assert set(judge(affordable, lambda path: torch.rand(2), limit=len(every), seed=0)) == fitting


def test_every_path_that_fits_can_be_drawn(small_paths: tuple[PathSpace, AffordablePaths]) -> None:
    _, affordable = small_paths
    generator = torch.Generator().manual_seed(0)
    drawn = {affordable.draw(generator) for _ in range(40 * len(set(affordable)))}
    assert drawn == set(affordable)


def test_strongest_path_that_fits_is_where_the_comparison_begins(
    small_paths: tuple[PathSpace, AffordablePaths],
) -> None:
    every, affordable = small_paths
    weights = every.supernet.mixture("stage1").weights.detach()

    def strength(path: Any) -> float:
        return sum(float(weights[e, k]) for e, k in enumerate(path))

    assert affordable.strongest() == max(affordable, key=strength) != every.strongest()


# ---- searches --------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {
    **{"space": "chain", "cells": 1, "nodes": 2, "epochs": 3, "held_out": 8, "compared_images": 8},
    **{"scored_paths": 4, "retrain_channels": 4},
}


def retrained_parameters(search: BilevelSearch) -> int:
    config, space = search.config, search.supernet.space
    sizes = {"channels": config.retrain_channels, "cells": config.retrain_cells, "classes": 10}
    return count_parameters(DerivedNetwork(space, search.derived(), **sizes))


@pytest.mark.parametrize("method", [name for name in METHODS if name != "pc-darts"])
def test_budget_binds_whatever_the_method(method: str) -> None:
    settings = {**SETTINGS, "method": method, "tie_break": "capacity"}
    free = small_search(**settings)
    run(free, 0, 3)
    limit = retrained_parameters(free) - 1
    bound = small_search(**settings, max_params=limit)
    run(bound, 0, 3)
    assert retrained_parameters(bound) <= limit
    torch.testing.assert_close(bound.supernet.state_dict(), free.supernet.state_dict(), rtol=0, atol=0)


def test_candidates_that_a_budget_cannot_do_without_stay() -> None:
    settings = {**SETTINGS, "method": "dssp", "candidates_kept": 1, "prune_strategy": "none"}
    free, bound = small_search(**settings), small_search(**settings, max_params=10**9)
    wide = bound.method.budget
    assert wide is not None
    least = sum(min(costs.values())[0] for edges in wide.costs.values() for costs in edges)
    tight = bound.method.budget = replace(wide, limits={"max_params": wide.fixed[0] + least})
    for search in (free, bound):
        run(search, 0, 3)
    assert isinstance(free.method, Dssp) and not free.method.paths.any_fits(tight)
    assert tight.admits(bound.supernet.space, bound.derived())


def test_random_genotypes_of_darts_fit_what_they_are_given() -> None:
    net = supernet(SPACES["darts"][0])
    room = budget_of("darts", {"max_params": 1})
    free = counted("darts", derive(net, max_edges_per_node=2))[0]
    for limit in random.Random(0).sample(range(room.fixed[0], free), 5):
        found = derive(net, max_edges_per_node=2, budget=replace(room, limits={"max_params": limit}))
        assert counted("darts", found)[0] <= limit
