"""Memory that betrays a kernel which reads what was never written, or reads or writes beside its tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

MARGIN = 64
CANARY = 12345.0


def in_margins(values: Tensor, margin_value: float) -> tuple[Tensor, Tensor]:
    """A copy of the same shape and strides in the middle of a larger buffer, and that buffer."""
    buffer = torch.full((values.numel() + 2 * MARGIN,), margin_value, dtype=values.dtype, device=values.device)
    view = buffer.as_strided(values.shape, values.stride(), MARGIN)
    return view.copy_(values), buffer


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """torch.empty and torch.empty_like give NaN, with margins that must still be whole in the end."""
    buffers: list[Tensor] = []
    empty, empty_like = torch.empty, torch.empty_like

    def guard(allocated: Tensor) -> Tensor:
        view, buffer = in_margins(allocated.fill_(torch.nan), CANARY)
        buffers.append(buffer)
        return view

    with (
        patch.object(torch, "empty", lambda *args, **keywords: guard(empty(*args, **keywords))),
        patch.object(torch, "empty_like", lambda *args, **keywords: guard(empty_like(*args, **keywords))),
    ):
        yield
    assert buffers
    for buffer in buffers:
        assert (buffer[:MARGIN] == CANARY).all() and (buffer[-MARGIN:] == CANARY).all()
