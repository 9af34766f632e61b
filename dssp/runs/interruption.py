"""Signals that ask a run to stop: SIGTERM, SIGINT (Ctrl-C) and SIGUSR1, which schedulers send before the time is up."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from dssp.distributed import launched_ranks

RESUME_ME = os.EX_TEMPFAIL  # 75: the exit status of a run that was asked to stop; --resume continues it
ECHO_SECONDS = 5.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


@contextmanager
def on_signals(act: Callable[[str], None]) -> Iterator[None]:
    """Call act(name of the signal) at the first of them; the second one then ends the process at once.

    In one of several processes, which may get the same signal from a scheduler and from torchrun, what comes within
    ECHO_SECONDS of the first does not count.

    Python takes signals in the main thread only: in another one this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    began: list[float] = []

    def handle(number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if began and now - began[0] < ECHO_SECONDS:
            return
        if began or launched_ranks() == 1:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        if began:
            os.kill(os.getpid(), number)
        began.append(now)
        act(signal.Signals(number).name)

    before = {each: signal.signal(each, handle) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
