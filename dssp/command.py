"""What the commands share: choosing the device, and turning expected failures into one line and an exit status."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from rich.console import Console

from dssp.data import DataUnavailable
from dssp.derived.exporting import ExportFailed
from dssp.derived.trained import NetworkUnavailable
from dssp.distributed import RanksApart, is_main, joined, launched_ranks, local_rank, name, ranks
from dssp.engine import Diverged, Interrupted
from dssp.options import ConfigError
from dssp.runs.determinism import NotDeterministic, deterministic
from dssp.runs.interruption import RESUME_ME, on_signals
from dssp.runs.memory import OutOfMemory, memory_named
from dssp.runs.run_folder import RunFolderError

Config = TypeVar("Config")


class DeviceUnavailable(Exception):
    """A device that was asked for and is not there."""


class OneProcessOnly(Exception):
    """A command that several processes were started for and that cannot use them."""


class GenotypeUnavailable(Exception):
    """A genotype that cannot be read or built; one line that says why."""


# What the user can mend; each is one line.
FAILURES = (
    DataUnavailable,
    RunFolderError,
    DeviceUnavailable,
    GenotypeUnavailable,
    NetworkUnavailable,
    ExportFailed,
    OutOfMemory,
    NotDeterministic,
    OneProcessOnly,
)


def choose_device(name: str, threads: int | None) -> torch.device:
    """The device called ``name``; ``"auto"`` is the first GPU if there is one. Sets the number of CPU threads.

    Of several ranks, each takes the GPU of its number on its machine.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and ranks() > 1:
        if device.index is not None:
            raise DeviceUnavailable(f"--device {name}: every rank takes a GPU of its own, expected auto, cuda or cpu")
        device, there = torch.device("cuda", local_rank()), torch.cuda.device_count()
        if local_rank() >= there:
            raise DeviceUnavailable(
                f"--device {name}: every rank takes a GPU of its own, {there} are here; start at most {there} ranks "
                "per machine, or use --device cpu"
            )
        torch.cuda.set_device(device)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def run_command(run: Callable[[Config, Console], Any], config: Config, *, many_ranks: bool = False) -> None:
    """Run a command; a failure the user can mend ends the process with one line and status 1, a signal with 75.

    ``many_ranks``: torchrun may start it on several processes, which then work on one run; rank 0 has the screen.
    """
    try:
        if not many_ranks and launched_ranks() > 1:
            raise OneProcessOnly(f"this command runs in one process, got {launched_ranks()}: start it with python")
        with (
            deterministic(getattr(config, "deterministic", False)),  # before anything starts CUDA
            joined(getattr(config, "device", "cpu")),  # before the signals: who waits for the others may be ended
            on_signals(_interrupt),
            _quiet_writers(),
            memory_named("start", getattr(config, "batch_size", None)),
        ):
            run(config, Console(quiet=not is_main()))
    except FAILURES as error:
        _fail(str(error))
    except RanksApart as error:
        _fail(f"{error}. What was saved before is intact and --resume continues from it", at_once=True)
    except ConfigError as error:
        _fail(f"--{error.field.replace('_', '-')}: {error.reason}")
    except Diverged as error:
        _fail(f"{error}; the last checkpoint is kept. Lower the learning rate or use --precision float32")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}; what was saved before is intact and --resume continues from it")
    except Interrupted as error:
        resumes = "; --resume continues where it stopped" if hasattr(config, "resume") else ""
        if launched_ranks() > 1:  # torchrun ends the others when the first has ended; all have saved by now
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(f"{name()}stopped by {error}{resumes}", file=sys.stderr)
        sys.exit(RESUME_ME)


def _fail(line: str, *, at_once: bool = False) -> NoReturn:
    """Status 1 and a line; ``at_once`` leaves without the clean-up that waits for what a lost rank never sends."""
    if at_once:
        print(f"{name()}{line}", file=sys.stderr, flush=True)
        os._exit(1)
    sys.exit(f"{name()}{line}")


@contextmanager
def _quiet_writers() -> Iterator[None]:
    """TensorBoard's thread that cannot write tells the main thread, which says so in one line. No traceback."""
    before = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else before(args)
    try:
        yield
    finally:
        threading.excepthook = before


def _interrupt(name: str) -> NoReturn:
    raise Interrupted(name)
