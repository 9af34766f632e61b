"""Ranks on GPUs: the averaging of gradients by NCCL goes into the CUDA graph of a step, and synchronised norms do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dssp.steps.capture import EAGER_STEPS
from dssp.steps.sync_batch_norm import synchronise_norms
from tests.gpu.test_search_cuda import run_steps, search_on_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or not dist.is_nccl_available(), reason="needs a GPU and NCCL"),
]


@pytest.fixture
def group_of_one(tmp_path: Path) -> Iterator[None]:
    """Collectives run, and change nothing: all that one GPU can show."""
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("synchronised", [False, True], ids=["own norms", "synchronised norms"])
def test_steps_with_collectives_are_recorded_and_train_as_eager_ones_do(group_of_one: None, synchronised: bool) -> None:
    captured, eager = (search_on_gpu(no_cuda_graphs=off) for off in (False, True))
    if synchronised:
        for search in (captured, eager):
            synchronise_norms(search.supernet)
    for epoch in (0, 1):
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a warning would say that the step cannot be recorded
            found, expected = (run_steps(search, epoch, EAGER_STEPS + 4) for search in (captured, eager))
        assert captured.captured.is_recorded and not eager.captured.is_recorded
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
