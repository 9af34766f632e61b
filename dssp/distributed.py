"""One run on many processes: ranks as torchrun starts them, what they average, what they agree on, how they end.

Every rank holds the whole model and takes its share of each global batch. Gradients are averaged explicitly, not by
DistributedDataParallel: which candidates run changes from step to step and edges leave in mid-run, and the same few
collectives serve alpha, masks and weights. In a process that is alone, every function here is what it is for one rank,
without a process group.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import groupby
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

SECONDS = 600.0  # a collective that takes longer has failed; a rank that dies is noticed at once
POLL_SECONDS = 0.05
BUCKET = 2**24  # elements that one collective averages: what it needs beside the gradients is 64 MiB in float32

T = TypeVar("T")


class RanksApart(Exception):
    """The ranks cannot go on together: one is gone, or they are no longer the same; one line that says which."""


# ---- who is there ----------------------------------------------------------------------------------------------------


def rank() -> int:
    """This process among those of the run, from 0."""
    return dist.get_rank() if _is_joined() else 0


def ranks() -> int:
    """How many processes work on the run."""
    return dist.get_world_size() if _is_joined() else 1


def share() -> tuple[int, int]:
    """Which part of how many this rank takes of every global batch."""
    return rank(), ranks()


def is_main() -> bool:
    """Whether this rank writes and speaks for all: rank 0."""
    return rank() == 0


def _is_joined() -> bool:
    return dist.is_available() and dist.is_initialized()


# ---- what torchrun says ----------------------------------------------------------------------------------------------


def launched_ranks() -> int:
    """How many processes this one was started with."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def local_rank() -> int:
    """This process among those of its machine, from 0: the GPU that it takes."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def name() -> str:
    """What lines on the screen begin with: `rank 3: `; nothing in a process that is alone."""
    return f"rank {os.environ['RANK']}: " if launched_ranks() > 1 else ""


def is_under_torchrun() -> bool:
    """Whether torchrun started this process, and may do so again."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def restarts(which: Literal["COUNT", "MAX"]) -> int:
    """How often torchrun has started the run anew, and how often it would at most."""
    return int(os.environ.get({"COUNT": "TORCHELASTIC_RESTART_COUNT", "MAX": "TORCHELASTIC_MAX_RESTARTS"}[which], "0"))


@contextmanager
def joined(device: str) -> Iterator[None]:
    """With the process group of the ranks, if there are several: NCCL for tensors on GPUs, gloo for those on the CPU.

    A collective fails after DSSP_TIMEOUT seconds (default 600). Raises RanksApart if the others do not come.
    """
    if launched_ranks() == 1:
        yield
        return
    # Its defaults hold the group that exists when it is imported, and optimizers import it. A group that is held keeps
    # its threads, and one of those that drops a tensor while the interpreter ends aborts a rank whose run is complete.
    importlib.import_module("torch.distributed.nn.functional")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    seconds = float(os.environ.get("DSSP_TIMEOUT", SECONDS))
    with _or_apart("the ranks did not come together"):
        store, me, count = next(iter(dist.rendezvous("env://", timeout=timedelta(seconds=seconds))))
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
            store=dist.PrefixStore(_name_of_this_start(store, me, count, seconds), store),
            rank=me,
            world_size=count,
            timeout=timedelta(seconds=seconds),
        )
    yield  # who fails leaves without a word to the group: a farewell would wait for the others
    dist.destroy_process_group()


def _name_of_this_start(store: dist.Store, me: int, count: int, seconds: float) -> str:
    """A name that rank 0 makes up and all ranks know.

    torchrun's store outlives a restart, and in it are the addresses of ranks that are dead; so nobody believes rank 0
    before it has answered to something that was never said before.
    """
    mine, end = uuid.uuid4().hex, time.monotonic() + seconds
    name = mine if me == 0 else ""
    if me > 0:
        store.set(f"hello/{me}", mine)
    while not name or (me == 0 and store.add(f"{name}/came", 0) < count - 1):
        if time.monotonic() > end:
            raise RuntimeError(f"{count} were started, after {seconds:g} seconds some are missing")
        for r in range(1, count) if me == 0 else ():
            if store.check([f"hello/{r}"]):
                store.set(f"answer/{r}", f"{store.get(f'hello/{r}').decode()} {name}")
        if me > 0 and store.check([f"answer/{me}"]):
            said, name_of_0 = store.get(f"answer/{me}").decode().split()
            name = name_of_0 if said == mine else ""
        time.sleep(POLL_SECONDS)
    if me > 0:
        store.add(f"{name}/came", 1)
    return name


@contextmanager
def _or_apart(what: str) -> Iterator[None]:
    """Failures of collectives, which torch raises as RuntimeError, as RanksApart."""
    try:
        yield
    except RuntimeError as error:
        line = str(error).strip().splitlines()[0].split(". ")[0]  # gloo goes on with advice to programmers
        reason = re.sub(r"\[/\S*\] ", "", line)  # and begins with a place in its source
        raise RanksApart(f"{what} ({reason})") from error


def _sum(tensor: Tensor, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
    """The tensor, in place the sum (or another operation) over the ranks."""
    with _or_apart("lost contact with the other ranks, one of them has ended or hangs"):
        dist.all_reduce(tensor, operation)
    return tensor


# ---- what is averaged ------------------------------------------------------------------------------------------------


@torch.no_grad()
def average_gradients(parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
    """Replace the gradients by their means over the ranks; the mean of the loss.

    A rank without a gradient where another has one counts as zeros; where none has one, None stays. All ranks must give
    the same parameters in the same order, and get the same bits, so they take the same decisions on what they see.
    On GPUs a CUDA graph may record it: which gradients there are is settled on the host, when it is recorded.
    """
    if not _is_joined():
        return loss
    parameters = list(parameters)
    present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.uint8)
    loss, tensors = loss.detach().clone(), []
    for parameter, there in zip(parameters, _sum(present, dist.ReduceOp.MAX).tolist(), strict=True):
        if there and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if parameter.grad is not None:
            tensors.append(parameter.grad)
    average_tensors([*tensors, loss])
    return loss


@torch.no_grad()
def average_tensors(tensors: list[Tensor]) -> list[Tensor]:
    """The tensors, in place their means over the ranks, which give the same shapes in the same order."""
    for bucket in _buckets(tensors) if _is_joined() else ():
        mean = _sum(torch.cat([tensor.reshape(-1) for tensor in bucket])).div_(ranks())
        parts = mean.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [part.view(tensor.shape) for part, tensor in zip(parts, bucket, strict=True)])
    return tensors


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Groups of one type and of at most BUCKET elements, or of one tensor, in the same order on every rank."""
    in_order = sorted(tensors, key=lambda tensor: str(tensor.dtype))
    for _, group in groupby(in_order, key=lambda tensor: tensor.dtype):
        bucket: list[Tensor] = []
        for tensor in group:
            if bucket and sum(map(Tensor.numel, bucket)) + tensor.numel() > BUCKET:
                yield bucket
                bucket = []
            bucket.append(tensor)
        yield bucket


def average(scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means over the ranks of what a step reports."""
    if not _is_joined() or not scalars:
        return dict(scalars)
    means = _sum(torch.stack(list(scalars.values()))).div_(ranks())
    return dict(zip(scalars, means.unbind(), strict=True))


class SumOverRanks(torch.autograd.Function):
    """sum over the ranks of x, for all; what comes back is the sum over the ranks of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _sum(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return SumOverRanks.apply(gradient)


def divided(function: Callable[[Tensor], Tensor], parts: Sequence[Tensor]) -> list[Tensor]:
    """[function(part) for part in parts], each computed by one rank and known to all.

    The function makes [n, width] of a part [n, ...]; all ranks must have the same parts.
    """
    if not _is_joined():
        return [function(part) for part in parts]
    results = {i: function(parts[i]) for i in range(rank(), len(parts), ranks())}
    width = highest(max((result.shape[1] for result in results.values()), default=0))
    lines = [results[i] if i in results else part.new_zeros(len(part), width) for i, part in enumerate(parts)]
    together = _sum(torch.cat(lines))  # x + 0: the bits of who computed it
    return list(together.split([len(part) for part in parts]))


# ---- what is agreed --------------------------------------------------------------------------------------------------


def highest(value: int) -> int:
    """The largest value that any rank has. On the host: GPUs go on working."""
    return int(_sum(torch.tensor(value), dist.ReduceOp.MAX)) if _is_joined() else value


def wait_for_all() -> None:
    """Go on when every rank is here."""
    highest(0)


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 first, then the first rank of every other machine, then the rest: who is later finds what was fetched."""
    turn = 0 if is_main() else 1 if local_rank() == 0 else 2
    for _ in range(turn):
        wait_for_all()
    try:
        yield
    finally:
        for _ in range(2 - turn):
            wait_for_all()


def on_main(function: Callable[[], T]) -> T:
    """What the function returns on rank 0, where alone it runs. Raises RanksApart on the others if it raises."""
    if not _is_joined():
        return function()
    answer: list[Any] = [None]
    try:
        if is_main():
            answer = [(function(),)]
    finally:
        with _or_apart("lost contact with rank 0"):
            dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[0] is None:
        raise RanksApart("rank 0 cannot go on; its own line says why")
    return answer[0][0]


def check_same(values: Mapping[str, Any], when: str) -> None:
    """Raises RanksApart, on every rank, naming the first value that is not the same on all, and who has another."""
    if not _is_joined():
        return
    gathered: list[Any] = [None] * ranks()
    with _or_apart("lost contact with the other ranks, one of them has ended or hangs"):
        dist.all_gather_object(gathered, dict(values))
    for what, expected in gathered[0].items():
        others = [str(r) for r, theirs in enumerate(gathered) if theirs[what] != expected]
        if others:
            raise RanksApart(f"{when}: {what} of rank {', '.join(others)} differ from those of rank 0")


def checksum(tensors: Iterable[Tensor]) -> str:
    """A few characters that the same tensors give and others do not."""
    digest = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
