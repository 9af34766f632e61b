"""`python -m dssp.compare`, as a user runs, interrupts, continues and misuses it; its searches are real processes."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dssp import compare
from dssp.runs.interruption import RESUME_ME

ROOT = Path(__file__).parents[2]
DATA = ["--dataset", "fake", "--image-size", "8", "--train-images", "48", "--held-out", "8"]
SIZES = ["--channels", "2", "--cells", "3", "--nodes", "1", "--batch-size", "12", "--threads", "1", "--epochs", "2"]
FLAGS = [*DATA, *SIZES, "--retrain-epochs", "0", "--retrain-channels", "2", "--retrain-cells", "3"]
METHODS = ["--methods", "darts", "dssp-paper", "--prune-strategy", "budget"]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that are started find the package wherever they run."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


def rows(folder: Path) -> dict[str, dict[str, str]]:
    """comparison.csv, by the name of the run."""
    with (folder / "comparison.csv").open(newline="") as file:
        return {f"{row['method']}-{row['seed']}": row for row in csv.DictReader(file)}


def started(folder: Path) -> dict[str, float]:
    """When the output of each run was last begun."""
    return {path.stem: path.stat().st_mtime for path in folder.glob("*.err")}


def test_crash_of_one_run_leaves_the_others_alone_and_resume_tries_it_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "darts-0").write_text("a file where the run folder should be")
    arguments = [*FLAGS, *METHODS, "--seeds", "1", "--run-dir", str(folder)]
    with pytest.raises(SystemExit, match=r"1 of 2 runs failed \(darts-0\); --resume tries them again"):
        compare.main(arguments)
    said = capsys.readouterr().out
    assert "--prune-strategy is not passed to darts: method darts prunes nothing" in said
    assert f"darts-0 failed: --run-dir {folder}/darts-0: File exists" in said and "dssp-paper-0 finished" in said
    found = rows(folder)
    assert {name: row["status"] for name, row in found.items()} == {"darts-0": "failed", "dssp-paper-0": "finished"}
    assert "File exists" in found["darts-0"]["error"] and int(found["dssp-paper-0"]["peak_memory_bytes"]) > 2**20

    (folder / "darts-0").unlink()
    before = started(folder)
    compare.main([*arguments, "--resume"])
    said, after = capsys.readouterr().out, started(folder)
    assert after["dssp-paper-0"] == before["dssp-paper-0"] and after["darts-0"] > before["darts-0"]
    assert "failed" not in said and "Time / darts" in said
    assert all(row["status"] == "finished" and float(row["search_seconds"]) > 0 for row in rows(folder).values())
    methods = json.loads((folder / "comparison.json").read_text())["methods"]
    assert set(methods) == {"darts", "dssp-paper"} and methods["darts"]["parameters"]["n"] == 1
    assert "</html>" in (folder / "comparison.html").read_text()


def test_searches_of_one_time_have_the_epochs_that_pilots_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without_epochs = FLAGS[: FLAGS.index("--epochs")] + FLAGS[FLAGS.index("--epochs") + 2 :]
    arguments = [*without_epochs, *METHODS, "--seeds", "1", "--search-seconds", "1", "--run-dir", str(tmp_path / "all")]
    compare.main(arguments)
    said, found = capsys.readouterr().out, rows(tmp_path / "all")
    for method in ("darts", "dssp-paper"):
        epochs, taken = found[f"{method}-0"]["epochs"], float(found[f"{method}-0"]["search_seconds"])
        assert f"{method}: {epochs} epochs for 1 s (4 took " in said and 0.2 < taken < 5
    assert "Epochs" in said
    pilots = started(tmp_path / "all" / "pilots")
    assert set(pilots) == {"darts-4", "darts-8", "dssp-paper-4", "dssp-paper-8"}

    compare.main([*arguments, "--resume"])
    assert started(tmp_path / "all" / "pilots") == pilots and rows(tmp_path / "all") == found


def start(arguments: list[str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "dssp.compare", *arguments]
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.slow
def test_interrupted_comparison_continues_to_the_same_results(tmp_path: Path) -> None:
    arguments = [*FLAGS, *METHODS, "--seeds", "2", "--retrain-epochs", "1", "--jobs", "2"]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    output, errors = start([*arguments, "--run-dir", str(whole)]).communicate()
    assert output.count(" finished: ") == 4 and errors == ""
    assert all(row["shared"] == "yes" for row in rows(whole).values()) and "Search time (shared)" in output

    process = start([*arguments, "--epochs", "2", "--run-dir", str(cut)])
    while not any((cut / name / "metrics.jsonl").exists() for name in ("darts-0", "dssp-paper-0")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to everybody in the foreground
    output, errors = process.communicate()
    assert process.returncode == RESUME_ME and "stopped by SIGINT; --resume continues" in errors
    assert "Traceback" not in errors and not (cut / "darts-1").exists()
    assert "darts-0 unfinished" in output or "dssp-paper-0 unfinished" in output

    process = start([*arguments, "--run-dir", str(cut), "--resume"])
    output, errors = process.communicate()
    assert process.returncode == 0 and errors == ""
    found, wanted = rows(cut), rows(whole)
    for name in ("darts-0", "dssp-paper-0", "darts-1", "dssp-paper-1"):
        for column in ("test_accuracy", "parameters", "flops", "genotype", "status"):
            assert found[name][column] == wanted[name][column] != ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--resume", "--resume: no run under runs/ has this configuration"),
        ("--resume --run-dir nowhere", "--resume: nowhere holds no run"),
        ("--run-dir taken", "taken already holds a run: add --resume to continue it"),
        ("--run-dir taken --resume --seeds 2", "--resume: taken holds a run with another seeds (then 3, now 2)"),
    ],
)
def test_misuse_is_one_line_and_starts_nothing(
    arguments: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "taken").mkdir()
    stored = {"methods": ["darts"], "seeds": 3, "flags": {}, "jobs": 1}
    (tmp_path / "taken" / "config.json").write_text(json.dumps({"config": stored}))
    with pytest.raises(SystemExit) as exit_:
        compare.main(["--methods", "darts", *arguments.split()])
    assert said in str(exit_.value.code) and "\n" not in str(exit_.value.code)
    assert not list(tmp_path.rglob("*.err"))
