"""mixed_sum on a CUDA device: the claims of tests/kernels/test_mixed_sum.py, and those only a GPU can show."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from dssp_kernels import FusedMixedEdge, mixed_sum
from tests.kernels.mixtures import Mixture, mixture, oracle, run

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
    if torch.cuda.mem_get_info()[0] < 8 * n:
        pytest.skip("needs 17 GB of free device memory")
    x = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    x[-3:] = torch.tensor([1.0, 2.0, 3.0])
    y = mixed_sum([x, x], torch.zeros(2, device="cuda"))
    assert y[-3:].tolist() == [1.0, 2.0, 3.0] and not y[:10].any()


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
    graph.replay()
    for a, b in zip(captured, run(mixed_sum, m), strict=True):
        assert torch.equal(a, b)


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
