"""The run folder: where it is, what identifies the run in it, which rows of metrics it holds."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from dssp.config import RetrainConfig, SearchConfig
from dssp.distributed import check_same, highest, is_under_torchrun, on_main, ranks, restarts
from dssp.runs.files import write_atomically, write_json
from dssp.options import ConfigError

Config = TypeVar("Config", SearchConfig, RetrainConfig)

RUNS = Path("runs")
GLOBAL_BATCH = ("batch_size", "retrain_batch_size")  # per rank: times the number of ranks it must stay the same
NOT_COMPARED = (
    "resume",
    "run_dir",
    "device",
    "threads",
    "workers",
    *GLOBAL_BATCH,
    "checkpoint_every",
    "max_skipped_steps",
    "jobs",
    *("max_params", "max_flops"),  # of what is derived at the end: if nothing fits, the search need not be repeated
)  # may differ when a run is continued


class RunFolderError(Exception):
    """A run folder that cannot be used; one line that says why and what to do."""


class Resumable(Protocol):
    """The configuration of a run with a folder of its own."""

    @property
    def run_dir(self) -> str | None: ...

    @property
    def resume(self) -> bool: ...

    def to_dict(self) -> dict[str, Any]: ...


def open_run_folder(config: Resumable, kind: str, details: dict[str, Any]) -> Path:
    """The folder of this run with its config.json: a new one, or with ``resume`` the one to continue.

    The folder is this process's until it ends; of several ranks, rank 0's, and the others are told its name. Under
    torchrun, ``resume`` of a folder that holds no run yet begins one: the same command serves for every start.
    A run may continue on another number of ranks, with the same global batch (ranks times --batch-size) and no other.
    ``details`` go into config.json too; "data" among them must be the same when the run is continued. Raises
    RunFolderError when there is nothing to resume, the folder holds another run or is in use by another process, or it
    cannot be written.
    """
    return on_main(lambda: _open(config, kind, {"ranks": ranks(), **details}))


def check_same_command(config: SearchConfig | RetrainConfig) -> None:
    """Raises RanksApart if a rank was started with another configuration; where its data are is its own affair."""
    own = ("run_dir", "data_path", "benchmark", "threads", "workers")
    check_same({name: value for name, value in config.to_dict().items() if name not in own}, "start")


def after_restart(config: Config) -> Config:
    """The configuration, which continues its run where torchrun has started it anew (`--max-restarts`).

    A machine that takes another one's place knows of no restart: for that, --resume has to be there from the start.

    Raises ConfigError if torchrun may do that and the run folder has no name, as nobody could find it then.
    """
    if restarts("MAX") and config.run_dir is None:
        raise ConfigError(
            "run_dir", "expected a folder, or torchrun --max-restarts could not continue the run, got none"
        )
    return replace(config, resume=True) if highest(restarts("COUNT")) else config


def _open(config: Resumable, kind: str, details: dict[str, Any]) -> Path:
    folder = Path(config.run_dir) if config.run_dir else None
    begins = is_under_torchrun() and folder is not None and not (folder / "config.json").exists()
    if config.resume and not begins:
        folder = folder or _newest_like(config, kind)
        _check_same_run(config, folder, details)
        _lock(folder)
        return folder
    folder = folder or _new_folder(kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _lock(folder)
        if (folder / "config.json").exists():
            raise RunFolderError(
                f"{folder} already holds a run: add --resume to continue it, or choose another --run-dir"
            )
        if changes := _git("diff", "HEAD", "--", "."):
            write_atomically(folder / "changes.diff", lambda file: file.write(changes.encode()))
        write_json(folder / "config.json", {"config": config.to_dict(), **_circumstances(), **details})
    except OSError as error:
        raise RunFolderError(f"--run-dir {folder}: {error.strerror}") from None
    return folder


def finished_summary(folder: Path) -> dict[str, Any] | None:
    """The summary of a run that is finished, else None."""
    path = folder / "summary.json"
    return json.loads(path.read_text()) if path.exists() else None


_held: list[int] = []  # locks of this process; closing one, or the end of the process, gives it back


def _lock(folder: Path) -> None:
    """Make the folder this process's own until it ends; the kernel sees to that, however it ends."""
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    mine = any(os.path.samestat(os.fstat(descriptor), os.fstat(held)) for held in _held)
    try:
        if not mine:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.truncate(descriptor, 0)
            os.write(descriptor, f"{os.getpid()} on {platform.node()}\n".encode())
            _held.append(descriptor)
    except BlockingIOError:
        owner = os.read(descriptor, 200).decode(errors="replace").strip()
        os.close(descriptor)
        raise RunFolderError(f"{folder} is in use by another process ({owner}): wait for its end or stop it") from None
    if mine:
        os.close(descriptor)


def _new_folder(kind: str) -> Path:
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder, again = RUNS / f"{stamp}-{kind}", 1
    while folder.exists():
        again += 1
        folder = RUNS / f"{stamp}-{kind}-{again}"
    return folder


def _newest_like(config: Resumable, kind: str) -> Path:
    for path in sorted(RUNS.glob(f"*-{kind}*/config.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError, AttributeError, TypeError):  # somebody else's folder, or a damaged one
            if not _differences(config, path):
                return path.parent
    raise RunFolderError(f"--resume: no run under {RUNS}/ has this configuration; name its folder with --run-dir")


def _differences(config: Resumable, path: Path) -> list[str]:
    content = json.loads(path.read_text())
    stored, ranks_then = content.get("config", {}), content.get("ranks", 1)
    batches = [
        f"global {name} (then {ranks_then} * {stored.get(name, 0)}, now {ranks()} * {value})"
        for name, value in config.to_dict().items()
        if name in GLOBAL_BATCH and ranks_then * stored.get(name, 0) != ranks() * value
    ]
    return batches + [
        f"{name} (then {stored.get(name)!r}, now {value!r})"
        for name, value in config.to_dict().items()
        if name not in NOT_COMPARED and stored.get(name) != value
    ]


def _check_same_run(config: Resumable, folder: Path, details: dict[str, Any]) -> None:
    path = folder / "config.json"
    if not path.exists():
        raise RunFolderError(f"--resume: {folder} holds no run (no config.json)")
    try:
        differences = _differences(config, path)
    except (ValueError, AttributeError, TypeError) as error:
        raise RunFolderError(f"--resume: {path} is damaged: {error}") from None
    if differences:
        raise RunFolderError(f"--resume: {folder} holds a run with another {'; '.join(differences)}")
    data = json.loads(path.read_text()).get("data")
    if data != details.get("data"):
        raise RunFolderError(f"--resume: the data set is not the one {folder} began with ({data}, {details['data']})")


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
        "command": shlex.join(["python", "-m", *_command()]),
        "versions": versions,
        "commit": (_git("log", "-1", "--format=%H", "--", ".") or "").strip() or None,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, {device}",
    }


def _command() -> list[str]:
    program = sys.modules["__main__"].__spec__
    return [program.name if program else Path(sys.argv[0]).name, *sys.argv[1:]]


def _git(*arguments: str) -> str | None:
    """What git says in the source tree this package runs from; None if it runs from none, or for an empty answer."""
    command = ["git", "-C", str(Path(__file__).parents[1]), *arguments]  # the package: what runs is all of it
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None  # no git on this machine
    return done.stdout or None


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
