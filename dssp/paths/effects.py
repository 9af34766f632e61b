"""What each candidate contributes to the hard paths it is on: an additive model of their held-out losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dssp.paths.scores import Score, score
from dssp.paths.space import Path, PathSpace

Floats = NDArray[np.float64]
Effects = dict[tuple[int, int], float]
"""By position of the edge over all cell types and of the candidate."""


def path_effects(space: PathSpace, losses: Callable[[Path], Tensor], *, count: int, seed: int) -> Effects:
    """By how much the mean held-out loss of a path is lower with a candidate on it, beside the others of its edge.

    Least squares on ``count`` paths drawn by space.draw():

        loss(path) = c - sum over its edges e of effect(e, path[e])

    Every loss informs on all edges at once, so far fewer paths than there are tell candidates apart. Only differences
    between candidates of one edge mean something: the solution is the one of the smallest norm.
    """
    generator = torch.Generator().manual_seed(seed)
    paths = [space.draw(generator) for _ in range(count)]
    columns, design = _design(paths)
    coefficients = _least_squares(design, np.array([float(losses(path).double().mean()) for path in paths]))
    return dict(zip(columns, (-coefficients[1:]).tolist(), strict=True))


def score_smoothly(space: PathSpace, losses: Callable[[Path], Tensor], *, limit: int, seed: int) -> Score:
    """The result of scores.score(), halfway() to the additive model."""
    return halfway(score(space, losses, limit=limit, seed=seed))


def halfway(scores: Score) -> Score:
    """Every loss halfway between what was measured and what additive_model() says.

    The loss of a path in shared weights also tells which paths happened to train them last. The model averages over
    that, and knows nothing of how candidates work together; mostly their mean ranks paths better than either
    (bench/path_ranks.py).
    """
    model = additive_model(scores)
    return {path: (losses + model[path]) / 2 for path, losses in scores.items()}


def additive_model(scores: Score) -> Score:
    """The losses as sums of what the candidates of a path add, least squares over all paths, image by image."""
    measured = torch.stack(list(scores.values())).double().numpy()  # [paths, images]
    _, design = _design(list(scores))
    fitted = torch.from_numpy(design @ _least_squares(design, measured)).float()
    return dict(zip(scores, fitted, strict=True))


def _design(paths: Sequence[Path]) -> tuple[list[tuple[int, int]], Floats]:
    """The (edge, candidate) pairs of the paths, and [paths, 1 + pairs]: a one, then whether a path has each."""
    columns = sorted({(e, k) for path in paths for e, k in enumerate(path) if k is not None})
    rows = [[1.0, *(float(path[e] == k) for e, k in columns)] for path in paths]
    return columns, np.array(rows)


def _least_squares(design: Floats, values: Floats) -> Floats:
    """Of all solutions the one of the smallest norm, for [rows, columns] and [rows] or [rows, n]."""
    return np.asarray(np.linalg.lstsq(design, values, rcond=None)[0], dtype=np.float64)
