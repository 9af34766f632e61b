"""The benchmark's own logic: bytes, means, paired ratios, accuracy check and what it prints and writes."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import edge_throughput, results
from bench.accuracy import float64_results, is_accurate, relative_errors
from bench.baselines import Compiler, eager, stack_einsum
from bench.cases import Case, Inputs, make_cases, make_inputs
from bench.timing import Timings, peak_memory, time_interleaved
from dssp_kernels import mixed_sum

CPU = torch.device("cpu")
TINY = ["--device=cpu", "--shapes=2x3x4x4", "--layouts=contiguous", "--k=3", "--seconds=0", "--no-compile", "--quick"]
SPEEDUP = re.compile(rf"{results.TIMES}\d")


def one_percent_off(*args: Any, **kwargs: Any) -> Tensor:
    return mixed_sum(*args, **kwargs) * 1.01


def run(out: Path, ours: Any = mixed_sum) -> tuple[int, dict[str, Any]]:
    status = edge_throughput.main([*TINY, "--out", str(out)], ours)
    return status, json.loads((out / "edge_throughput.json").read_text())


def test_bytes_are_each_active_tensor_once_per_direction() -> None:
    case = Case((2, 3, 4, 4), candidates=7)
    assert case.tensor_bytes == 2 * 3 * 4 * 4 * 4
    assert case.minimum_bytes(backward=False) == (7 + 1) * case.tensor_bytes
    assert case.minimum_bytes(backward=True) == (7 + 1 + 2 * 7 + 1) * case.tensor_bytes


def test_removed_edges_move_no_bytes_and_flagged_ones_only_their_zeros() -> None:
    removed = Case((2, 3, 4, 4), dtype="bfloat16", candidates=7, edges=4, pruned_edges=3)
    flagged = Case((2, 3, 4, 4), dtype="bfloat16", candidates=7, edges=4, pruned_edges=3, flagged=True)
    single = Case((2, 3, 4, 4), dtype="bfloat16", candidates=7)
    assert removed.minimum_bytes(backward=True) == single.minimum_bytes(backward=True)
    assert flagged.minimum_bytes(backward=False) == single.minimum_bytes(backward=False)
    assert flagged.minimum_bytes(backward=True) == single.minimum_bytes(backward=True) + 21 * single.tensor_bytes


def test_geometric_mean() -> None:
    assert results.geometric_mean([2.0, 8.0]) == pytest.approx(4.0)


def test_mean_speedups_need_every_shape_and_no_red_row() -> None:
    def row(shape: list[int], ratio: float | None) -> dict[str, Any]:
        described = {"shape": shape, "layout": "contiguous", "dtype": "float32", "candidates": 7, "edges": 1}
        return described | {"pass": "forward", "speedup": {"eager": ratio}}

    def mean(*rows: dict[str, Any]) -> Any:
        return results.mean_speedups(rows, [(1, 2), (3, 4)], "speedup")["contiguous"]["forward"]["eager"]

    assert mean(row([1, 2], 2.0), row([3, 4], 8.0)) == pytest.approx(4.0)
    assert mean(row([1, 2], 2.0)) is None
    assert mean(row([1, 2], 2.0), row([3, 4], None)) is None


def test_ratio_is_paired_within_rounds() -> None:
    timings = Timings({"eager": [2.0, 20.0, 3.0], "ours": [1.0, 10.0, 1.0]})
    assert timings.ratio("eager", "ours") == 2.0  # the slow second round slowed both
    assert timings.best_ratio("eager", "ours") == 2.0
    assert timings.median("eager") == 3.0


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: [lambda name=name: order.append(name)] for name in ("a", "b", "c")}
    timings = time_interleaved(contenders, CPU, seconds=0.0, turn=0.0)
    assert timings.rounds == 3
    assert all(len(set(order[i : i + 6])) == 3 for i in range(len(order) - 3 * 6, len(order), 6))  # warm + timed call


def test_buffers_are_used_in_turn() -> None:
    used: list[int] = []
    calls = [lambda i=i: used.append(i) for i in range(3)]
    time_interleaved({"a": calls}, CPU, seconds=0.0, turn=0.0)
    assert used == [i % 3 for i in range(len(used))]


def test_peak_memory_counts_results_and_intermediates() -> None:
    x = torch.ones(1000)
    peaks = peak_memory({"one": lambda: x + 1, "chain": lambda: (x + 1) + 1}, CPU)
    assert peaks["one"] == pytest.approx(4000, rel=0.05)
    assert peaks["chain"] == pytest.approx(8000, rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("edges, pruned_edges", [(1, 0), (3, 1)])
def test_einsum_and_ours_compute_what_eager_computes(dtype: str, edges: int, pruned_edges: int) -> None:
    case = Case((2, 3, 5, 5), "channels_last", dtype, 3, edges, pruned_edges, flagged=True)
    inputs = make_inputs(case, CPU, seed=0)
    exact = float64_results(inputs)
    for mix in (eager, stack_einsum, mixed_sum):
        errors = relative_errors(mix, inputs, exact)
        assert max(errors.values()) < (0.05 if dtype == "bfloat16" else 1e-5)


def test_removed_candidates_leave_the_other_gradients_to_compare() -> None:
    case = Case((2, 3, 4, 4), candidates=2, edges=3, pruned_edges=2)
    inputs = make_inputs(case, CPU, seed=0)
    removed: Inputs = inputs.without(case.pruned_inputs)
    errors = relative_errors(mixed_sum, removed, float64_results(inputs), pruned=case.pruned_inputs)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("ours, accurate", [(2e-3, True), (2.1e-3, False), (math.nan, False)])
def test_accuracy_bound_is_twice_eagers_error(ours: float, accurate: bool) -> None:
    assert is_accurate({"y": ours}, {"y": 1e-3}, ["y"], torch.float32) is accurate


def test_what_cannot_be_compiled_is_reported_once_with_its_reason() -> None:
    def breaks_the_graph(outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None) -> Tensor:
        torch._dynamo.graph_break()
        return eager(outputs, alpha, mask, active)

    compiler = Compiler(enabled=True)
    inputs = make_inputs(Case((2, 3, 4, 4)), CPU, seed=0)
    assert compiler.compile(breaks_the_graph, inputs, CPU) == (None, {})
    assert compiler.problem is not None and "Unsupported" in compiler.problem
    assert compiler.compile(eager, inputs, CPU) == (None, {})


def test_quick_keeps_one_node_and_the_full_grid_both_ways_of_pruning() -> None:
    def nodes(quick: bool) -> list[Case]:
        layouts = ["contiguous", "channels_last"]
        cases = make_cases([(8, 8, 8, 8), (2, 3, 4, 4)], layouts, ["float32"], [7, 8], 4, [0.0, 0.5], quick)
        return [case for case in cases if case.edges == 4]

    assert [(node.pruned_edges, node.flagged) for node in nodes(quick=True)] == [(0, False), (2, False)]
    assert [node.flagged for node in nodes(quick=False)] == [False, False, True] * 2
    assert {node.shape for node in nodes(quick=False)} == {(2, 3, 4, 4)}


def test_run_writes_table_json_and_summary(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path)
    assert status == 0
    assert set(found) >= {"machine", "versions", "commit", "rows", "summary"}
    assert [(row["edges"], row["pruned"], row["pass"]) for row in found["rows"]] == [
        (1, 0.0, "forward"),
        (1, 0.0, "forward+backward"),
        (4, 0.5, "forward"),
        (4, 0.5, "forward+backward"),
    ]
    for row in found["rows"]:
        assert row["accuracy"] == "green"
        assert set(row["speedup"]) <= set(row["milliseconds"])
        assert min(*row["milliseconds"].values(), *row["speedup"].values(), row["gb_per_s"]) > 0
        assert set(row["peak_memory_bytes"]) >= {"eager", "ours"}
        assert set(row["error"]["ours"]) == ({"y"} if row["pass"] == "forward" else {"y", "inputs", "alpha", "mask"})
    assert set(found["summary"]["pruned_edge"]["share_of_active"]) == {"forward", "forward+backward"}
    printed = capsys.readouterr().out
    assert "2x3x4x4" in printed and SPEEDUP.search(printed) and "RED" not in printed
    assert "torch.compile: not measured: switched off" in printed


def test_wrong_contender_is_red_and_shows_no_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path, one_percent_off)
    assert status == 1
    assert all(row["accuracy"] == "red" for row in found["rows"])
    assert all(
        ratio is None for row in found["rows"] for ratio in [*row["speedup"].values(), *row["best_speedup"].values()]
    )
    assert found["summary"]["red_rows"] == len(found["rows"])
    printed = capsys.readouterr().out
    assert "RED" in printed and not SPEEDUP.search(printed)


def test_pruning_the_whole_node_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edge_throughput.parse(["--pruned", "0.95", "--edges", "4"])
    assert "must stay active" in capsys.readouterr().err
