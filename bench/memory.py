"""Memory of a call: the bytes it keeps for the backward pass, and the most it holds at once."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes autograd keeps for backward after `call`: every distinct storage among the saved tensors, once.

    The call's own inputs count where they are saved: in a network, what keeps a candidate's output alive until the
    backward pass is the mix. Whole storages count, also where a view of them is what was saved.
    """
    storages: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held until the end, so that no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in storages.values())


def peak_memory(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    """Most bytes each call held at once on the device, beyond what was there before it: results and intermediates.

    GPU: the caching allocator's own peak. CPU: running sum of the allocations and releases torch's profiler records.
    """
    return cuda_peak_memory(calls, device) if device.type == "cuda" else host_peak_memory(calls)


def cuda_peak_memory(calls: Mapping[str, Callable[[], object]], device: torch.device) -> dict[str, int]:
    peaks = {}
    for name, call in calls.items():
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device) - before
    return peaks


def host_peak_memory(calls: Mapping[str, Callable[[], object]]) -> dict[str, int]:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        for name, call in calls.items():
            with record_function(f"peak memory: {name}"):
                call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((event for event in events if "ts" in event), key=lambda event: event["ts"])
    changes = [(event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]"]
    peaks = {}
    for name in calls:
        span = next(event for event in events if event["name"] == f"peak memory: {name}")
        held = peak = 0
        for when, change in changes:
            if span["ts"] <= when <= span["ts"] + span["dur"]:
                held += change
                peak = max(peak, held)
        peaks[name] = peak
    return peaks
