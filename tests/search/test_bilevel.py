"""A bilevel step moves architecture and weights apart from each other; what was removed is neither run nor stepped."""

from __future__ import annotations

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import load_data
from dssp.options import ConfigError
from dssp.search import build_supernet
from dssp.steps.optimization import frozen
from tests.search.small import BATCH, small_data, small_search


def run_epoch(search: BilevelSearch, epoch: int) -> dict[str, Any]:
    for batch in search.batches(epoch):
        search.step(batch, epoch)
    return search.end_epoch(epoch)


def copies(parameters: list[nn.Parameter]) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in parameters]


def unchanged(parameters: list[nn.Parameter], before: list[torch.Tensor]) -> list[bool]:
    return [torch.equal(parameter, value) for parameter, value in zip(parameters, before, strict=True)]


def test_weight_step_leaves_alpha_and_masks_alone() -> None:
    search = small_search()
    architecture, weights = search.supernet.architecture_parameters(), search.supernet.weights()
    before = copies(architecture), copies(weights)
    train, _, _ = next(search.batches(1))
    values = search.step((train, None, {}), epoch=1)
    assert all(unchanged(architecture, before[0])) and not any(unchanged(weights, before[1]))
    assert values.keys() == {"train_loss", "train_accuracy"}
    assert all(parameter.grad is None for parameter in architecture)


def test_bilevel_step_moves_both_and_reports_both() -> None:
    search = small_search()
    parameters = [*search.supernet.architecture_parameters(), *search.supernet.weights()]
    before = copies(parameters)
    values = search.step(next(search.batches(1)), epoch=1)
    assert not any(unchanged(parameters, before))
    assert values.keys() == {"train_loss", "train_accuracy", "valid_loss", "valid_accuracy", "prune_loss"}
    assert all(parameter.requires_grad for parameter in parameters)


def test_each_half_computes_gradients_for_its_own_parameters_only() -> None:
    search = small_search()
    computed: Counter[int] = Counter()
    for parameter in search.supernet.parameters():
        parameter.register_post_accumulate_grad_hook(lambda parameter: computed.update([id(parameter)]))
    search.step(next(search.batches(1)), epoch=1)
    assert set(computed.values()) == {1} and len(computed) == len(list(search.supernet.parameters()))


def test_architecture_step_comes_first_and_sees_the_validation_half() -> None:
    search, twin = small_search(), small_search()
    train, valid, noise = next(search.batches(1))
    assert valid is not None
    values = search.step((train, valid, noise), epoch=1)
    expected = twin.architect.step(*valid, noise)
    assert all(torch.equal(values[name], value) for name, value in expected.items())
    images = {tuple(image.flatten().tolist()) for image in train[0]} & {tuple(i.flatten().tolist()) for i in valid[0]}
    assert not images


def test_warm_up_trains_weights_only() -> None:
    search = small_search(warmup_epochs=2)
    architecture = search.supernet.architecture_parameters()
    before = copies(architecture)
    assert [run_epoch(search, epoch)["phase"] for epoch in range(2)] == ["warm-up", "warm-up"]
    assert all(unchanged(architecture, before)) and not search.architect.optimizer.state
    assert run_epoch(search, 2)["phase"] == "search" and not any(unchanged(architecture, before))


def test_warm_up_reports_validation_figures_without_disturbing_the_search() -> None:
    search = small_search()
    for batch in search.batches(0):
        search.step(batch, 0)
    before = copy.deepcopy(search.supernet.state_dict())
    row = search.end_epoch(0)
    assert {"valid_loss", "valid_accuracy", "prune_loss"} <= row.keys()
    assert all(torch.equal(value, before[name]) for name, value in search.supernet.state_dict().items())


def test_removed_candidates_leave_the_optimizer() -> None:
    search = small_search(prune_strategy="budget", edge_budget=0.5, epochs=2, warmup_epochs=0)
    before = {id(weight) for weight in search.supernet.weights()}
    row = run_epoch(search, 0)
    held = {id(weight) for group in search.optimizer.param_groups for weight in group["params"]}
    assert row["pruned"] and held < before
    assert held == {id(weight) for weight in search.supernet.weights()} == {id(weight) for weight in search.weights}
    assert {id(weight) for weight in search.optimizer.state} == held  # momentum for each of them and nothing else


def test_removed_candidates_are_not_run() -> None:
    search = small_search(prune_strategy="budget", edge_budget=0.5, epochs=2, warmup_epochs=0)
    runs: Counter[str] = Counter()
    for name, module in search.supernet.named_modules():
        if "._ops." in name and name.rsplit("._ops.", 1)[1].isdigit() and name.count("._ops.") == 2:
            module.register_forward_hook(lambda module, inputs, output, name=name: runs.update([name]))
    batch = next(search.batches(0))
    search.step(batch, 0)
    assert len(runs) == 3 * 5 * 7 and set(runs.values()) == {2}  # cells * edges * candidates, one run per half step
    removed = run_epoch(search, 0)["pruned"]
    runs.clear()
    search.step(batch, 0)
    gone = sum(len(search.supernet.mixed_edges(edge)) for edge in removed)
    assert removed and len(runs) == (3 * 5 - gone) * 7


def test_row_shows_each_edge_in_order_and_null_where_it_is_gone() -> None:
    search = small_search(prune_strategy="budget", epochs=2, warmup_epochs=0)
    removed = run_epoch(search, 0)["pruned"]
    row = run_epoch(search, 1)
    assert row["total_edges"] == 10 and row["active_edges"] == 10 - len(removed)
    edges = list(search.supernet.edges())
    for key in ("gates", "normalised_gates"):
        shown = row[key]["normal"] + row[key]["reduce"]
        assert [edge for edge, value in zip(edges, shown, strict=True) if value is None] == sorted(
            removed, key=edges.index
        )
    assert all(sum(weights) == pytest.approx(1) for rows in row["alpha"].values() for weights in rows)


def test_darts_has_no_gates_and_prunes_nothing() -> None:
    search = small_search(method="darts")
    rows = [run_epoch(search, epoch) for epoch in range(2)]
    assert all(row["gates"] is None and row["normalised_gates"] is None and not row["pruned"] for row in rows)
    assert search.supernet.space.operations[0] == "none"


def test_steps_are_what_an_epoch_yields() -> None:
    search = small_search()
    assert search.steps(1) == len(list(search.batches(1))) == len(small_data().train) // BATCH == 2


def test_batch_larger_than_the_data_is_one_step() -> None:
    search = small_search(batch_size=1000)
    assert search.steps(1) == len(list(search.batches(0))) == len(list(search.batches(1))) == 1


def test_learning_rate_falls_along_the_cosine() -> None:
    search = small_search(epochs=4, weight_lr=0.1, weight_lr_min=0.02)
    rates = []
    for epoch in range(4):
        search.batches(epoch)
        rates.append(search.optimizer.param_groups[0]["lr"])
    assert rates[0] == pytest.approx(0.1) and rates[2] == pytest.approx(0.06) and rates == sorted(rates, reverse=True)


def test_measurements_see_all_classes_of_a_folder_that_is_sorted_by_class(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    for name, images in (("ant", 700), ("bee", 20)):  # the validation half begins with 350 ants
        (tmp_path / name).mkdir()
        for i in range(images):
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    data = load_data("imagefolder", data_path=tmp_path, image_size=8)
    config = SearchConfig(dataset="imagefolder", data_path=str(tmp_path), channels=2, nodes=1, held_out=256).resolve()
    _, labels = BilevelSearch(config, build_supernet(config, data, torch.device("cpu")), data).held_out
    assert len(labels) == 256 and labels.unique().tolist() == [0, 1]


def test_frozen_parameters_thaw_when_a_step_fails() -> None:
    parameter = nn.Parameter(torch.ones(1))
    with pytest.raises(RuntimeError, match="stop"), frozen([parameter]):
        assert not parameter.requires_grad
        raise RuntimeError("stop")
    assert parameter.requires_grad


def test_bfloat16_steps_stay_near_float32_ones_and_keep_the_parameters_float32() -> None:
    rows = []
    for precision in ("float32", "bfloat16"):
        search = small_search(precision=precision, channels=4)
        rows.append([search.step(batch, epoch=1) for batch in search.batches(1)])
        assert {parameter.dtype for parameter in search.supernet.parameters()} == {torch.float32}
    for exact, rounded in zip(*rows, strict=True):
        torch.testing.assert_close(rounded["train_loss"], exact["train_loss"], rtol=0.05, atol=0)
        assert not torch.equal(rounded["train_loss"], exact["train_loss"])


def test_a_grad_clip_of_zero_clips_nothing() -> None:
    free, loose = (small_search(grad_clip=clip) for clip in (0.0, 1e9))
    for search in (free, loose):
        search.step(next(search.batches(1)), epoch=1)
    for a, b in zip(free.weights, loose.weights, strict=True):
        assert torch.equal(a, b)


def test_a_schedule_without_a_pruning_point_is_refused() -> None:
    with pytest.raises(ConfigError, match="prune_every: no pruning point in 4 epochs, got 9"):
        small_search(prune_every=9)
    small_search(prune_every=9, prune_strategy="none")
