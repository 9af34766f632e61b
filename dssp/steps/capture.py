"""CUDA graphs: a training step recorded once and replayed, so that the GPU never waits for Python to launch kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from dssp.distributed import highest

EAGER_STEPS = 2  # before a recording: momentum, library plans and compiled kernels must exist by then

Scalars = dict[str, Tensor]


class CapturedStep:
    """step(*batch) -> scalars, replayed from a CUDA graph once it has run a few times as it is.

    The graph holds addresses and the values of Python numbers: call reset() whenever a learning rate changes or
    parameters come or go; the next steps record it anew. A batch of another shape runs as it is. On a CPU every step
    does; on a GPU where recording fails, a warning says why, once, and every step does from then on.

    Args:
        step: launches work on one device without waiting for it, and reads nothing on the host but shapes.
        enabled: False runs every step as it is.
    """

    def __init__(self, step: Callable[..., Scalars], *, enabled: bool = True) -> None:
        self._step, self._enabled = step, enabled
        self.reset()

    def reset(self) -> None:
        """Forget the recording and give its memory back."""
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: list[Tensor] = []
        self._scalars: Scalars = {}
        self._eager_steps = 0

    @property
    def is_recorded(self) -> bool:
        """Whether the next step of the same shape is a replay."""
        return self._graph is not None

    def __call__(self, *batch: Tensor) -> Scalars:
        if not self._enabled or batch[0].device.type != "cuda":
            return self._step(*batch)
        if self._graph is None and self._eager_steps >= EAGER_STEPS:
            self._record(batch)
        if self._graph is None or [tensor.shape for tensor in batch] != [tensor.shape for tensor in self._batch]:
            return self._run_aside(batch)
        for static, tensor in zip(self._batch, batch, strict=True):
            static.copy_(tensor)
        self._graph.replay()
        return {name: value.clone() for name, value in self._scalars.items()}  # the next replay overwrites them

    def _run_aside(self, batch: tuple[Tensor, ...]) -> Scalars:
        """On a stream of its own, so that autograd ties nothing to the default stream, which cannot be recorded."""
        self._eager_steps += 1
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            scalars = self._step(*batch)
        here.wait_stream(aside)
        return scalars

    def _record(self, batch: tuple[Tensor, ...]) -> None:
        torch.cuda.empty_cache()  # a graph allocates from a pool of its own
        static, graph, recorded = [tensor.clone() for tensor in batch], torch.cuda.CUDAGraph(), False
        try:
            with torch.cuda.graph(graph):
                scalars = self._step(*static)
            recorded = True
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"CUDA graphs: this step cannot be recorded, so it runs uncaptured ({reason})", stacklevel=3)
        self._enabled = not highest(not recorded)  # ranks replay together or not at all
        if self._enabled:
            self._graph, self._batch, self._scalars = graph, static, scalars
