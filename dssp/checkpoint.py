"""Checkpoints: written whole or not at all, read without executing anything, the newest good one wins.

``<name>-<epoch>-<step>.pt`` is the state after ``step`` steps of epoch ``epoch``, both counted from 0, so step 0 is the
end of the epoch before; the text file ``<name>-latest`` names the newest. Saving writes a hidden file, brings it to the
disk, renames it, brings the folder to the disk, does the same with the pointer, then removes the oldest checkpoint. A
process that dies anywhere between leaves at least the checkpoints that were there before.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import Any

import torch

from dssp.runs.files import write_atomically

FORMAT = 4  # of the state inside
KEEP = 2


def save_checkpoint(folder: Path, name: str, epoch: int, step: int, state: dict[str, Any]) -> Path:
    """Write a checkpoint into an existing folder and drop all but the newest two of that name. Raises OSError."""
    content = io.BytesIO()  # so that a full disk is an OSError; torch's own writer has other words for it
    torch.save({"format": FORMAT, "state": state}, content)
    path = folder / f"{name}-{epoch:05d}-{step:07d}.pt"
    write_atomically(path, lambda file: file.write(content.getbuffer()))
    write_atomically(folder / f"{name}-latest", lambda file: file.write(f"{path.name}\n".encode()))
    abandoned = folder.glob(f".{name}-*")  # by processes that were killed while they wrote
    for old in (*_oldest_first(folder, name)[:-KEEP], *abandoned):
        old.unlink(missing_ok=True)
    return path


def load_newest(folder: Path, name: str) -> dict[str, Any] | None:
    """The state in the newest readable checkpoint of that name, on the CPU, or None; damaged ones are skipped with a
    warning."""
    for path in reversed(_oldest_first(folder, name)):
        try:
            return _read(path)
        except _DAMAGE as error:
            warnings.warn(f"{path}: damaged checkpoint skipped ({error})", RuntimeWarning, stacklevel=2)
    return None


def _oldest_first(folder: Path, name: str) -> list[Path]:
    return sorted(folder.glob(f"{name}-[0-9]*-[0-9]*.pt"))


_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, pickle.UnpicklingError, NotImplementedError),
    *(OSError, EOFError, RuntimeError, ValueError, TypeError, LookupError, AttributeError),
)


def read_plain(path: Path) -> Any:
    """What torch.save wrote, on the CPU, its checksums verified; tensors and plain values only, nothing is executed."""
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():  # torch.load does not look at the checksums
            raise zipfile.BadZipFile(f"wrong checksum of {damaged}")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read(path: Path) -> dict[str, Any]:
    content = read_plain(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("state"), dict):
        raise ValueError(f"expected a checkpoint of format {FORMAT}")
    return content["state"]
