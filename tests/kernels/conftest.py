"""Fixtures of the kernels' tests: each backend in turn, and any number of threads."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from dssp_kernels import get_backend, set_backend
from tests.kernels.backends import with_cpu_kernels


@pytest.fixture(params=[pytest.param("cpu", marks=with_cpu_kernels), "reference"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that CPU tensors can have without an interpreter."""
    before = get_backend()
    set_backend(request.param)
    yield request.param
    set_backend(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of threads for this test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
