"""What the commands share: choosing the device, and turning expected failures into one line and an exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from rich.console import Console

from dssp.config import ConfigError, RetrainConfig, SearchConfig
from dssp.data import DataUnavailable
from dssp.exporting import ExportFailed
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
    """Run a command; a failure the user can mend ends the process with one line and status 1."""
    try:
        run(config, Console())
    except FAILURES as error:
        sys.exit(str(error))
    except ConfigError as error:
        sys.exit(f"--{error.field.replace('_', '-')}: {error.reason}")
    except KeyboardInterrupt:
        resumable = isinstance(config, SearchConfig | RetrainConfig)
        sys.exit("interrupted" + "; --resume continues after the last finished epoch" * resumable)
