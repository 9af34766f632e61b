"""One case measured: accuracy beside time, memory and the share of the copy bandwidth, as a row per pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bench import accuracy, results
from bench.baselines import PASSES, Compiler, Mix, call, copy_of_the_same_size, eager, stack_einsum
from bench.cases import DTYPES, Case, Inputs, make_inputs
from bench.memory import peak_memory, saved_bytes
from bench.timing import Timings, time_interleaved

Contenders = Mapping[str, tuple[Mix, Sequence[Inputs]]]  # name -> the mix and its input sets
MAX_SETS = 64


def measure(
    case: Case,
    ours: Mix,
    device: torch.device,
    seconds: float,
    *,
    compiler: Compiler,
    compiled_passes: Sequence[str] = (),
    every_baseline: bool = False,
) -> list[results.Row]:
    """One row for the forward pass and one for forward + backward, about `seconds` each.

    Eager and ours always take part, torch.compile in `compiled_passes`; with `every_baseline` also eager in
    channels_last where the case is contiguous, and stack + einsum where it has no BatchNorm.
    """
    sets = input_sets(case, device)
    removed = 0 if case.flagged else case.pruned_inputs
    kept = [inputs.without(removed) for inputs in sets]
    exact = accuracy.float64_results(sets[0])
    errors = {
        "eager": accuracy.relative_errors(eager, sets[0], exact),
        "ours": accuracy.relative_errors(ours, kept[0], exact, pruned=removed),
    }
    del exact
    contenders: dict[str, tuple[Mix, Sequence[Inputs]]] = {"eager": (eager, sets)}
    if every_baseline and case.layout != "channels_last":
        contenders["eager channels_last"] = (eager, [inputs.to(layout="channels_last") for inputs in sets])
    if every_baseline and not case.folded:
        contenders["stack+einsum"] = (stack_einsum, sets)
    compiled, compile_seconds = compiler.compile(eager, sets[0], compiled_passes, device)
    rows = []
    for name in PASSES:
        taking_part = dict(contenders)
        if compiled and name in compiled_passes:
            taking_part["torch.compile"] = (compiled, sets)
        taking_part["ours"] = (ours, kept)  # last: the order in which rows list them
        timings = time_pass(case, name, taking_part, device, seconds)
        memory = memory_of_pass(name, taking_part, device)
        rows.append(row(case, name, errors, timings) | memory | {"compile_seconds": compile_seconds.get(name)})
    return rows


def input_sets(case: Case, device: torch.device) -> list[Inputs]:
    """Inputs to take in turn: on a GPU enough of them to overflow its L2 twice (tensors so small that this takes more
    than MAX_SETS wait for launches, not for memory); on a CPU one set, as a network that has just written its
    activations finds them. The sets share their norms: compiled code need not look out for other ones.
    """
    sets = 1
    if device.type == "cuda":
        set_bytes = (case.edges * case.candidates + 1) * case.tensor_bytes
        sets += min(2 * torch.cuda.get_device_properties(device).L2_cache_size // set_bytes, MAX_SETS)
    made = [make_inputs(case, device, seed) for seed in range(sets)]
    return [replace(inputs, norms=made[0].norms) for inputs in made]


def time_pass(case: Case, name: str, contenders: Contenders, device: torch.device, seconds: float) -> Timings:
    turns: dict[str, Any] = {
        key: [partial(PASSES[name], mix, inputs) for inputs in sets] for key, (mix, sets) in contenders.items()
    }
    total_bytes = case.minimum_bytes(backward=name != "forward")
    turns["copy"] = copy_of_the_same_size(total_bytes, len(contenders["eager"][1]), device)
    return time_interleaved(turns, device, seconds=seconds)


def memory_of_pass(name: str, contenders: Contenders, device: torch.device) -> results.Row:
    """Peak of the pass and, where it has a backward one, the bytes kept for that."""
    first = {key: (mix, sets[0]) for key, (mix, sets) in contenders.items()}
    peaks = peak_memory({key: partial(PASSES[name], mix, inputs) for key, (mix, inputs) in first.items()}, device)
    saved = None
    if name != "forward":
        saved = {key: saved_bytes(partial(call, mix, inputs)) for key, (mix, inputs) in first.items()}
    return {"peak_memory_bytes": peaks, "saved_bytes": saved}


def row(case: Case, name: str, errors: Mapping[str, accuracy.Errors], timings: Timings) -> results.Row:
    checked = accuracy.FORWARD if name == "forward" else accuracy.FORWARD_BACKWARD
    accurate = accuracy.is_accurate(errors["ours"], errors["eager"], checked, DTYPES[case.dtype])
    total_bytes = case.minimum_bytes(backward=name != "forward")
    baselines = [key for key in timings.seconds if key not in ("ours", "copy")]
    return {
        "case": str(case),
        "shape": list(case.shape),
        "layout": case.layout,
        "dtype": case.dtype,
        "candidates": case.candidates,
        "edges": case.edges,
        "batch_norm": case.folded,
        "pruned": case.pruned_edges / case.edges,
        "pruned_as": ("flagged" if case.flagged else "removed") if case.pruned_edges else None,
        "pass": name,
        "milliseconds": {key: 1e3 * timings.median(key) for key in timings.seconds},
        "spread": {key: timings.spread(key) for key in timings.seconds},
        "rounds": timings.rounds,
        "speedup": {key: timings.ratio(key, "ours") if accurate else None for key in baselines},
        "best_speedup": {key: timings.best_ratio(key, "ours") if accurate else None for key in baselines},
        "minimum_bytes": total_bytes,
        "gb_per_s": total_bytes / timings.median("ours") / 1e9,
        "fraction_of_copy": timings.ratio("copy", "ours"),
        "error": {key: {part: found[part] for part in checked} for key, found in errors.items()},
        "accuracy": "green" if accurate else "red",
    }
