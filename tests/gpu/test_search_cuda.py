"""The search on a CUDA device: captured steps are the steps they stand for, and a step waits for nothing."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import load_data
from dssp.search import build_supernet
from dssp.steps.capture import EAGER_STEPS, CapturedStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture(autouse=True)
def deterministic_convolutions() -> Iterator[None]:
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def search_on_gpu(**settings: object) -> BilevelSearch:
    device = torch.device("cuda")
    fields = {"dataset": "fake", "image_size": 16, "channels": 8, "cells": 3, "epochs": 4, "warmup_epochs": 1}
    config = SearchConfig(**{**fields, "batch_size": 32, **settings}).resolve()  # type: ignore[arg-type]
    data = load_data("fake", data_path=None, image_size=16, seed=0, device=device, workers=1)
    return BilevelSearch(config, build_supernet(config, data, device), data)


def run_steps(search: BilevelSearch, epoch: int, count: int) -> list[dict[str, Tensor]]:
    return [search.step(batch, epoch) for batch, _ in zip(search.batches(epoch), range(count), strict=False)]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_steps_train_as_eager_ones_do(precision: str) -> None:
    captured, eager = (search_on_gpu(no_cuda_graphs=off, precision=precision) for off in (False, True))
    for epoch in (0, 1, 2):  # the warm-up's step, then the bilevel one, then one with edges gone
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would say that the step cannot be recorded
            found, expected = (run_steps(search, epoch, EAGER_STEPS + 4) for search in (captured, eager))
        assert captured.captured.is_recorded and not eager.captured.is_recorded
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-2 if precision == "bfloat16" else 1e-3, atol=1e-3)
        for search in (captured, eager):
            search.supernet.remove_edge(f"normal:{epoch}->5")
            search._forget_removed_weights()


METHODS = [
    *({"method": method} for method in ("darts", "pc-darts", "fair-darts", "snas", "dssp-paper")),
    {"method": "darts", "unrolled": True, "beta_decay": 5.0},
]
EVERY_CAPTURED_METHOD = pytest.mark.parametrize(
    "settings", METHODS, ids=lambda settings: "-".join([settings["method"], *list(settings)[1:]])
)


@EVERY_CAPTURED_METHOD
def test_captured_steps_of_a_method_train_as_eager_ones_do(settings: dict[str, object]) -> None:
    captured, eager = (search_on_gpu(no_cuda_graphs=off, **settings) for off in (False, True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, expected = (run_steps(search, 1, EAGER_STEPS + 3) for search in (captured, eager))
    assert captured.captured.is_recorded and not eager.captured.is_recorded
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


@EVERY_CAPTURED_METHOD
def test_a_step_does_not_wait_for_the_device(settings: dict[str, object]) -> None:
    search = search_on_gpu(no_cuda_graphs=True, **settings)
    batches = list(search.batches(1))
    search.step(batches[0], 1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        search.step(batches[1], 1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_that_cannot_be_recorded_says_so_once_and_runs() -> None:
    total = torch.zeros((), device="cuda")

    def step(batch: Tensor) -> dict[str, Tensor]:
        total.add_(batch.sum())
        return {"loss": torch.tensor(total.item())}  # waits for the device

    captured = CapturedStep(step)
    with pytest.warns(UserWarning, match="cannot be recorded") as caught:
        for _ in range(EAGER_STEPS + 3):
            captured(torch.ones(2, device="cuda"))
    assert len(caught) == 1 and total.item() == 2 * (EAGER_STEPS + 3)


def test_removed_edges_give_their_memory_back() -> None:
    search = search_on_gpu(no_cuda_graphs=True)
    run_steps(search, 1, 2)
    search.optimizer.zero_grad()
    before = torch.cuda.memory_allocated()
    removed = sum(
        p.numel()
        for edge in ("normal:0->5", "normal:1->5")
        for m in search.supernet.mixed_edges(edge)
        for p in m.parameters()
    )
    for edge in ("normal:0->5", "normal:1->5"):
        search.supernet.remove_edge(edge)
    search._forget_removed_weights()
    assert before - torch.cuda.memory_allocated() >= 2 * 4 * removed  # weights and their momentum


@pytest.mark.parametrize("captured", [True, False], ids=["captured", "eager"])
@pytest.mark.parametrize("at", [0, EAGER_STEPS + 2], ids=["first", "later"])
def test_step_that_is_not_finite_is_taken_back_on_the_device(captured: bool, at: int) -> None:
    search = search_on_gpu(no_cuda_graphs=not captured)
    for index, (batch, _) in enumerate(zip(search.batches(1), range(at + 3), strict=False)):
        train, valid, noise = batch
        assert valid is not None
        if index != at:
            search.step(batch, 1)
            continue
        before = {name: value.clone() for name, value in search.supernet.state_dict().items()}
        values = search.step(((train[0] * torch.inf, train[1]), (valid[0] * torch.nan, valid[1]), noise), 1)
        assert all(value.isnan() for value in values.values())
        for name, value in search.supernet.state_dict().items():
            assert name.endswith("num_batches_tracked") or torch.equal(value, before[name]), name
        optimizers = (search.optimizer, search.architect.optimizer)
        state = [tensor for one in optimizers for entry in one.state.values() for tensor in entry.values()]
        assert all(tensor.isfinite().all() and (at or not tensor.any()) for tensor in state)
    assert all(value.isfinite().all() for value in search.supernet.state_dict().values())


def test_deterministic_search_repeats_itself(tmp_path: Path) -> None:
    """In processes of their own: cuBLAS must not have started before."""
    flags = ["--dataset=fake", "--image-size=16", "--channels=8", "--cells=3", "--epochs=3", "--retrain-epochs=1"]
    rows = []
    for run in (tmp_path / "first", tmp_path / "second"):
        command = [
            sys.executable,
            "-m",
            "dssp.search",
            *flags,
            "--device=cuda",
            "--deterministic",
            "--run-dir",
            str(run),
        ]
        done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        lines = [*(run / "metrics.jsonl").open(), *(run / "retrain.jsonl").open()]
        rows.append([{k: v for k, v in json.loads(line).items() if not k.endswith("seconds")} for line in lines])
    assert rows[0] == rows[1]
