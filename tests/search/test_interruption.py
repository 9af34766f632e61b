"""SIGTERM, SIGINT and SIGUSR1 end a run after the step under way, saved; a second one ends the process at once."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dssp.callbacks import Checkpointing, Interruption
from dssp.checkpoint import load_newest
from dssp.command import run_command
from dssp.config import SearchConfig
from dssp.engine import Callback, Engine, Interrupted
from dssp.metrics import RunningMeans
from dssp.runs.interruption import RESUME_ME, SIGNALS, on_signals
from tests.search.test_skipped_steps import Scripted

EVERY_SIGNAL = pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)


class SignalAt(Callback):
    """Sends this process a signal at a step of the first epoch, or at its end (0)."""

    def __init__(self, number: signal.Signals, step: int) -> None:
        self.number, self.step = number, step

    def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
        if (epoch, step) == (0, self.step):
            signal.raise_signal(self.number)

    def epoch_end(self, engine: Engine, row: dict[str, object]) -> None:
        if (row["epoch"], 0) == (0, self.step):
            signal.raise_signal(self.number)


@EVERY_SIGNAL
@pytest.mark.parametrize(("step", "saved"), [(1, (0, 1)), (3, (0, 3)), (0, (1, 0))], ids=["first", "last", "end"])
@pytest.mark.parametrize("position", [0, 1, 2])
def test_signal_saves_after_the_step_and_stops(
    tmp_path: Path, number: signal.Signals, step: int, saved: tuple[int, int], position: int
) -> None:
    callbacks: list[Callback] = [Interruption(), Checkpointing(tmp_path, resume=False)]
    callbacks.insert(position, SignalAt(number, step))
    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(Interrupted, match=number.name):
        Engine(Scripted([1.0, 2.0, 3.0]), callbacks).fit()
    state = load_newest(tmp_path, "scripted")
    assert state is not None
    # Heard now or, where the callback that listens had its turn, at the next step; what was done is saved either way.
    following = {(0, 1): (0, 2), (0, 3): (1, 0), (1, 0): (1, 1)}
    assert (state["epoch"], state["step"]) in (saved, following[saved])
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_signal_after_the_last_look_is_not_lost(tmp_path: Path) -> None:
    task = Scripted([1.0])
    task.epochs = 1
    with pytest.raises(Interrupted, match="SIGTERM"):
        Engine(task, [SignalAt(signal.SIGTERM, 0), Interruption(), Checkpointing(tmp_path, resume=False)]).fit()
    again = Engine(task, [Interruption(), Checkpointing(tmp_path, resume=True)])
    again.fit()
    assert again.epoch == 1


def test_handlers_are_given_back_also_when_a_step_raises() -> None:
    class Raises(Callback):
        def step_end(self, engine: Engine, epoch: int, step: int, means: RunningMeans) -> None:
            raise ValueError

    before = [signal.getsignal(each) for each in SIGNALS]
    with pytest.raises(ValueError):
        Engine(Scripted([1.0]), [Interruption(), Raises()]).fit()
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_other_threads_run_without_signals() -> None:
    done: list[bool] = []

    def work() -> None:
        Engine(Scripted([1.0]), [Interruption()]).fit()
        done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]


@EVERY_SIGNAL
def test_signal_outside_of_training_ends_the_command_with_the_documented_status(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        run_command(lambda config, console: signal.raise_signal(number), SearchConfig())
    assert exit_.value.code == RESUME_ME == 75
    assert capsys.readouterr().err == f"stopped by {number.name}; --resume continues where it stopped\n"


def test_second_signal_leaves_at_once() -> None:
    lines = [
        "import signal, time",
        "from dssp.runs.interruption import on_signals",
        "with on_signals(lambda name: print(name, flush=True)):",
        "    signal.raise_signal(signal.SIGINT)",
        "    print('goes on', flush=True)",
        "    signal.raise_signal(signal.SIGINT)",
        "    print('not reached', flush=True)",
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], cwd=root, capture_output=True, text=True)
    assert done.returncode == -signal.SIGINT and done.stdout == "SIGINT\ngoes on\n"


def test_help_names_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    from dssp.config import parse_search

    with pytest.raises(SystemExit):
        parse_search(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "75 stopped by SIGTERM, SIGINT or SIGUSR1 with everything saved" in said and "--checkpoint-every" in said


def test_default_handlers_return() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with on_signals(lambda name: None):
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
