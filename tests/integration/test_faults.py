"""What goes wrong around a run: one clear line each, nothing that was saved is lost, and the run can be continued."""

from __future__ import annotations

import multiprocessing
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dssp import data as data_module
from dssp import retrain, search
from dssp.bilevel import BilevelSearch
from dssp.checkpoint import load_newest
from dssp.data import load_data
from dssp.runs.fingerprint import fingerprint
from dssp.runs.interruption import RESUME_ME
from dssp.runs.run_folder import keep_rows
from tests.search.test_resume import assert_identical

ROOT = Path(__file__).parents[2]
SHAPE = ["--dataset=fake", "--image-size=8", "--channels=2", "--cells=3", "--nodes=1", "--threads=1"]
FLAGS = [*SHAPE, "--batch-size=100", "--epochs=2", "--warmup-epochs=1", "--retrain-epochs=0"]


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    threads, file_size = torch.get_num_threads(), resource.getrlimit(resource.RLIMIT_FSIZE)
    yield
    torch.set_num_threads(threads)
    resource.setrlimit(resource.RLIMIT_FSIZE, file_size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def failure(folder: Path, *flags: str, main: Callable[[list[str]], None] = search.main) -> str:
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as exit_:
        main([*FLAGS, "--run-dir", str(folder), *flags])
    assert isinstance(exit_.value.code, str) and "\n" not in exit_.value.code
    return exit_.value.code


def at_step(monkeypatch: pytest.MonkeyPatch, epoch: int, act: Callable[[], Any]) -> None:
    """Do something before the second step of an epoch (of 4, or 3 in the first)."""
    step, steps = BilevelSearch.step, [0]

    def acting(self: BilevelSearch, batch: Any, now: int) -> Any:
        if now == epoch:
            steps[0] += 1
            if steps[0] == 2:
                act()
        return step(self, batch, now)

    monkeypatch.setattr(BilevelSearch, "step", acting)


@cache
def undisturbed() -> tempfile.TemporaryDirectory[str]:
    """Holds, in "run", the same run when nothing goes wrong."""
    root = tempfile.TemporaryDirectory()
    search.main([*FLAGS, "--run-dir", f"{root.name}/run"])
    return root


def assert_can_be_continued(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run goes on from its first epoch or later and ends as one that nothing went wrong in."""
    monkeypatch.undo()
    state = load_newest(folder / "checkpoints", "search")
    assert state is not None and (state["epoch"], state["step"]) >= (1, 0)
    search.main([*FLAGS, "--run-dir", str(folder), "--resume"])
    whole = Path(undisturbed().name, "run")
    assert_identical(*(keep_rows(path / "metrics.jsonl", 9) for path in (folder, whole)))
    assert_identical(*(load_newest(path / "checkpoints", "search") for path in (folder, whole)))
    assert (folder / "summary.json").exists()


def test_full_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit on the size of files stands for the disk: the checkpoint does not fit."""
    at_step(monkeypatch, 1, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)))
    line = failure(folder)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert "File too large; what was saved before is intact and --resume continues from it" in line
    assert not list((folder / "checkpoints").glob(".*"))
    assert_can_be_continued(folder, monkeypatch)


def test_run_folder_deleted_while_it_is_used(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, lambda: shutil.rmtree(folder))
    assert "No such file or directory" in failure(folder)
    assert not (folder / "checkpoints").exists()  # not half of a folder in its place


def test_memory_that_the_cpu_does_not_have(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, lambda: torch.empty(2**60, dtype=torch.uint8))
    line = failure(folder)
    assert line.startswith("search: out of memory at batch size 100 (peak of the process ")
    assert "lower --batch-size or --channels" in line and "Checkpoints are intact" in line
    assert_can_be_continued(folder, monkeypatch)


def test_memory_that_a_gpu_does_not_have_while_retraining(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("dssp.derived.retraining.Retraining.step", out_of_memory)
    line = failure(folder, "--retrain-epochs=1", "--retrain-batch-size=50", "--retrain-channels=2", "--retrain-cells=3")
    assert line.startswith("retraining: out of memory at batch size 50 (") and "lower --retrain-batch-size or" in line


def test_other_errors_keep_their_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise RuntimeError("a mistake of ours")

    at_step(monkeypatch, 0, fail)
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        search.main([*FLAGS, "--run-dir", str(folder)])


def test_label_out_of_range(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = data_module._held_out

    def poisoned(labels: torch.Tensor) -> Any:
        parts = held_out(labels)
        labels[7] = 12
        return parts

    monkeypatch.setattr(data_module, "_held_out", poisoned)
    assert failure(folder) == "fake: image 7 has label 12, expected 0 to 9; mend its labels"
    assert not folder.exists()


def test_image_that_gets_corrupted_while_training(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(12):
            pixels = np.random.default_rng(i).integers(0, 255, (8, 8, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.png")
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 0)  # decoded anew in every epoch
    flags = ["--dataset=imagefolder", "--data-path", str(tmp_path / "data"), "--batch-size=2", "--workers=1"]

    def corrupt() -> None:
        for path in (tmp_path / "data").rglob("*.png"):
            path.write_bytes(path.read_bytes()[:40])

    at_step(monkeypatch, 1, corrupt)
    line = failure(folder, *flags)
    assert ".png: not a readable image (" in line and line.endswith("replace or remove it")
    state = load_newest(folder / "checkpoints", "search")
    assert state is not None and state["epoch"] == 1


def test_loss_that_stays_infinite(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = failure(folder, "--weight-lr=1e30", "--weight-lr-min=1e30", "--max-skipped-steps=3", "--grad-clip=0")
    assert "search: loss or gradient not finite in 3 steps in a row" in line and "the last checkpoint is kept" in line


def test_second_process_on_a_run_folder_is_refused_until_the_first_is_dead(folder: Path) -> None:
    program = [
        "import sys, time",
        "from pathlib import Path",
        "from dssp.runs.run_folder import _lock",
        "_lock(Path(sys.argv[1]))",
        "print('locked', flush=True)",
        "time.sleep(600)",
    ]
    folder.mkdir()
    owner = subprocess.Popen(
        [sys.executable, "-c", "\n".join(program), str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None and owner.stdout.readline() == "locked\n"
    line = failure(folder)
    assert line.startswith(f"{folder} is in use by another process ({owner.pid} on ")
    owner.kill()
    owner.communicate()
    search.main([*FLAGS, "--run-dir", str(folder), "--epochs=1"])
    assert (folder / "summary.json").exists()


def test_signal_saves_and_resume_finishes(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    at_step(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as exit_:
        search.main([*FLAGS, "--run-dir", str(folder)])
    assert exit_.value.code == RESUME_ME
    said = capfd.readouterr().err
    assert said.splitlines()[-1] == "stopped by SIGTERM; --resume continues where it stopped"
    state = load_newest(folder / "checkpoints", "search")
    assert state is not None and (state["epoch"], state["step"]) == (1, 2)
    assert_can_be_continued(folder, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_second_ctrl_c_leaves_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    arguments = [*FLAGS, "--run-dir", str(folder)]
    child = multiprocessing.get_context("fork").Process(target=search.main, args=(arguments,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGINT
    state = load_newest(folder / "checkpoints", "search")
    assert state is not None and (state["epoch"], state["step"]) == (1, 0)  # nothing of the epoch was saved
    assert_can_be_continued(folder, monkeypatch)


def test_finished_retraining_says_so_and_repeats_its_summary(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search.main([*FLAGS, "--run-dir", str(folder), "--epochs=1"])
    sizes = ["--genotype", str(folder / "genotype.json"), "--run-dir", str(tmp_path / "retrained"), "--epochs=1"]
    flags = [*(flag for flag in SHAPE if "nodes" not in flag), *sizes, "--batch-size=200"]
    retrain.main(flags)
    summary = capsys.readouterr().out.splitlines()[-2:]
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "retrained").rglob("*.*"))
    for _ in range(2):
        retrain.main([*flags, "--resume"])
        said = capsys.readouterr().out.splitlines()
        assert said[0].endswith("is finished, nothing is left to do") and said[1:] == summary
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "retrained").rglob("*.*")) == before


def test_other_images_are_not_continued_with(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 0, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit):
        search.main([*FLAGS, "--run-dir", str(folder)])
    load = search.load_data

    def brighter(*arguments: Any, **settings: Any) -> Any:
        loaded = load(*arguments, **settings)
        loaded.train.store.pixels[3, 0, 0, 0] ^= 1
        return loaded

    monkeypatch.setattr(search, "load_data", brighter)
    assert f"--resume: the data set is not the one {folder} began with" in failure(folder, "--resume")


def test_fingerprint_depends_on_images_and_labels_alone() -> None:
    fake, again, digits = load_data("fake", image_size=8), load_data("fake", image_size=8, seed=3), load_data("digits")
    assert fingerprint(fake) == fingerprint(again) != fingerprint(digits)
    fake.train.labels[5] += 1
    assert fingerprint(fake) != fingerprint(again)
