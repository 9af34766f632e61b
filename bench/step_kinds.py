"""Where the time of a step goes, by kind of operation."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# (kind, what an operator's name contains): the first that fits decides.
NAMED = (
    # Ours have the pointwise one, and the BatchNorm between two, in the same operator; the second has its BatchNorm.
    ("depthwise convolution", ("depthwise", "separable")),
    ("other convolution", ("pointwise",)),
    ("mix", ("mixed_sum", "mixedsum")),
    ("BatchNorm", ("batch_norm", "batchnorm", "lerp")),
    ("pooling", ("pool", "parameter_free")),  # ours with its BatchNorm and its share of the mix
    ("element-wise", ("relu", "clamp_min", "threshold", "aten::copy_", "aten::cat", "aten::fill_", "aten::zero_")),
)
# Stock DARTS mixes by these. They also sum the gradients where a state branches: a profile cannot tell the two apart.
MIX = ("aten::mul", "aten::add", "aten::add_", "aten::sum")
KINDS = ("depthwise convolution", "other convolution", "mix", "BatchNorm", "pooling", "element-wise", "other")

Event = dict[str, Any]  # of the profiler's trace: name, cat, ts and dur in microseconds, tid, args


def share_by_kind(step: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Kind -> its share of the time spent in operators during a step (on a GPU: in the kernels they launch)."""
    events = trace(step, device)
    operators = [event for event in events if event["cat"] == "cpu_op"]
    times = kernel_times(operators, events) if device.type == "cuda" else self_times(operators)
    spent = dict.fromkeys(KINDS, 0.0)
    for operator, time in zip(operators, times, strict=True):
        spent[kind(operator)] += time
    return {name: time / sum(times) for name, time in spent.items()}


def trace(step: Callable[[], object], device: torch.device) -> list[Event]:
    """What torch's profiler saw during a step. Read from its JSON: its own summary takes longer than the step."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_text())["traceEvents"] if "dur" in event and "cat" in event]


def self_times(operators: Sequence[Event]) -> list[float]:
    """Time of each operator without that of the operators it called."""
    times = [event["dur"] for event in operators]
    running: dict[int, list[int]] = defaultdict(list)  # per thread, the operators that called each other
    for index in sorted(range(len(operators)), key=lambda i: (operators[i]["ts"], -operators[i]["dur"])):
        event, callers = operators[index], running[operators[index]["tid"]]
        while callers and event["ts"] >= operators[callers[-1]]["ts"] + operators[callers[-1]]["dur"]:
            callers.pop()
        if callers:
            times[callers[-1]] -= event["dur"]
        callers.append(index)
    return times


def kernel_times(operators: Sequence[Event], events: Sequence[Event]) -> list[float]:
    """Time on the GPU of what each operator launched itself."""
    launched: dict[int | None, float] = defaultdict(float)
    for event in events:
        if event["cat"] in ("kernel", "gpu_memcpy", "gpu_memset"):
            launched[event["args"].get("External id")] += event["dur"]
    return [launched[event["args"]["External id"]] for event in operators]


def kind(operator: Event) -> str:
    """One of KINDS, by the operator's name; for convolutions by the shape of the weights."""
    name = operator["name"].lower()
    if name.startswith("autograd::") or name.endswith("backward0"):  # autograd's own work around an operator
        return "other"
    if name.startswith("aten::") and "conv" in name:
        return "depthwise convolution" if is_depthwise(operator["args"]["Input Dims"]) else "other convolution"
    if name in MIX:
        return "mix"
    return next((found for found, parts in NAMED if any(part in name for part in parts)), "other")


def is_depthwise(shapes: list[list[int]]) -> bool:
    """True if, of a convolution's inputs (..., images, weights, ...), every filter sees one of many channels."""
    images, weights = [shape for shape in shapes if len(shape) == 4][-2:]
    return weights[1] == 1 and weights[0] == images[1] > 1
