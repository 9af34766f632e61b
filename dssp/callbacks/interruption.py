"""A signal ends the run after the step under way, with everything saved."""

from __future__ import annotations

import os
from contextlib import ExitStack, suppress
from typing import Any

from dssp.distributed import highest
from dssp.engine import Callback, Engine
from dssp.metrics import RunningMeans
from dssp.runs.interruption import SIGNALS, on_signals

STDERR = 2


class Interruption(Callback):
    """Turns SIGTERM, SIGINT and SIGUSR1 into the engine's ``stop_reason``; stands before the callback that saves.

    Of several ranks, all stop after the same step, whichever was asked.
    """

    def fit_start(self, engine: Engine) -> None:
        self.asked: str | None = None  # a signal comes at any moment, the engine hears of it between two steps
        self.stack = ExitStack()
        self.stack.enter_context(on_signals(self._ask))

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        engine.stop_reason = self._agreed()

    def epoch_end(self, engine: Engine, row: dict[str, Any]) -> None:
        engine.stop_reason = self._agreed()

    def _agreed(self) -> str | None:
        names = [None, *(each.name for each in SIGNALS)]
        return names[highest(names.index(self.asked))]

    def fit_end(self, engine: Engine) -> None:
        self.stack.close()
        engine.stop_reason = self.asked  # also what came after the last look

    def _ask(self, name: str) -> None:
        self.asked = name
        with suppress(OSError):  # not print(): the signal may have come in the middle of another one
            os.write(STDERR, f"{name}: saving after this step; once more leaves at once\n".encode())
