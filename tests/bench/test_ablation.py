"""The ablation: every variant lacks one ingredient, its runs are searches, the table is what their folders say."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import ablation
from dssp.comparison.results import Comparison, Result, read_comparison
from dssp.config import SearchConfig, parse_search

TINY = ["--dataset=fake", "--image-size=8", "--channels=2", "--cells=3", "--nodes=1", "--train-images=50"]
SHORT = ["--epochs=3", "--warmup-epochs=1", "--path-epochs=1", "--batch-size=25", "--held-out=5", "--scored-paths=4"]


@pytest.mark.parametrize("flags", [[], ["--space=nasbench201"], ["--dataset=cifar10", "--epochs=20"]])
def test_every_variant_of_dssp_differs_from_it_in_what_it_says(flags: list[str]) -> None:
    plan = ablation.parse([*flags, "--seeds=2"])
    runs = {run.name: run.config for run in plan.runs(Path("x"))}
    assert len(runs) == 2 * len(ablation.VARIANTS)
    whole = asdict(runs["dssp-1"])
    assert (whole["method"], whole["raw_gates"], whole["offer_none"], whole["seed"]) == ("dssp", False, False, 1)
    for name, variant in ablation.VARIANTS.items():
        own = asdict(runs[f"{name}-1"])
        changed = {field for field in own if own[field] != whole[field]} - {"run_dir"}
        implied = {"path_epochs"} if own["method"] == "dssp-paper" else set()  # it has no hard paths
        assert changed == {*variant.changed, *implied}, name


def test_run_is_the_search_that_its_arguments_say() -> None:
    for run in ablation.parse([*TINY, *SHORT]).runs(Path("x")):
        assert parse_search(run.arguments).resolve() == run.config and run.name == run.folder.name


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--raw-gates"], "unrecognized arguments: --raw-gates"),
        (["--variants", "gates"], "argument --variants: invalid choice: 'gates'"),
        (["--downsample=0"], "argument --downsample: expected at least 1"),
        (["--max-skips=2"], "argument --max-skips: expected method"),
    ],
)
def test_bad_command_line_is_one_line(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        ablation.parse(argv)
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_stored_command_names_no_folder_of_this_machine() -> None:
    words = [
        "--run-dir=/home/x/runs/a",
        "--data-path",
        "/data/my images/cifar",
        "--json=bench/results/a.json",
        "--seeds=3",
    ]
    shown = ["--run-dir=a", "--data-path", "cifar", "--json=bench/results/a.json", "--seeds=3"]
    assert [ablation.without_folder(word) for word in words] == shown


def comparison(accuracies: dict[str, list[float | None]]) -> Comparison:
    """Finished runs of these accuracies, seed after seed; None: a run that is not finished."""
    results = [
        Result(variant, seed, "finished" if value else "unfinished", None, False, {"test_accuracy": value}, None)
        for variant, values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    return Comparison(Path("x"), {"methods": list(accuracies), "seeds": 2}, None, tuple(results))


def test_variant_is_compared_with_dssp_seed_by_seed() -> None:
    found = comparison({"dssp": [0.9, 0.8, 0.7], "raw-gates": [0.91, 0.79, None], "no-paths": [0.88, 0.78, 0.68]})
    assert ablation.difference(found, "dssp") is None
    raw, no_paths = (ablation.difference(found, variant) for variant in ("raw-gates", "no-paths"))
    assert raw and no_paths and (raw.n, no_paths.n) == (2, 3)
    assert (raw.mean, no_paths.mean) == (pytest.approx(0.0), pytest.approx(-0.02))
    assert (raw.std, no_paths.std) == (pytest.approx(2**0.5 / 100), pytest.approx(0.0, abs=1e-12))


def test_table_has_a_line_per_variant_and_only_numbers_that_some_run_has() -> None:
    made = ablation.markdown(comparison({"dssp": [0.9, 0.92], "raw-gates": [0.91, None], "no-paths": [None, None]}))
    assert made.replace("\N{NO-BREAK SPACE}", " ").replace("\N{EN DASH}", "-").split("\n") == [
        "| Variant | Runs | Test accuracy | Over dssp |",
        "| --- | --- | --- | --- |",
        "| dssp | 2 | 91.00 ± 1.41 % | - |",
        "| gates not relative | 1 | 91.00 % | 1.00 % |",
        "| no hard paths: alpha and gates decide | 0 | - | - |",
    ]


def test_variants_are_searched_once_and_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = tmp_path / "runs", tmp_path / "elsewhere" / "a.json"
    flags = [*TINY, *SHORT, "--variants", "dssp", "offer-none", "--seeds=1", "--jobs=2", f"--run-dir={folder}"]
    ablation.main([*flags, f"--json={other}"])
    found = json.loads(other.read_text())
    assert found == json.loads((folder / "ablation.json").read_text())
    assert {"cpu", "cores"} <= found["machine"].keys() and "torch" in found["versions"] and found["commit"]
    assert str(tmp_path) not in other.read_text() and "--run-dir=runs" in found["command"]
    assert found["variants"]["offer-none"]["parameters"]["n"] == 1 and found["variants"]["dssp"]["flops"]["mean"] > 0
    stored = {name: json.loads((folder / f"{name}-0" / "config.json").read_text()) for name in ("dssp", "offer-none")}
    assert [("none" in run["operations"]) for run in stored.values()] == [False, True]
    assert SearchConfig.from_dict(stored["offer-none"]["config"]).offer_none

    said = capsys.readouterr().out
    assert "`none` is a candidate" in said and "Parameters" in said
    before = (folder / "processes.json").stat().st_mtime_ns
    ablation.main([*flags, "--resume", "--markdown"])
    again = json.loads((folder / "ablation.json").read_text())
    assert (folder / "processes.json").stat().st_mtime_ns == before  # nothing ran
    assert (again["variants"], again["runs"]) == (found["variants"], found["runs"])
    assert ablation.markdown(read_comparison(folder)) in capsys.readouterr().out
