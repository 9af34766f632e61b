"""One JSON object per epoch, appended to a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from dssp.engine import Callback, Engine
from dssp.runs.run_folder import keep_rows


class MetricsLog(Callback):
    """Appends each epoch's row to ``path`` and keeps all in ``rows``; a continued run first drops rows it will redo."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def fit_start(self, engine: Engine) -> None:
        self.rows = keep_rows(self.path, engine.epoch)

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())  # before the checkpoint that takes the row for granted
