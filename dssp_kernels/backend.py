"""Which implementation runs: by the tensors' device, overridable with set_backend() or DSSP_BACKEND."""

from __future__ import annotations

import functools
import importlib.util
import os
import warnings
from pathlib import Path

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "cpu", "reference")


def _checked(name: str, origin: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{origin}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_backend = _checked(os.environ.get("DSSP_BACKEND", "auto"), "DSSP_BACKEND")


def set_backend(name: str) -> None:
    """Choose the implementation behind every operator of this package.

    - ``"auto"``: Triton for CUDA tensors, C++ for CPU tensors, the reference where neither is there.
    - ``"triton"``: Triton only (CPU tensors too when TRITON_INTERPRET=1 was set before triton was imported).
    - ``"cpu"``: the C++ kernels only.
    - ``"reference"``: plain PyTorch on any device: the oracle the others are tested against.

    Whatever the choice, the reference runs under the transforms of torch.func (grad, vmap, jvp, hessian, ...) and in a
    backward pass that is itself differentiated or batched.

    The environment variable DSSP_BACKEND sets the initial choice. Raises ValueError for any other name.
    """
    global _backend
    _backend = _checked(name, "name")


def get_backend() -> str:
    """The choice in force: one of ``"auto"``, ``"triton"``, ``"cpu"``, ``"reference"``."""
    return _backend


def _load_cpu_kernels() -> str | None:
    """Load the C++ extension; the reason why it cannot be used, or None."""
    libraries = sorted(Path(__file__).parent.glob("_cpu*.so"))
    if not libraries:
        return "they were not built (no C++17 compiler that could, when the package was installed)"
    try:
        torch.ops.load_library(str(libraries[0]))
    except OSError as error:
        return f"{libraries[0].name} does not load with torch {torch.__version__}: {error}"
    return None


WHY_NO_CPU_KERNELS = _load_cpu_kernels()
HAS_TRITON = importlib.util.find_spec("triton") is not None


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _reference_instead(why: str) -> str:
    if not torch.compiler.is_compiling():
        _say_once(f"dssp_kernels: the slower reference backend runs, because {why}")
    return "reference"


def transforms_are_active() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp, ...) is at work: PyTorch's own operators know them all."""
    return torch._C._are_functorch_transforms_active()


def backward_is_transformed(grad: Tensor) -> bool:
    """Whether a backward pass that got this gradient is itself differentiated or batched (is_grads_batched=True)."""
    if torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() or transforms_are_active() or torch._C._functorch.is_legacy_batchedtensor(grad)


def implementation_for(device: torch.device) -> str:
    """Who serves tensors on ``device``: ``"triton"``, ``"interpreter"`` (of Triton), ``"cpu"`` or ``"reference"``.

    Raises RuntimeError when the backend asked for cannot serve that device.
    """
    if _backend == "reference" or transforms_are_active():
        return "reference"
    if device.type == "cuda" and _backend != "cpu":
        if HAS_TRITON:
            return "triton"
        if _backend == "triton":
            raise RuntimeError("backend 'triton' was asked for, but triton is not installed: pip install triton")
        return _reference_instead("triton is not installed (pip install triton)")
    if device.type == "cpu" and _backend != "triton":
        if WHY_NO_CPU_KERNELS is None:
            return "cpu"
        if _backend == "cpu":
            raise RuntimeError(f"backend 'cpu' was asked for, but the C++ kernels are missing: {WHY_NO_CPU_KERNELS}")
        return _reference_instead(f"the C++ kernels are missing: {WHY_NO_CPU_KERNELS}")
    if device.type == "cpu" and HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if _backend == "auto":
        return _reference_instead(f"there are no kernels for {device.type} tensors")
    raise RuntimeError(f"backend {_backend!r} cannot run on {device.type} tensors: move them or set_backend('auto')")
