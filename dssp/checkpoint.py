"""Checkpoints: written whole or not at all, read without executing anything, the newest good one wins."""

from __future__ import annotations

import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch

from dssp.files import write_atomically

KEEP = 2


def save_checkpoint(folder: Path, name: str, epoch: int, state: dict[str, Any]) -> None:
    """Write ``<name>-<epoch>.pt`` and drop all but the newest two of that name."""
    folder.mkdir(parents=True, exist_ok=True)
    # By name, not through the open file: there torch answers a Ctrl-C with an error of its own.
    write_atomically(folder / f"{name}-{epoch:05d}.pt", lambda file: torch.save(state, file.name))
    for old in sorted(folder.glob(f"{name}-*.pt"))[:-KEEP]:
        old.unlink()


def load_newest(folder: Path, name: str) -> dict[str, Any] | None:
    """The newest readable checkpoint of that name, on the CPU, or None; a damaged one is skipped with a warning."""
    for path in sorted(folder.glob(f"{name}-*.pt"), reverse=True):
        try:
            return _read(path)
        except (zipfile.BadZipFile, OSError, RuntimeError, ValueError, pickle.UnpicklingError) as error:
            warnings.warn(f"{path}: damaged checkpoint skipped ({error})", RuntimeWarning, stacklevel=2)
    return None


def _read(path: Path) -> dict[str, Any]:
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load does not look at the checksums
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)
