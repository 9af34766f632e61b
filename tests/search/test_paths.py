"""Hard paths are all that a derived cell may be, and run in the supernet as they would alone."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dssp.network import DerivedNetwork
from dssp.paths.scores import score, select
from dssp.paths.space import Path, PathSpace
from dssp.relaxation import Mixture
from dssp.spaces import DARTS, NASBENCH201
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def pruned_supernet() -> Supernet:
    """Two nodes, three edges into the second; one edge gone, candidates gone on two others."""
    torch.manual_seed(0)
    supernet = small_supernet(nodes=2)
    supernet.remove_edge("normal:0->2")
    supernet.remove_candidate("normal:1->2", "skip_connect")
    supernet.remove_candidate("reduce:2->3", "max_pool_3x3")
    return supernet


@pytest.mark.parametrize("max_edges", [1, 2, 5])
def test_all_paths_are_different_and_as_many_as_counted(max_edges: int) -> None:
    paths = list(PathSpace(pruned_supernet(), max_edges))
    assert len(set(paths)) == len(paths) == len(PathSpace(pruned_supernet(), max_edges))


def test_paths_hold_what_is_left_and_no_more_edges_than_allowed() -> None:
    supernet = pruned_supernet()
    space = PathSpace(supernet, 2)
    # normal: node 2 has one edge with one candidate, node 3 two of three edges; reduce: both edges into node 2.
    assert len(space) == 1 * (3 * 4) * 4 * (4 + 2 * 2)
    for path in space:
        chosen = dict(zip(supernet.edges(), path, strict=True))
        assert chosen["normal:0->2"] is None and chosen["normal:1->2"] == 0 and chosen["reduce:2->3"] in (None, 1)
        assert sum(chosen[f"normal:{source}->3"] is not None for source in range(3)) == 2


def test_draws_are_uniform_over_all_paths() -> None:
    space, generator = PathSpace(pruned_supernet(), 1), torch.Generator().manual_seed(0)
    counts = Counter(space.draw(generator) for _ in range(40 * len(space)))
    assert set(counts) <= set(space)
    # Edges are drawn before their candidates, so one with fewer of them is not drawn less often: near 40 times each.
    assert all(10 < counts[path] < 100 for path in space)


def test_neighbours_differ_in_one_edge_and_are_paths() -> None:
    space = PathSpace(pruned_supernet(), 2)
    everything = set(space)
    path = next(iter(space))
    near = list(space.neighbours(path))
    assert set(near) <= everything and path not in near
    assert all(sum(a != b for a, b in zip(path, other, strict=True)) <= 2 for other in near)
    reached = {path}
    for _ in range(12):
        reached |= {other for known in reached for other in space.neighbours(known)}
    assert reached == everything


def test_a_path_in_the_supernet_computes_what_its_derived_network_computes() -> None:
    torch.manual_seed(0)
    space = replace(NASBENCH201, operations=NASBENCH201.operations[1:])
    supernet = Supernet(space, channels=4, cells=1, classes=3)
    paths = PathSpace(supernet, 3)
    path = paths.draw(torch.Generator().manual_seed(1))
    derived = DerivedNetwork(NASBENCH201, paths.genotype(path), channels=4, cells=1, classes=3)
    ours = supernet.state_dict()
    with torch.no_grad():
        for name, value in derived.state_dict().items():
            if name in ours and ours[name].shape == value.shape:
                value.copy_(ours[name])
        for position, k in enumerate(path):
            for cell in (0, 2, 4):
                candidate = supernet.cells[cell]._ops[position]._ops[k]
                operation = derived.cells[cell]._ops[position]
                operation.load_state_dict(candidate.state_dict(), strict=False)
    images = torch.randn(8, 3, 8, 8)
    torch.testing.assert_close(supernet(images, paths.mixtures(path)), derived(images), rtol=1e-4, atol=1e-5)


def test_only_the_candidates_of_the_path_run() -> None:
    supernet = small_supernet(nodes=2, light=False)
    ran: list[str] = []
    for edge in supernet.edges():
        for k, candidate in enumerate(supernet.mixed_edges(edge)[0]._ops):
            candidate.register_forward_hook(lambda *_, name=f"{edge}/{k}": ran.append(name))
    space = PathSpace(supernet, 2)
    path = space.draw(torch.Generator().manual_seed(0))
    supernet(torch.randn(2, 1, 8, 8), space.mixtures(path))
    assert sorted(ran) == sorted(f"{edge}/{k}" for edge, k in zip(supernet.edges(), path, strict=True) if k is not None)


def test_strongest_is_what_alpha_and_gates_say() -> None:
    supernet = pruned_supernet()
    with torch.no_grad():
        for type in supernet.cell_types:
            supernet.alpha[type].copy_(torch.randn_like(supernet.alpha[type]))
            supernet.mask[type].copy_(torch.randn_like(supernet.mask[type]))
    space = PathSpace(supernet, 2)
    weights = torch.cat([supernet.mixture(type).weights for type in supernet.cell_types])

    def strength(path: Path) -> float:
        return sum(float(weights[edge, k]) for edge, k in enumerate(path) if k is not None)

    assert space.strongest() == max(space, key=strength)


def test_capacity_is_the_weights_that_the_path_runs() -> None:
    supernet = small_supernet(nodes=2, light=False)
    space = PathSpace(supernet, 2)
    path = space.draw(torch.Generator().manual_seed(0))
    supernet(torch.randn(2, 1, 8, 8), space.mixtures(path)).sum().backward()
    used = [
        w
        for name, w in supernet.named_parameters()
        if (".cells" not in name and "_ops.0._ops" in name) or "_ops." in name
    ]
    assert space.parameters(path) == sum(w.numel() for w in used if w.grad is not None)


# ---- comparing -------------------------------------------------------------------------------------------------------


def landscape(path: Path) -> torch.Tensor:
    """Smooth in the number of edges that differ from one optimum."""
    return torch.full((4,), float(sum((k or 0) != (e % 2) for e, k in enumerate(path))))


def test_few_paths_are_all_scored() -> None:
    space = PathSpace(pruned_supernet(), 1)
    assert set(score(space, landscape, limit=10_000, seed=0)) == set(space)


def test_many_paths_are_searched_within_the_limit_and_the_best_of_a_smooth_landscape_is_found() -> None:
    supernet = small_supernet(nodes=3)
    space = PathSpace(supernet, 5)
    scores = score(space, landscape, limit=400, seed=0)
    assert len(scores) <= 400 < len(space)
    assert float(scores[select(scores, lambda path: 0)].mean()) == 0
    assert score(space, landscape, limit=400, seed=0).keys() == scores.keys()


def test_lowest_loss_is_selected_and_size_decides_among_ties_only() -> None:
    base = torch.linspace(0, 1, 100)
    noise = torch.tensor([0.1, -0.1]).repeat(50)
    scores: dict[Path, torch.Tensor] = {(0,): base, (1,): base + noise + 0.001, (2,): base + 0.5}
    size = {(0,): 2, (1,): 3, (2,): 4}
    assert select(scores, lambda path: 0) == (0,)
    assert select(scores, size.__getitem__) == (1,)  # (2,) is larger, but clearly worse
    assert select({**scores, (3,): base + noise}, lambda path: -size.get(path, 1)) == (3,)


def test_mixtures_of_a_path_weigh_its_candidates_with_one() -> None:
    supernet = small_supernet(nodes=2)
    space = PathSpace(supernet, 2)
    path = next(iter(space))
    mixtures = space.mixtures(path)
    assert all(isinstance(mixture, Mixture) for mixture in mixtures.values())
    rows = list(itertools.chain.from_iterable(mixture.weights.tolist() for mixture in mixtures.values()))
    assert [row.index(1.0) if 1.0 in row else None for row in rows] == list(path)
    assert all(sum(row) in (0.0, 1.0) for row in rows)


def test_genotype_of_a_path_has_its_operations() -> None:
    supernet = Supernet(replace(DARTS, nodes=2), channels=2, cells=3, classes=2, gated=False)
    space = PathSpace(supernet, 2)
    none = DARTS.operations.index("none")
    path = tuple(none if e == 0 else 3 if k is not None else None for e, k in enumerate(space.draw(torch.Generator())))
    genotype = space.genotype(path)
    assert ("none", 0) not in genotype.normal[0] and {name for name, _ in genotype.reduce[1]} == {DARTS.operations[3]}
