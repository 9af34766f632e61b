"""`python -m dssp.sweep` with Ray Tune, where it is installed: real trials, one of which fails."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLAGS = (
    "--dataset fake --image-size 8 --train-images 48 --held-out 8 --channels 2 --cells 3 --nodes 1 --batch-size 12 "
    "--threads 1 --epochs 2 --retrain-channels 2 --retrain-cells 3 --lambda-prune 0.001 0.1 --run-dir all"
)


@pytest.mark.slow
def test_failed_trial_is_tried_again_by_resume_and_the_others_are_kept(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "dssp.sweep", *FLAGS.split()]
    (tmp_path / "all").mkdir()
    obstacle = tmp_path / "all" / "lambda-prune=0.1"
    obstacle.write_text("a file where the run folder should be")

    failed = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert failed.returncode == 1 and "1 of 2 trials failed" in failed.stderr.splitlines()[-1]
    assert "File exists" in (tmp_path / "all" / "lambda-prune=0.1.err").read_text()
    metrics = tmp_path / "all" / "lambda-prune=0.001" / "metrics.jsonl"
    before = metrics.stat().st_mtime

    obstacle.unlink()
    resumed = subprocess.run([*command, "--resume"], cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert resumed.returncode == 0, resumed.stderr
    assert metrics.stat().st_mtime == before
    with (tmp_path / "all" / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["lambda_prune"] for row in rows] == ["0.001", "0.1"]
    assert all(float(row["valid_accuracy"]) >= 0 and float(row["search_seconds"]) > 0 for row in rows)
