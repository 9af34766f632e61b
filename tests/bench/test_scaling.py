"""The scaling section: its cases, and the straight line through their times."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import edge_throughput
from bench.baselines import ours
from bench.cases import Case
from bench.plot import main as plot
from bench.results import write_json
from bench.scaling import fit_lines, measure_series, print_scaling, series, straight_line


def test_each_series_varies_one_thing() -> None:
    cases = series(Case((64, 4, 2, 2), candidates=7, folded=True))
    assert [case.candidates for _, case in cases["candidates"]] == [1, 2, 4, 8, 16, 32]
    assert [case.edges for _, case in cases["edges"]] == [1, 2, 3, 4, 5, 6]
    assert [case.shape[0] for _, case in cases["images"]] == [value for value, _ in cases["images"]]
    left = cases["edges left of 10"]
    assert [case.edges - case.pruned_edges for _, case in left] == [value for value, _ in left]
    assert max(case.pruned_edges / case.edges for _, case in left) == 0.9


def test_a_straight_line_is_found_exactly() -> None:
    line = straight_line([1, 2, 4, 8], [3 + 0.5 * x for x in (1, 2, 4, 8)])
    assert line["fixed_ms"] == pytest.approx(3) and line["ms_each"] == pytest.approx(0.5)
    assert line["largest_deviation"] == pytest.approx(0, abs=1e-9)
    assert straight_line([1, 2, 4, 8], [1, 4, 16, 64])["largest_deviation"] > 0.3


def test_scaling_is_measured_printed_and_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = []
    for folded in (False, True):
        cases = series(Case((2, 2, 2, 2), candidates=2, folded=folded))
        for name in ("candidates", "edges left of 10"):
            rows += measure_series(name, cases[name][:2], ours, torch.device("cpu"), seconds=0.0)
    assert {row["accuracy"] for row in rows} == {"green"}
    lines = fit_lines(rows)
    assert len(lines) == 2 * 2 * 2  # series, plain and BatchNorm, passes
    assert all(len(line["milliseconds"]["ours"]) == len(line["values"]) == 2 for line in lines)
    print_scaling(lines, "2x2x2x2")
    assert "edges left of 10, BatchNorm, forward+backward: 1: " in capsys.readouterr().out
    file = tmp_path / "found.json"
    write_json(file, {"machine": {}, "commit": None, "rows": rows, "scaling_lines": lines})
    pytest.importorskip("matplotlib")
    assert plot([str(file)]) == 0
    assert {path.name for path in tmp_path.glob("*.png")} == {"found.png", "found-scaling.png"}


@pytest.mark.slow
def test_scaling_flag_adds_every_series(tmp_path: Path) -> None:
    flags = "--device=cpu --quick --no-compile --seconds=0 --shapes 2x3x4x4 --small-shapes --scaling 2x2x2x2"
    assert edge_throughput.main([*flags.split(), "--out", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "edge_throughput.json").read_text())
    assert [line["values"] for line in found["scaling_lines"][:2]] == [[1, 2, 4, 8, 16, 32]] * 2
    assert len(found["scaling_rows"]) == 2 * 2 * (6 + 6 + 5 + 6)  # plain and BatchNorm, passes, values
