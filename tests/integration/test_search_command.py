"""`python -m dssp.search` and `python -m dssp.retrain`, as a user runs, interrupts, continues and misuses them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dssp import retrain, search
from dssp.callbacks import MetricsLog
from dssp.engine import Engine
from dssp.genotype import load_genotype
from dssp.metrics import RunningMeans
from dssp.runs.interruption import RESUME_ME

ROOT = Path(__file__).parents[2]
SHAPE = ["--channels", "2", "--cells", "3", "--threads", "1"]
SIZES = ["--nodes", "2", "--batch-size", "12", "--epochs", "5", "--warmup-epochs", "1"]
RETRAINING = [f"--retrain-{name}={value}" for name, value in (("epochs", 5), ("channels", 2), ("cells", 3))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags for a folder of 48 training and 8 test images of 8x8 in two classes, in any order of brightness."""
    root = tmp_path_factory.mktemp("images")
    noise = np.random.default_rng(0)
    for part, count in (("train", 24), ("test", 4)):
        for name, brightness in (("dark", 0), ("light", 100)):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 150, (8, 8, 3)) + brightness
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i}.png")
    return ["--dataset", "imagefolder", "--data-path", str(root), "--image-size", "8"]


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """--threads holds for the whole process: put the number back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def start(module: str, arguments: list[str], folder: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def flags(data: list[str], run_dir: Path) -> list[str]:
    return [*data, *SHAPE, *SIZES, *RETRAINING, "--retrain-batch-size", "24", "--run-dir", str(run_dir)]


@pytest.fixture(scope="module")
def finished(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of an undisturbed search."""
    folder = tmp_path_factory.mktemp("finished")
    process = start("dssp.search", flags(data, Path("run")), folder)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    for said in ("normal cell", "Pruned: 5 edges", "after epoch 2:", "test accuracy", "Report:     run/report.html"):
        assert said in output
    return folder / "run"


# ---- what a run leaves behind ----------------------------------------------------------------------------------------


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def checkpoint(run: Path, name: str) -> Any:
    return torch.load(run / "checkpoints" / name, weights_only=True)


def timeless(value: Any) -> Any:
    """JSON without the entries that are times."""
    if isinstance(value, dict):
        return {key: timeless(entry) for key, entry in value.items() if not str(key).endswith("seconds")}
    return [timeless(entry) for entry in value] if isinstance(value, list) else value


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    """Bit for bit, times excepted."""
    assert type(left) is type(right), where
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and torch.equal(left, right), where
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            if not str(key).endswith("seconds"):
                assert_identical(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for i, (one, two) in enumerate(zip(left, right, strict=True)):
            assert_identical(one, two, f"{where}[{i}]")
    else:
        assert left == right, where


def assert_same_run(found: Path, expected: Path) -> None:
    """Alpha, masks, weights, optimizers, history, metrics, genotype and summary agree."""
    for name in ("search-00004-0000000.pt", "search-00005-0000000.pt", "retrain-00005-0000000.pt"):
        assert_identical(checkpoint(found, name), checkpoint(expected, name), name)
    for name in ("metrics.jsonl", "retrain.jsonl"):
        assert timeless(rows(found / name)) == timeless(rows(expected / name))
    assert (found / "genotype.json").read_bytes() == (expected / "genotype.json").read_bytes()
    summaries = [timeless(json.loads((run / "summary.json").read_text())) for run in (found, expected)]
    assert summaries[0] == summaries[1]


def test_run_folder_has_everything_the_contract_names(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} - {"changes.diff"} == {
        ".lock",
        "config.json",
        "metrics.jsonl",
        "retrain.jsonl",
        "tensorboard",
        "checkpoints",
        "genotype.json",
        "network.pt",
        "summary.json",
        "report.html",
    }
    config = json.loads((finished / "config.json").read_text())
    assert {"config", "command", "versions", "commit", "machine", "edges", "operations"} <= config.keys()
    assert config["config"]["epochs"] == 5 and config["config"]["lambda_prune"] == 0.01
    assert config["command"].startswith("python -m dssp.search --dataset imagefolder")
    epochs = rows(finished / "metrics.jsonl")
    keys = {"epoch", "train_loss", "valid_loss", "valid_accuracy", "active_edges", "step_seconds", "seconds"}
    assert [row["epoch"] for row in epochs] == list(range(5)) and all(keys <= row.keys() for row in epochs)
    assert [row["phase"] for row in epochs] == ["warm-up", "search", "paths", "paths", "paths"]
    assert [row["epoch"] for row in rows(finished / "retrain.jsonl")] == list(range(5))


def test_summary_agrees_with_the_rest_of_the_folder(finished: Path) -> None:
    summary = json.loads((finished / "summary.json").read_text())
    assert summary["genotype"] == json.loads((finished / "genotype.json").read_text())["genotype"]
    assert 0 <= summary["test_accuracy"] <= 1 and summary["parameters"] > 0 and summary["flops"] > 0
    assert summary["search_seconds"] > 0 and summary["tabulated"] is None
    epochs = rows(finished / "metrics.jsonl")
    assert summary["search_flops"] == epochs[-1]["search_flops"] > epochs[-2]["search_flops"]
    of_paths = [row["step_seconds"] for row in epochs if row["phase"] == "paths"]
    assert summary["step_seconds"]["paths"] == pytest.approx(sum(of_paths) / len(of_paths))
    pruned = [(row["epoch"], edge) for row in epochs for edge in row["pruned"]]
    assert [(event["epoch"], event["edge"]) for event in summary["pruned"]] == pruned and len(pruned) == 5
    assert all(event["step"] == 2 * (event["epoch"] + 1) for event in summary["pruned"])
    assert epochs[-1]["active_edges"] == 10 - len([epoch for epoch, _ in pruned if epoch < 4])
    derived = {
        f"{cell}:{source}->{node}"
        for cell in ("normal", "reduce")
        for node, edges in enumerate(summary["genotype"][cell], start=2)
        for _, source in edges
    }
    assert not derived & {edge for _, edge in pruned}


def test_genotype_says_where_it_comes_from(finished: Path) -> None:
    content = json.loads((finished / "genotype.json").read_text())
    assert (content["space"], content["method"], content["seed"]) == ("darts", "dssp", 0)
    assert len(load_genotype(finished / "genotype.json").normal) == 2


def test_tensorboard_shows_search_and_retraining(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for task, epochs in (("search", 5), ("retrain", 5)):
        events = EventAccumulator(str(finished / "tensorboard" / task)).Reload()
        assert [event.step for event in events.Scalars("train_loss")] == list(range(epochs))
    gates = EventAccumulator(str(finished / "tensorboard" / "search")).Reload().Scalars("gates/normal:0->2")
    logged = [row["gates"]["normal"][0] for row in rows(finished / "metrics.jsonl")]
    assert [event.value for event in gates] == pytest.approx([gate for gate in logged if gate is not None])


def test_report_is_one_page(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert "</html>" in page and "<svg" in page


def test_genotype_of_a_search_retrains(finished: Path, data: list[str], tmp_path: Path) -> None:
    out = tmp_path / "retrained"
    genotype = ["--genotype", str(finished / "genotype.json"), "--run-dir", str(out)]
    process = start("dssp.retrain", [*data, *SHAPE, *genotype, "--epochs", "2", "--batch-size", "24"], tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    summary = json.loads((out / "summary.json").read_text())
    assert summary["parameters"] == json.loads((finished / "summary.json").read_text())["parameters"]
    assert f"Test accuracy {summary['test_accuracy']:.2%}" in output
    assert len(rows(out / "retrain.jsonl")) == 2


# ---- the same run again, whole or in pieces --------------------------------------------------------------------------


@pytest.mark.slow  # runs that are cut and continue are compared with `finished`, too
def test_same_seed_gives_the_same_run_and_another_seed_another(finished: Path, data: list[str], tmp_path: Path) -> None:
    search.main(flags(data, tmp_path / "same"))
    assert_same_run(tmp_path / "same", finished)
    search.main([*flags(data, tmp_path / "other"), "--seed", "1", "--epochs", "1", "--retrain-epochs", "0"])
    first, second = rows(tmp_path / "same" / "metrics.jsonl")[0], rows(tmp_path / "other" / "metrics.jsonl")[0]
    assert first["train_loss"] != second["train_loss"]


def wait_for(path: Path, lines: int) -> None:
    """Until the file has so many lines."""
    while not path.exists() or len(path.read_text().splitlines()) < lines:
        time.sleep(0.002)


# Pruning points are the ends of epochs 1 to 3, so the third row is written when edges have just left twice.
CUTS = pytest.mark.parametrize(
    ("log", "lines"),
    [
        pytest.param("config.json", 1, id="before the first epoch", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", 1, id="after warm-up", marks=pytest.mark.slow),
        pytest.param("metrics.jsonl", 3, id="after a pruning epoch", marks=pytest.mark.slow),
        pytest.param("retrain.jsonl", 1, id="while retraining"),
    ],
)


@CUTS
def test_interrupted_search_continues_bit_for_bit(
    finished: Path, data: list[str], tmp_path: Path, log: str, lines: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    pressed: list[int] = []

    def press_ctrl_c(self: MetricsLog, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if not pressed and (run / log).exists() and len((run / log).read_text().splitlines()) >= lines:
            pressed.append(step)
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(RESUME_ME)):
        patch.setattr(MetricsLog, "step_end", press_ctrl_c)
        search.main(flags(data, run))
    assert not (run / "summary.json").exists()
    search.main([*flags(data, run), "--resume"])
    assert_same_run(run, finished)


def test_killed_search_continues_bit_for_bit(finished: Path, data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start("dssp.search", flags(data, run), tmp_path)
    wait_for(run / "metrics.jsonl", 3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL and not (run / "summary.json").exists()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "train_')  # a kill while a row was written
    search.main([*flags(data, run), "--resume"])
    assert_same_run(run, finished)
    assert "</html>" in (run / "report.html").read_text()


def test_continuing_a_finished_search_changes_nothing(
    finished: Path, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "report.html").unlink()
    for _ in range(2):
        search.main([*flags(data, run), "--resume"])
        said = capsys.readouterr().out
        assert "is finished, nothing is left to do" in said and "Pruned: 5 edges" in said
    assert_same_run(run, finished)
    assert (run / "report.html").exists()


def test_damaged_newest_checkpoint_costs_an_epoch_and_nothing_else(
    finished: Path, data: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    newest = run / "checkpoints" / "search-00005-0000000.pt"
    newest.write_bytes(newest.read_bytes()[:-100])
    (run / "summary.json").unlink()  # or there would be nothing to do
    with pytest.warns(RuntimeWarning, match="damaged checkpoint skipped"):
        search.main([*flags(data, run), "--resume"])
    assert_same_run(run, finished)


# ---- other ways to search --------------------------------------------------------------------------------------------


def test_darts_searches_without_masks(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    search.main([*flags(data, run), "--method", "darts", "--epochs", "2", "--retrain-epochs", "0"])
    epochs, summary = rows(run / "metrics.jsonl"), json.loads((run / "summary.json").read_text())
    assert all(row["gates"] is None and row["active_edges"] == 10 and not row["pruned"] for row in epochs)
    assert summary["pruned"] == [] and json.loads((run / "genotype.json").read_text())["method"] == "darts"
    assert len(epochs[0]["alpha"]["normal"][0]) == 8  # `none` is among the candidates
    assert "</html>" in (run / "report.html").read_text()


def test_no_retraining_counts_only(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    search.main([*flags(data, run), "--epochs", "1", "--warmup-epochs", "0", "--retrain-epochs", "0"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["test_accuracy"] is None and summary["retrain_seconds"] is None
    assert summary["parameters"] > 0 and summary["flops"] > 0 and not (run / "retrain.jsonl").exists()
    assert "not retrained" in capsys.readouterr().out
    genotype = ["--genotype", str(run / "genotype.json"), "--run-dir", str(tmp_path / "counted"), "--epochs", "0"]
    retrain.main([*data, *SHAPE, *genotype])
    assert f"Not trained, {summary['parameters']:,} parameters" in capsys.readouterr().out


def test_search_that_is_all_warm_up_still_ends_with_a_summary(data: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    search.main([*flags(data, run), "--epochs", "1", "--warmup-epochs", "1", "--retrain-epochs", "0"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["pruned"] == [] and summary["step_seconds"]["first"] == summary["step_seconds"]["last"] > 0


# ---- misuse ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--dataset imagefolder --data-path nowhere", 1, "imagefolder: nowhere is no folder; pass --data-path"),
        ("--space chain --max-params 500", 1, "--max-params: no network that is left fits: the smallest has"),
        ("--resume", 1, "--resume: no run under runs/ has this configuration"),
        ("--resume --run-dir nowhere", 1, "--resume: nowhere holds no run"),
        ("--device cuda:99", 1, "--device cuda:99: this machine has"),
        ("--run-dir /dev/null/x", 1, "--run-dir /dev/null/x: Not a directory"),
        ("--cells 2", 2, "argument --cells: expected at least 3"),
        ("--epochs 2 --warmup-epochs 3", 2, "argument --warmup-epochs: expected at most the 2 epochs"),
        ("--lambda-prune -1", 2, "argument --lambda-prune: expected at least 0"),
        ("--prune-strategy sometimes", 2, "argument --prune-strategy: invalid choice"),
    ],
)
def test_misuse_of_search_is_one_line(
    arguments: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_one_line(search.main, arguments.split(), status, said, tmp_path, monkeypatch, capsys)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        ("--genotype nowhere.json", 1, "--genotype: nowhere.json: No such file or directory"),
        ("--genotype empty.json", 1, "--genotype: empty.json: genotype text: expected one Genotype"),
        ("--genotype strange.txt", 1, "--genotype: strange.txt names conv_9x9, expected operations among none"),
        ("", 2, "required: --genotype"),
        ("--genotype empty.json --epochs -1", 2, "argument --epochs: expected at least 0"),
    ],
)
def test_misuse_of_retrain_is_one_line(
    arguments: str,
    status: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.json").write_text("")
    edges = "[('conv_9x9', 0), ('skip_connect', 1)]"
    strange = f"Genotype(normal={edges}, normal_concat=[2], reduce={edges}, reduce_concat=[2])"
    (tmp_path / "strange.txt").write_text(strange)
    assert_one_line(retrain.main, arguments.split(), status, said, tmp_path, monkeypatch, capsys)


def assert_one_line(
    main: Any,
    arguments: list[str],
    status: int,
    said: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The command ends with this status, one line on stderr, and leaves no run folder."""
    monkeypatch.chdir(folder)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    output = capsys.readouterr()
    # sys.exit(text) prints the text and leaves with status 1
    line = exit_.value.code if isinstance(exit_.value.code, str) else output.err
    assert (1 if isinstance(exit_.value.code, str) else exit_.value.code) == status
    assert said in line and line.strip().count("\n") == 0 and output.out == ""
    assert not (folder / "runs").exists()


def test_missing_data_is_one_line_on_stderr_of_the_process(tmp_path: Path) -> None:
    process = start("dssp.search", ["--dataset", "imagefolder", "--data-path", "nowhere"], tmp_path)
    output, errors = process.communicate()
    assert process.returncode == 1 and output == ""
    assert errors.startswith("imagefolder: nowhere is no folder") and errors.count("\n") == 1


def test_run_folder_in_use_is_refused_untouched(finished: Path, data: list[str]) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(SystemExit, match="already holds a run: add --resume to continue it"):
        search.main(flags(data, finished))
    assert (finished / "metrics.jsonl").read_bytes() == before
