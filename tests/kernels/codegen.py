"""Compile what the Triton launchers launch for a GPU that need not be there; print what the machine code does as JSON.

Reads a JSON list from standard input: {"kernel", "arch", "dtype", "edges", "candidates"}, and "n" for mixed_sum's
kernels or "shape", "layout" and "training" for those of batch_norm_mixed_sum. Run it without TRITON_INTERPRET, in a
process of its own: it replaces Triton's driver and lets launches end after compilation.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from dssp_kernels import triton_launch
from dssp_kernels.batch_norm_mixed_sum import triton_launchers as batch_norm
from dssp_kernels.batch_norm_mixed_sum.reference import BATCH, PLAIN, RUNNING
from dssp_kernels.mixed_sum import triton_launchers as mixed_sum

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
WIDTHS = {"128": 16, "64": 8, "U16": 2, "U8": 1}  # bytes by SASS suffix; none: 4


class OfflineDriver:
    """All that Triton asks of a driver before it launches."""

    def __init__(self, arch: int | str) -> None:
        self.arch = arch

    def get_current_device(self) -> int | str:
        return self.arch

    def get_current_stream(self, device: int | str) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32) if isinstance(self.arch, int) else GPUTarget("hip", self.arch, 64)


@contextmanager
def compiling_for(arch: int | str) -> Iterator[list[Any]]:
    """Triton's compiled kernels in the order the launchers launch them, for tensors that take no memory."""
    triton.runtime.driver.set_active(OfflineDriver(arch))
    warp_size = triton.runtime.driver.active.get_current_target().warp_size
    triton_launch.NUM_WARPS = triton_launch.THREADS // warp_size
    kernels: list[Any] = []
    run = JITFunction.run
    JITFunction.run = lambda *args, **keywords: kernels.append(run(*args, **keywords | {"warmup": True}))
    with torch.device("meta"):
        yield kernels
    JITFunction.run = run


def mixed_sum_kernels(variant: dict[str, Any]) -> list[Any]:
    edges, candidates = variant["edges"], variant["candidates"]
    with compiling_for(variant["arch"]) as kernels:
        outputs = [torch.empty(variant["n"], dtype=getattr(torch, variant["dtype"])) for _ in range(edges * candidates)]
        alpha, mask = torch.empty(edges, candidates), torch.empty(edges)
        active = torch.empty(edges, dtype=torch.bool) if edges > 1 else None
        if variant["kernel"] == "forward":
            mixed_sum.mixed_sum_forward(outputs, alpha, mask, active, True)
        else:
            needs_grad = [True] * len(outputs)
            dots = variant["kernel"] != "weights"
            mixed_sum.mixed_sum_backward(outputs[0], outputs, alpha, mask, active, True, needs_grad, dots)
    return kernels[1:] if variant["kernel"] == "finish" else kernels


def batch_norm_kernels(variant: dict[str, Any]) -> list[Any]:
    """The first candidate of an edge is not normalised, as skip is not; "absent": the second is not there."""
    edges, candidates, channels = variant["edges"], variant["candidates"], variant["shape"][1]
    entries = range(edges * candidates)
    norm = BATCH if variant["training"] else RUNNING
    kinds = [PLAIN if i % candidates == 0 or (variant["absent"] and i % candidates == 1) else norm for i in entries]
    with compiling_for(variant["arch"]) as kernels:
        memory_format = getattr(torch, variant["layout"])
        x = torch.empty(variant["shape"], dtype=getattr(torch, variant["dtype"])).to(memory_format=memory_format)
        outputs = [None if variant["absent"] and i % candidates == 1 else torch.empty_like(x) for i in entries]
        alpha, mask = torch.empty(edges, candidates), torch.empty(edges)
        active = torch.empty(edges, dtype=torch.bool) if edges > 1 else None
        affine = [torch.empty(channels) if kind != PLAIN else None for kind in kinds] if variant["affine"] else []
        means = [torch.empty(channels) if kind != PLAIN else None for kind in kinds]
        mixture, norms = (outputs, alpha, mask, active, affine, affine), (kinds, [1e-5] * len(kinds), True)
        _, mean, variance = batch_norm.batch_norm_mixed_sum_forward(*mixture, means, means, *norms)
        needs = [tensor is not None for tensor in affine] or [False] * len(kinds)
        batch_norm.batch_norm_mixed_sum_backward(
            x, *mixture, mean, variance, *norms, [output is not None for output in outputs], needs, needs, True
        )
        tracked = [i for i in entries if kinds[i] != PLAIN]
        running, counters = [means[i] for i in tracked], [torch.empty((), dtype=torch.int64) for _ in tracked]
        batch_norm.batch_norm_update_running_statistics(
            running, running, counters, mean, variance, active, tracked, [0.1] * len(tracked), 100
        )
    return kernels


def sass_facts(cubin: bytes) -> dict[str, Any]:
    """Registers, stack, memory instructions by width in bytes, arithmetic between a basic block's 16-byte loads."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, usage = (
            subprocess.run([str(TOOLS / tool), option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("nvdisasm", "-c"), ("cuobjdump", "-res-usage"))
        )
    loads: dict[int, int] = {}
    stores: dict[int, int] = {}
    for operation, suffix in re.findall(r"\b(LDG|STG)\.E(?:\.(128|64|U16|U8))?\b", sass):
        counts, width = (loads if operation == "LDG" else stores), WIDTHS.get(suffix, 4)
        counts[width] = counts.get(width, 0) + 1
    registers, stack = (int(re.findall(rf"{name}:(\d+)", usage)[-1]) for name in ("REG", "STACK"))
    spills = len(re.findall(r"\b(?:LDL|STL)\b", sass))
    between = [re.findall(r"\bLDG\.E\.128\b.*\bLDG\.E\.128\b", block, re.DOTALL) for block in sass.split("\n.L_")]
    waits = sum(len(re.findall(r"\b(?:FFMA|FMUL|FADD)\b", code)) for codes in between for code in codes)
    facts = {"registers": registers, "stack": stack, "spills": spills}
    return facts | {"loads": loads, "stores": stores, "arithmetic_between_loads": waits}


def amd_facts(assembly: str) -> dict[str, Any]:
    loads, stores = (
        {16: len(re.findall(rf"\b(?:global|buffer)_{kind}_dwordx4\b", assembly))} for kind in ("load", "store")
    )
    registers, spills = (int(re.findall(rf"\.vgpr_{name}: +(\d+)", assembly)[-1]) for name in ("count", "spill_count"))
    return {"registers": registers, "stack": 0, "spills": spills, "loads": loads, "stores": stores}


def main() -> None:
    facts: list[dict[str, Any]] = []
    for variant in json.load(sys.stdin):
        if "shape" in variant:
            kernels = {kernel.metadata.name: kernel for kernel in batch_norm_kernels(variant)}
            code = kernels[f"batch_norm_{variant['kernel']}_kernel"].asm
        else:
            code = mixed_sum_kernels(variant)[0].asm
        facts.append(sass_facts(code["cubin"]) if isinstance(variant["arch"], int) else amd_facts(code["amdgcn"]))
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
