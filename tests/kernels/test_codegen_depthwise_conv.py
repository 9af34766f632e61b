"""What depthwise_conv2d's compiled Triton kernels do on GPUs that need not be there: 16-byte accesses, no spills.

Run as a script, without TRITON_INTERPRET, it compiles the variants given as JSON on standard input, see codegen.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
KERNELS = ("fwd", "bwd_input", "bwd_weight", "bwd_weight_finish")
# Programs have 128 threads, an NVIDIA multiprocessor 65,536 registers. What counts is bytes in flight: resident
# programs x 128 threads x loads per thread x 16. To hide an H200's latency takes about 40 KB per multiprocessor: with
# two programs resident, 10 loads each.
CEILINGS = {"fwd": 184, "bwd_input": 184, "bwd_weight": 248, "bwd_weight_finish": 64}
CEILING_7X7 = 248  # two programs resident

Variant = dict[str, Any]
Facts = dict[str, dict[str, Any]]


def variant(arch: int | str, dtype: str, kernel: int, **others: Any) -> Variant:
    common = {"arch": arch, "dtype": dtype, "kernel": kernel, "stride": 1, "dilation": 1, "shape": [64, 16, 32, 32]}
    return common | {"layout": "channels_last"} | others


VARIANTS = [
    variant(90, "bfloat16", 5),
    variant(90, "float32", 5, stride=2),
    variant(90, "bfloat16", 3, dilation=2, shape=[64, 40, 7, 7]),  # 16 bytes divide a pixel, 32 do not
]
SLOW_VARIANTS = [
    *(variant(arch, "bfloat16", 5) for arch in (80, 100, "gfx942")),
    *(variant(arch, "float32", 5) for arch in (80, 100, "gfx942")),
    *(variant(90, dtype, 7, dilation=dilation) for dtype in ("bfloat16", "float32", "float64") for dilation in (1, 2)),
    *(variant(90, "bfloat16", 7, stride=2, dilation=dilation) for dilation in (1, 2)),
    variant(90, "float16", 5, stride=3),
    variant(90, "bfloat16", 5, shape=[2**12, 64, 256, 256]),  # more than 2^31 elements
]
SCALAR_VARIANTS = [variant(90, "bfloat16", 5, stride=2, layout="contiguous_format", shape=[64, 16, 32, 31])]
PARAMETERS = [*VARIANTS, *(pytest.param(v, marks=pytest.mark.slow) for v in SLOW_VARIANTS)]


def name(v: Variant) -> str:
    shape = "x".join(map(str, v["shape"]))
    return f"{v['arch']}-{v['dtype']}-k{v['kernel']}-s{v['stride']}-d{v['dilation']}-{shape}-{v['layout']}"


@cache
def compiled(slow: bool) -> dict[str, Facts]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    variants = SLOW_VARIANTS if slow else [*VARIANTS, *SCALAR_VARIANTS]
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(variants),
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(map(name, variants), json.loads(done.stdout), strict=True))


def facts_of(v: Variant) -> Facts:
    return compiled(v in SLOW_VARIANTS)[name(v)]


def met(rows: int, taps: int, up: int, step: int, down: int = 1) -> tuple[int, int]:
    """How many source rows meet some of the rows with some tap, and how many of the rows meet any."""
    met = [(t, t * up + i * step) for t in range(rows) for i in range(taps) if (t * up + i * step) % down == 0]
    return len({source for _, source in met}), len({t for t, _ in met})


def accesses(v: Variant) -> dict[str, tuple[int, int, int, int]]:
    """By kernel, what a thread does: 16-byte loads and stores of pixels, loads of weights and stores of sums at most.

    Each row of pixels is read once per column of taps, whatever their number.
    """
    taps, stride, dilation = v["kernel"], v["stride"], v["dilation"]
    vector = 16 // getattr(torch, v["dtype"]).itemsize
    vectors = max(1, min(8 // vector, 2))  # per tile, in the first two kernels
    height = (v["shape"][2] - 1) // stride + 1
    rows = max(1, 4 // stride) * stride  # of x's gradient, whole strides
    sources, targets = met(rows, taps, 1, -dilation, stride)
    phases = len({tap * dilation % stride for tap in range(taps)})  # columns of x's gradient that are not zero
    columns = -(-taps // -(-taps // (15 // taps)))  # of taps per program of the weight's gradient
    grads = 2 - height % 2  # rows of the result's gradient
    return {
        "fwd": (met(4, taps, stride, dilation)[0] * vectors, 4 * vectors, taps * vector, 0),
        "bwd_input": (
            (stride * sources + phases * targets) * vectors,
            stride * rows * vectors,
            stride * taps * vector,
            0,
        ),
        "bwd_weight": (columns * met(grads, taps, stride, dilation)[0] + grads, 0, 0, taps * columns),
    }


@pytest.mark.parametrize("v", [*PARAMETERS, *SCALAR_VARIANTS], ids=name)
def test_no_spills_and_few_registers(v: Variant) -> None:
    for kernel, found in facts_of(v).items():
        assert found["spills"] == 0 and found["stack"] == 0, kernel
        if isinstance(v["arch"], int):  # an AMD compute unit has four times the registers
            assert found["registers"] <= (CEILING_7X7 if v["kernel"] == 7 else CEILINGS[kernel]), kernel


@pytest.mark.parametrize("v", PARAMETERS, ids=name)
def test_pixels_are_read_and_written_16_bytes_at_a_time(v: Variant) -> None:
    facts = facts_of(v)
    for kernel, (loads, stores, weights, sums) in accesses(v).items():
        read, written = ({int(width): n for width, n in facts[kernel][key].items()} for key in ("loads", "stores"))
        assert read[16] == loads and written.get(16, 0) == stores, kernel
        assert sum(n for width, n in read.items() if width < 16) <= weights, kernel
        assert sum(n for width, n in written.items() if width < 16) <= sums, kernel


def main() -> None:
    from dssp_kernels.depthwise_conv import triton_launchers
    from tests.kernels.codegen import amd_facts, compiling_for, sass_facts

    results = []
    for v in json.load(sys.stdin):
        with compiling_for(v["arch"]) as kernels:
            layout = getattr(torch, v["layout"])
            x = torch.empty(v["shape"], dtype=getattr(torch, v["dtype"])).to(memory_format=layout)
            weight = torch.empty(v["shape"][1], 1, v["kernel"], v["kernel"], dtype=x.dtype)
            pairs = [(v["stride"],) * 2, (v["dilation"] * (v["kernel"] // 2),) * 2, (v["dilation"],) * 2]
            y = triton_launchers.depthwise_conv2d_forward(x, weight, *pairs, True)
            triton_launchers.depthwise_conv2d_backward(y, x, weight, *pairs, True, True, True)
        codes = [kernel.asm for kernel in kernels]
        facts = [sass_facts(c["cubin"]) if isinstance(v["arch"], int) else amd_facts(c["amdgcn"]) for c in codes]
        results.append(dict(zip(KERNELS, facts, strict=True)))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
