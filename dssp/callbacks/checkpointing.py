"""A checkpoint after every epoch, and the way back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dssp.checkpoint import load_newest, save_checkpoint
from dssp.engine import Callback, Engine


class Checkpointing(Callback):
    """Saves the engine's state to ``folder``; with ``resume`` the newest state there is restored first."""

    def __init__(self, folder: Path, *, resume: bool) -> None:
        self.folder, self.resume = folder, resume

    def fit_start(self, engine: Engine) -> None:
        state = load_newest(self.folder, engine.task.name) if self.resume else None
        if state is not None:
            engine.load_state_dict(state)

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        save_checkpoint(self.folder, engine.task.name, engine.epoch, engine.state_dict())
