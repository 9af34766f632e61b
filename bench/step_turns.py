"""Whole steps, seconds long each, timed in turns within one process, phase by phase."""

from __future__ import annotations

import gc
from collections.abc import Mapping

import torch

from bench.step_subjects import Phases
from bench.timing import Timings, host_measure


def take_turns(
    contenders: Mapping[str, Phases], device: torch.device, rounds: int, *, warm_up: bool = True
) -> dict[str, Timings]:
    """Phase -> seconds of each contender in each round; "step" is the sum of its phases.

    The first round is one more and not counted, unless `warm_up` is off: in it the process gets its memory from the
    system, page by page, and kernels are chosen or compiled.
    """
    taken: dict[str, dict[str, list[float]]] = {}
    gc.collect()
    gc.freeze()  # what is there already is not searched again between the turns
    try:
        for turn in range(-1 if warm_up else 0, rounds):
            for name, phases in contenders.items():
                gc.collect()
                seconds = time_phases(phases, device)
                seconds["step"] = sum(seconds.values())
                for phase in seconds if turn >= 0 else ():
                    taken.setdefault(phase, {}).setdefault(name, []).append(seconds[phase])
    finally:
        gc.unfreeze()
    return {phase: Timings(seconds) for phase, seconds in taken.items()}


def time_phases(phases: Phases, device: torch.device) -> dict[str, float]:
    """Seconds of each phase; on a GPU between events, without waiting for it from one phase to the next."""
    if device.type != "cuda":
        return {name: host_measure(call, 1) for name, call in phases.items()}  # type: ignore[arg-type]  # result unused
    events = [torch.cuda.Event(enable_timing=True) for _ in range(len(phases) + 1)]
    torch.cuda.synchronize(device)
    events[0].record()
    for call, event in zip(phases.values(), events[1:], strict=True):
        call()
        event.record()
    events[-1].synchronize()
    return {name: start.elapsed_time(end) / 1e3 for name, start, end in zip(phases, events, events[1:], strict=False)}
