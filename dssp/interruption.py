"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which schedulers send before the time is up."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUME_ME = os.EX_TEMPFAIL  # 75: the exit status of a run that was asked to stop; --resume continues it
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def on_signals(act: Callable[[str], None]) -> Iterator[None]:
    """Call act(name of the signal) at the first of them; the second one then ends the process at once.

    Python takes signals in the main thread only: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        act(signal.Signals(number).name)

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
