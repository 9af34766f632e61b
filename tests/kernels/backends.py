"""Marks for tests that need a certain backend."""

import pytest

from dssp_kernels.backend import WHY_NO_CPU_KERNELS

with_cpu_kernels = pytest.mark.skipif(WHY_NO_CPU_KERNELS is not None, reason=f"C++ kernels: {WHY_NO_CPU_KERNELS}")
