"""The method dssp: candidates leave, hard paths train, and the derived cell was compared with others."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from dssp.bilevel import BilevelSearch
from dssp.methods.dssp import Dssp
from dssp.paths.effects import score_smoothly
from tests.search.small import set_gates, small_data, small_search

SETTINGS = {"method": "dssp", "epochs": 6, "warmup_epochs": 1, "path_epochs": 3, "scored_paths": 12, "held_out": 8}


def run(search: BilevelSearch, epochs: range) -> list[dict[str, Any]]:
    rows = []
    for epoch in epochs:
        for batch in search.batches(epoch):
            search.step(batch, epoch)
        rows.append(search.end_epoch(epoch))
    return rows


def test_phases_follow_each_other_and_the_learning_rate_starts_again() -> None:
    search = small_search(**SETTINGS, weight_lr=0.1, weight_lr_min=0.0)
    rows = run(search, range(6))
    assert [row["phase"] for row in rows] == ["warm-up", "search", "search", "paths", "paths", "paths"]
    assert rows[3]["learning_rate"] == rows[0]["learning_rate"] == 0.1 > rows[2]["learning_rate"]
    assert [bool(row["dropped"]) for row in rows] == [False, False, True, False, False, True]
    assert rows[5]["active_edges"] <= 6 and not any(row["pruned"] for row in rows[3:])
    assert 1 < rows[5]["scored_paths"] <= 12


def test_hard_paths_train_weights_only_and_run_one_candidate_per_edge() -> None:
    search = small_search(**SETTINGS)
    run(search, range(3))
    architecture = [parameter.detach().clone() for parameter in search.supernet.architecture_parameters()]
    ran: list[str] = []
    for edge in search.supernet.live_edges():
        for k, candidate in enumerate(search.supernet.mixed_edges(edge)[0]._ops):
            if candidate is not None:
                candidate.register_forward_hook(lambda *_, name=f"{edge}/{k}": ran.append(name))
    for batch in search.batches(3):
        ran.clear()
        assert batch[1] is None
        search.step(batch, 3)
        edges = [name.split("/")[0] for name in ran]
        assert len(set(edges)) == len(edges) > 0
    after = search.supernet.architecture_parameters()
    assert all(torch.equal(a, b) for a, b in zip(architecture, after, strict=True))


def test_hard_paths_learn_from_both_halves_but_the_images_they_are_compared_on() -> None:
    search, data = small_search(**SETTINGS, compared_images=8, batch_size=4), small_data()
    compared, _ = data.valid.sample(8, seed=0)
    others = [
        image for image in data.valid.sample(len(data.valid), seed=0)[0] if not (image == compared).all((1, 2, 3)).any()
    ]
    plain = replace(search._training_images(3), padding=0, flip=False)
    seen, _ = plain.sample(len(plain), seed=0)
    assert len(seen) == len(data.train) + len(data.valid) - 8 and len(others) == len(data.valid) - 8
    assert not any((image == seen).all((1, 2, 3)).any() for image in compared)
    assert all((image == seen).all((1, 2, 3)).any() for image in others)
    assert search.steps(3) == len(list(search.batches(3))) > search.steps(2) == len(list(search.batches(2)))


def test_derived_cell_is_the_path_of_the_lowest_smoothed_held_out_loss() -> None:
    search = small_search(**{**SETTINGS, "scored_paths": 10_000, "nodes": 1, "tie_break": "loss"})
    run(search, range(6))
    method = search.method
    assert isinstance(method, Dssp) and method.paths.space is not None
    scores = score_smoothly(method.paths.space, partial(method.paths.losses_of, comparing=True), limit=10_000, seed=0)
    losses = {path: float(losses.mean()) for path, losses in scores.items()}
    assert search.derived() == method.paths.space.genotype(min(losses, key=losses.__getitem__))


def test_resumed_search_continues_bit_for_bit_from_every_epoch() -> None:
    settings = {**SETTINGS, "nodes": 1}
    whole = small_search(**settings)
    rows = run(whole, range(6))
    for cut in (1, 2, 3, 5):  # before and after candidates leave, between hard paths, before these are compared
        first = small_search(**settings)
        run(first, range(cut))
        second = small_search(**settings)
        second.load_state_dict(first.state_dict())
        assert run(second, range(cut, 6)) == rows[cut:]
        assert second.derived() == whole.derived()
        for name, value in whole.supernet.state_dict().items():
            assert torch.equal(value, second.supernet.state_dict()[name]), (cut, name)
    finished = small_search(**settings)
    finished.load_state_dict(whole.state_dict())
    assert finished.derived() == whole.derived()


def test_without_hard_paths_alpha_and_gates_decide() -> None:
    search = small_search(**{**SETTINGS, "path_epochs": 0})
    rows = run(search, range(6))
    assert {row["phase"] for row in rows} == {"warm-up", "search"} and "scored_paths" not in rows[-1]
    assert search.derived() == search.method.derived()


def test_search_sees_small_images_and_hard_paths_whole_ones() -> None:
    search = small_search(**SETTINGS, downsample=2)
    sizes: list[int] = []
    search.supernet.stem.register_forward_hook(lambda module, inputs, output: sizes.append(inputs[0].shape[-1]))
    run(search, range(6))
    assert set(sizes) == {4, 8} and sizes == sorted(sizes)


def test_downsampled_images_are_means_over_squares() -> None:
    method = small_search(method="darts", downsample=2).method
    images = torch.arange(9.0).reshape(1, 1, 3, 3)
    assert method.downsampled(images).flatten().tolist() == [2.0, 3.5, 6.5, 8.0]


def test_raw_gates_mix_as_the_paper_has_it() -> None:
    relative, raw = (small_search(method="dssp", raw_gates=raw) for raw in (False, True))
    for search in (relative, raw):
        set_gates(search.supernet, [0.1 * i for i in range(1, 6)] * 2)
    found, paper = raw.method.mixture("normal").weights, raw.supernet.mixture("normal").weights
    assert torch.equal(found, paper) and torch.allclose(found.sum(1), torch.arange(1, 6) * 0.1)
    assert torch.allclose(relative.method.mixture("normal").weights.sum(1)[:2], torch.tensor([2 / 3, 4 / 3]))


def test_none_is_a_candidate_only_if_it_is_to_be_offered() -> None:
    assert "none" not in small_search(method="dssp").supernet.space.operations
    assert "none" in small_search(method="dssp", offer_none=True).supernet.space.operations


@pytest.mark.parametrize("path_epochs", [3, 0])
def test_offered_none_is_derived_nowhere(path_epochs: int) -> None:
    search = small_search(**{**SETTINGS, "nodes": 1, "path_epochs": path_epochs}, offer_none=True)
    with torch.no_grad():
        for alpha in search.supernet.alpha.values():
            alpha[:, search.supernet.space.operations.index("none")] = 9.0
    run(search, range(6))
    nodes = [node for cell, _ in search.derived().cells.values() for node in cell]
    assert all(nodes) and all(name != "none" for node in nodes for name, _ in node)
