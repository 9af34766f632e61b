"""Checkpoints while a run goes on, and the way back from them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from dssp.checkpoint import load_newest, save_checkpoint
from dssp.distributed import is_main, on_main, wait_for_all
from dssp.engine import Callback, Engine
from dssp.metrics import RunningMeans

SECONDS = 600.0  # what a crash may cost where nobody says otherwise


class Checkpointing(Callback):
    """Saves the engine's state to ``folder``; with ``resume`` the newest state there is restored first.

    After each epoch, when the run is asked to stop, and between: after every ``every`` steps of an epoch or, if that is
    None, ten minutes after the last checkpoint. Of several ranks, rank 0 reads and writes, and all get what it read.
    """

    def __init__(self, folder: Path, *, resume: bool, every: int | None = None) -> None:
        self.folder, self.resume, self.every = folder, resume, every

    def fit_start(self, engine: Engine) -> None:
        state = on_main(lambda: self._newest(engine.task.name))
        if state is not None:
            engine.load_state_dict(state)
        self.saved = time.perf_counter()

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        due = step % self.every == 0 if self.every else time.perf_counter() - self.saved >= SECONDS
        if due or engine.stop_reason is not None:
            self._save(engine)

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        self._save(engine)

    def _newest(self, name: str) -> dict[str, Any] | None:
        self.folder.mkdir(parents=True, exist_ok=True)  # only now: a folder that goes while we run is an error
        return load_newest(self.folder, name) if self.resume else None

    def _save(self, engine: Engine) -> None:
        if is_main():
            save_checkpoint(self.folder, engine.task.name, engine.epoch, engine.step, engine.state_dict())
        if engine.stop_reason is not None:
            wait_for_all()  # torchrun stops all ranks as soon as one has ended
        self.saved = time.perf_counter()
