"""What the machine does to a run: full and read-only disks, clocks that jump; nothing that was saved is lost."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dssp import search
from dssp.runs.run_folder import keep_rows
from tests.integration.test_faults import FLAGS, ROOT, assert_can_be_continued, at_step, failure

DAY = 86_400.0  # seconds
DAC_OVERRIDE, DAC_READ_SEARCH = 1, 2  # root's powers to write and read where permissions say no (capabilities(7))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@contextmanager
def without_powers() -> Iterator[None]:
    """Permissions hold for this process, if it is root's too."""
    libc, Three = ctypes.CDLL(None, use_errno=True), ctypes.c_uint32 * 6
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), Three()  # version 3; effective, permitted, inheritable, twice
    assert libc.capget(header, held) == 0
    fewer = Three(*held)
    fewer[0] &= ~(1 << DAC_OVERRIDE | 1 << DAC_READ_SEARCH)
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0


def test_run_folder_that_becomes_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_step(monkeypatch, 1, lambda: (folder / "checkpoints").chmod(0o555))
    with without_powers():
        line = failure(folder)
    assert "Permission denied; what was saved before is intact and --resume continues from it" in line
    (folder / "checkpoints").chmod(0o755)
    assert_can_be_continued(folder, monkeypatch)


def test_run_folder_that_may_not_be_made(tmp_path: Path) -> None:
    (tmp_path / "theirs").mkdir(mode=0o555)
    with without_powers():
        assert failure(tmp_path / "theirs" / "run") == f"--run-dir {tmp_path / 'theirs' / 'run'}: Permission denied"
    assert list((tmp_path / "theirs").iterdir()) == []


def test_disk_that_has_no_room_for_a_row(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """/dev/full stands for the disk: every write is refused with ENOSPC."""

    def fill() -> None:
        (folder / "metrics.jsonl").rename(folder / "rows")
        (folder / "metrics.jsonl").symlink_to("/dev/full")

    at_step(monkeypatch, 1, fill)
    line = failure(folder)
    assert "No space left on device; what was saved before is intact and --resume continues from it" in line
    (folder / "rows").replace(folder / "metrics.jsonl")
    assert_can_be_continued(folder, monkeypatch)


def may_mount() -> bool:
    """Whether this process may have a file system of its own: in a container it often may not."""
    if shutil.which("unshare") is None:
        return False
    command = ["unshare", "--map-root-user", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    return subprocess.run(command, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif("not may_mount()", reason="needs unshare and the right to mount")
def test_disk_that_fills_up_and_is_given_room(tmp_path: Path) -> None:
    """A file system of 60 KiB, which later has more: in a mount namespace, so nobody needs to be root."""
    run = f"{sys.executable} -m dssp.search {' '.join(FLAGS)} --run-dir disk/run"
    script = f"""
        mkdir disk && mount -t tmpfs -o size=60k tmpfs disk
        {run} 2> full.txt; echo $? > full.status
        mount -o remount,size=64m disk
        {run} --resume 2> room.txt; echo $? > room.status
        cp -r disk/run kept
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, check=True, timeout=170)
    said = (tmp_path / "full.txt").read_text()
    assert (tmp_path / "full.status").read_text() == "1\n", said
    assert "No space left on device; what was saved before is intact" in said.splitlines()[-1]
    assert (tmp_path / "room.status").read_text() == "0\n", (tmp_path / "room.txt").read_text()
    assert [row["epoch"] for row in keep_rows(tmp_path / "kept" / "metrics.jsonl", 9)] == [0, 1]


@pytest.mark.parametrize(
    "jump", [pytest.param(-400 * DAY, id="back"), pytest.param(400 * DAY, id="ahead", marks=pytest.mark.slow)]
)
def test_clock_that_jumps_by_a_year(folder: Path, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """The clock of the day, and the times of files: neither says what is newest, or how long a run took."""
    real = time.time

    def jump_and_stop() -> None:
        monkeypatch.setattr(time, "time", lambda: real() + jump)
        signal.raise_signal(signal.SIGTERM)

    at_step(monkeypatch, 1, jump_and_stop)
    with pytest.raises(SystemExit):
        search.main([*FLAGS, "--checkpoint-every=1", "--run-dir", str(folder)])
    for age, path in enumerate(sorted((folder / "checkpoints").iterdir(), reverse=True)):
        os.utime(path, (real() + jump * age, real() + jump * age))
    assert_can_be_continued(folder, monkeypatch)
    assert all(0 <= row["seconds"] < 3600 for row in keep_rows(folder / "metrics.jsonl", 9))
