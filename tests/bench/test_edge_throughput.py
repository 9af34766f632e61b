"""The benchmark as a whole: paired ratios, accuracy check, baselines, and what the command prints and writes."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import baselines, edge_throughput, results
from bench.accuracy import float64_results, is_accurate, relative_error, relative_errors
from bench.baselines import Compiler, eager, empty_compile_cache, forward_backward, stack_einsum
from bench.cases import Case, Inputs, make_inputs
from bench.timing import Timings, time_interleaved

CPU = torch.device("cpu")
TINY = ["--device=cpu", "--quick", "--no-compile", "--seconds=0", "--layouts=contiguous", "--k=3"]
TINY += ["--shapes=2x3x4x4", "--small-shapes=1x1x1x1"]
SPEEDUP = re.compile(rf"{results.TIMES}\d")


def one_percent_off(*args: Any, **kwargs: Any) -> Tensor:
    return baselines.ours(*args, **kwargs) * 1.01


def run(out: Path, *more: str, ours: Any = baselines.ours) -> tuple[int, dict[str, Any]]:
    status = edge_throughput.main([*TINY, "--out", str(out), *more], ours)
    return status, json.loads((out / "edge_throughput.json").read_text())


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("edges, pruned_edges", [(1, 0), (3, 1)])
@pytest.mark.parametrize("folded", [False, True], ids=["plain", "batch_norm"])
def test_every_contender_computes_the_same(dtype: str, edges: int, pruned_edges: int, folded: bool) -> None:
    case = Case((2, 3, 5, 5), "channels_last", dtype, 3, edges, pruned_edges, flagged=True, folded=folded)
    inputs = make_inputs(case, CPU, seed=0)
    exact = float64_results(inputs)
    for mix in (eager, baselines.ours) if folded else (eager, stack_einsum, baselines.ours):
        errors = relative_errors(mix, inputs, exact)
        assert max(errors.values()) < (0.05 if dtype == "bfloat16" else 1e-5)


def test_eager_is_darts_expression_over_batch_norm() -> None:
    inputs = make_inputs(Case((4, 3, 5, 5), candidates=2, edges=2, folded=True), CPU, seed=0)
    weights, gates = torch.softmax(inputs.alpha, -1), torch.sigmoid(inputs.mask)
    expected = sum(
        gates[i // 2] * weights[i // 2, i % 2] * torch.nn.functional.batch_norm(o, None, None, training=True)
        for i, o in enumerate(inputs.outputs)
        if o is not None
    )
    torch.testing.assert_close(baselines.call(eager, inputs), expected)


@pytest.mark.parametrize("folded", [False, True], ids=["plain", "batch_norm"])
def test_removed_candidates_leave_the_other_gradients_to_compare(folded: bool) -> None:
    case = Case((2, 3, 4, 4), candidates=2, edges=3, pruned_edges=2, folded=folded)
    inputs = make_inputs(case, CPU, seed=0)
    removed: Inputs = inputs.without(case.pruned_inputs)
    errors = relative_errors(baselines.ours, removed, float64_results(inputs), pruned=case.pruned_inputs)
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("ours, accurate", [(2e-3, True), (2.1e-3, False), (math.nan, False)])
def test_accuracy_bound_is_twice_eagers_error(ours: float, accurate: bool) -> None:
    assert is_accurate({"y": ours}, {"y": 1e-3}, ["y"], torch.float32) is accurate


def test_zeros_are_right_only_if_exact() -> None:
    zero = torch.zeros(3)
    assert relative_error([zero], [zero]) == 0
    assert relative_error([zero + 1e-30], [zero]) == math.inf
    assert relative_error([zero * math.nan], [zero]) == math.inf


def test_what_cannot_be_compiled_is_reported_once_with_its_reason() -> None:
    def breaks_the_graph(outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None) -> Tensor:
        torch._dynamo.graph_break()
        return eager(outputs, alpha, mask, active)

    compiler = Compiler(enabled=True)
    inputs = make_inputs(Case((2, 3, 4, 4)), CPU, seed=0)
    assert compiler.compile(breaks_the_graph, inputs, ["forward"], CPU) == (None, {})
    assert compiler.problem is not None and "Unsupported" in compiler.problem
    assert compiler.compile(eager, inputs, ["forward"], CPU) == (None, {})


@pytest.mark.slow
@pytest.mark.parametrize("edges", [1, 2])
def test_eager_with_batch_norm_compiles_in_one_piece(edges: int) -> None:
    inputs = make_inputs(Case((4, 3, 5, 5), "channels_last", candidates=2, edges=edges, folded=True), CPU, seed=0)
    compiler = Compiler(enabled=True)
    with empty_compile_cache():
        compiled, seconds = compiler.compile(eager, inputs, ["forward+backward"], CPU)
    assert compiler.problem is None and compiled is not None and list(seconds) == ["forward+backward"]
    torch.testing.assert_close(forward_backward(compiled, inputs), forward_backward(eager, inputs))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, dict[str, Any], str]:
    """Exit status, JSON and output of one run."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status, found = run(tmp_path_factory.mktemp("finished"))
    return status, found, printed.getvalue()


def test_run_writes_table_json_and_summary(finished: tuple[int, dict[str, Any], str]) -> None:
    status, found, printed = finished
    assert status == 0
    assert set(found) >= {"machine", "versions", "commit", "rows", "summary"}
    assert [(row["shape"][-1], row["edges"], row["batch_norm"], row["pruned"]) for row in found["rows"][::2]] == [
        (1, 1, False, 0.0),
        (4, 1, False, 0.0),
        (4, 1, True, 0.0),
        (4, 5, False, 0.4),
    ]
    assert [row["pass"] for row in found["rows"]] == ["forward", "forward+backward"] * 4
    for row in found["rows"]:
        assert row["accuracy"] == "green"
        assert set(row["speedup"]) <= set(row["milliseconds"])
        assert min(*row["milliseconds"].values(), *row["speedup"].values(), row["gb_per_s"]) > 0
        assert set(row["peak_memory_bytes"]) >= {"eager", "ours"}
        assert (row["saved_bytes"] is None) == (row["pass"] == "forward")
        assert set(row["error"]["ours"]) == ({"y"} if row["pass"] == "forward" else {"y", "inputs", "alpha", "mask"})
    assert set(found["summary"]["pruned_edge"]["share_of_active"]) == {"forward", "forward+backward"}
    assert found["summary"]["least_speedup"]["case"] in {row["case"] for row in found["rows"]}
    assert "2x3x4x4" in printed and SPEEDUP.search(printed) and "RED" not in printed
    assert "torch.compile: not measured: switched off" in printed


def test_full_run_has_every_baseline(tmp_path: Path) -> None:
    full = [flag for flag in TINY if flag != "--quick"]
    assert edge_throughput.main([*full, "--dtypes=float32", "--pruned", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "edge_throughput.json").read_text())["rows"]
    assert [(row["edges"], row["batch_norm"]) for row in rows[2::2]] == [(1, False), (1, True), (5, False), (5, True)]
    for row in rows:
        expected = {"eager", "eager channels_last"} | (set() if row["batch_norm"] else {"stack+einsum"})
        assert set(row["speedup"]) == expected


def test_wrong_contender_is_red_and_shows_no_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, found = run(tmp_path, ours=one_percent_off)
    assert status == 1
    assert all(row["accuracy"] == "red" for row in found["rows"])
    assert all(
        ratio is None for row in found["rows"] for ratio in [*row["speedup"].values(), *row["best_speedup"].values()]
    )
    assert found["summary"]["red_rows"] == len(found["rows"])
    assert found["summary"]["least_speedup"] is None
    printed = capsys.readouterr().out
    assert "RED" in printed and not SPEEDUP.search(printed)


def test_pruning_the_whole_node_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        edge_throughput.parse(["--pruned", "0.95", "--edges", "4"])
    assert "must stay active" in capsys.readouterr().err


def test_baseline_that_was_faster_fails_the_run(
    finished: tuple[int, dict[str, Any], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"fraction_of_copy": 1000 * row["fraction_of_copy"]} for row in finished[1]["rows"]]
    faster = tmp_path / "faster.json"
    results.write_json(faster, finished[1] | {"rows": rows})
    status, _ = run(tmp_path / "again", "--baseline", str(faster))
    assert status == 2
    assert f"{len(rows)} rows, {len(rows)} over 10 % slower" in capsys.readouterr().out


def test_baseline_that_is_no_result_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other.json"
    other.write_text("[]")
    for file in (other, tmp_path / "missing.json"):
        with pytest.raises(SystemExit):
            edge_throughput.parse(["--baseline", str(file)])
        assert file.name in capsys.readouterr().err
