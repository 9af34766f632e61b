"""bench/gpu_suite.sh with programs that stand in for Python and compute-sanitizer: what it runs, and what it says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

SUITE = Path(__file__).parents[2] / "bench" / "gpu_suite.sh"
TOOLS = ("bash", "timeout", "tee", "mkdir", "dirname", "mktemp", "cat", "mv", "cp", "ls", "rm")
PYTHON = """echo "$@" >> "$OUT/python.txt"; echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> "$OUT/cache.txt"
case "$*" in *setup.py*|*gpu_suite*) exit 1;; esac"""
SANITIZER = """echo "$@" > "$OUT/sanitizer.txt"
while [[ $1 == --* ]]; do [[ $1 != --log-file ]] || echo "ERROR SUMMARY: $ERRORS errors" > "$2"; shift 2; done
"$@" && exit $ERRORS"""

pytestmark = pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason=f"needs {', '.join(TOOLS)}")


def program(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{shutil.which('bash')}\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A folder with the tools that the suite may find, a Python that finds a GPU and passes all, and no sanitizer."""
    for tool in TOOLS:
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / tool).symlink_to(str(shutil.which(tool)))
    program(tmp_path / "python", PYTHON)
    return tmp_path


def suite(machine: Path, *stages: str, errors: int = 0) -> tuple[int, str, dict[str, Any]]:
    """Exit status, what was said, and summary.json."""
    out = machine / "out"
    environment = {
        **{"PATH": str(machine / "bin"), "CUDA_HOME": str(machine / "cuda"), "HOME": os.environ.get("HOME", "/")},
        **{"PYTHON": str(machine / "python"), "OUT": str(out), "ERRORS": str(errors), "TMPDIR": str(machine)},
    }
    done = subprocess.run(["bash", str(SUITE), *stages], env=environment, capture_output=True, text=True, timeout=60)
    summary = out / "summary.json"
    return done.returncode, done.stdout + done.stderr, json.loads(summary.read_text()) if summary.exists() else {}


def test_without_a_sanitizer_the_suite_says_so_and_passes(machine: Path) -> None:
    status, said, summary = suite(machine)
    assert status == 0 and summary["passed"]
    assert list(summary["stages"]) == ["build", "tests", "sanitize", "bench", "step", "search"]
    assert summary["stages"]["sanitize"] == {"status": "absent", "exit_code": 127, "seconds": 0}
    assert "no compute-sanitizer on PATH or in $CUDA_HOME/bin; the kernels' memory accesses were not checked" in said


@pytest.mark.parametrize("place", ["bin", "cuda/bin"])
def test_sanitizer_watches_a_few_kernel_tests_and_leaves_its_log(machine: Path, place: str) -> None:
    program(machine / place / "compute-sanitizer", SANITIZER)
    status, said, summary = suite(machine, "sanitize")
    assert status == 0 and summary["passed"] and list(summary["stages"]) == ["sanitize"]
    assert summary["stages"]["sanitize"]["status"] == "passed"
    assert (machine / "out" / "compute-sanitizer.log").read_text() == "ERROR SUMMARY: 0 errors\n"
    assert "ERROR SUMMARY: 0 errors" in said and "--tool memcheck --error-exitcode 9" in said
    assert "-m pytest tests/gpu -m gpu -q -k (nothing_outside" in (machine / "out" / "python.txt").read_text()
    assert (machine / "out" / "cache.txt").read_text().split() == ["1"]


def test_tests_outside_of_the_sanitizer_keep_torch_s_cache(machine: Path) -> None:
    program(machine / "bin" / "compute-sanitizer", SANITIZER)
    suite(machine, "tests", "sanitize", "bench")
    assert (machine / "out" / "cache.txt").read_text().split("\n") == ["", "", "1", "", ""]


def test_errors_that_the_sanitizer_finds_fail_the_suite(machine: Path) -> None:
    program(machine / "bin" / "compute-sanitizer", SANITIZER)
    status, said, summary = suite(machine, "sanitize", errors=9)
    assert status == 1 and not summary["passed"]
    assert summary["stages"]["sanitize"]["status"] == "failed" and "ERROR SUMMARY: 9 errors" in said


def test_failing_build_does_not_fail_the_suite_and_failing_tests_do(machine: Path) -> None:
    status, _, summary = suite(machine, "build")
    assert status == 0 and summary["stages"]["build"]["status"] == "failed"
    program(machine / "python", PYTHON.replace("setup.py", "pytest"))
    assert suite(machine, "tests", "search")[0] == 1


def test_unknown_stage_and_missing_gpu_are_refused(machine: Path) -> None:
    assert suite(machine, "sanitise")[:2] == (
        2, "stage: expected some of build tests sanitize bench step search, got sanitise\n",
    )  # fmt: skip
    program(machine / "python", "exit 1")
    status, said, summary = suite(machine)
    assert status == 2 and "finds no torch with a CUDA device" in said and not summary


def test_stages_together_end_within_ten_minutes() -> None:
    limits = dict(re.findall(r"^\s*stage (\w+) (\d+) ", SUITE.read_text(), re.MULTILINE))
    assert set(limits) == {"build", "tests", "sanitize", "bench", "step", "search"}
    assert sum(map(int, limits.values())) < 580
