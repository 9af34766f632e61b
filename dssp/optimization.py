"""What searching and retraining share of weight optimisation: SGD, the cosine, one clipped step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.skipped_steps import reported, step_if_finite


def sgd(weights: Iterable[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD as DARTS uses it, updating all weights in a few batched kernels."""
    return torch.optim.SGD(weights, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)


def cosine(epoch: int, epochs: int, *, start: float, end: float) -> float:
    """Learning rate of an epoch: from ``start`` towards ``end`` along half a cosine (a function of the epoch alone)."""
    return end + 0.5 * (start - end) * (1.0 + math.cos(math.pi * epoch / epochs))


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The same learning rate for all groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def logits_of(model: Callable[[Tensor], Tensor], images: Tensor, precision: str) -> Tensor:
    """model(images) or, with precision "bfloat16", the same under autocast and back in float32."""
    if precision != "bfloat16":
        return model(images)
    with torch.autocast(images.device.type, torch.bfloat16):
        return model(images).float()


def weight_step(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    *,
    grad_clip: float,
    precision: str,
    penalty: Callable[[], Tensor] | None = None,
) -> dict[str, Tensor]:
    """One step on the cross-entropy; detached scalars train_loss, train_accuracy. A grad_clip of 0 clips nothing.

    A `penalty` is added to the loss: what parameters that are not this optimizer's learn from beside the cross-entropy.
    Where loss or gradient are not finite, nothing changes but BatchNorm's statistics, and both scalars are NaN.
    """
    logits = logits_of(model, images, precision)
    loss = F.cross_entropy(logits, labels)
    optimizer.zero_grad()
    (loss if penalty is None else loss + penalty()).backward()
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, grad_clip or math.inf, foreach=True)
    taken = step_if_finite(optimizer, loss, norm)
    accuracy = (logits.detach().argmax(1) == labels).float().mean()
    return reported(taken, {"train_loss": loss, "train_accuracy": accuracy})


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
    """Mean loss and accuracy over all images, in eval mode."""
    was_training = model.training
    model.eval()
    losses, hits, count = [], [], 0
    for images, labels in batches:
        logits = model(images)
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        hits.append((logits.argmax(1) == labels).sum())
        count += len(labels)
    model.train(was_training)
    return float(torch.stack(losses).sum()) / count, float(torch.stack(hits).sum()) / count
