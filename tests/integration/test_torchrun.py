"""torchrun: a rank that dies is started again and the search ends without a hand; two agents are two machines."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from dssp.runs.run_folder import keep_rows

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo")
ROOT = Path(__file__).parents[2]
SHAPE = ["--dataset=fake", "--image-size=8", "--channels=2", "--cells=3", "--nodes=1", "--threads=1", "--device=cpu"]
RETRAINING = ["--retrain-epochs=1", "--retrain-batch-size=200", "--retrain-channels=2", "--retrain-cells=3"]
FLAGS = [*SHAPE, *RETRAINING, "--batch-size=50", "--epochs=3", "--warmup-epochs=1", "--checkpoint-every=1"]


def torchrun(folder: Path, *options: str, flags: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "dssp.search", *FLAGS, *flags]
    return subprocess.Popen(
        [*command, "--run-dir", str(folder / "run")],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "DSSP_TIMEOUT": "60"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_until(happened: Callable[[], Any]) -> None:
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.05)


def workers(agent: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of an agent's ranks."""
    found = {}
    for child in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        rank = re.search(rb"(?:^|\0)RANK=(\d+)\0", Path(f"/proc/{child}/environ").read_bytes())
        if rank:
            found[int(rank[1])] = int(child)
    return found


def rows(folder: Path) -> list[dict[str, Any]]:
    found = [row for log in ("metrics", "retrain") for row in keep_rows(folder / "run" / f"{log}.jsonl", 9)]
    return [{key: value for key, value in row.items() if not key.endswith("seconds")} for row in found]


def has_rows(folder: Path, count: int) -> bool:
    log = folder / "run" / "metrics.jsonl"
    return log.exists() and len(log.read_text().splitlines()) >= count


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on two ranks that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    agent = torchrun(folder, "--nproc-per-node=2", "--standalone")
    said, _ = agent.communicate(timeout=170)
    assert agent.returncode == 0, said
    assert said.count("Report:") == 1
    return folder


def test_ranks_that_torchrun_starts_search_as_one_run(whole: Path) -> None:
    assert len(rows(whole)) == 4
    assert json.loads((whole / "run" / "config.json").read_text())["ranks"] == 2


TRAINS_AND_LISTS_ITS_THREADS = """
import os, torch
from dssp.distributed import average_gradients, joined
with joined("cpu"):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    weight.sum().backward()
    average_gradients([weight], torch.ones(()))
    optimizer.step()
names = [open(f"/proc/self/task/{thread}/comm").read() for thread in os.listdir("/proc/self/task")]
raise SystemExit(str(names) if any("gloo" in name for name in names) else 0)
"""


def test_rank_that_trained_leaves_no_thread_of_its_group() -> None:
    """Such a thread may need the interpreter while that ends, which aborts the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "DSSP_TIMEOUT": "60"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TRAINS_AND_LISTS_ITS_THREADS],
            env={**os.environ, **shared, "RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_rank_that_dies_is_started_again_and_the_search_ends_the_same(whole: Path, tmp_path: Path, victim: int) -> None:
    agent = torchrun(tmp_path, "--nproc-per-node=2", "--standalone", "--max-restarts=2", flags=("--resume",))
    wait_until(lambda: has_rows(tmp_path, 1))
    os.kill(workers(agent)[victim], signal.SIGKILL)
    said, _ = agent.communicate(timeout=170)
    assert agent.returncode == 0, said
    # Torchrun names the rank that it sees end first: the killed one, or the other, which then has said what it missed.
    was_seen = f"exitcode: -{signal.SIGKILL.value}" in said or "Signal 9" in said
    assert was_seen or f"rank {1 - victim}: lost contact" in said
    assert rows(tmp_path) == rows(whole)
    for name in ("genotype.json",):
        assert (tmp_path / "run" / name).read_bytes() == (whole / "run" / name).read_bytes()


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_leaves_a_run_that_continues(whole: Path, tmp_path: Path) -> None:
    agent = torchrun(tmp_path, "--nproc-per-node=2", "--standalone")
    wait_until(lambda: has_rows(tmp_path, 1))
    agent.send_signal(signal.SIGTERM)
    said, _ = agent.communicate(timeout=60)
    assert all(f"rank {rank}: stopped by SIGTERM" in said for rank in range(2)), said
    agent = torchrun(tmp_path, "--nproc-per-node=2", "--standalone", flags=("--resume",))
    said, _ = agent.communicate(timeout=170)
    assert agent.returncode == 0 and rows(tmp_path) == rows(whole), said


@pytest.fixture
def meeting() -> list[str]:
    """What two machines of one rank each are told, so that they meet; whoever comes first keeps the store."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=1", "--local-addr=127.0.0.1"]
    return ["--nnodes=2", "--nproc-per-node=1", *place]


@pytest.mark.slow
def test_two_machines_search_as_one_with_two_ranks_does(whole: Path, tmp_path: Path, meeting: list[str]) -> None:
    agents = [torchrun(tmp_path, *meeting) for _ in range(2)]
    for agent in agents:
        said, _ = agent.communicate(timeout=170)
        assert agent.returncode == 0, said
    assert rows(tmp_path) == rows(whole)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["ranks"] == 2


@pytest.mark.slow
def test_run_that_lost_a_machine_ends_the_same_when_both_are_started_again(
    whole: Path, tmp_path: Path, meeting: list[str]
) -> None:
    """As a scheduler does it that requeues the job: the same command, --resume was there from the start."""
    agents = [torchrun(tmp_path, *meeting, flags=("--resume",)) for _ in range(2)]
    wait_until(lambda: has_rows(tmp_path, 1))
    for process in [process for agent in agents for process in (*workers(agent).values(), agent.pid)]:
        with suppress(ProcessLookupError):  # the other machine's rank leaves by itself
            os.kill(process, signal.SIGKILL)
    for agent in agents:
        agent.communicate(timeout=60)
    assert not (tmp_path / "run" / "summary.json").exists()
    agents = [torchrun(tmp_path, *meeting, flags=("--resume",)) for _ in range(2)]
    for agent in agents:
        said, _ = agent.communicate(timeout=170)
        assert agent.returncode == 0, said
    assert rows(tmp_path) == rows(whole)
    assert (tmp_path / "run" / "genotype.json").read_bytes() == (whole / "run" / "genotype.json").read_bytes()


@pytest.mark.slow
def test_run_that_torchrun_may_restart_needs_a_name(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1", "-m", "dssp.search"]
    done = subprocess.run(
        [*command, *FLAGS], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1 and "--run-dir: expected a folder, or torchrun --max-restarts" in done.stderr
