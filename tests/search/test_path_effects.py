"""An additive model of the losses of hard paths tells what candidates are worth, and steadies the losses themselves."""

from __future__ import annotations

import random
import zlib

import pytest
import torch

from dssp.paths.effects import path_effects, score_smoothly
from dssp.paths.scores import score
from dssp.paths.space import Path, PathSpace
from tests.search.small import small_supernet


@pytest.fixture
def space() -> PathSpace:
    """Two edges a node; some candidates and an edge are gone."""
    torch.manual_seed(0)
    supernet = small_supernet(light=False, nodes=2)
    supernet.remove_edge("normal:0->2")
    supernet.remove_candidate("normal:1->2", "skip_connect")
    return PathSpace(supernet, 2)


def planted(path: Path, images: int = 3) -> torch.Tensor:
    """A loss to which each candidate adds something of its own."""
    effects = [random.Random(31 * e + k).uniform(-1, 1) for e, k in enumerate(path) if k is not None]
    return sum(effects) + torch.arange(images) / 7


def test_additive_losses_give_back_the_effects_within_an_edge(space: PathSpace) -> None:
    found = path_effects(space, planted, count=400, seed=0)
    by_edge: dict[int, list[tuple[int, float]]] = {}
    for (edge, k), effect in found.items():
        by_edge.setdefault(edge, []).append((k, effect + random.Random(31 * edge + k).uniform(-1, 1)))
    assert len(by_edge) == 9 and len(by_edge[1]) == 6
    for sums in by_edge.values():
        assert max(total for _, total in sums) == pytest.approx(min(total for _, total in sums), abs=1e-6)


def test_effects_do_not_see_what_other_edges_do(space: PathSpace) -> None:
    """Noise per path ten times smaller than the effects: 400 paths still order the candidates of every edge."""

    def noisy(path: Path) -> torch.Tensor:
        return planted(path) + random.Random(repr(path)).gauss(0, 0.1)

    found = path_effects(space, noisy, count=400, seed=0)
    error = []
    for edge in {edge for edge, _ in found}:
        sums = torch.tensor(
            [effect + random.Random(31 * e + k).uniform(-1, 1) for (e, k), effect in found.items() if e == edge]
        )
        error.append(float((sums - sums.mean()).abs().max()))
    assert max(error) < 0.1


def test_smooth_losses_are_halfway_to_the_model(space: PathSpace) -> None:
    exact = score_smoothly(space, planted, limit=200, seed=0)
    assert list(exact) == list(score(space, planted, limit=200, seed=0))  # the same paths
    for path, losses in exact.items():
        torch.testing.assert_close(losses, planted(path))  # an additive loss is its own model

    def noise(path: Path) -> torch.Tensor:
        return torch.randn(3, generator=torch.Generator().manual_seed(zlib.crc32(repr(path).encode())))

    steady = torch.stack(list(score_smoothly(space, noise, limit=300, seed=0).values()))
    raw = torch.stack(list(score(space, noise, limit=300, seed=0).values()))
    assert 0.5 < float(steady.std() / raw.std()) < 0.7  # of noise a half stays, and of the rest what fits by chance
    torch.testing.assert_close(steady.mean(0), raw.mean(0))


def test_fewer_paths_than_effects_are_left_as_they_were_measured(space: PathSpace) -> None:
    few = score_smoothly(space, planted, limit=10, seed=0)
    for path, losses in few.items():
        torch.testing.assert_close(losses, planted(path))
