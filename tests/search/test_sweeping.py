"""Claims about dssp.sweep: the trials a command line stands for, what a trial is, and life without Ray."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from dssp import sweep
from dssp.config import parse_search
from dssp.sweeping import Trial, parse_sweep, run_trial
from tests.search.test_report import write_run


def test_every_combination_is_a_trial_that_its_arguments_say() -> None:
    plan = parse_sweep(["--lambda-prune", "0.1", "0.01", "--edge-budget", "0.3", "0.5", "0.3", "--epochs", "7"])
    trials = plan.trials(Path("x"))
    found = {(c.lambda_prune, c.edge_budget) for t in trials if (c := parse_search(t.arguments)).epochs == 7}
    assert found == {(0.1, 0.3), (0.1, 0.5), (0.01, 0.3), (0.01, 0.5)} and len(trials) == 4
    assert {trial.folder.name for trial in trials} >= {"lambda-prune=0.1_edge-budget=0.3"}
    assert all(parse_search(trial.arguments).run_dir == str(trial.folder) for trial in trials)


def test_trials_are_not_retrained_unless_asked() -> None:
    assert parse_search(parse_sweep([]).trials(Path("x"))[0].arguments).retrain_epochs == 0
    assert parse_search(parse_sweep(["--retrain-epochs", "3"]).trials(Path("x"))[0].arguments).retrain_epochs == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--lambda-prune 0.1 -1", "argument --lambda-prune: expected at least 0"),
        ("--edge-budget 0.5 2", "argument --edge-budget: expected at most 1"),
        ("--method none", "argument --method: invalid choice"),
        ("--jobs 0", "argument --jobs: expected at least 1"),
    ],
)
def test_bad_command_line_is_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_sweep(arguments.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and error.count("\n") == 1


def test_missing_ray_is_one_line_and_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SystemExit, match=r'needs Ray Tune: pip install "dssp\[sweep\]"'):
        sweep.main(["--lambda-prune", "0.1"])
    assert not list(tmp_path.iterdir())


def test_trial_that_fails_says_why(tmp_path: Path) -> None:
    trial = Trial({}, tmp_path / "trial", ["--dataset", "imagefolder", "--data-path", "nowhere"])
    with pytest.raises(RuntimeError, match="imagefolder: nowhere is no folder"):
        run_trial(trial, str(Path(__file__).parents[2]), pytest.fail)


def test_csv_has_a_line_per_trial_also_for_one_that_never_began(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a")
    rows = [sweep.row(Trial({"lambda_prune": x}, path, [])) for x, path in ((0.1, run), (0.2, tmp_path / "b"))]
    sweep.write_csv(tmp_path / "sweep.csv", rows)
    with (tmp_path / "sweep.csv").open(newline="") as file:
        first, second = csv.DictReader(file)
    assert (first["lambda_prune"], first["active_edges"], first["test_accuracy"]) == ("0.1", "26", "0.9778")
    assert (second["lambda_prune"], second["search_seconds"], second["folder"]) == ("0.2", "", "b")
