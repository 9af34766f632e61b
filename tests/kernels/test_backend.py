"""Which implementation runs, and what is said when it is not the expected one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dssp_kernels
from dssp_kernels import get_backend, set_backend
from dssp_kernels.backend import WHY_NO_CPU_KERNELS, implementation_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored_backend() -> Iterator[None]:
    before = get_backend()
    yield
    set_backend(before)


def _python(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a folder, whose packages come first."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
    )


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="name: .*auto, triton, cpu, reference.*'cuda'"):
        set_backend("cuda")


@pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason="no C++ kernels")
def test_cpu_tensors_run_the_cpp_kernels() -> None:
    set_backend("auto")
    assert implementation_for(CPU) == "cpu"


def test_reference_serves_every_device() -> None:
    set_backend("reference")
    assert {implementation_for(torch.device(name)) for name in ("cpu", "cuda", "meta")} == {"reference"}


def test_backend_that_cannot_serve_the_device_says_so() -> None:
    set_backend("cpu")
    with pytest.raises(RuntimeError, match="backend 'cpu' cannot run on cuda tensors"):
        implementation_for(torch.device("cuda"))


def test_environment_sets_the_backend() -> None:
    root = Path(dssp_kernels.__file__).parents[1]
    code = "import dssp_kernels; print(dssp_kernels.get_backend())"
    assert _python(code, root, DSSP_BACKEND="reference").stdout.strip() == "reference"
    assert "DSSP_BACKEND: expected one of" in _python(code, root, DSSP_BACKEND="gpu").stderr


def test_without_compiler_the_reference_runs_and_says_so_once(tmp_path: Path) -> None:
    package = Path(dssp_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "dssp_kernels", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    code = """
import sys; sys.modules["triton"] = None  # as where triton is absent
import torch, dssp_kernels
edge = dssp_kernels.FusedMixedEdge([torch.nn.Identity(), torch.nn.ReLU()])
for _ in range(3):
    edge(torch.ones(2, 3, requires_grad=True)).sum().backward()
print(torch.ops.dssp_kernels.mixed_sum_forward([torch.ones(2)], torch.zeros(1), None, None, True).tolist())
"""
    done = _python(code, tmp_path)
    assert done.stdout.strip() == "[1.0, 1.0]", done.stderr
    assert done.stderr.count("because the C++ kernels are missing: they were not built") == 1
