"""What the compiled Triton kernels do on GPUs that need not be there: 16-byte accesses, no spills, few registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
Variant = dict[str, Any]
# Programs have 128 threads, an NVIDIA multiprocessor has 65,536 registers. What counts is bytes in flight: resident
# programs x 128 threads x loads per thread x 16. To hide an H200's latency takes about 40 KB per multiprocessor.
CEILINGS = {
    "forward": 64,  # 8 programs resident, 8 loads each: 128 KB
    "backward": 80,  # 6 programs, 9 loads: 108 KB
    "backward of a node": 128,  # 4 programs, 9 loads: 72 KB
    "weights": 48,  # 10 programs; reads one tensor, writes the others
    "finish": 64,  # one program of 256 threads per edge
}


def variant(kernel: str, arch: int | str, dtype: str, candidates: int, **others: Any) -> Variant:
    common = {"kernel": kernel, "arch": arch, "dtype": dtype, "candidates": candidates}
    return common | {"edges": 1, "n": 2**20} | others


VARIANTS = [
    variant(kernel, arch, dtype, candidates)
    for arch in (80, 90, 100, "gfx942")
    for kernel, dtype, candidates in (
        ("forward", "bfloat16", 8),
        ("backward", "bfloat16", 8),
        ("forward", "float32", 7),
        ("backward", "float32", 7),
    )
] + [
    variant("finish", 90, "bfloat16", 8),
    variant("weights", 90, "bfloat16", 8),
    variant("weights", 90, "float32", 7),
    variant("forward", 90, "float32", 2),
    variant("backward", 90, "bfloat16", 4),
    variant("forward", 90, "bfloat16", 8, edges=5),
    variant("backward", 90, "bfloat16", 8, edges=2),
    variant("weights", 90, "bfloat16", 8, edges=2),
    variant("forward", 90, "bfloat16", 7, n=2**20 + 1),
    variant("backward", 90, "bfloat16", 7, n=2**20 + 1),
    variant("forward", 90, "float32", 8, n=2**31),
    variant("backward", 90, "float32", 8, n=2**31),
    variant("backward", 90, "bfloat16", 33),
]


def name(v: Variant) -> str:
    return f"{v['kernel']}-{v['arch']}-{v['dtype']}-E{v['edges']}-K{v['candidates']}-n{v['n']}"


@pytest.fixture(scope="module")
def facts() -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("codegen.py"))],
        input=json.dumps(VARIANTS),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(map(name, VARIANTS), json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("v", VARIANTS, ids=name)
def test_no_spills_and_few_registers(v: Variant, facts: dict[str, dict[str, Any]]) -> None:
    found = facts[name(v)]
    assert found["spills"] == 0 and found["stack"] == 0
    if isinstance(v["arch"], int):  # an AMD compute unit has four times the registers
        node = v["kernel"] == "backward" and (v["edges"] > 1 or v["candidates"] > 8)
        assert found["registers"] <= CEILINGS["backward of a node" if node else v["kernel"]]


@pytest.mark.parametrize("v", [v for v in VARIANTS if v["kernel"] != "finish"], ids=name)
def test_every_tensor_is_read_and_written_16_bytes_at_a_time(v: Variant, facts: dict[str, dict[str, Any]]) -> None:
    """One 16-byte access per tensor and vector, nothing narrower."""
    found = facts[name(v)]
    loads, stores = ({int(width): count for width, count in found[key].items()} for key in ("loads", "stores"))
    entries, groups = v["edges"] * v["candidates"], v["edges"] * -(-v["candidates"] // 8)
    reads = {"forward": entries, "backward": entries + groups, "weights": groups}[v["kernel"]]
    writes = 1 if v["kernel"] == "forward" else entries
    vectors = 4 if v["candidates"] <= 2 else 2 if v["candidates"] <= 4 else 1  # per thread and step
    assert loads[16] == reads * vectors and stores[16] == writes * vectors
    if isinstance(v["arch"], str):
        return
    rests = v["n"] % 2  # what is left of less than one vector goes element by element, once
    narrow_loads = sum(count for width, count in loads.items() if width < 16)
    parameters = (1 + rests) * v["edges"] * (v["candidates"] + 2)  # alpha, mask and active, float32 and bool
    assert narrow_loads <= parameters + rests * reads
    narrow_stores = sum(count for width, count in stores.items() if width < 16)
    assert narrow_stores <= rests * writes + (groups if v["kernel"] == "backward" else 0)  # partial sums


@pytest.mark.parametrize(
    "v", [v for v in VARIANTS if v["kernel"] in ("forward", "backward") and isinstance(v["arch"], int)], ids=name
)
def test_loads_are_in_flight_together(v: Variant, facts: dict[str, dict[str, Any]]) -> None:
    """Nothing is computed, hence nothing waited for, between the first and the last 16-byte load."""
    if v["candidates"] > 8:
        pytest.skip("candidates are read in groups of 8")
    assert facts[name(v)]["arithmetic_between_loads"] == 0
