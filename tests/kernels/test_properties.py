"""What mixed_sum and batch_norm_mixed_sum hold for any arguments: dtypes, layouts side by side, norms of every kind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dssp_kernels import batch_norm_mixed_sum, mixed_sum
from tests.kernels import mixtures
from tests.kernels import test_batch_norm_mixed_sum as with_norms
from tests.kernels.mixtures import Mixture
from tests.kernels.tensors import LAYOUTS, SLACK
from tests.kernels.test_batch_norm_mixed_sum import Case

# ---- any arguments ---------------------------------------------------------------------------------------------------


def expanded(tensor: Tensor) -> Tensor:
    """The first image for all."""
    return tensor[:1].expand_as(tensor)


ANY_LAYOUT = LAYOUTS | {"expanded": expanded}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@st.composite
def mixtures_of(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> Mixture:
    """Every entry in a layout of its own, of 1 to 4 edges with 1 to 9 candidates."""
    edges, candidates = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    entries = edges * candidates
    m = mixtures.mixture(
        shape,
        edges=edges,
        candidates=candidates,
        dtype=dtype,
        absent=sorted(draw(st.sets(st.integers(0, entries - 1), max_size=entries - 1))),
        gated=draw(st.booleans()),
        inactive=draw(st.none() | st.sets(st.integers(0, edges - 1)).map(sorted)),
        relaxation=draw(st.sampled_from(["softmax", "given"])),
        seed=draw(st.integers(0, 1000)),
    )
    names = draw(st.lists(st.sampled_from(list(ANY_LAYOUT)), min_size=1, max_size=3))
    layouts = [ANY_LAYOUT[names[i % len(names)]] for i in range(entries)]
    outputs = tuple(
        None if output is None else layout(output) for output, layout in zip(m.outputs, layouts, strict=True)
    )
    return replace(m, outputs=outputs, grad=draw(st.sampled_from(list(ANY_LAYOUT.values())))(m.grad))


@st.composite
def plain_mixtures(draw: st.DrawFn) -> Mixture:
    shape = tuple(draw(st.integers(low, high)) for low, high in ((0, 3), (1, 9), (1, 6), (1, 6)))
    return draw(mixtures_of(shape, draw(st.sampled_from(DTYPES))))


@st.composite
def norms_of(draw: st.DrawFn, channels: int, dtype: torch.dtype) -> nn.BatchNorm2d | None:
    if draw(st.booleans()):
        return None
    norm = nn.BatchNorm2d(
        channels,
        eps=draw(st.sampled_from([1e-5, 1e-3])),
        momentum=draw(st.sampled_from([None, 0.0, 0.1, 1.0])),
        affine=draw(st.booleans()),
        track_running_stats=draw(st.booleans()),
    )
    if draw(st.booleans()):
        norm.track_running_stats = not norm.track_running_stats  # the buffers stay as they are
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
            if tensor is not None:
                tensor.copy_(torch.rand(channels, generator=generator) + 0.5)
    return norm.to(torch.promote_types(dtype, torch.float32))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    shape = tuple(draw(st.integers(low, high)) for low, high in ((2, 3), (1, 17), (2, 5), (2, 5)))
    m = draw(mixtures_of(shape, dtype))
    norms = tuple(draw(norms_of(shape[1], dtype)) for _ in m.outputs)
    return Case(m, norms, draw(st.booleans()))


quickly = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


@quickly
@given(m=plain_mixtures())
def test_mixed_sum_of_any_entries_is_as_exact_as_eager(backend: str, m: Mixture) -> None:
    found = mixtures.run(mixed_sum, m)
    assert found[0].dtype is m.grad.dtype
    mixtures.assert_as_exact_as_eager(found, m, SLACK[m.grad.dtype])


@quickly
@given(c=cases())
def test_batch_norm_mixed_sum_of_any_norms_is_as_exact_as_eager(backend: str, c: Case) -> None:
    # Where a channel hardly varies, 1 / sqrt(variance + eps) magnifies every rounding error: eager's and ours alike.
    slack = {torch.float16: 1e-2, torch.bfloat16: 8e-2, torch.float32: 1e-4, torch.float64: 1e-9}[c.mixture.grad.dtype]
    with_norms.assert_as_exact_as_eager(with_norms.run(with_norms.fused, c), c, slack)


@quickly
@given(c=cases())
def test_two_runs_of_anything_are_bit_equal(backend: str, c: Case) -> None:
    first, second = (with_norms.run(with_norms.fused, c) for _ in range(2))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    first, second = (mixtures.run(mixed_sum, c.mixture) for _ in range(2))
    assert all(map(torch.equal, first, second))


@quickly
@given(m=plain_mixtures(), data=st.data())
def test_order_of_the_edges_does_not_matter(m: Mixture, data: st.DataObject) -> None:
    edges, candidates = m.alpha.shape
    order = data.draw(st.permutations(range(edges)))
    outputs = tuple(m.outputs[e * candidates + k] for e in order for k in range(candidates))
    index = torch.tensor(order)
    mask, active = (None if tensor is None else tensor[index] for tensor in (m.mask, m.active))
    permuted = replace(m, outputs=outputs, alpha=m.alpha[index], mask=mask, active=active)
    mixtures.assert_as_exact_as_eager(mixtures.run(mixed_sum, permuted), permuted, SLACK[m.grad.dtype])
    ours, theirs = mixtures.run(mixed_sum, permuted), mixtures.run(mixed_sum, m)
    assert torch.equal(ours[1], theirs[1][index])


@pytest.mark.parametrize("name", ["mixed_sum", "batch_norm_mixed_sum"])
def test_flags_and_parameters_may_be_columns_of_a_table(backend: str, name: str) -> None:
    m = mixtures.mixture((2, 3, 4, 4), edges=3, candidates=2, inactive=[1])
    assert m.mask is not None and m.active is not None
    alpha, mask, active = (
        torch.stack([tensor, torch.ones_like(tensor)], dim=-1)[..., 0] for tensor in (m.alpha, m.mask, m.active)
    )
    assert not active.is_contiguous()
    found, expected = (
        mixed_sum(m.outputs, *arguments, active=flags)
        if name == "mixed_sum"
        else batch_norm_mixed_sum(m.outputs, *arguments, active=flags, norms=[None] * 6, training=False)
        for *arguments, flags in ((alpha, mask, active), (m.alpha, m.mask, m.active))
    )
    assert torch.equal(found, expected)
