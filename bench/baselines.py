"""The contenders: what people write today, the same compiled, and a copy as the ceiling."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bench.cases import Inputs

Mix = Callable[..., Any]  # (outputs, alpha, mask, active) -> Tensor


def eager(outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None = None) -> Any:
    """DARTS' own expression for an edge; for a node, its sum over the edges.

    Stock code knows no pruned edge: one whose flag is off is computed and multiplied by 0, at full cost.
    """
    weights, gates = torch.softmax(alpha, -1), torch.sigmoid(mask)
    if alpha.dim() == 1:
        return sum(w * o for w, o in zip(weights, outputs, strict=True)) * gates
    if active is not None:
        gates = gates * active
    candidates = alpha.shape[1]
    edges = [outputs[i : i + candidates] for i in range(0, len(outputs), candidates)]
    rows = zip(weights, edges, gates, strict=True)
    return sum(sum(w * o for w, o in zip(row, edge, strict=True)) * gate for row, edge, gate in rows)


def stack_einsum(outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None = None) -> Tensor:
    """All outputs stacked into one tensor and contracted with their coefficients."""
    gates = torch.sigmoid(mask) if active is None else torch.sigmoid(mask) * active
    coefficients = (torch.softmax(alpha, -1) * gates.unsqueeze(-1)).flatten()
    stacked = torch.stack(outputs)
    return torch.einsum("k,k...->...", coefficients.to(stacked.dtype), stacked)


def call(mix: Mix, inputs: Inputs) -> Any:
    return mix(inputs.outputs, inputs.alpha, inputs.mask, active=inputs.active)


def forward(mix: Mix, inputs: Inputs) -> Tensor:
    """The mix as evaluation runs it: nothing recorded for a backward pass."""
    with torch.no_grad():
        return call(mix, inputs)


def forward_backward(mix: Mix, inputs: Inputs) -> tuple[Tensor, ...]:
    """The mix and its gradients for every candidate output, alpha and the mask, all freshly allocated."""
    y = call(mix, inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs.leaves, inputs.grad))


PASSES = {"forward": forward, "forward+backward": forward_backward}


@contextmanager
def empty_compile_cache() -> Iterator[None]:
    """Let torch.compile start from nothing, so that its times are those of a first run, unless a cache was chosen."""
    if "TORCHINDUCTOR_CACHE_DIR" in os.environ:
        yield
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        try:
            yield
        finally:
            del os.environ["TORCHINDUCTOR_CACHE_DIR"]


class Compiler:
    """torch.compile of the eager expression, or the reason why this machine cannot."""

    def __init__(self, enabled: bool) -> None:
        self.problem = None if enabled else "switched off (--no-compile)"

    def compile(self, mix: Mix, inputs: Inputs, device: torch.device) -> tuple[Mix | None, dict[str, float]]:
        """Compiled mix and the seconds each pass took to compile; (None, {}) once the machine has failed to."""
        if self.problem:
            return None, {}
        torch.compiler.reset()  # each case is compiled for its own static shape and strides
        compiled = torch.compile(mix, fullgraph=True, dynamic=False)
        seconds = {}
        for name, run in PASSES.items():
            start = time.perf_counter()
            try:
                run(compiled, inputs)
            except (
                RuntimeError,
                OSError,
            ) as error:  # theirs are RuntimeErrors; a compiler that is missing may be either
                self.problem = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                return None, {}
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name] = time.perf_counter() - start
        return compiled, seconds


def copy_of_the_same_size(total_bytes: int, sets: int, device: torch.device) -> list[Callable[[], Tensor]]:
    """For each input set, a copy into an existing buffer that reads and writes `total_bytes` together."""
    buffers = [torch.ones(2, total_bytes // 8, dtype=torch.float32, device=device) for _ in range(sets)]
    return [lambda pair=pair: pair[1].copy_(pair[0]) for pair in buffers]  # type: ignore[misc]  # bound default
