"""What the compiled Triton kernels do on GPUs that need not be there: 16-byte accesses, no spills, few registers."""

from __future__ import annotations

import functools
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


SIZES = (
    ("forward", "bfloat16", 8),
    ("backward", "bfloat16", 8),
    ("forward", "float32", 7),
    ("backward", "float32", 7),
)
VARIANTS = [
    *(variant(kernel, 90, dtype, candidates) for kernel, dtype, candidates in SIZES),
    variant("forward", "gfx942", "bfloat16", 8),
    variant("backward", "gfx942", "bfloat16", 8),
    variant("finish", 90, "bfloat16", 8),
    variant("weights", 90, "bfloat16", 8),
    variant("backward", 90, "bfloat16", 8, edges=2),
    variant("forward", 90, "bfloat16", 7, n=2**20 + 1),
    variant("backward", 90, "bfloat16", 33),
]
SLOW_VARIANTS = [
    *(variant(kernel, arch, dtype, candidates) for arch in (80, 100) for kernel, dtype, candidates in SIZES),
    variant("forward", "gfx942", "float32", 7),
    variant("backward", "gfx942", "float32", 7),
    variant("weights", 90, "float32", 7),
    variant("forward", 90, "float32", 2),
    variant("backward", 90, "bfloat16", 4),
    variant("forward", 90, "bfloat16", 8, edges=5),
    variant("weights", 90, "bfloat16", 8, edges=2),
    variant("backward", 90, "bfloat16", 7, n=2**20 + 1),
    variant("forward", 90, "float32", 8, n=2**31),
    variant("backward", 90, "float32", 8, n=2**31),
]

# Of batch_norm_mixed_sum. Per thread 8 loads of entries are in flight (4 of statistics), and of the gradient 2.
NORM_CEILINGS = {
    "mixed_sum_statistics": 80,  # 6 programs resident, 4 loads each: 48 KB per multiprocessor
    "mixed_sum_fwd_tables": 96,  # tiny
    "mixed_sum_fwd": 128,  # 4 programs, 8 loads: 64 KB
    "mixed_sum_bwd_sums": 168,  # 3 programs, 10 loads: 60 KB; sums and means of 8 channels x 4 entries
    "mixed_sum_bwd_tables": 64,  # tiny
    "mixed_sum_bwd": 96,  # 5 programs, 10 loads: 100 KB
    "running_statistics": 40,  # tiny
}


def norm_variant(kernel: str, arch: int | str, layout: str, **others: Any) -> Variant:
    common = {"kernel": kernel, "arch": arch, "dtype": "bfloat16", "layout": layout, "candidates": 8, "edges": 1}
    return common | {"shape": [64, 16, 32, 32], "training": True, "affine": False, "absent": False} | others


def norm_variants(*configurations: tuple[int | str, str, dict[str, Any]]) -> list[Variant]:
    return [
        norm_variant(kernel, arch, layout, **others)
        for arch, layout, others in configurations
        for kernel in NORM_CEILINGS
        if others.get("training", True) or kernel not in ("mixed_sum_statistics", "running_statistics")
    ]


NORM_VARIANTS = norm_variants((90, "contiguous_format", {}), (90, "channels_last", {}))
SLOW_NORM_VARIANTS = norm_variants(
    *((arch, layout, {}) for arch in (80, 100, "gfx942") for layout in ("contiguous_format", "channels_last")),
    (90, "channels_last", {"dtype": "float32"}),
    (90, "channels_last", {"shape": [64, 24, 7, 7]}),
    (90, "channels_last", {"edges": 2, "affine": True}),
    (90, "contiguous_format", {"edges": 2, "absent": True}),
    (90, "channels_last", {"training": False, "affine": True}),
)
SLOW = [*SLOW_VARIANTS, *SLOW_NORM_VARIANTS]


def marked(variants: list[Variant]) -> list[Any]:
    """The variants as parameters; what is slow is marked so."""
    return [pytest.param(v, marks=pytest.mark.slow) if v in SLOW else v for v in variants]


EVERY_VARIANT, EVERY_NORM_VARIANT = [*VARIANTS, *SLOW_VARIANTS], [*NORM_VARIANTS, *SLOW_NORM_VARIANTS]


def name(v: Variant) -> str:
    tensors = f"n{v['n']}" if "n" in v else f"{v['layout']}-{'x'.join(map(str, v['shape']))}"
    flags = [flag for flag in ("training", "affine", "absent") if v.get(flag)]
    return "-".join([f"{v['kernel']}-{v['arch']}-{v['dtype']}-E{v['edges']}-K{v['candidates']}-{tensors}", *flags])


def compiled(variants: list[Variant]) -> dict[str, dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("codegen.py"))],
        input=json.dumps(variants),
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(map(name, variants), json.loads(done.stdout), strict=True))


@functools.cache
def compiled_with(slow: bool) -> dict[str, dict[str, Any]]:
    """All that are slow, or all others, in one process."""
    return compiled(SLOW if slow else [*VARIANTS, *NORM_VARIANTS])


@pytest.fixture
def found(v: Variant) -> dict[str, Any]:
    """What the machine code of a kernel does."""
    return compiled_with(v in SLOW)[name(v)]


@pytest.mark.parametrize("v", marked(EVERY_VARIANT), ids=name)
def test_no_spills_and_few_registers(v: Variant, found: dict[str, Any]) -> None:
    assert found["spills"] == 0 and found["stack"] == 0
    if isinstance(v["arch"], int):  # an AMD compute unit has four times the registers
        node = v["kernel"] == "backward" and (v["edges"] > 1 or v["candidates"] > 8)
        assert found["registers"] <= CEILINGS["backward of a node" if node else v["kernel"]]


@pytest.mark.parametrize("v", marked([v for v in EVERY_VARIANT if v["kernel"] != "finish"]), ids=name)
def test_every_tensor_is_read_and_written_16_bytes_at_a_time(v: Variant, found: dict[str, Any]) -> None:
    """One 16-byte access per tensor and vector, nothing narrower."""
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
    "v",
    marked([v for v in EVERY_VARIANT if v["kernel"] in ("forward", "backward") and isinstance(v["arch"], int)]),
    ids=name,
)
def test_loads_are_in_flight_together(v: Variant, found: dict[str, Any]) -> None:
    """Nothing is computed, hence nothing waited for, between the first and the last 16-byte load."""
    if v["candidates"] > 8:
        pytest.skip("candidates are read in groups of 8")
    assert found["arithmetic_between_loads"] == 0


@pytest.mark.parametrize("v", marked(EVERY_NORM_VARIANT), ids=name)
def test_norms_inside_the_mix_spill_nothing(v: Variant, found: dict[str, Any]) -> None:
    assert found["spills"] == 0 and found["stack"] == 0
    if isinstance(v["arch"], int):
        shifted = v["kernel"] == "mixed_sum_fwd" and v["affine"]  # 3 programs are resident then: 48 KB
        assert found["registers"] <= (168 if shifted else NORM_CEILINGS[v["kernel"]])


@pytest.mark.parametrize("v", marked(EVERY_NORM_VARIANT), ids=name)
def test_norms_inside_the_mix_read_every_entry_once_16_bytes_at_a_time(v: Variant, found: dict[str, Any]) -> None:
    """Per thread and step: two vectors of each of a group's four entries, and of the gradient; four of statistics.

    Where channels are neighbours in memory, what is known about 16 bytes of them is read as such, too.
    """
    if v["kernel"] not in ("mixed_sum_statistics", "mixed_sum_fwd", "mixed_sum_bwd"):
        pytest.skip("reads what is known per channel as well, or nothing else")
    loads, stores = ({int(width): count for width, count in found[key].items()} for key in ("loads", "stores"))
    element = 2 if v["dtype"] == "bfloat16" else 4
    running = not v["training"]
    entries = {"mixed_sum_statistics": 4, "mixed_sum_fwd": 8, "mixed_sum_bwd": 2 if running else 10}[v["kernel"]]
    tables = {"mixed_sum_statistics": 0, "mixed_sum_fwd": 3 if v["affine"] else 2, "mixed_sum_bwd": 1 if running else 4}
    in_tables = 4 * tables[v["kernel"]] * (4 // element if v["layout"] == "channels_last" else 0)
    repeated = loads[16] // (entries + in_tables)  # the compiler may unroll the loop over groups or shares
    assert loads[16] == (entries + in_tables) * repeated
    assert repeated in ((1, 2, 2 * v["edges"]) if v["kernel"] != "mixed_sum_bwd" else (1,))
    written = {"mixed_sum_statistics": 0, "mixed_sum_fwd": 2, "mixed_sum_bwd": 8}[v["kernel"]]
    assert stores.get(16, 0) == written
    assert 2 not in loads and 2 not in stores
