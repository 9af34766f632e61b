"""Every instruction set that the C++ kernels are compiled for, and that this machine has, computes the same."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import (
    SeparableConvolution,
    SeparablePair,
    batch_norm_mixed_sum,
    mixed_sum,
    pointwise_batch_norm,
    pool_batch_norm,
    separable_conv2d_group,
)
from dssp_kernels.backend import get_backend, set_backend
from tests.kernels.backends import with_cpu_kernels
from tests.source_trees import ROOT

pytestmark = with_cpu_kernels
CAPABILITIES = ("default", "avx2", "avx512")
HERE = torch.backends.cpu.get_cpu_capability().lower()


def normal(*shape: int) -> Tensor:
    """By NumPy: what torch draws depends on the instruction set."""
    return torch.from_numpy(np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32))


def results(dtype: torch.dtype) -> list[Tensor]:
    """Values and gradients of the operators; 24 channels, 13 columns: whole packs of vectors, and some left over."""
    x = normal(2, 24, 11, 13).to(dtype, memory_format=torch.channels_last).requires_grad_()
    leaves = [normal(3), *(normal(24, 1, k, k) for k in (3, 5)), *(normal(width, 24, 1, 1) for width in (24, 40))]
    alpha, *weights = [leaf.to(dtype).requires_grad_() for leaf in leaves]
    convolutions = [
        SeparableConvolution(weights[0], weights[2], padding=2, dilation=2, relu=True),
        SeparableConvolution(weights[1], weights[3], padding=2, stride=2),
    ]
    convolutions.append(SeparablePair(convolutions[0], nn.BatchNorm2d(24, affine=False, dtype=dtype), convolutions[1]))
    inputs = [x, -x, x * x]
    norms = [nn.BatchNorm2d(24, affine=False), None, nn.BatchNorm2d(24, affine=False)]
    outputs = [
        *separable_conv2d_group(x, convolutions),
        mixed_sum(inputs, alpha),
        batch_norm_mixed_sum(inputs, alpha, norms=[norm and norm.to(dtype) for norm in norms], training=True),
        pointwise_batch_norm(x, weights[2], relu=True)[0],
        pool_batch_norm(x, "max", 3, padding=1)[0],
        pool_batch_norm(x, "avg", 3, padding=1)[0],
    ]
    loss = sum((y * torch.linspace(-1, 1, y.numel(), dtype=dtype).view(y.shape)).sum() for y in outputs)
    return [y.detach() for y in outputs] + list(torch.autograd.grad(loss, [x, alpha, *weights]))


def results_with(capability: str) -> list[Tensor]:
    """results(torch.float32) of a process that may use no more than `capability`."""
    code = "import sys, torch, tests.kernels.test_instruction_sets as t; "
    code += "torch.save(t.results(torch.float32), sys.stdout.buffer)"
    environment = os.environ | {"ATEN_CPU_CAPABILITY": capability, "DSSP_BACKEND": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, check=True)
    return torch.load(io.BytesIO(done.stdout), weights_only=True)


@pytest.mark.skipif(HERE not in CAPABILITIES, reason="one instruction set only")
def test_all_of_this_machine_agree_with_float64() -> None:
    before = get_backend()
    set_backend("reference")
    expected = results(torch.float64)
    set_backend(before)
    found = {name: results_with(name) for name in CAPABILITIES[: CAPABILITIES.index(HERE) + 1]}
    for name, tensors in found.items():
        for i, (ours, theirs) in enumerate(zip(tensors, expected, strict=True)):
            error = (ours.double() - theirs).norm() / theirs.norm()
            assert error < 2e-6, f"{name}, result {i}: {error:.1e}"
    if HERE != "default":  # the baseline has no fused multiply-add: other bits of the first, which only our kernels
        assert not torch.equal(found["default"][0], found["avx2"][0])  # make, say that it really ran
