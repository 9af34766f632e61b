"""Claims about dssp.comparison: which runs a command line stands for, and what they say together."""

from __future__ import annotations

import csv
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dssp.comparison.page import write_page
from dssp.comparison.plan import parse_compare
from dssp.comparison.processes import Processes
from dssp.comparison.results import Comparison, Spread, read_comparison, spread, write_results
from dssp.comparison.table import plus_minus, rows
from dssp.comparison.time_budget import fitting_epochs
from dssp.config import parse_search
from dssp.methods import METHODS
from dssp.options import ConfigError
from dssp.report import UnreadableRun
from dssp.report.scatter import Point, pareto_front
from tests.search.test_report import Page, change_json, pictures, write_json, write_run

GIB = 2**30


def write_comparison(folder: Path, seeds: int = 2, **flags: Any) -> Path:
    """A comparison as the command leaves it: two methods, all runs finished, dssp twice as fast as darts."""
    folder.mkdir(parents=True)
    config = {"methods": ["dssp", "darts"], "seeds": seeds, "flags": flags, "jobs": 1}
    write_json(folder / "config.json", config=config, command="python -m dssp.compare --seeds 2")
    record = {}
    for method, seconds in (("dssp", 50.0), ("darts", 100.0)):
        for seed in range(seeds):
            run = write_run(folder / f"{method}-{seed}", masks=method == "dssp")
            change_json(run / "summary.json", search_seconds=seconds + seed, test_accuracy=0.9 + 0.02 * seed)
            record[run.name] = {"peak_memory_bytes": GIB, "shared": False, "error": None}
    write_json(folder / "processes.json", **record)
    return folder


def csv_rows(comparison: Comparison) -> dict[str, dict[str, str]]:
    """comparison.csv by the name of the run."""
    write_results(comparison)
    with (comparison.folder / "comparison.csv").open(newline="") as file:
        return {f"{row['method']}-{row['seed']}": row for row in csv.DictReader(file)}


# The plan


def test_comparison_of_all_methods_is_the_default() -> None:
    plan = parse_compare([])
    assert plan.methods == tuple(METHODS) and plan.seeds == 3
    assert len({run.name for run in plan.runs(Path("x"))}) == 3 * len(METHODS)


def test_every_run_is_the_search_that_its_arguments_say() -> None:
    flags = ["--epochs", "7", "--alpha-lr", "1e-05", "--no-cuda-graphs", "--run-dir", "ignored", "--data-path=a b"]
    for run in parse_compare(["--methods", "darts", "dssp", "--seeds", "2", *flags]).runs(Path("x y")):
        config = parse_search(run.arguments).resolve()
        assert config == run.config and config.epochs == 7 and config.no_cuda_graphs and config.data_path == "a b"
        assert config.run_dir == f"x y/{run.name}" and f"{config.method}-{config.seed}" == run.name


def test_all_methods_get_the_same_epochs() -> None:
    runs = parse_compare(["--dataset", "fake", "--epochs", "9"]).runs(Path("x"))
    assert {(run.config.epochs, run.config.retrain_epochs) for run in runs} == {(9, 0)}


def test_flag_that_a_method_refuses_goes_to_the_others_only() -> None:
    plan = parse_compare(["--methods", "dssp", "darts", "--seeds", "1", "--prune-strategy", "budget"])
    dssp, darts = plan.runs(Path("x"))
    assert dssp.config.prune_strategy == "budget" and "--prune-strategy=budget" in dssp.arguments
    assert darts.config.prune_strategy == "none" and not any("prune" in flag for flag in darts.arguments)
    assert plan.refused == {"dssp": {}, "darts": {"prune_strategy": "method darts prunes nothing, got budget"}}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("--methods darts --prune-strategy budget", "argument --prune-strategy: method darts prunes nothing"),
        ("--methods dssp darts --epochs 2 --warmup-epochs 3", "argument --warmup-epochs: expected at most the 2"),
        ("--methods none", "argument --methods: invalid choice: 'none'"),
        ("--epochs 0", "argument --epochs: expected at least 1"),
        ("--search-seconds 0", "argument --search-seconds: expected a number of seconds above 0, got 0"),
        ("--search-seconds nan", "argument --search-seconds: expected a number of seconds above 0, got nan"),
        ("--search-seconds 9 --epochs 3", "argument --search-seconds: not together with --epochs"),
        ("--search-seconds 9 --methods dssp --warmup-epochs 5", "argument --warmup-epochs: expected at most the 4"),
        ("--seeds 0", "argument --seeds: expected a whole number of at least 1, got 0"),
        ("--jobs two", "argument --jobs: expected a whole number of at least 1, got two"),
        ("--method darts", "unrecognized arguments: --method darts"),
        ("--seed 1", "unrecognized arguments: --seed 1"),
    ],
)
def test_bad_command_line_is_one_line(arguments: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_compare(arguments.split())
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and said in error and error.count("\n") == 1


def test_same_comparison_on_another_device_is_the_same() -> None:
    first, second = (
        parse_compare([*flags, "--lambda-prune", "0.1"]) for flags in ([], ["--device", "cpu", "--jobs", "2"])
    )
    other = parse_compare(["--lambda-prune", "0.2"])
    timeless = [{k: v for k, v in plan.to_dict().items() if k != "jobs"} for plan in (first, second, other)]
    assert timeless[0] == timeless[1] != timeless[2]


# A budget of time


@pytest.mark.parametrize(
    ("measured", "seconds", "epochs"),
    [
        ([(4, 4.0), (8, 8.0)], 20.0, 20),
        ([(4, 14.0), (8, 18.0)], 20.0, 10),  # ten seconds whatever the epochs are
        ([(4, 4.0), (8, 10.0)], 20.0, 16),  # no search takes less than no time without epochs
        ([(4, 9.0), (8, 8.0)], 20.0, 20),  # noise
    ],
)
def test_epochs_that_fit_lie_on_the_line_through_two_pilots(
    measured: list[tuple[int, float]], seconds: float, epochs: int
) -> None:
    assert fitting_epochs("darts", measured, seconds) == epochs


def test_time_for_no_epoch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"search_seconds: method darts needs about 11\.0 s for one epoch, got 10 s"):
        fitting_epochs("darts", [(4, 14.0), (8, 18.0)], 10.0)


def test_methods_search_for_the_epochs_they_are_given() -> None:
    plan = parse_compare(["--methods", "dssp", "darts", "--seeds", "2", "--search-seconds", "30", "--channels", "4"])
    pilots = [run.config for runs in plan.pilots(Path("x")).values() for run in runs]
    assert [(c.method, c.epochs, c.retrain_epochs, c.seed, c.channels) for c in pilots] == [
        (method, epochs, 0, 0, 4) for method in ("dssp", "darts") for epochs in (4, 8)
    ]
    runs = [run.config for run in replace(plan, epochs={"dssp": 21, "darts": 9}).runs(Path("x"))]
    assert [(config.method, config.epochs) for config in runs] == 2 * [("dssp", 21), ("darts", 9)]
    assert all(config.retrain_epochs > 0 for config in runs)


# Statistics


@given(st.lists(st.none() | st.floats(-1e6, 1e6), max_size=6))
def test_spread_is_mean_and_sample_deviation_of_what_is_known(values: list[float | None]) -> None:
    known, found = [value for value in values if value is not None], spread(values)
    if found is None:
        assert not known
        return
    assert found.n == len(known) and found.mean == pytest.approx(sum(known) / len(known), abs=1e-6)
    assert (found.std is None) == (len(known) == 1)
    if found.std is not None:
        assert found.std == pytest.approx(statistics.variance(known) ** 0.5, abs=1e-6)


@pytest.mark.parametrize(
    ("found", "size", "unit", "text"),
    [
        (Spread(0.9741, 0.0032, 3), 0.01, "%", "97.4 ± 0.3 %"),
        (Spread(213456, 1200, 3), 1e3, "k", "213 ± 1 k"),
        (Spread(5, None, 1), 1, "s", "5.00 s"),
        (Spread(987, 86, 2), 1, "", "987 ± 86"),
    ],
)
def test_deviation_has_the_unit_and_decimals_of_the_mean(found: Spread, size: float, unit: str, text: str) -> None:
    assert plus_minus(found, size, unit).replace("\N{NO-BREAK SPACE}", " ") == text


def test_methods_are_averaged_over_their_finished_runs(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all", seeds=3)
    (folder / "dssp-2" / "summary.json").unlink()
    write_results(read_comparison(folder))
    methods = json.loads((folder / "comparison.json").read_text())["methods"]
    assert methods["dssp"]["runs"] == {"finished": 2, "failed": 0, "unfinished": 1}
    assert methods["dssp"]["search_seconds"] == {"mean": 50.5, "std": pytest.approx(0.5**0.5), "n": 2}
    assert methods["darts"]["test_accuracy"] == {"mean": pytest.approx(0.92), "std": pytest.approx(0.02), "n": 3}
    assert methods["dssp"]["search_seconds_over_darts"] == pytest.approx(0.5)
    assert methods["darts"]["search_seconds_over_darts"] == 1
    table = rows(read_comparison(folder), wide=False)
    assert table[0][:2] == ["dssp", "2 of 3"] and table[0][-1] == "0.50" and table[1][:2] == ["darts", "3"]


def test_every_run_is_a_row_of_the_csv(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all")
    change_json(folder / "dssp-1" / "summary.json", tabulated={"cifar10_test_200ep": 91.5})
    (folder / "darts-1" / "summary.json").unlink()
    failed = {"peak_memory_bytes": GIB, "shared": True, "error": 'no, "sorry"\n'}
    change_json(folder / "processes.json", **{"darts-1": failed})
    found = csv_rows(read_comparison(folder))
    assert set(found) == {"dssp-0", "dssp-1", "darts-0", "darts-1"}
    assert (
        found["dssp-1"]["tabulated_cifar10_test_200ep"] == "91.5"
        and found["dssp-0"]["tabulated_cifar10_test_200ep"] == ""
    )
    assert float(found["dssp-1"]["test_accuracy"]) == 0.92 and found["dssp-0"]["parameters"] == "213456"
    assert found["dssp-0"]["step_first_seconds"] == "0.31" and found["dssp-0"]["peak_memory_bytes"] == str(GIB)
    assert found["dssp-0"]["step_paths_seconds"] == "0.04" and found["dssp-0"]["search_flops"] == str(3 * 10**12)
    assert found["dssp-0"]["genotype"].startswith("Genotype(normal=[")
    assert (found["darts-1"]["status"], found["darts-1"]["error"]) == ("failed", 'no, "sorry"\n')
    assert (found["darts-1"]["shared"], found["darts-1"]["test_accuracy"]) == ("yes", "")


def test_damaged_run_is_a_failed_one(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all")
    (folder / "darts-0" / "metrics.jsonl").write_text("damaged\n")
    result = next(result for result in read_comparison(folder).results if result.name == "darts-0")
    assert result.status == "failed" and "metrics.jsonl, line 1" in (result.error or "")


def test_folder_without_a_comparison_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnreadableRun, match="no comparison"):
        read_comparison(write_run(tmp_path / "run"))


def test_finished_runs_are_not_started_again(tmp_path: Path) -> None:
    folder = write_comparison(tmp_path / "all")
    plan = parse_compare(["--methods", "dssp", "darts", "--seeds", "2"])
    before = sorted(folder.rglob("*"))
    Processes(folder, jobs=1).run(plan.runs(folder), look=lambda running: None, ended=lambda run: pytest.fail(run.name))
    assert sorted(folder.rglob("*")) == before


# The page


def test_page_shows_methods_courses_sizes_and_best_cells(tmp_path: Path) -> None:
    html = write_page(read_comparison(write_comparison(tmp_path / "all"))).read_text(encoding="utf-8")
    text = Page(html).text.replace("\N{NO-BREAK SPACE}", " ")
    for part in ("Methods compared on digits", "91.00 ± 1.41 %", "50.5 ± 0.7 s", "DSSP, seed 1: 92.00 %"):
        assert part in text
    assert "python -m dssp.compare --seeds 2" in text and "not finished" not in text
    (course,) = pictures(html, "Validation accuracy of the supernet (%) by seconds of search")
    lines = [group.get("class", "") for group in course.iter("g")]
    assert sorted(lines) == sorted(2 * ["line s0 thin", "line s1 thin"] + ["line s0", "line s1"])
    for name in ("parameters", "FLOPs per image"):
        (scatter,) = pictures(html, f"Test accuracy (%) and {name}")
        assert len(list(scatter.iter("circle"))) == 4
    assert len(pictures(html, "Derived normal cell")) == 2


def test_page_loads_nothing_and_links_to_its_runs_only(tmp_path: Path) -> None:
    html = write_page(read_comparison(write_comparison(tmp_path / "all"))).read_text(encoding="utf-8")
    links = {attributes.get("href") for tag, attributes in Page(html).active}
    assert links == {f"{method}-{seed}/report.html" for method in ("dssp", "darts") for seed in (0, 1)}
    assert {tag for tag, _ in Page(html).active} == {"a"} and "url(" not in html


def test_texts_of_runs_are_escaped(tmp_path: Path) -> None:
    evil = "</title></svg><script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp;"
    folder = write_comparison(tmp_path / "<script>alert(2)<", **{evil: evil})
    change_json(folder / "config.json", command=evil)
    change_json(folder / "processes.json", **{"darts-1": {"peak_memory_bytes": 1, "shared": False, "error": evil}})
    for run in folder.glob("d*-?"):
        change_json(run / "config.json", config={"dataset": evil, "space": evil}, versions={evil: evil})
        change_json(run / "summary.json", tabulated={evil: 50.0})
        line = {"epoch": 6, "seconds": 50.0, "tabulated": {evil: 50.0}}
        with (run / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
    page = Page(write_page(read_comparison(folder)).read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.active} == {"a"}
    assert page.text.count("<script>alert(1)</script>") > 6


def test_comparison_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "all"
    folder.mkdir()
    write_json(folder / "config.json", config={"methods": ["gdas"], "seeds": 2, "flags": {}, "jobs": 1})
    text = Page(write_page(read_comparison(folder)).read_text(encoding="utf-8")).text
    assert "2 of 2 runs unfinished" in text and "Best cells" not in text


POINTS = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12)


@given(POINTS)
def test_front_is_what_no_point_beats(places: list[tuple[int, int]]) -> None:
    def beats(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a != b and a[0] <= b[0] and a[1] >= b[1]

    front = pareto_front([Point("", "", x, y) for x, y in places])
    unbeaten = {place for place in places if not any(beats(other, place) for other in places)}
    assert [(point.x, point.y) for point in front] == sorted(unbeaten)
