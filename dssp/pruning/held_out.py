"""The fixed validation images on which removals and derived cells are decided, and what masking costs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.distributed import divided
from dssp.supernet import Supernet

BATCH = 256  # images per forward pass; their statistics are what BatchNorm uses


Measure = Callable[[], Tensor]
"""The losses of a supernet as it is now, one per held-out image: float32 [n] on the CPU."""


class Losses(Protocol):
    """A Measure: on the images on which removals are measured or, if asked, those on which paths are compared."""

    def __call__(self, *, comparing: bool = False) -> Tensor: ...


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm uses the batch's own statistics and leaves the running ones alone."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and module.track_running_stats]
    for norm in norms:
        norm.track_running_stats = False
    try:
        yield
    finally:
        for norm in norms:
            norm.track_running_stats = True


@torch.no_grad()
def held_out_logits(model: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """logits(images), a function of `model`, under batch statistics: the model is left as it was.

    Several ranks divide the batches among them, and all get the same bits: those that one process has.
    """
    with batch_statistics(model):
        return torch.cat(divided(logits, images.tensor_split(-(-len(images) // BATCH))))


def held_out_losses(model: nn.Module, logits: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor) -> Tensor:
    """The cross-entropy of each image under batch statistics: [n] on the CPU."""
    return F.cross_entropy(held_out_logits(model, logits, images), labels, reduction="none").float().cpu()


def edge_effects(supernet: Supernet, edges: Sequence[str], losses: Measure) -> list[Tensor]:
    """What masking each edge alone adds to each held-out loss."""
    full, effects = losses(), []
    for edge in edges:
        for mixed_edge in supernet.mixed_edges(edge):
            mixed_edge.prune()
        effects.append(losses() - full)
        for mixed_edge in supernet.mixed_edges(edge):
            mixed_edge.restore()
    return effects


def candidate_effects(supernet: Supernet, candidates: Sequence[tuple[str, str]], losses: Measure) -> list[Tensor]:
    """What masking each candidate (edge, operation) alone adds to each held-out loss, the softmax renormalised."""
    full, effects = losses(), []
    for edge, operation in candidates:
        cell_type, position = supernet.locate(edge)
        offered = supernet.offered(cell_type)[position]
        k = supernet.space.operations.index(operation)
        offered[k] = False
        effects.append(losses() - full)
        offered[k] = True
    return effects
