"""The genotype of a chain of inverted bottlenecks: per stage one operation for each layer, or `none`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

KERNELS, EXPANSIONS = (3, 5, 7), (3, 6)
OPERATIONS = ("none", *(f"mb_conv_{k}x{k}_e{e}" for e in EXPANSIONS for k in KERNELS))  # e: expansion
STAGES = 6

Edge = tuple[str, int]
Cell = tuple[tuple[Edge, ...], ...]


@dataclass(frozen=True)
class ChainGenotype:
    """A chain in stages (ProxylessNAS, arXiv:1812.00332; FBNet, arXiv:1812.03443): per stage its layers' operations.

    `none` is a layer that is not there. The first layer of a stage changes size and width, so it always is. Raises
    ValueError saying which stage and layer, what came and what was expected.
    """

    stages: tuple[tuple[str, ...], ...]

    space: ClassVar[str] = "chain"
    inputs: ClassVar[int] = 1
    shortcuts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        stages = self.stages
        if not isinstance(stages, tuple) or not 1 <= len(stages) <= STAGES:
            raise ValueError(f"stages: expected 1 to {STAGES} of them, got {_short(stages)}")
        for i, layers in enumerate(stages, start=1):
            if not isinstance(layers, tuple) or not layers:
                raise ValueError(f"stages: stage {i}: expected at least one layer, got {_short(layers)}")
            for j, operation in enumerate(layers, start=1):
                allowed = OPERATIONS if j > 1 else OPERATIONS[1:]
                if operation not in allowed:
                    got, expected = _short(operation), ", ".join(allowed)
                    raise ValueError(f"stages: stage {i}, layer {j}: got {got}, expected one of {expected}")

    @property
    def cells(self) -> dict[str, tuple[Cell, tuple[int, ...]]]:
        """Per stage the edges that are there, layer by layer, and its output: the last layer."""
        return {
            f"stage{i}": (
                tuple(((operation, source),) if operation != "none" else () for source, operation in enumerate(layers)),
                (len(layers),),
            )
            for i, layers in enumerate(self.stages, start=1)
        }

    @classmethod
    def from_cells(cls, cells: Mapping[str, Sequence[Sequence[Edge]]], concat: Sequence[int]) -> ChainGenotype:
        """The genotype of the chain with these edges, stage by stage; a layer without one is `none`."""
        return cls(tuple(tuple(node[0][0] if node else "none" for node in layers) for layers in cells.values()))

    def to_dict(self) -> dict[str, Any]:
        """The genotype as JSON types; `from_dict` reads it back."""
        return {"stages": [list(layers) for layers in self.stages]}

    @classmethod
    def from_dict(cls, fields: object) -> ChainGenotype:
        """The genotype that `to_dict` wrote. Raises ValueError saying what is wrong."""
        if not isinstance(fields, dict) or set(fields) != {"stages"}:
            got = sorted(map(str, fields)) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"genotype: expected an object with the field stages, got {got}")
        stages = fields["stages"]
        if not isinstance(stages, list):
            raise ValueError(f"stages: expected a list, got {type(stages).__name__}")
        return cls(tuple(tuple(layers) if isinstance(layers, list) else layers for layers in stages))

    def to_text(self) -> str:
        """For people: the layers of a stage joined by `+`, the stages by ` | `."""
        return " | ".join(" + ".join(layers) for layers in self.stages)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
