"""A checkpoint is there whole or not at all, and reading one executes nothing."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dssp.checkpoint import load_newest, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


def state(epoch: int) -> dict[str, Any]:
    return {"epoch": epoch, "weights": {"w": torch.full((40, 40), float(epoch))}, "history": [{"edge": "normal:0->2"}]}


def stop(*_: object) -> None:
    """What kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


class KilledWhilePickled:
    def __reduce__(self) -> Any:
        stop()


def killed_while_writing(folder: Path) -> None:
    save_checkpoint(folder, "search", 2, 0, {**state(2), "last": KilledWhilePickled()})


def killed_before_moving(folder: Path) -> None:
    sys.addaudithook(lambda event, arguments: stop() if event == "os.rename" else None)
    save_checkpoint(folder, "search", 2, 0, state(2))


def killed_after_moving(folder: Path) -> None:
    sys.addaudithook(lambda event, arguments: stop() if event == "os.remove" else None)
    save_checkpoint(folder, "search", 2, 0, state(2))


def test_newest_two_are_kept_and_the_newest_is_read(tmp_path: Path) -> None:
    (tmp_path / "new" / "folder").mkdir(parents=True)
    for epoch in (1, 2, 9, 10, 11):
        save_checkpoint(tmp_path / "new" / "folder", "search", epoch, 0, state(epoch))
    save_checkpoint(tmp_path / "new" / "folder", "retrain", 1, 0, {"other": 1})
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "retrain-00001-0000000.pt",
        "retrain-latest",
        "search-00010-0000000.pt",
        "search-00011-0000000.pt",
        "search-latest",
    ]
    found = load_newest(tmp_path / "new" / "folder", "search")
    assert found is not None and found["epoch"] == 11 and found["history"] == state(0)["history"]
    assert torch.equal(found["weights"]["w"], state(11)["weights"]["w"])


def test_step_within_an_epoch_comes_before_the_end_of_it(tmp_path: Path) -> None:
    for epoch, step in ((9, 0), (9, 120), (9, 1_000_000), (10, 0)):
        save_checkpoint(tmp_path, "search", epoch, step, {"at": [epoch, step]})
        found = load_newest(tmp_path, "search")
        assert found is not None and found["at"] == [epoch, step]
        assert (tmp_path / "search-latest").read_text() == f"search-{epoch:05d}-{step:07d}.pt\n"


def test_files_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    (tmp_path / ".search-00000-0000007.pt.123").write_bytes(b"half")
    (tmp_path / ".retrain-00000-0000007.pt.123").write_bytes(b"of another task")
    save_checkpoint(tmp_path, "search", 1, 0, state(1))
    assert [path.name for path in tmp_path.glob(".*")] == [".retrain-00000-0000007.pt.123"]


def test_folder_that_is_gone_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path / "gone", "search", 1, 0, state(1))
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("content", [[1, 2], {"state": {}}, {"format": 3, "state": {}}, {"format": 4, "state": 3}])
def test_file_that_is_no_checkpoint_of_this_format_is_skipped(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "search-00001-0000000.pt")
    with pytest.warns(RuntimeWarning, match="expected a checkpoint of format 4"):
        assert load_newest(tmp_path, "search") is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.floats(0, 1, exclude_max=True), piece=st.binary(max_size=40), cut=st.booleans())
def test_whatever_happened_to_a_file_the_state_is_whole_or_there_is_none(
    tmp_path: Path, where: float, piece: bytes, cut: bool
) -> None:
    path = save_checkpoint(tmp_path, "search", 1, 0, state(1))
    data = path.read_bytes()
    position = int(where * len(data))
    path.write_bytes(data[:position] + piece + (b"" if cut else data[position + len(piece) :]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_newest(tmp_path, "search")
    assert found is None or torch.equal(found["weights"]["w"], state(1)["weights"]["w"])


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_newest(tmp_path / "nowhere", "search") is None


@pytest.mark.parametrize(
    ("work", "expected"),
    [(killed_while_writing, 1), (killed_before_moving, 1), (killed_after_moving, 2)],
    ids=["while writing", "before moving", "after moving"],
)
def test_kill_between_stages_leaves_a_whole_checkpoint(
    tmp_path: Path, work: Callable[[Path], None], expected: int
) -> None:
    save_checkpoint(tmp_path, "search", 1, 0, state(1))
    child = multiprocessing.get_context("fork").Process(target=work, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing half written is even looked at
        found = load_newest(tmp_path, "search")
    assert found is not None and found["epoch"] == expected


def flipped(data: bytes) -> bytes:
    middle = data.index(torch.full((4,), 2.0).numpy().tobytes()) + 8
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: d[:-1],
        lambda d: d[: len(d) // 2],
        lambda d: b"",
        lambda d: bytes(len(d)),
        lambda d: b"x" * 99,
        flipped,
    ],
    ids=["one byte short", "half", "empty", "zeros", "text", "one bit of a weight flipped"],
)
def test_damaged_checkpoint_is_skipped_with_a_warning(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    for epoch in (1, 2):
        save_checkpoint(tmp_path, "search", epoch, 0, state(epoch))
    newest = tmp_path / "search-00002-0000000.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    with pytest.warns(RuntimeWarning, match=r"search-00002-0000000.pt: damaged checkpoint skipped"):
        found = load_newest(tmp_path, "search")
    assert found is not None and found["epoch"] == 1


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_reading_executes_nothing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "search", 1, 0, {"x": Malicious(tmp_path / "executed")})
    with pytest.warns(RuntimeWarning, match="damaged checkpoint skipped"):
        assert load_newest(tmp_path, "search") is None
    assert not (tmp_path / "executed").exists()
