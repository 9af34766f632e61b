"""CellOutput: the maps that a cell puts out, and the modules that will read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dssp.spaces.operations import ReLUConvBN


class CellOutput:
    """What a cell puts out, [B, C_m, H, W] each: maps that count as one tensor, x = cat(maps, dim=1).

    `readers` are the modules that x will go through, in this cell and the next ones. Those that can, read all maps at
    once: x is read a single time, gets a single gradient, and need not exist.
    """

    def __init__(self, maps: Sequence[Tensor], readers: Sequence[nn.Module] = ()) -> None:
        self.maps, self.readers = list(maps), list(readers)
        self._tensor = self.maps[0] if len(self.maps) == 1 else None
        self._read: list[tuple[nn.Module, Tensor]] = []

    @property
    def tensor(self) -> Tensor:
        """x."""
        if self._tensor is None:
            self._tensor = torch.cat(self.maps, dim=1)
        return self._tensor

    def read_by(self, module: nn.Module) -> Tensor:
        """module(x)."""
        if not any(reader is module for reader, _ in self._read):
            readers = self.readers if any(reader is module for reader in self.readers) else (module,)
            together = [reader for reader in readers if isinstance(reader, ReLUConvBN) and reader.reads_maps(self.maps)]
            if not any(reader is module for reader in together):
                return module(self.tensor)
            self._read += zip(together, ReLUConvBN.read_together(together, self.maps), strict=True)
        found = next(y for reader, y in self._read if reader is module)
        self._read = [(reader, y) for reader, y in self._read if reader is not module]  # nobody asks twice
        return found
