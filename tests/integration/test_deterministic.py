"""--deterministic: set for one run and gone after it, the same bits again, and who cannot give them is named."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dssp import data as data_module
from dssp import evaluate, retrain, search
from dssp.bilevel import BilevelSearch
from dssp.checkpoint import load_newest, read_plain
from dssp.derived.retraining import Retraining
from dssp.runs.determinism import CUBLAS, NotDeterministic, deterministic
from dssp.runs.run_folder import keep_rows
from tests.search.test_resume import assert_identical

SHAPE = ["--image-size=8", "--channels=2", "--cells=3", "--threads=1"]
SEARCH = ["--nodes=1", "--batch-size=3", "--epochs=2", "--warmup-epochs=1", "--path-epochs=0", "--held-out=6"]
RETRAINING = ["--retrain-epochs=2", "--retrain-batch-size=4", "--retrain-channels=2", "--retrain-cells=3"]


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(CUBLAS, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def settings() -> tuple[Any, ...]:
    """What --deterministic changes in the process."""
    cudnn = torch.backends.cudnn
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    return enabled, warns, cudnn.deterministic, cudnn.benchmark, os.environ.get(CUBLAS)


ON = (True, False, True, False, ":4096:8")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of an image folder that is decoded anew in every epoch: 20 images for training, 4 to test."""
    noise = np.random.default_rng(0)
    for name, brightness in (("dark", 0), ("light", 100)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(12):
            pixels = noise.integers(0, 150, (9, 11, 3)) + brightness
            Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / name / f"{i}.png")
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 0)
    return ["--dataset=imagefolder", "--data-path", str(tmp_path / "images")]


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, act: Callable[[], Any]) -> list[Any]:
    """What act() returned at every call of a method."""
    original, seen = getattr(owner, name), list[Any]()

    def watching(*arguments: Any, **options: Any) -> Any:
        seen.append(act())
        return original(*arguments, **options)

    monkeypatch.setattr(owner, name, watching)
    return seen


def test_search_repeats_every_bit_with_other_workers(
    tmp_path: Path, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    searching = watch(monkeypatch, BilevelSearch, "step", settings)
    retraining = watch(monkeypatch, Retraining, "step", settings)
    before = settings()
    for workers in (1, 4):
        run = ["--run-dir", str(tmp_path / str(workers)), f"--workers={workers}", "--deterministic"]
        search.main([*images, *SHAPE, *SEARCH, *RETRAINING, *run])
        assert settings() == before
    assert set(searching) == set(retraining) == {ON}
    first, second = (tmp_path / str(workers) for workers in (1, 4))
    for log in ("metrics.jsonl", "retrain.jsonl"):
        assert_identical(*(keep_rows(folder / log, 9) for folder in (first, second)))
    for task in ("search", "retrain"):
        assert_identical(*(load_newest(folder / "checkpoints", task) for folder in (first, second)))
    assert_identical(*(read_plain(folder / "network.pt") for folder in (first, second)))
    assert_identical(*(json.loads((folder / "summary.json").read_text()) for folder in (first, second)))


def test_retraining_and_evaluation_set_it_and_the_next_run_does_not_have_it(
    tmp_path: Path, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = "[('sep_conv_3x3', 0), ('max_pool_3x3', 1)]"
    (tmp_path / "cell.txt").write_text(f"Genotype(normal={cell}, normal_concat=[2], reduce={cell}, reduce_concat=[2])")
    training = ["--genotype", str(tmp_path / "cell.txt"), "--epochs=1", "--batch-size=4"]
    steps, tests = watch(monkeypatch, Retraining, "step", settings), watch(monkeypatch, evaluate, "evaluate", settings)
    before = settings()
    for name, flag in (("with", ["--deterministic"]), ("without", [])):
        run = ["--run-dir", str(tmp_path / name)]
        retrain.main([*images, *SHAPE, *training, *run, *flag])
        evaluate.main([*run, "--device=cpu", *flag])
    assert set(steps) == {ON, before} and tests == [ON, before] and settings() == before
    stored = [json.loads((tmp_path / name / "config.json").read_text())["config"] for name in ("with", "without")]
    assert [config["deterministic"] for config in stored] == [True, False]


def unpool() -> None:
    """An operation of which torch has no deterministic form, on the CPU either."""
    pooled, places = F.max_pool2d(torch.rand(1, 1, 4, 4), 2, return_indices=True)
    F.max_unpool2d(pooled, places, 2)


def test_operation_that_refuses_is_named_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, BilevelSearch, "step", unpool)
    before = settings()
    flags = [
        "--dataset=fake",
        *SHAPE,
        "--nodes=1",
        "--batch-size=200",
        "--epochs=1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as exit_:
        search.main([*flags, "--deterministic"])
    line = str(exit_.value.code)
    assert line.startswith("--deterministic: max_unpool") and "\n" not in line
    assert "has no deterministic implementation; leave the flag out" in line
    assert settings() == before


def test_other_errors_inside_are_themselves_and_nothing_leaks() -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="of ours"), deterministic(True):
        assert settings() == ON
        raise RuntimeError("a mistake of ours")
    assert settings() == before


@pytest.mark.parametrize("workspace", [":4096:8", ":16:8"])
def test_workspace_of_the_user_is_kept(workspace: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, workspace)
    with deterministic(True):
        assert os.environ[CUBLAS] == workspace
    assert os.environ[CUBLAS] == workspace


def test_workspace_that_does_not_repeat_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CUBLAS, ":0:0")
    with pytest.raises(NotDeterministic, match="must be :4096:8 or :16:8, got ':0:0'"), deterministic(True):
        pass


def test_cuda_that_started_without_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    with pytest.raises(NotDeterministic, match="CUDA has started without it"), deterministic(True):
        pass


def test_run_is_not_continued_with_the_other_setting(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--dataset=fake",
        *SHAPE,
        "--nodes=1",
        "--batch-size=200",
        "--epochs=1",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    search.main([*flags, "--retrain-epochs=0", "--deterministic"])
    with pytest.raises(SystemExit, match=r"another deterministic \(then True, now False\)"):
        search.main([*flags, "--retrain-epochs=0", "--resume"])
