"""Ranks for tests: forked processes, so that nobody waits for torch to load, joined by gloo over the loopback."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch

from dssp.distributed import joined


def start_ranks(count: int, function: Callable[..., Any], *arguments: Any) -> list[ForkProcess]:
    """Processes that call function(*arguments) with the environment that torchrun gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_as_rank, args=(r, count, port, function, arguments)) for r in range(count)]
    for process in processes:
        process.start()
    return processes


def _as_rank(rank: int, count: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    os.environ |= {
        **{"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "DSSP_TIMEOUT": "60"},
    }
    function(*arguments)


def results_of_ranks(count: int, function: Callable[[], Any], folder: Path) -> list[Any]:
    """What function() returns on each of so many joined ranks."""
    processes = start_ranks(count, _keep_result, function, folder)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * count
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _keep_result(function: Callable[[], Any], folder: Path) -> None:
    with joined("cpu"):
        torch.save(function(), folder / f"{os.environ['RANK']}.pt")
