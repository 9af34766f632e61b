"""Positions along an axis: round tick values, and things moved apart until none overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise


def ticks(low: float, high: float, count: int = 6, *, whole: bool = False) -> list[float]:
    """Round values, 1, 2 or 5 times a power of ten apart, that enclose [low, high]; about `count`, at most two more.

    `whole` keeps to integers. An empty range is widened around its value.
    """
    if whole:
        low, high = math.floor(low), math.ceil(high)
    if not high - low > 1e-9 * max(abs(low), abs(high), 1e-200):
        margin = max(abs(low), abs(high)) / 10 or 0.5
        low, high = low - margin, high + margin
    exponent = math.floor(math.log10((high - low) / count))
    if whole and exponent < 0:
        exponent = 0
    digit = next(d for d in (1, 2, 5, 10) if d * 10.0**exponent * count >= (high - low) * (1 - 1e-9))
    step = digit * 10.0**exponent
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    # Integer arithmetic, so that the third tick of 0.1 is 0.3 and not 0.30000000000000004.
    scale = 10 ** abs(exponent)
    return [i * digit * scale if exponent >= 0 else i * digit / scale for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Ticks as text, all with the same decimals: 0.0, 0.5, 1.0; powers of ten where plain decimals would be long."""
    plain = all(value == 0 or 1e-4 <= abs(value) < 1e7 for value in values)
    decimals = next((d for d in range(8) if all(math.isclose(round(v, d), v, rel_tol=1e-9) for v in values)), 8)
    return [(f"{v:,.{decimals}f}" if plain else f"{v:g}").replace("-", "\N{MINUS SIGN}") for v in values]


def spread(wanted: Sequence[float], sizes: Sequence[float]) -> list[float]:
    """Centres closest to `wanted` (least squares) that keep the order and do not let items of these sizes overlap.

    Pool adjacent violators: with the cumulated sizes subtracted, "no overlap" reads "not decreasing".
    """
    offsets = [0.0]
    for before, after in pairwise(sizes):
        offsets.append(offsets[-1] + (before + after) / 2)
    pools: list[tuple[float, int]] = []  # (mean, members)
    for value, offset in zip(wanted, offsets, strict=False):
        mean, members = value - offset, 1
        while pools and pools[-1][0] > mean:
            before_mean, before_members = pools.pop()
            mean = (mean * members + before_mean * before_members) / (members + before_members)
            members += before_members
        pools.append((mean, members))
    placed = [mean for mean, members in pools for _ in range(members)]
    return [mean + offset for mean, offset in zip(placed, offsets, strict=False)]
