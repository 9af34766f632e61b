"""The runs of a comparison as processes: started, waited for, stopped; what each needed and how it ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dssp.comparison.plan import PlannedRun
from dssp.engine import Interrupted
from dssp.runs.files import write_json
from dssp.runs.interruption import RESUME_ME, on_signals

POLL_SECONDS = 0.2
RECORD = "processes.json"
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes per unit of ru_maxrss


@dataclass(frozen=True)
class Ended:
    """How a run's processes ended: the largest peak memory, whether other runs went beside them, the last error."""

    peak_memory_bytes: int
    shared: bool
    error: str | None


def is_finished(folder: Path) -> bool:
    """Whether the run in this folder came to its end."""
    return (folder / "summary.json").exists()


def read_record(folder: Path) -> dict[str, Ended]:
    """How the runs of a comparison's folder ended, by name."""
    path = folder / RECORD
    return {name: Ended(**ended) for name, ended in json.loads(path.read_text()).items()} if path.exists() else {}


class Processes:
    """The searches of a comparison, ``jobs`` at a time, each a child process; whoever crashes crashes alone.

    Finished runs are left as they are, begun ones continue. What a run prints goes to <name>.out and <name>.err beside
    its folder. Children live in sessions of their own: only the parent hears of Ctrl-C and passes it on once, as a
    second signal would end them before they have saved.
    """

    def __init__(self, folder: Path, jobs: int) -> None:
        self.folder, self.jobs = folder, jobs
        self.record = read_record(folder)
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._told: set[str] = set()

    def run(
        self, runs: Sequence[PlannedRun], *, look: Callable[[Sequence[str]], None], ended: Callable[[PlannedRun], None]
    ) -> None:
        """Run what is not finished; ``look`` is called all the time, with the names of the running ones.

        Raises Interrupted after a signal, once all children have saved and ended.
        """
        asked: list[str] = []
        waiting = [run for run in runs if not self._is_done(run)]
        shared = self.jobs > 1 and len(waiting) > 1
        by_name = {run.name: run for run in runs}

        def ask(name: str) -> None:
            asked.append(name)
            with suppress(OSError):  # not print(): the signal may have come in the middle of another one
                os.write(2, f"{name}: the searches save and end; once more leaves them to it\n".encode())

        with on_signals(ask):
            try:
                while self._children or (waiting and not asked):
                    while waiting and not asked and len(self._children) < self.jobs:
                        self._start(waiting.pop(0))
                    if asked:
                        self._stop()
                    for name in self._reap(shared):
                        ended(by_name[name])
                    look(list(self._children))
                    time.sleep(POLL_SECONDS)
            finally:
                while self._children:  # what failed here must not leave searches behind
                    self._stop()
                    self._reap(shared)
                    time.sleep(POLL_SECONDS)
        if asked:
            raise Interrupted(asked[0])

    def _is_done(self, run: PlannedRun) -> bool:
        before = self.record.get(run.name)
        return is_finished(run.folder) and (before is None or before.error is None)

    def _start(self, run: PlannedRun) -> None:
        command = [sys.executable, "-m", "dssp.search", *run.arguments]
        if (run.folder / "config.json").exists():
            command.append("--resume")
        with (self.folder / f"{run.name}.out").open("ab") as out, (self.folder / f"{run.name}.err").open("wb") as err:
            self._children[run.name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )

    def _stop(self) -> None:
        """Ask every child, once, to save and end."""
        for name, child in self._children.items():
            if name not in self._told:
                self._told.add(name)
                os.kill(child.pid, signal.SIGTERM)  # it exists until _reap has waited for it

    def _reap(self, shared: bool) -> list[str]:
        """The children that have ended since the last call, now on record."""
        names = []
        for name, child in list(self._children.items()):
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid == 0:
                continue
            child.returncode = os.waitstatus_to_exitcode(status)
            del self._children[name]
            before = self.record.get(name)
            self.record[name] = Ended(
                max(usage.ru_maxrss * RSS_UNIT, before.peak_memory_bytes if before else 0),
                shared or (before is not None and before.shared),
                self._error(name, child.returncode),
            )
            names.append(name)
        if names:
            write_json(self.folder / RECORD, {name: asdict(ended) for name, ended in self.record.items()})
        return names

    def _error(self, name: str, status: int) -> str | None:
        """One line that says why a child ended; None if it came to its end or stopped because it was told to."""
        if status == 0 or (name in self._told and status in (RESUME_ME, -signal.SIGTERM)):
            return None
        lines = (self.folder / f"{name}.err").read_text(errors="replace").split("\n")
        said = next((line.strip() for line in reversed(lines) if line.strip()), None)
        return said or (f"ended by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}")
