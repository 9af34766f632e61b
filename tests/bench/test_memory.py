"""Bytes kept for backward and peak bytes, on calls whose memory is known."""

from __future__ import annotations

import pytest
import torch

from bench.baselines import call, eager, ours
from bench.cases import Case, make_inputs
from bench.memory import peak_memory, saved_bytes

CPU = torch.device("cpu")


def test_peak_memory_counts_results_and_intermediates() -> None:
    x = torch.ones(1000)
    peaks = peak_memory({"one": lambda: x + 1, "chain": lambda: (x + 1) + 1}, CPU)
    assert peaks["one"] == pytest.approx(4000, rel=0.05)
    assert peaks["chain"] == pytest.approx(8000, rel=0.05)


def test_a_storage_saved_twice_counts_once() -> None:
    x = torch.ones(1000, requires_grad=True)
    assert saved_bytes(lambda: x + 1) == 0
    assert saved_bytes(lambda: x * x) == 4000
    assert saved_bytes(lambda: x[:500] * x[500:]) == 4000
    assert saved_bytes(lambda: x * (x + 1)) == 8000


def test_batch_norm_in_the_mix_keeps_no_normalised_candidate() -> None:
    case = Case((8, 4, 16, 16), candidates=5, folded=True)
    inputs = make_inputs(case, CPU, seed=0)
    kept = {mix: saved_bytes(lambda mix=mix: call(mix, inputs)) / case.tensor_bytes for mix in (eager, ours)}
    assert kept[eager] == pytest.approx(5 + 5 + 1, rel=0.05)  # candidates, normalised candidates, their sum
    assert kept[ours] == pytest.approx(5, rel=0.05)
