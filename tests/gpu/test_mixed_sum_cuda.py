"""mixed_sum on a CUDA device: the claims of tests/kernels/test_mixed_sum.py, and those only a GPU can show."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from dssp_kernels import FusedMixedEdge, mixed_sum
from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.mixtures import Mixture, assert_as_exact_as_eager, mixture, oracle, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Largest error relative to the tensor's largest value: rounding of the stored type, or of float32 sums.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 2e-5, torch.float64: 1e-12}


def on_gpu(m: Mixture) -> Mixture:
    """The same mixture on the device."""

    def move(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.cuda()

    outputs = tuple(move(output) for output in m.outputs)
    return Mixture(outputs, move(m.alpha), move(m.mask), move(m.active), m.relaxation, move(m.grad))


def assert_matches_float64(m: Mixture, found: list[Tensor], tolerance: float) -> None:
    """Result and every gradient against the oracle in float64 on the CPU."""
    for ours, true in zip(found, run(oracle, m.to(torch.float64)), strict=True):
        scale = max(1.0, float(true.abs().max())) if true.numel() else 1.0
        torch.testing.assert_close(ours.cpu().double(), true, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("size", [1, 63, 1000, 7186, 262_144])
@pytest.mark.parametrize(("edges", "candidates"), [(1, 1), (1, 7), (2, 8), (5, 7), (1, 33)])
def test_result_and_gradients_match_float64(dtype: torch.dtype, size: int, edges: int, candidates: int) -> None:
    absent = (1,) if candidates > 1 else ()
    m = mixture(
        (size,),
        edges=edges,
        candidates=candidates,
        dtype=dtype,
        absent=absent,
        inactive=[edges - 1] if edges > 1 else [],
    )
    assert_matches_float64(m, run(mixed_sum, on_gpu(m)), TOLERANCE[dtype])


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_errors_are_at_most_twice_those_of_eager(dtype: torch.dtype, relaxation: str) -> None:
    m = mixture((100_003,), edges=2, candidates=7, dtype=dtype, relaxation=relaxation)
    assert_as_exact_as_eager(run(mixed_sum, on_gpu(m)), on_gpu(m))


@pytest.mark.parametrize("size", [1, 7, 1000, 7186, 1_000_003])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype, size: int) -> None:
    m = on_gpu(mixture((size,), edges=2, candidates=9, dtype=dtype, inactive=[1]))
    surrounded = replace(m, outputs=tuple(in_margins(output, torch.nan)[0] for output in m.outputs))
    surrounded = replace(surrounded, grad=in_margins(m.grad, torch.nan)[0])
    expected = run(mixed_sum, m)
    with guarded_allocations():  # which also start as NaN
        found = run(mixed_sum, surrounded)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


def test_tensors_that_start_between_16_bytes() -> None:
    m = on_gpu(mixture((10_001,), candidates=3, dtype=torch.bfloat16))
    shifted = replace(m, outputs=tuple(torch.cat([o[:1], o])[1:] for o in m.outputs))
    for a, b in zip(run(mixed_sum, shifted), run(mixed_sum, m), strict=True):
        assert torch.equal(a, b)


def test_channels_last_runs_without_a_copy() -> None:
    x = [torch.randn(8, 16, 32, 32, device="cuda").to(memory_format=torch.channels_last) for _ in range(7)]
    alpha = torch.zeros(7, device="cuda")
    mixed_sum(x, alpha)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = mixed_sum(x, alpha)
    assert torch.cuda.max_memory_allocated() - before == y.nbytes


def test_one_launch_forward_and_two_backward() -> None:
    m = on_gpu(mixture((10_000,), edges=5, candidates=8, absent=range(0, 40, 8), inactive=[2]))
    run(mixed_sum, m)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(mixed_sum, m)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    launched = sorted(name for name in names if name.startswith("mixed_sum"))
    assert launched == ["mixed_sum_bwd_finish_kernel", "mixed_sum_bwd_kernel", "mixed_sum_fwd_kernel"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_runs_on_the_tensors_device_not_the_current_one() -> None:
    m = mixture((5000,), candidates=3)
    x = [output.to("cuda:1") for output in m.outputs]
    y = mixed_sum(x, m.alpha.to("cuda:1"), m.mask.to("cuda:1"))
    torch.testing.assert_close(y.cpu(), run(oracle, m)[0])


def test_channels_last_stays_channels_last() -> None:
    m = mixture((4, 16, 9, 9), candidates=7, layout=lambda t: t.to(memory_format=torch.channels_last))
    found = run(mixed_sum, on_gpu(m))
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_matches_float64(m, found, TOLERANCE[torch.float32])


def test_two_runs_are_bit_equal() -> None:
    m = on_gpu(mixture((1_000_003,), candidates=7, dtype=torch.bfloat16))
    for a, b in zip(run(mixed_sum, m), run(mixed_sum, m), strict=True):
        assert torch.equal(a, b)


def test_inactive_edge_is_not_read() -> None:
    m = on_gpu(mixture((5000,), edges=2, candidates=3, inactive=[1]))
    expected = run(mixed_sum, m)
    for output in m.outputs[3:]:
        output.fill_(float("nan"))
    for a, b in zip(run(mixed_sum, m), expected, strict=True):
        assert torch.equal(a, b)


def test_more_than_two_to_the_31_elements() -> None:
    n = 2**31 + 77
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip("needs 30 GB of free device memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.tensor([1.0, 2.0, 3.0])
    alpha = torch.zeros(2, device="cuda", requires_grad=True)
    a, b = x.requires_grad_(), x.detach().requires_grad_()
    y = mixed_sum([a, b], alpha, relaxation="given")
    assert not y.any()
    y = mixed_sum([a, b], alpha)
    assert y[-3:].tolist() == [1.0, 2.0, 3.0] and not y[:10].any() and y.count_nonzero() == 3
    d_alpha, d_a, d_b = torch.autograd.grad(mixed_sum([a, b], alpha, relaxation="given"), (alpha, a, b), x)
    assert d_alpha.tolist() == [14.0, 14.0] and not d_a.any() and not d_b.any()
    d_a, d_b = torch.autograd.grad(y, (a, b), x)
    assert d_a[-3:].tolist() == [0.5, 1.0, 1.5] and d_b.count_nonzero() == 3


def test_no_host_synchronisation() -> None:
    m = on_gpu(mixture((4096,), edges=2, candidates=4, inactive=[0]))
    run(mixed_sum, m)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(mixed_sum, m)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_follows_an_edge_switched_off_by_its_flag() -> None:
    m = on_gpu(mixture((4096,), edges=2, candidates=4, inactive=[]))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(mixed_sum, m)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(mixed_sum, m)
    m.active[1] = False
    for output in m.outputs[4:]:
        output.fill_(torch.nan)
    graph.replay()
    for a, b in zip(captured, run(mixed_sum, m), strict=True):
        assert torch.equal(a, b)
    y, d_alpha, d_mask, *d_outputs = captured
    assert y.isfinite().all() and y.any()
    assert all(not d.any() for d in (d_alpha[1], d_mask[1], *d_outputs[4:])) and d_alpha[0].any()


def test_runs_on_the_current_stream() -> None:
    m = on_gpu(mixture((100_000,), candidates=7))
    expected = run(mixed_sum, m)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = run(mixed_sum, m)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_opcheck() -> None:
    m = on_gpu(mixture((2, 3, 4), edges=2, absent=(0,), inactive=[1]))
    arguments = (list(m.outputs), m.alpha, m.mask, m.active, True)
    opcheck(torch.ops.dssp_kernels.mixed_sum_forward, arguments)
    needs = [i % 2 == 1 for i in range(6)]
    opcheck(torch.ops.dssp_kernels.mixed_sum_backward, (m.grad, *arguments, needs, True))


def test_compiles_without_graph_breaks() -> None:
    m = on_gpu(mixture((2, 3, 8, 8), candidates=3))
    for found, expected in zip(run(torch.compile(mixed_sum, fullgraph=True), m), run(mixed_sum, m), strict=True):
        torch.testing.assert_close(found, expected)


def test_edge_trains_and_prunes() -> None:
    edge = FusedMixedEdge([nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1), nn.Identity()]).cuda()
    x = torch.randn(4, 8, 16, 16, device="cuda")
    edge(x).square().mean().backward()
    assert edge.alpha.grad.isfinite().all() and edge.mask.grad.isfinite().all()
    edge.prune()
    assert not edge(x).any()


def test_second_derivative() -> None:
    alpha = torch.randn(3, dtype=torch.float64, device="cuda", requires_grad=True)
    x = torch.randn(6, dtype=torch.float64, device="cuda", requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda a, x: mixed_sum([x.sin(), x, x * x], a), (alpha, x))
