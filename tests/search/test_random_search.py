"""Random search with weight sharing: uniform hard paths train, random ones are compared, the best one is derived."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from dssp.bilevel import BilevelSearch
from dssp.methods.random_search import RandomSearch
from dssp.paths.scores import score_random
from dssp.paths.space import Path, PathSpace
from dssp.spaces import DARTS, NASBENCH201
from dssp.supernet import Supernet
from tests.search.small import small_search, small_supernet


def searched(**settings: Any) -> tuple[BilevelSearch, list[dict[str, Any]]]:
    search = small_search(method="random", nodes=1, epochs=2, held_out=8, **settings)
    rows = []
    for epoch in range(2):
        for batch in search.batches(epoch):
            assert batch[1] is None
            search.step(batch, epoch)
        rows.append(search.end_epoch(epoch))
    return search, rows


def test_no_step_touches_alpha() -> None:
    before = small_search(method="random", nodes=1).supernet.alpha
    search, rows = searched(scored_paths=3)
    assert all(torch.equal(now, was) for now, was in zip(search.supernet.alpha.values(), before.values(), strict=True))
    assert not search.architect.optimizer.state and {row["phase"] for row in rows} == {"paths"}


def test_best_of_the_scored_paths_is_derived() -> None:
    search, rows = searched(scored_paths=20)
    method = search.method
    assert isinstance(method, RandomSearch) and method.paths.space is not None
    assert "scored_paths" not in rows[0] and rows[1]["scored_paths"] == 20
    compared = partial(method.paths.losses_of, comparing=True)
    drawn = score_random(method.paths.space, compared, limit=20, seed=0)
    best = min(drawn, key=lambda path: float(drawn[path].mean()))
    assert search.derived() == method.paths.space.genotype(best)
    assert rows[1]["path_loss"] == float(drawn[best].mean())


def constant(path: Path) -> torch.Tensor:
    return torch.zeros(2)


def test_random_scores_are_of_different_paths_up_to_the_limit_and_of_all_where_there_are_fewer() -> None:
    space = PathSpace(small_supernet(nodes=2), 1)
    assert len(score_random(space, constant, limit=7, seed=0)) == 7 < len(space)
    assert set(score_random(space, constant, limit=len(space) + 1, seed=0)) == set(space)


def test_none_is_on_a_path_only_where_the_space_derives_it() -> None:
    for space, derives in ((DARTS, False), (NASBENCH201, True)):
        paths = PathSpace(Supernet(space, channels=2, cells=3, classes=2, gated=False), 2)
        generator = torch.Generator().manual_seed(0)
        none = space.operations.index("none")
        assert any(none in paths.draw(generator) for _ in range(50)) == derives
