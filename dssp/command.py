"""What the commands share: choosing the device, and turning expected failures into one line and an exit status."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

import torch
from rich.console import Console

from dssp.config import ConfigError
from dssp.data import DataUnavailable
from dssp.engine import Diverged, Interrupted
from dssp.exporting import ExportFailed
from dssp.interruption import RESUME_ME, on_signals
from dssp.memory import OutOfMemory, memory_named
from dssp.run_folder import RunFolderError
from dssp.trained import NetworkUnavailable

Config = TypeVar("Config")


class DeviceUnavailable(Exception):
    """A device that was asked for and is not there."""


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
)


def choose_device(name: str, threads: int | None) -> torch.device:
    """The device called ``name``; ``"auto"`` is the first GPU if there is one. Sets the number of CPU threads."""
    if threads is not None:
        torch.set_num_threads(threads)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise DeviceUnavailable(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def run_command(run: Callable[[Config, Console], Any], config: Config) -> None:
    """Run a command; a failure the user can mend ends the process with one line and status 1, a signal with 75."""
    try:
        with on_signals(_interrupt), _quiet_writers(), memory_named("start", getattr(config, "batch_size", None)):
            run(config, Console())
    except FAILURES as error:
        sys.exit(str(error))
    except ConfigError as error:
        sys.exit(f"--{error.field.replace('_', '-')}: {error.reason}")
    except Diverged as error:
        sys.exit(f"{error}; the last checkpoint is kept. Lower the learning rate or use --precision float32")
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(f"{where}{error.strerror or error}; what was saved before is intact and --resume continues from it")
    except Interrupted as error:
        resumes = "; --resume continues where it stopped" if hasattr(config, "resume") else ""
        print(f"stopped by {error}{resumes}", file=sys.stderr)
        sys.exit(RESUME_ME)


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
