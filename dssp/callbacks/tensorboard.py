"""TensorBoard events: every scalar of an epoch's row, tabulated accuracies, and the gate of every edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dssp.engine import Callback, Engine


class TensorBoard(Callback):
    """Writes to a folder named after the task in ``folder``; needs the tensorboard package."""

    def __init__(self, folder: Path, edges: dict[str, list[str]] | None = None) -> None:
        self.folder, self.edges = folder, edges or {}

    def fit_start(self, engine: Engine) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here: it takes a second to import

        # A folder per task: purging hides everything in the folder from that step on, whatever its name.
        self.writer = SummaryWriter(str(self.folder / engine.task.name), purge_step=engine.epoch)

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self.writer.add_scalar(key, value, row["epoch"])
        for column, accuracy in row.get("tabulated", {}).items():
            self.writer.add_scalar(f"tabulated/{column}", accuracy, row["epoch"])
        for cell_type, gates in (row.get("gates") or {}).items():
            for edge, gate in zip(self.edges[cell_type], gates, strict=True):
                if gate is not None:
                    self.writer.add_scalar(f"gates/{cell_type}:{edge}", gate, row["epoch"])
        self.writer.flush()  # an epoch that a checkpoint holds is not run again to be written

    def fit_end(self, engine: Engine) -> None:
        self.writer.close()
