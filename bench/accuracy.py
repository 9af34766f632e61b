"""Accuracy beside speed: errors against float64, and the check that decides whether a speed-up may be shown."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bench.baselines import Mix, eager, forward_backward
from bench.cases import Inputs

Errors = dict[str, float]  # of "y", and of the gradients for "inputs", "alpha" and "mask"
FORWARD = ("y",)
FORWARD_BACKWARD = ("y", "inputs", "alpha", "mask")


def float64_results(inputs: Inputs) -> tuple[Tensor, ...]:
    """y and the gradients of every leaf: DARTS' expression on the same numbers in float64."""
    return forward_backward(eager, inputs.to(dtype=torch.float64))


def relative_errors(mix: Mix, inputs: Inputs, exact: Sequence[Tensor], pruned: int = 0) -> Errors:
    """||result - exact|| / ||exact|| of a mix; the first `pruned` candidates are not among its inputs.

    The gradient of one gate is a single sum that may cancel to nearly nothing by chance, and its error with it or not:
    it is measured against the gradients of gates and alpha together, which are made of the same terms.
    """
    y, *gradients = forward_backward(mix, inputs)
    *outputs, alpha, mask = gradients
    exact_y, *exact_outputs, exact_alpha, exact_mask = exact
    return {
        "y": relative_error([y], [exact_y]),
        "inputs": relative_error(outputs, exact_outputs[pruned:]),
        "alpha": relative_error([alpha], [exact_alpha]),
        "mask": relative_error([mask], [exact_mask], scale=[exact_mask, exact_alpha]),
    }


def relative_error(results: Sequence[Tensor], exact: Sequence[Tensor], scale: Sequence[Tensor] | None = None) -> float:
    """||results - exact|| / ||scale||, by default ||exact||.

    Of zeros, such as the gradient of alpha where an edge has one candidate: 0 if exact, else infinite.
    """
    error = sum(float((a.double() - b).square().sum()) for a, b in zip(results, exact, strict=True))
    size = sum(float(b.square().sum()) for b in (exact if scale is None else scale))
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return (error / size) ** 0.5


def is_accurate(ours: Errors, eager: Errors, names: Sequence[str], dtype: torch.dtype) -> bool:
    """At most twice eager's own error, plus four roundings of the accumulator. NaN never passes."""
    rounding = 4 * torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    return all(ours[name] <= 2 * eager[name] + rounding for name in names)
