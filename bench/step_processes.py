"""What needs a process of its own: the first step after the start, and torch.compile of the stock supernet.

python bench/step_processes.py first-step darts-c16-l8-b32 cpu 2      prints one JSON object
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # `bench`, and the two packages where they are not installed
from bench.step_subjects import SUBJECTS, Case, TrainingStep, load_batches
from bench.step_turns import take_turns

IMPORTED = time.time()
ROUNDS = 3


def first_step(case: Case, device: torch.device) -> dict[str, float]:
    """Seconds since the imports were done: supernet and batch built, and the first training step over."""
    subject = SUBJECTS[case.subject]
    data = subject.load(device)
    supernet = subject.ours(case, data).to(device).to(memory_format=torch.channels_last)
    step = TrainingStep(supernet, load_batches(case, data)[0])
    built = time.time()
    step()
    float(step.loss)  # waits for the device
    return {"imported_at": IMPORTED, "build_seconds": built - IMPORTED, "step_seconds": time.time() - built}


def compiled_step(case: Case, device: torch.device) -> dict[str, float]:
    """torch.compile of the stock supernet: seconds to compile (with the first step), then the step beside eager's."""
    subject = SUBJECTS[case.subject]
    data = subject.load(device)
    stock = subject.stock(case, data).to(device)
    batch, _ = load_batches(case, data)
    compiled = TrainingStep(torch.compile(stock, dynamic=False), batch, contiguous=True)  # type: ignore[arg-type]
    start = time.perf_counter()
    compiled()
    float(compiled.loss)
    seconds = time.perf_counter() - start
    eager = TrainingStep(stock, batch, contiguous=True)
    timings = take_turns({"stock": eager.phases, "compiled": compiled.phases}, device, ROUNDS)["step"]
    return {
        "compile_seconds": seconds,
        "seconds": timings.median("compiled"),
        "stock_seconds": timings.median("stock"),
    }


def run_apart(task: str, case: Case, device: torch.device, timeout: float | None = None) -> dict[str, Any]:
    """What `task` (first-step, compile) found in a fresh process; {"problem": why} if it failed or took too long."""
    command = [sys.executable, __file__, task, str(case), str(device), str(torch.get_num_threads())]
    started = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compilers it started
        process.communicate()
        return {"problem": f"not finished within {timeout:g} s"}
    if process.returncode:
        return {"problem": (errors.strip().splitlines() or [f"exit status {process.returncode}"])[-1]}
    found = json.loads(output.splitlines()[-1])
    if "imported_at" in found:
        found["import_seconds"] = found.pop("imported_at") - started
        found["seconds"] = found["import_seconds"] + found["build_seconds"] + found["step_seconds"]
    return found


def main(task: str, case: str, device: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    run = {"first-step": first_step, "compile": compiled_step}[task]
    print(json.dumps(run(Case.parse(case), torch.device(device))))


if __name__ == "__main__":
    main(*sys.argv[1:])
