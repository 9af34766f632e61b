"""The benchmark tells what a cell is worth, is never asked for advice, and a table that cannot serve is one line."""

from __future__ import annotations

import gzip
import json
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from dssp import retrain, search
from dssp.arch_genotype import OPERATIONS, ArchGenotype
from dssp.benchmark import COLUMNS, Benchmark, open_benchmark
from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import load_data
from dssp.options import ConfigError
from dssp.search import build_supernet
from dssp.spaces import DARTS, NASBENCH201

HEADINGS = "index,arch,cifar10_valid_12ep,cifar10_test_12ep,cifar10_test_200ep"
SKIPS = "|skip_connect~0|+|skip_connect~0|skip_connect~1|+|skip_connect~0|skip_connect~1|skip_connect~2|"
CONVS = SKIPS.replace("skip_connect", "nor_conv_3x3")
SIZES = "--channels 2 --cells 1 --image-size 8 --threads 1 --batch-size 192"


def table(path: Path, rows: list[str], headings: str = HEADINGS) -> str:
    text = "\n".join([headings, *rows]) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def row(index: int, arch: str) -> str:
    return f"{index},{arch},{index}.5,{10 + index}.25,{20 + index}.0"


def whole_table(path: Path) -> str:
    """All 15,625 cells; a cell's accuracies tell its index."""
    cells = enumerate(product(OPERATIONS, repeat=6))
    return table(path, [row(i, "|{}~0|+|{}~0|{}~1|+|{}~0|{}~1|{}~2|".format(*cell)) for i, cell in cells])


@pytest.mark.parametrize("name", ["table.csv", "table.csv.gz"])
def test_accuracies_of_a_cell_are_those_of_its_row(tmp_path: Path, name: str) -> None:
    benchmark = Benchmark(table(tmp_path / name, [row(0, SKIPS), row(7, CONVS)]), NASBENCH201)
    assert len(benchmark) == 2
    assert benchmark.tabulated(ArchGenotype.from_text(CONVS)) == dict(zip(COLUMNS, (7.5, 17.25, 27.0), strict=True))


def test_columns_may_stand_in_any_order_beside_others(tmp_path: Path) -> None:
    path = table(tmp_path / "t.csv", [f"3,2,x,{SKIPS},1"], f"{COLUMNS[2]},{COLUMNS[1]},more,arch,{COLUMNS[0]}")
    found = Benchmark(path, NASBENCH201).tabulated(ArchGenotype.from_text(SKIPS))
    assert found == dict(zip(COLUMNS, (1, 2, 3), strict=True))


def test_no_path_is_no_benchmark() -> None:
    assert open_benchmark(None, DARTS) is None


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("nowhere.csv", None, "No such file or directory"),
        ("plain.csv.gz", f"{HEADINGS}\n".encode(), "Not a gzipped file"),
        ("cut.csv.gz", gzip.compress(b"index,arch" * 1000, mtime=0)[:-9], "unreadable"),
        ("bytes.csv", b"\xff\xfe\x00", "unreadable"),
        ("empty.csv", b"", "no column arch, cifar10_valid_12ep"),
        ("other.csv", f"{HEADINGS.replace('_200ep', '')}\n".encode(), "no column cifar10_test_200ep, got index, arch"),
        ("words.csv", f"{HEADINGS}\n{row(0, SKIPS)}\n1,{CONVS},good,1,2\n".encode(), "line 3: expected numbers"),
        ("short.csv", f"{HEADINGS}\n0,{SKIPS},1\n".encode(), "line 2: expected numbers"),
        ("twice.csv", f"{HEADINGS}\n{row(0, SKIPS)}\n{row(1, SKIPS)}\n".encode(), "line 3: |skip_connect~0|"),
    ],
)
def test_table_that_cannot_serve_is_one_line(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        Benchmark(str(tmp_path / name), NASBENCH201)
    assert error.value.field == "benchmark" and name in str(error.value) and message in str(error.value)
    assert "\n" not in str(error.value)


def test_cell_that_is_not_in_the_table_is_named(tmp_path: Path) -> None:
    benchmark = Benchmark(table(tmp_path / "t.csv", [row(0, SKIPS)]), NASBENCH201)
    with pytest.raises(ConfigError, match=r"t\.csv: none of its 1 cells is \|nor_conv_3x3~0\|\+"):
        benchmark.tabulated(ArchGenotype.from_text(CONVS))


def test_space_without_arch_strings_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="looked up by arch strings, the cells of space darts have none"):
        Benchmark("nowhere.csv", DARTS)


# ---- in a search -----------------------------------------------------------------------------------------------------


def run_search(run: Path, *flags: str) -> dict[str, Any]:
    space = ["--dataset", "fake", "--space", "nasbench201", "--epochs", "3", "--warmup-epochs", "1"]
    few = ["--train-images", "200", "--batch-size", "48", "--held-out", "64", "--scored-paths", "16"]
    search.main([*space, *SIZES.split(), *few, "--run-dir", str(run), *flags])
    return json.loads((run / "summary.json").read_text())


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def timeless(row: dict[str, Any], *left_out: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not key.endswith("seconds") and key not in left_out}


def test_search_shows_the_tabulated_accuracies_of_what_it_would_derive(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = whole_table(tmp_path / "table.csv.gz")
    summary = run_search(tmp_path / "judged", "--benchmark", path)
    output = capsys.readouterr().out
    benchmark = Benchmark(path, NASBENCH201)
    arch = json.loads((tmp_path / "judged" / "genotype.json").read_text())["text"]
    epochs = rows(tmp_path / "judged")
    assert summary["tabulated"] == epochs[-1]["tabulated"] == benchmark.tabulated(ArchGenotype.from_text(arch))
    for epoch in epochs:
        assert f"cifar10_test_200ep {epoch['tabulated']['cifar10_test_200ep']:.2f}" in output
    assert f"Tabulated accuracy: cifar10_valid_12ep {summary['tabulated']['cifar10_valid_12ep']:.2f} %" in output
    assert "Tabulated accuracy of the derived cell" in (tmp_path / "judged" / "report.html").read_text()

    alone = run_search(tmp_path / "alone")
    assert alone["tabulated"] is None and all("tabulated" not in epoch for epoch in rows(tmp_path / "alone"))
    judged = [timeless(epoch, "tabulated") for epoch in epochs]  # the table has changed nothing else
    assert judged == [timeless(epoch) for epoch in rows(tmp_path / "alone")]
    assert alone["genotype"] == summary["genotype"]

    (tmp_path / "judged" / "summary.json").unlink()
    next((tmp_path / "judged" / "checkpoints").glob("search-00003-*.pt")).unlink()  # as if cut before the last epoch
    again = run_search(tmp_path / "judged", "--benchmark", path, "--resume")
    assert timeless(again, "step_seconds") == timeless(summary, "step_seconds")
    assert [timeless(epoch) for epoch in rows(tmp_path / "judged")] == [timeless(epoch) for epoch in epochs]


def test_epoch_is_judged_by_what_is_left_after_pruning(tmp_path: Path) -> None:
    config = SearchConfig(
        dataset="fake", space="nasbench201", image_size=8, channels=2, cells=1, epochs=2, warmup_epochs=0,
        prune_strategy="budget", edge_budget=0.5,
    ).resolve()  # fmt: skip
    data = load_data("fake", image_size=8)
    benchmark = Benchmark(whole_table(tmp_path / "table.csv"), NASBENCH201)
    task = BilevelSearch(config, build_supernet(config, data, torch.device("cpu")), data, benchmark)
    row = task.end_epoch(0)
    assert row["pruned"] and row["tabulated"] == benchmark.tabulated(task.derived())
    for edge in row["pruned"]:
        source, node = map(int, edge.split(":")[1].split("->"))
        assert task.derived().normal[node - 1][source] == ("none", source)


def test_retraining_by_arch_string_is_judged_too(tmp_path: Path) -> None:
    (tmp_path / "arch.txt").write_text(CONVS)
    path = table(tmp_path / "t.csv", [row(0, SKIPS), row(1, CONVS)])
    out = ["--run-dir", str(tmp_path / "run"), "--genotype", str(tmp_path / "arch.txt"), "--benchmark", path]
    retrain.main(["--dataset", "fake", "--epochs", "1", *SIZES.split(), *out])
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["tabulated"]["cifar10_test_200ep"] == 21.0 and 0 <= summary["test_accuracy"] <= 1
    assert ArchGenotype.from_dict(summary["genotype"]).to_text() == CONVS
    assert json.loads((tmp_path / "run" / "config.json").read_text())["config"]["space"] == "nasbench201"


@pytest.mark.parametrize(
    ("space", "said"),
    [("darts", "--space: the genotype is of space nasbench201, got darts"), ("nasbench201", "nowhere.csv: No such")],
)
def test_misuse_of_retraining_is_one_line(tmp_path: Path, space: str, said: str) -> None:
    (tmp_path / "arch.txt").write_text(CONVS)
    flags = ["--genotype", str(tmp_path / "arch.txt"), "--space", space, "--benchmark", "nowhere.csv"]
    with pytest.raises(SystemExit, match=said):
        retrain.main(flags)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"space": "mine", "genotype": ArchGenotype.from_text(CONVS).to_dict()}, "space: got 'mine', expected one of"),
        ({"space": "darts", "genotype": ArchGenotype.from_text(CONVS).to_dict()}, "names space darts, its genotype is"),
        ({"space": 3, "genotype": ArchGenotype.from_text(CONVS).to_dict()}, "space: expected a name, got 3"),
    ],
)
def test_genotype_that_does_not_fit_its_space_is_one_line(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    (tmp_path / "genotype.json").write_text(json.dumps(content))
    with pytest.raises(SystemExit, match=said):
        retrain.main(["--genotype", str(tmp_path / "genotype.json")])


@pytest.mark.skipif("DSSP_NASBENCH201" not in os.environ, reason="DSSP_NASBENCH201 names no table")
def test_real_table_holds_every_cell() -> None:
    benchmark = Benchmark(os.environ["DSSP_NASBENCH201"], NASBENCH201)
    assert len(benchmark) == 15625
    assert all(set(benchmark.tabulated(ArchGenotype.from_text(arch))) == set(COLUMNS) for arch in (SKIPS, CONVS))
