"""What is made of rows: geometric means, the JSON file, the comparison with an earlier run, the README's table."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench import plot, readme_table, results
from bench.comparison import compare

SHAPES = [(1, 2), (3, 4)]


def row(shape: list[int], ratio: float | None, **different: Any) -> dict[str, Any]:
    described = {"shape": shape, "layout": "channels_last", "dtype": "float32", "candidates": 7, "edges": 1}
    described |= {"pruned": 0.0, "batch_norm": False, "pass": "forward+backward", "case": str(shape)}
    described |= {"speedup": {"eager": ratio}, "best_speedup": {"eager": ratio}, "fraction_of_copy": 0.5}
    described |= {"accuracy": "red" if ratio is None else "green"}
    described |= {"saved_bytes": {"ours": 1, "eager": 2}, "peak_memory_bytes": {"ours": 3, "eager": 4}}
    return described | different


def mean(*rows: dict[str, Any], kind: str = "edge") -> Any:
    found = results.means(rows, SHAPES, lambda row: row["speedup"])
    return found[kind]["channels_last"]["forward+backward"]["eager"]


def test_geometric_mean() -> None:
    assert results.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_means_need_every_shape_and_no_red_row() -> None:
    assert mean(row([1, 2], 2.0), row([3, 4], 8.0)) == pytest.approx(4.0)
    assert mean(row([1, 2], 2.0)) is None
    assert mean(row([1, 2], 2.0), row([3, 4], None)) is None


def test_kinds_of_mix_have_means_of_their_own() -> None:
    edges = [row([1, 2], 2.0), row([3, 4], 8.0)]
    nodes = [row([1, 2], 3.0, edges=5, batch_norm=True), row([3, 4], 3.0, edges=5, batch_norm=True)]
    pruned = [row([1, 2], 100.0, edges=5, batch_norm=True, pruned=0.4)]
    assert mean(*edges, *nodes, *pruned) == pytest.approx(4.0)
    assert mean(*edges, *nodes, *pruned, kind="node E=5 with BatchNorm") == pytest.approx(3.0)


def test_summary_names_the_row_where_eager_comes_closest() -> None:
    summary = results.summarise([row([1, 2], 2.0), row([9, 9], 0.9), row([3, 4], None)], SHAPES)
    assert summary["least_speedup"] == {"case": "[9, 9]", "pass": "forward+backward", "eager": 0.9}
    assert summary["memory"]["edge"]["channels_last"]["forward+backward"] == {"peak": 0.75, "saved": 0.5}


def test_json_has_a_line_per_row_and_no_infinities(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "found.json"
    results.write_json(file, {"rows": [{"a": 1}, {"a": math.nan}], "none": [], "summary": {"b": [math.inf]}})
    assert json.loads(file.read_text()) == {"rows": [{"a": 1}, {"a": None}], "none": [], "summary": {"b": [None]}}
    assert '\n  {"a": 1},\n' in file.read_text()


def test_rows_are_compared_in_units_of_the_copy() -> None:
    now = [row([1, 2], 2.0, fraction_of_copy=0.4), row([3, 4], 2.0), row([5, 6], 2.0)]
    then = [row([1, 2], 2.0, fraction_of_copy=0.6), row([3, 4], 9.0)]
    assert [entry["slowdown"] for entry in compare(now, then)] == pytest.approx([1.5, 1.0])
    assert compare([row([1, 2], 2.0, **{"pass": "forward"})], then) == []


def found(ratio: float | None) -> dict[str, Any]:
    rows = [row([1, 2], ratio), row([3, 4], ratio)]
    machine = {"cpu": "A CPU", "cores": 2, "instruction_set": "AVX2"}
    described = {"machine": machine, "versions": {"torch": "2.10"}, "commit": "0123456789", "command": ["--k", "7"]}
    return described | {"rows": rows, "summary": results.summarise(rows, SHAPES)}


def test_readme_table_shows_means_memory_and_origin(tmp_path: Path) -> None:
    made = readme_table.table(found(3.14159), "bench/results/x.json")
    assert "| edge | eager | - | - | - | 3.1x |" in made
    assert "edge 0.50 (channels_last)" in made
    assert "A CPU with AVX2, 2 cores, torch 2.10, commit 0123456, `python bench/edge_throughput.py --k 7`" in made
    assert "| edge |" not in readme_table.table(found(None), "x.json")


def test_readme_table_replaces_only_what_is_between_its_markers(tmp_path: Path) -> None:
    file, readme = tmp_path / "found.json", tmp_path / "README.md"
    results.write_json(file, found(2.0))
    readme.write_text(f"before\n{readme_table.BEGIN}\nold\n{readme_table.END}\nafter\n")
    for _ in range(2):
        assert readme_table.main([str(file), "--write", str(readme)]) == 0
        text = readme.read_text()
        assert text.startswith("before\n") and text.endswith("\nafter\n")
        assert text.count("| edge | eager |") == 1 and "old" not in text
    with pytest.raises(ValueError, match="markers|lines"):
        readme_table.replaced("no markers", "table")


@pytest.mark.parametrize("content", ["[]", "no JSON", "{}", '{"rows": [{"case": "of another benchmark"}]}'])
def test_other_files_are_refused_by_name(content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    for main in (readme_table.main, plot.main):
        with pytest.raises(SystemExit):
            main([str(file)])
        assert "other.json: expected JSON of bench/edge_throughput.py" in capsys.readouterr().err
