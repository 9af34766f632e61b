"""Search spaces, by name."""

from __future__ import annotations

from dssp.spaces.darts import DARTS, CellSpace

SPACES: dict[str, CellSpace] = {space.name: space for space in (DARTS,)}


def get_space(name: str) -> CellSpace:
    """The search space called `name`; ValueError if there is none."""
    if name not in SPACES:
        raise ValueError(f"space: got {name!r}, expected one of {', '.join(SPACES)}")
    return SPACES[name]


__all__ = ["DARTS", "SPACES", "CellSpace", "get_space"]
