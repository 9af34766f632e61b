"""The run folder: a new one for each run, the right one to continue, one line for every refusal."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from dssp.config import RetrainConfig, SearchConfig
from dssp.runs.run_folder import RunFolderError, keep_rows, open_run_folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(**settings: Any) -> SearchConfig:
    return SearchConfig(**settings).resolve()


def refusal(of: SearchConfig | RetrainConfig, kind: str = "dssp") -> str:
    with pytest.raises(RunFolderError) as error:
        open_run_folder(of, kind, {})
    assert "\n" not in str(error.value)
    return str(error.value)


def test_default_folder_is_named_after_time_and_method() -> None:
    first, second = (open_run_folder(config(), "dssp", {}) for _ in range(2))
    assert first.parent == Path("runs") and first != second
    assert all(folder.match("runs/2*-*-dssp*") for folder in (first, second))


def test_config_says_everything_that_is_needed_to_repeat_the_run() -> None:
    folder = open_run_folder(config(seed=3, run_dir="x/y"), "dssp", {"edges": {"normal": ["0->2"]}})
    stored = json.loads((folder / "config.json").read_text())
    assert folder == Path("x/y")
    assert SearchConfig.from_dict(stored["config"]) == config(seed=3, run_dir="x/y")
    assert {"command", "versions", "commit", "machine", "edges"} <= stored.keys()
    assert {"python", "torch", "triton", "dssp"} == stored["versions"].keys()


def git(here: Path, *arguments: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *who, *arguments], cwd=here, check=True, capture_output=True)


def test_changes_since_the_commit_are_kept_beside_the_config(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = here / "tree" / "dssp"
    (tree / "runs").mkdir(parents=True)
    (tree / "supernet.py").write_text("one\n")
    git(tree, "init")
    git(tree, "add", ".")
    git(tree, "commit", "-m", "first")
    monkeypatch.setattr("dssp.runs.run_folder.__file__", str(tree / "runs" / "run_folder.py"))
    clean = open_run_folder(config(run_dir="clean"), "dssp", {})
    assert not (clean / "changes.diff").exists()
    assert len(json.loads((clean / "config.json").read_text())["commit"]) == 40
    (tree / "supernet.py").write_text("two\n")
    dirty = open_run_folder(config(run_dir="dirty"), "dssp", {})
    assert (dirty / "changes.diff").read_text().endswith("-one\n+two\n")


def test_folder_is_this_process_s_own_and_may_be_opened_by_it_again() -> None:
    folder = open_run_folder(config(run_dir="x"), "dssp", {})
    assert open_run_folder(config(run_dir="x", resume=True), "dssp", {}) == folder
    held = os.open(folder / ".lock", os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(held)


def test_folder_that_holds_a_run_is_not_overwritten() -> None:
    folder = open_run_folder(config(run_dir="x"), "dssp", {})
    before = (folder / "config.json").read_bytes()
    assert refusal(config(run_dir="x", seed=1)) == (
        "x already holds a run: add --resume to continue it, or choose another --run-dir"
    )
    assert (folder / "config.json").read_bytes() == before


def test_folder_that_cannot_be_written_is_refused() -> None:
    Path("file").write_text("")
    assert refusal(config(run_dir="file/x")).startswith("--run-dir file/x: ")
    assert refusal(config(run_dir="file")).startswith("--run-dir file: ")


def test_resume_continues_the_named_folder_and_leaves_its_config_alone() -> None:
    folder = open_run_folder(config(run_dir="x"), "dssp", {})
    before = (folder / "config.json").read_bytes()
    assert open_run_folder(config(run_dir="x", resume=True), "dssp", {}) == folder
    assert (folder / "config.json").read_bytes() == before


def test_resume_may_change_what_does_not_change_the_run() -> None:
    open_run_folder(config(run_dir="x"), "dssp", {})
    again = config(run_dir="./x", resume=True, device="cpu", threads=2, workers=1)
    assert open_run_folder(again, "dssp", {}) == Path("x")


def test_resume_of_another_configuration_names_the_fields() -> None:
    open_run_folder(config(run_dir="x"), "dssp", {})
    assert refusal(config(run_dir="x", resume=True, seed=1, lambda_prune=0.5)) == (
        "--resume: x holds a run with another seed (then 0, now 1); lambda_prune (then 0.01, now 0.5)"
    )


def test_resume_without_a_folder_finds_the_newest_run_of_the_same_configuration() -> None:
    for age, (name, settings) in enumerate(
        [("1-dssp", {}), ("2-dssp", {}), ("3-dssp", {"seed": 1}), ("4-darts", {"method": "darts"})]
    ):
        folder = open_run_folder(config(run_dir=f"runs/{name}", **settings), "dssp", {})
        os.utime(folder / "config.json", (1000 + age, 1000 + age))
    assert open_run_folder(config(resume=True), "dssp", {}) == Path("runs/2-dssp")
    assert open_run_folder(config(resume=True, seed=1), "dssp", {}) == Path("runs/3-dssp")
    assert open_run_folder(config(resume=True, method="darts"), "darts", {}) == Path("runs/4-darts")


@pytest.mark.parametrize("content", ["{", "[]", '{"config": 3}', "\x00"])
def test_resume_looks_past_folders_that_are_damaged(content: str) -> None:
    folder = open_run_folder(config(), "dssp", {})
    Path("runs/9-dssp").mkdir()
    Path("runs/9-dssp/config.json").write_text(content)
    os.utime(folder / "config.json", (1000, 1000))
    assert open_run_folder(config(resume=True), "dssp", {}) == folder
    assert "damaged" in refusal(config(resume=True, run_dir="runs/9-dssp"))


def test_nothing_to_resume_is_refused() -> None:
    assert "no run under runs/ has this configuration" in refusal(config(resume=True))
    assert "nowhere holds no run (no config.json)" in refusal(config(resume=True, run_dir="nowhere"))
    assert not Path("runs").exists() and not Path("nowhere").exists()


def test_search_is_not_resumed_as_a_retraining() -> None:
    open_run_folder(config(run_dir="x"), "dssp", {})
    retraining = RetrainConfig(genotype="g.json", run_dir="x", resume=True).resolve()
    assert "genotype (then None, now 'g.json')" in refusal(retraining, "retrain")


def test_rows_of_epochs_that_will_run_again_are_cut_off(here: Path) -> None:
    path = here / "metrics.jsonl"
    assert keep_rows(path, 3) == [] and not path.exists()
    path.write_text("".join(f'{{"epoch": {epoch}}}\n' for epoch in range(5)) + '{"epo')
    assert keep_rows(path, 3) == [{"epoch": epoch} for epoch in range(3)]
    assert path.read_text() == '{"epoch": 0}\n{"epoch": 1}\n{"epoch": 2}\n'
    assert keep_rows(path, 0) == [] and path.read_text() == ""
