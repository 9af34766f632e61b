"""The contenders: what people write today, the same compiled, our operators, and a copy as the ceiling."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bench.cases import Inputs
from dssp_kernels import batch_norm_mixed_sum, mixed_sum

Mix = Callable[..., Any]  # (outputs, alpha, mask, active, norms where the case has any) -> Tensor
Norms = Sequence[nn.BatchNorm2d | None]
CACHE = "TORCHINDUCTOR_CACHE_DIR"


def eager(
    outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None = None, norms: Norms | None = None
) -> Any:
    """DARTS' own expression for an edge, each candidate's BatchNorm in training mode before it; for a node, its sum
    over the edges.

    Stock code knows no pruned edge: one whose flag is off is computed and multiplied by 0, at full cost.
    """
    weights, gates = torch.softmax(alpha, -1), torch.sigmoid(mask)
    entries = iter(outputs if norms is None else normalised(outputs, norms))

    def edge(row: Tensor) -> Any:  # the row ends first: what is left of the entries belongs to the next edge
        return sum(w * o for w, o in zip(row, entries, strict=False))

    if alpha.dim() == 1:
        return edge(weights) * gates
    if active is not None:
        gates = gates * active
    return sum(edge(row) * gate for row, gate in zip(weights, gates, strict=True))


def normalised(outputs: list[Tensor], norms: Norms) -> Iterator[Tensor]:
    """One after the other, when the sum asks for it: as DARTS' candidates end in their norm."""
    return (norm(output) for norm, output in zip(norms, outputs, strict=True))  # type: ignore[misc]  # none is None


def ours(
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor,
    active: Tensor | None = None,
    norms: Norms | None = None,
) -> Tensor:
    """The fused operator of dssp_kernels."""
    if norms is None:
        return mixed_sum(outputs, alpha, mask, active=active)
    return batch_norm_mixed_sum(outputs, alpha, mask, norms=norms, training=True, active=active)


def stack_einsum(outputs: list[Tensor], alpha: Tensor, mask: Tensor, active: Tensor | None = None) -> Tensor:
    """All outputs stacked into one tensor and contracted with their coefficients."""
    gates = torch.sigmoid(mask) if active is None else torch.sigmoid(mask) * active
    coefficients = (torch.softmax(alpha, -1) * gates.unsqueeze(-1)).flatten()
    stacked = torch.stack(outputs)
    return torch.einsum("k,k...->...", coefficients.to(stacked.dtype), stacked)


def call(mix: Mix, inputs: Inputs) -> Any:
    norms = {} if inputs.norms is None else {"norms": inputs.norms}
    return mix(inputs.outputs, inputs.alpha, inputs.mask, active=inputs.active, **norms)


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
    """Let torch.compile start from nothing, so that its times are those of a first run."""
    before = os.environ.get(CACHE)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        os.environ[CACHE] = folder
        try:
            yield
        finally:
            del os.environ[CACHE]
            if before is not None:
                os.environ[CACHE] = before


class Compiler:
    """torch.compile of the eager expression, or the reason why this machine cannot."""

    def __init__(self, enabled: bool) -> None:
        self.problem = None if enabled else "switched off (--no-compile)"

    def compile(
        self, mix: Mix, inputs: Inputs, passes: Sequence[str], device: torch.device
    ) -> tuple[Mix | None, dict[str, float]]:
        """Compiled mix and the seconds each of the passes took to compile; (None, {}) once the machine has failed to,
        or where no pass is asked for."""
        if self.problem or not passes:
            return None, {}
        torch.compiler.reset()  # each case is compiled for its own static shape and strides
        compiled = torch.compile(mix, fullgraph=True, dynamic=False)
        seconds = {}
        for name in passes:
            start = time.perf_counter()
            try:
                PASSES[name](compiled, inputs)
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
