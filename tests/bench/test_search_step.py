"""The comparison of supernets: equal weights and steps, what a red check prints, kinds of operation, limits in time."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench import search_step, stock_darts
from bench.results import TIMES
from bench.step_agreement import FUSED, LIMITS, gradient_error, is_green
from bench.step_kinds import KINDS, kind, self_times, share_by_kind
from bench.step_processes import run_apart
from bench.step_scaling import SERIES, points
from bench.step_subjects import (
    DIGITS,
    MAIN,
    NASBENCH,
    SUBJECTS,
    Case,
    Subject,
    TrainingStep,
    bilevel_steps,
    build_contenders,
    kept_edges,
    load_batches,
    renamed_darts,
)
from bench.step_turns import take_turns
from dssp.data import DataSet
from dssp.relaxation import Mixture
from dssp.spaces import DARTS
from dssp.supernet import Supernet
from dssp_kernels import FusedMixedEdge

CPU = torch.device("cpu")
TINY = Case("darts", channels=16, cells=3, batch=4)
TINY_NASBENCH = Case("nasbench201", channels=8, cells=1, batch=4)
CONTRACT = {"name", "stock_seconds", "stock_channels_last_seconds", "ours_seconds", "ours_half_pruned_seconds"}
CONTRACT |= {"loss_error", "gradient_error", "stock_peak_bytes", "ours_peak_bytes"}
SPEEDUP = re.compile(rf"{TIMES}\d")


class OnePercentOff(Supernet):
    def forward(self, images: Tensor, mixtures: Mapping[str, Mixture] | None = None) -> Tensor:
        return super().forward(images, mixtures) * 1.01


def one_node(supernet: type[Supernet] = Supernet) -> Subject:
    """DARTS with cells of one node, on images of 8x8: the same operations, a seventh of the edges."""

    def stock(case: Case, data: DataSet) -> nn.Module:
        return stock_darts.Network(case.channels, len(data.classes), case.cells, steps=1)

    def ours(case: Case, data: DataSet) -> Supernet:
        sizes = {"channels": case.channels, "cells": case.cells, "classes": len(data.classes)}
        return supernet(replace(DARTS, nodes=1), **sizes, gated=False)

    return Subject("fake", stock, ours, renamed_darts, image_size=8)


SMALL = {TINY: one_node(), TINY_NASBENCH: replace(SUBJECTS["nasbench201"], image_size=8)}
every_space = pytest.mark.parametrize(("case", "subject"), SMALL.items(), ids=[case.subject for case in SMALL])


def run(out: Path, subject: Subject, *flags: str, case: Case = TINY) -> tuple[int, dict[str, Any]]:
    argv = ["--device=cpu", f"--cases={case}", "--rounds=1", "--out", str(out), *flags]
    status = search_step.main(argv, {case.subject: subject})
    return status, json.loads((out / "search_step.json").read_text())


def test_case_is_its_name() -> None:
    assert str(MAIN) == "darts-c16-l8-b32"
    assert Case.parse(str(MAIN)) == MAIN


@pytest.mark.parametrize(
    "name", ["darts", "unknown-c16-l8-b32", "darts-c4-l8-b32", "darts-c16-l2-b32", "nasbench201-c16-l0-b32"]
)
def test_case_of_another_form_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}', expected"):
        Case.parse(name)


@pytest.mark.parametrize("share, count", [(0.01, 4), (0.25, 4), (0.5, 7), (0.75, 10), (1.0, 14)])
def test_pruning_leaves_its_share_and_an_edge_into_every_node(share: float, count: int) -> None:
    kept = kept_edges(DARTS, share)
    assert len(kept) == count
    assert all(not kept.isdisjoint(DARTS.edges_into(node)) for node in DARTS.concat)


@every_space
def test_contenders_differ_only_in_what_they_are_named_after(case: Case, subject: Subject) -> None:
    nets = build_contenders(case, subject, subject.load(CPU), CPU)
    states = {name: net.state_dict() for name, net in nets.items()}
    stock, ours, half = states["stock"], states["ours"], states["ours_half_pruned"]
    assert len(stock) == len(ours) > len(half)
    for key, value in stock.items():
        assert torch.equal(value, ours[subject.renamed(key)])
        assert all(torch.equal(value, state[key]) for name, state in states.items() if name.startswith("stock"))
    assert all(torch.equal(value, ours[key]) for key, value in half.items())
    whole, pruned = nets["ours"], nets["ours_half_pruned"]
    assert isinstance(whole, Supernet) and isinstance(pruned, Supernet)
    assert 2 * len(pruned.live_edges()) == len(whole.live_edges())
    assert ("stock_fused" in nets) == (case.subject == "darts")  # NAS-Bench-201's cell is no mixed op to fuse_mixed_ops
    if "stock_fused" in nets:
        assert any(isinstance(module, FusedMixedEdge) for module in nets["stock_fused"].modules())


@every_space
def test_bilevel_steps_of_stock_and_ours_lead_to_the_same_weights(case: Case, subject: Subject) -> None:
    data = subject.load(CPU)
    batches = [(images.double(), labels) for images, labels in load_batches(case, data)]
    nets = {name: net.double() for name, net in build_contenders(case, subject, data, CPU).items()}
    before = copy.deepcopy(nets["stock"].state_dict())
    for step in bilevel_steps(case, subject, data, nets, *batches).values():
        step["step"]()
    stock, ours = nets["stock"].state_dict(), nets["ours"].state_dict()
    for key, value in stock.items():
        assert not torch.equal(value, before[key])
        torch.testing.assert_close(ours[subject.renamed(key)], value, rtol=1e-6, atol=1e-9)


def test_gradient_error_is_that_of_the_worst_parameter() -> None:
    nets = [nn.Linear(2, 2), nn.Linear(2, 2)]
    for net, scale in zip(nets, (1.0, 1.5), strict=True):
        net.weight.grad, net.bias.grad = torch.ones(2, 2), torch.ones(2) * scale
    assert gradient_error(*nets, str) == pytest.approx(0.5)
    nets[1].weight.grad = torch.full((2, 2), math.nan)
    assert math.isnan(gradient_error(*nets, str))


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("factor, green", [(1.0, True), (1.01, False), (math.nan, False)])
def test_check_is_red_when_one_error_is_above_its_limit(name: str, factor: float, green: bool) -> None:
    assert is_green({**LIMITS, name: LIMITS[name] * factor}) is green
    fused = {f"{FUSED}{limited}": limit for limited, limit in LIMITS.items()}
    assert is_green({**LIMITS, **fused, f"{FUSED}{name}": LIMITS[name] * factor}) is green


def test_phases_are_timed_in_turns_and_the_first_round_is_not_counted() -> None:
    calls: list[str] = []
    contenders = {
        name: {phase: lambda label=f"{name} {phase}": calls.append(label) for phase in ("forward", "backward")}
        for name in ("a", "b")
    }
    timings = take_turns(contenders, CPU, rounds=2)
    assert calls == ["a forward", "a backward", "b forward", "b backward"] * 3
    assert {phase: found.rounds for phase, found in timings.items()} == {"forward": 2, "backward": 2, "step": 2}
    parts = [timings[phase].seconds["a"][0] for phase in ("forward", "backward")]
    assert timings["step"].seconds["a"][0] == sum(parts)


@pytest.mark.parametrize(
    "name, shapes, expected",
    [
        ("aten::mkldnn_convolution", [[4, 8, 6, 6], [8, 1, 3, 3], []], "depthwise convolution"),
        ("aten::convolution_backward", [[4, 8, 6, 6], [4, 8, 6, 6], [8, 1, 5, 5], []], "depthwise convolution"),
        ("aten::mkldnn_convolution", [[4, 8, 6, 6], [8, 8, 1, 1], []], "other convolution"),
        ("aten::mkldnn_convolution", [[4, 1, 6, 6], [24, 1, 3, 3], []], "other convolution"),  # stem of one channel
        ("aten::_slow_conv2d_backward", [[4, 8, 6, 6], [4, 8, 6, 6], [8, 8, 1, 1], []], "other convolution"),
        ("dssp_kernels::depthwise_conv2d_backward", [], "depthwise convolution"),
        ("dssp_kernels::separable_conv2d_group_forward", [], "depthwise convolution"),
        ("dssp_kernels::pointwise_batch_norm_forward", [], "other convolution"),
        ("dssp_kernels::batch_norm_mixed_sum_forward", [], "mix"),
        ("dssp_kernels::parameter_free_sums_backward", [], "pooling"),
        ("aten::native_batch_norm_backward", [], "BatchNorm"),
        ("aten::mul", [], "mix"),
        ("aten::max_pool2d_with_indices", [], "pooling"),
        ("aten::threshold_backward", [], "element-wise"),
        ("autograd::engine::evaluate_function: ConvolutionBackward0", [], "other"),
        ("aten::addmm", [], "other"),
    ],
)
def test_operators_belong_to_a_kind(name: str, shapes: list[list[int]], expected: str) -> None:
    assert kind({"name": name, "args": {"Input Dims": shapes}}) == expected


def test_time_of_an_operator_is_without_those_it_called() -> None:
    spans = [(0, 10, 1), (1, 4, 1), (2, 1, 1), (6, 3, 1), (10, 5, 1), (3, 7, 2)]  # start, length, thread
    operators = [{"ts": start, "dur": length, "tid": thread} for start, length, thread in spans]
    assert self_times(operators) == [3, 3, 1, 3, 5, 7]


def test_shares_of_a_step_add_up_and_stock_has_every_kind() -> None:
    subject = one_node()
    data = subject.load(CPU)
    step = TrainingStep(subject.stock(TINY, data), load_batches(TINY, data)[0], contiguous=True)
    shares = share_by_kind(step, CPU)
    assert set(shares) == set(KINDS)
    assert sum(shares.values()) == pytest.approx(1.0)
    assert min(shares.values()) > 0


@pytest.mark.parametrize("name", SERIES)
@pytest.mark.parametrize("quick", [True, False])
def test_series_vary_one_thing_only(name: str, quick: bool) -> None:
    field = {"edges": "cells"}.get(name, name)  # a series over edges varies no size at all
    for value, case, share in points(name, MAIN, quick):
        assert replace(case, **{field: getattr(MAIN, field)}) == MAIN
        assert name == "edges" or (getattr(case, name) == value and share == 1.0)


def test_process_past_its_time_is_ended_and_says_so() -> None:
    assert run_apart("compile", TINY, CPU, timeout=0.01) == {"problem": "not finished within 0.01 s"}


@pytest.mark.slow  # it imports torch
def test_process_that_fails_gives_its_reason() -> None:
    found = run_apart("first-step", replace(TINY, batch=10_000), CPU)
    assert "has" in found["problem"] and "too few for a batch" in found["problem"]


@every_space
def test_quick_run_has_the_main_figures(
    case: Case, subject: Subject, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, found = run(tmp_path, subject, "--quick", case=case)
    assert status == 0
    (row,) = found["cases"]
    assert set(row) >= CONTRACT
    assert row["name"] == str(case) and row["accuracy"] == "green"
    assert 0 < row["ours_half_pruned_peak_bytes"] < row["ours_peak_bytes"] < row["stock_peak_bytes"]
    assert row["loss_error"] < 1e-5 and row["gradient_error_float64"] < 1e-9
    assert not found["scaling"] and not found["first_step"] and not found["torch_compile"]
    printed = capsys.readouterr().out
    assert SPEEDUP.search(printed) and "RED" not in printed


def test_quick_run_has_every_space_and_the_default_search() -> None:
    assert search_step.parse(["--quick", "--device=cpu"]).cases == [MAIN, NASBENCH, DIGITS]


def test_full_run_writes_everything(tmp_path: Path) -> None:
    flags = ["--scaling", "batch", f"--scaling-case={TINY}", "--compile-timeout=0"]
    status, found = run(tmp_path, one_node(), *flags)
    assert status == 0
    assert set(found) >= {"machine", "versions", "commit", "cases", "scaling", "first_step", "torch_compile"}
    (row,) = found["cases"]
    assert set(row) >= CONTRACT
    assert row["stock_fused_speedup"] == pytest.approx(row["stock_channels_last_seconds"] / row["stock_fused_seconds"])
    for name in ("stock", "stock_channels_last", "stock_fused", "ours", "ours_half_pruned"):
        parts = row["forward_seconds"][name] + row["backward_seconds"][name]
        assert row[f"{name}_seconds"] == pytest.approx(parts)  # of a single round
        assert row["bilevel_seconds"][name] > 0
    assert set(row["kinds"]) == {"stock", "ours"}
    assert found["scaling"][0]["values"] == [2, 4, 8, 16] and len(found["scaling"][0]["seconds"]) == 4
    assert found["first_step"][str(TINY)]["step_seconds"] > 0


def test_wrong_supernet_is_red_and_shows_no_speedup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--scaling", "--no-first-step", "--compile-timeout=0"]
    status, found = run(tmp_path, one_node(OnePercentOff), *flags)
    assert status == 1
    (row,) = found["cases"]
    assert row["accuracy"] == "red"
    assert (
        set(row["speedup"].values()) == set(row["bilevel_speedup"].values()) == {row["stock_fused_speedup"]} == {None}
    )
    printed = capsys.readouterr().out
    assert "RED" in printed and not SPEEDUP.search(printed)
