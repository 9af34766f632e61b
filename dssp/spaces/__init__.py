"""Search spaces, by name."""

from __future__ import annotations

from dssp.spaces.cell_space import CellSpace
from dssp.spaces.chain import CHAIN
from dssp.spaces.darts import DARTS
from dssp.spaces.nasbench201 import NASBENCH201

SPACES: dict[str, CellSpace] = {space.name: space for space in (DARTS, NASBENCH201, CHAIN)}


def get_space(name: str) -> CellSpace:
    """The search space called `name`; ValueError if there is none."""
    if name not in SPACES:
        raise ValueError(f"space: got {name!r}, expected one of {', '.join(SPACES)}")
    return SPACES[name]


__all__ = ["CHAIN", "DARTS", "NASBENCH201", "SPACES", "CellSpace", "get_space"]
