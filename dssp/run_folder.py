"""The run folder: where it is, what identifies the run in it, which rows of metrics it holds."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dssp.config import RetrainConfig, SearchConfig
from dssp.files import write_atomically, write_json

RUNS = Path("runs")
NOT_COMPARED = ("resume", "run_dir", "device", "threads", "workers")  # may differ when a run is continued


class RunFolderError(Exception):
    """A run folder that cannot be used; one line that says why and what to do."""


def open_run_folder(config: SearchConfig | RetrainConfig, kind: str, details: dict[str, Any]) -> Path:
    """The folder of this run with its config.json: a new one, or with ``resume`` the one to continue.

    Raises RunFolderError when there is nothing to resume, the folder holds another run, or it cannot be written.
    """
    folder = Path(config.run_dir) if config.run_dir else None
    if config.resume:
        folder = folder or _newest_like(config, kind)
        _check_same_run(config, folder)
        return folder
    folder = folder or _new_folder(kind)
    if (folder / "config.json").exists():
        raise RunFolderError(f"{folder} already holds a run: add --resume to continue it, or choose another --run-dir")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", {"config": config.to_dict(), **_circumstances(), **details})
    except OSError as error:
        raise RunFolderError(f"--run-dir {folder}: {error.strerror}") from None
    return folder


def _new_folder(kind: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, again = RUNS / f"{stamp}-{kind}", 1
    while folder.exists():
        again += 1
        folder = RUNS / f"{stamp}-{kind}-{again}"
    return folder


def _newest_like(config: SearchConfig | RetrainConfig, kind: str) -> Path:
    for path in sorted(RUNS.glob(f"*-{kind}*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, AttributeError):  # somebody else's folder, or a damaged one
            if not _differences(config, path):
                return path.parent
    raise RunFolderError(f"--resume: no run under {RUNS}/ has this configuration; name its folder with --run-dir")


def _differences(config: SearchConfig | RetrainConfig, path: Path) -> list[str]:
    stored = json.loads(path.read_text()).get("config", {})
    return [
        f"{name} (then {stored.get(name)!r}, now {value!r})"
        for name, value in config.to_dict().items()
        if name not in NOT_COMPARED and stored.get(name) != value
    ]


def _check_same_run(config: SearchConfig | RetrainConfig, folder: Path) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise RunFolderError(f"--resume: {folder} holds no run (no config.json)")
    try:
        differences = _differences(config, path)
    except (ValueError, AttributeError) as error:
        raise RunFolderError(f"--resume: {path} is damaged: {error}") from None
    if differences:
        raise RunFolderError(f"--resume: {folder} holds a run with another {'; '.join(differences)}")


def _circumstances() -> dict[str, Any]:
    """What else is needed to repeat the run."""
    from dssp import __version__

    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "dssp": __version__,
        "triton": None,
    }
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # None says it
        versions["triton"] = importlib.metadata.version("triton")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return {
        "command": " ".join(["python", "-m", *_command()]),
        "versions": versions,
        "commit": _commit(),
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}",
    }


def _command() -> list[str]:
    program = sys.modules["__main__"].__spec__
    return [program.name if program else Path(sys.argv[0]).name, *sys.argv[1:]]


def _commit() -> str | None:
    """The commit of the source tree this package runs from, if it runs from one."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(
            ["git", "-C", str(here), "log", "-1", "--format=%H", "--", "."], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine
    return done.stdout.strip() or None


def stored_config(folder: Path) -> SearchConfig | RetrainConfig:
    """The configuration of the run in a folder. Raises RunFolderError if there is none, or no sound one."""
    path = folder / "config.json"
    try:
        fields = json.loads(path.read_text())["config"]
        kind = RetrainConfig if "genotype" in fields else SearchConfig
        return kind.from_dict(fields)
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise RunFolderError(f"{path}: no configuration of a run ({error})") from None


def keep_rows(path: Path, epochs: int) -> list[dict[str, Any]]:
    """Cut a file of metrics back to the rows of the first ``epochs`` epochs and return them."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            break  # the line that was being written when the run was cut
        if row["epoch"] < epochs:
            rows.append(row)
    write_atomically(path, lambda file: file.write("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return rows
