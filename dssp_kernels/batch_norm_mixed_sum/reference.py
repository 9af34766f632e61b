"""batch_norm_mixed_sum in plain PyTorch: the oracle. Any device, differentiable any number of times."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dssp_kernels.mixed_sum.reference import mixed_sum_reference

PLAIN, RUNNING, BATCH = range(3)
"""What an entry is: not normalised, normalised by its running statistics, by those of the batch."""


def batch_norm_mixed_sum_reference(
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_variances: Sequence[Tensor | None],
    kinds: Sequence[int],
    eps: Sequence[float],
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, variance):  y = sum_ek c_ek * ((o_ek - mean_ek) / sqrt(variance_ek + eps_ek) * weight_ek + bias_ek).

    outputs: E*K tensors [B, C, H, W] of one dtype, or None; c as in mixed_sum; an entry that is PLAIN adds c_ek * o_ek.
    Sequences of optional tensors [C] have an entry per output, or none at all. mean and variance [E*K, C]: the
    statistics used, float64, the variance without Bessel's correction; 0 and 1 for entries that are not normalised.
    """
    first = next(output for output in outputs if output is not None)
    sum_dtype = torch.promote_types(first.dtype, torch.float32)
    candidates = alpha.shape[-1]
    means = torch.zeros(len(outputs), first.shape[1], dtype=torch.float64, device=first.device)
    variances = torch.ones_like(means)
    normalised: list[Tensor | None] = []
    for i, output in enumerate(outputs):
        if output is None:
            normalised.append(None)
            continue
        x = output.to(sum_dtype)
        if active is not None:  # whatever an inactive edge holds stays out of the statistics' gradients as well
            x = torch.where(active[i // candidates], x, 0.0)
        if kinds[i] != PLAIN:
            if kinds[i] == BATCH:
                variance, mean = _variance_and_mean(x)
            else:
                mean, variance = running_means[i].to(sum_dtype), running_variances[i].to(sum_dtype)  # type: ignore[union-attr]
            means[i], variances[i] = mean.detach(), variance.detach()
            if active is not None:
                variance = torch.where(active[i // candidates], variance, 1.0)
            x = (x - _per_channel(mean)) * _per_channel((variance + eps[i]).rsqrt())
            if weights and weights[i] is not None:
                x = x * _per_channel(weights[i].to(sum_dtype))  # type: ignore[union-attr]
            if biases and biases[i] is not None:
                x = x + _per_channel(biases[i].to(sum_dtype))  # type: ignore[union-attr]
        normalised.append(x)
    y = mixed_sum_reference(normalised, alpha, mask, softmax, active)
    return y.to(first.dtype), means, variances


def _variance_and_mean(x: Tensor) -> tuple[Tensor, Tensor]:
    if x.numel() == 0:
        return x.new_ones(x.shape[1]), x.new_zeros(x.shape[1])
    return torch.var_mean(x, dim=(0, 2, 3), correction=0)


def _per_channel(values: Tensor) -> Tensor:
    return values.reshape(1, -1, 1, 1)


def update_running_statistics_reference(
    running_means: Sequence[Tensor],
    running_variances: Sequence[Tensor],
    counters: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    active: Tensor | None,
    entries: Sequence[int],
    momenta: Sequence[float],
    count: int,
) -> None:
    """BatchNorm2d's update, in place, for the norms of some ``entries`` (rows of mean and variance [E*K, C]).

    running = (1 - momentum) * running + momentum * new, with Bessel's correction for the variance; a negative momentum
    stands for the cumulative average, 1 / (number of batches). ``count``: elements per channel. Inactive edges stay.
    """
    for running_mean, running_variance, counter, entry, momentum in zip(
        running_means, running_variances, counters, entries, momenta, strict=True
    ):
        live = None if active is None else active[entry * active.numel() // mean.shape[0]]
        counter.add_(1 if live is None else live.to(counter.dtype))
        if count == 0:
            continue
        factor = 1.0 / counter.double() if momentum < 0 else momentum
        unbiased = variance[entry] * (count / max(count - 1, 1))
        for running, new in ((running_mean, mean[entry]), (running_variance, unbiased)):
            updated = ((1.0 - factor) * running.double() + factor * new).to(running.dtype)
            running.copy_(updated if live is None else torch.where(live, updated, running))
