"""Paired timing: contenders take turns within one process, so that a noisy neighbour slows all of them alike."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from statistics import median, quantiles

import torch

Calls = Sequence[Callable[[], object]]  # the same work on different buffers, used in turn


@dataclass(frozen=True)
class Timings:
    """Seconds per call of each contender, one entry per round."""

    seconds: dict[str, list[float]]

    @property
    def rounds(self) -> int:
        return len(next(iter(self.seconds.values())))

    def median(self, name: str) -> float:
        return median(self.seconds[name])

    def spread(self, name: str) -> float:
        """Distance between the quartiles over the median: how noisy this machine was."""
        first, _, third = quantiles(self.seconds[name], n=4)
        return (third - first) / self.median(name)

    def ratio(self, slow: str, fast: str) -> float:
        """How many times as long `slow` takes: the median over the rounds of the ratio within each round."""
        return median(a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=True))

    def best_ratio(self, slow: str, fast: str) -> float:
        """The same from the fastest round of each. What holds on a machine so busy that most rounds were disturbed:
        there, every parallel region may wait a scheduler's time slice for its last thread, and `ratio` counts slices.
        """
        return min(self.seconds[slow]) / min(self.seconds[fast])


def time_interleaved(
    contenders: Mapping[str, Calls], device: torch.device, *, seconds: float, min_rounds: int = 7, turn: float = 2e-3
) -> Timings:
    """Let the contenders take turns for about `seconds`; where they are slow, longer, to see `min_rounds` (at least 3).

    A turn is about `turn` seconds untimed, so that nobody pays for the caches his predecessor filled (a last-level
    cache takes several calls to let go of what was in it), then as long again.
    """
    measure = cuda_measure if device.type == "cuda" else host_measure
    work = {name: rotating(calls) for name, calls in contenders.items()}
    for call in work.values():
        measure(call, 2)
    repeats = {name: max(1, round(turn / max(measure(call, 1), 1e-7))) for name, call in work.items()}
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for rounds in count(1):
            names = names[1:] + names[:1]  # another one goes first, so none always follows the same neighbour
            for name in names:
                measure(work[name], repeats[name])
                taken[name].append(measure(work[name], repeats[name]))
            elapsed = time.perf_counter() - start
            if elapsed >= seconds and rounds >= (min_rounds if elapsed < 3 * seconds else 3):
                break
    finally:
        gc.enable()
    return Timings(taken)


def rotating(calls: Calls) -> Callable[[], None]:
    turn = count()

    def run() -> None:
        calls[next(turn) % len(calls)]()

    return run


def host_measure(call: Callable[[], None], repeats: int) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    return (time.perf_counter() - start) / repeats


def cuda_measure(call: Callable[[], None], repeats: int) -> float:
    torch.cuda.synchronize()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats
