"""Hard paths scored on held-out images, and the choice between those that tie."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dssp.paths.space import Path, PathSpace

Score = dict[Path, Tensor]
"""Paths and the loss of each held-out image on them."""


def score_random(space: PathSpace, losses: Callable[[Path], Tensor], *, limit: int, seed: int) -> Score:
    """The held-out losses of all paths or, where there are more than ``limit``, of that many drawn by space.draw().

    Of fewer, where a budget leaves so few that 100 draws for each do not find them.
    """
    if len(space) <= limit:
        return {path: losses(path) for path in space}
    generator = torch.Generator().manual_seed(seed)
    found: Score = {}
    for _ in range(100 * limit):
        path = space.draw(generator)
        if path not in found:
            found[path] = losses(path)
        if len(found) == limit:
            break
    return found


def score(space: PathSpace, losses: Callable[[Path], Tensor], *, limit: int, seed: int) -> Score:
    """The held-out losses of all paths or, where there are more than ``limit``, of that many on a search among them.

    The search takes the path of the largest alpha and random ones for a quarter of ``limit``, then goes on from the
    best to its neighbours, in random order, moving whenever one is better.
    """
    if len(space) <= limit:
        return {path: losses(path) for path in space}
    generator = torch.Generator().manual_seed(seed)
    found: Score = {}
    for path in [space.strongest(), *(space.draw(generator) for _ in range(limit // 4))]:
        found.setdefault(path, losses(path))
    while len(found) < limit:
        best = min(found, key=lambda path: float(found[path].mean()))
        fresh = [path for path in dict.fromkeys(space.neighbours(best)) if path not in found]
        if not fresh:
            break  # a local optimum, all of whose neighbours are known
        for i in torch.randperm(len(fresh), generator=generator)[: limit - len(found)].tolist():
            found[fresh[i]] = losses(fresh[i])
            if float(found[fresh[i]].mean()) < float(found[best].mean()):
                break
    return found


def select(scores: Score, preference: Callable[[Path], float]) -> Path:
    """Of the paths that tie with the one of the lowest mean loss, the most preferred; among equals, the lowest loss.

    Two paths tie if the mean of their paired differences is within two of its standard errors. To prefer small ones is
    parsimony; that large ones are better is a prior, which NAS-Bench-201 and digits confirm and other data need not.
    Its reason: a path that has been trained for few steps does worse the more weights it has, and so is worth more
    than it shows.
    """
    best = min(scores, key=lambda path: float(scores[path].mean()))
    ties = []
    for path, losses in scores.items():
        difference = losses - scores[best]
        if float(difference.mean()) <= 2 * float(difference.std()) / math.sqrt(len(difference)):
            ties.append(path)
    return max(ties, key=lambda path: (preference(path), -float(scores[path].mean())))
