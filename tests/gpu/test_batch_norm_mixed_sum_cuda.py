"""batch_norm_mixed_sum on a CUDA device: the claims of its CPU tests, and those only a GPU can show."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradgradcheck

from dssp_kernels import FusedMixedEdge, batch_norm_mixed_sum
from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.tensors import LAYOUTS
from tests.kernels.test_batch_norm_mixed_sum import KINDS, Case, case, eager, fused, run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Largest error relative to the tensor's largest value: rounding of the stored type, or of float32 sums.
TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2, torch.float32: 3e-5, torch.float64: 1e-11}
DENSE = ["contiguous", "channels_last"]


def on_gpu(c: Case) -> Case:
    def move(tensor: Any) -> Any:
        return None if tensor is None else tensor.cuda()

    m = c.mixture
    moved = {"alpha": move(m.alpha), "mask": move(m.mask), "active": move(m.active), "grad": move(m.grad)}
    norms = tuple(norm if norm is None else copy.deepcopy(norm).cuda() for norm in c.norms)
    return replace(c, mixture=replace(m, outputs=tuple(map(move, m.outputs)), **moved), norms=norms)


def assert_matches_float64(found: dict[str, Tensor], c: Case) -> None:
    tolerance = TOLERANCE[c.mixture.grad.dtype]
    for name, true in run(eager, c.to(torch.float64)).items():
        atol = tolerance * max(1.0, float(true.abs().max())) if true.numel() else 0.0
        torch.testing.assert_close(found[name].cpu().double(), true.double(), rtol=0, atol=atol, msg=name)


def captured(compute: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            compute()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()
    return graph, result


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "sliced channels"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "shape", [(3, 5, 7, 9), (8, 16, 16, 16), (4, 24, 9, 7), (16, 40, 1, 1), (2, 130, 6, 6)], ids=str
)
def test_result_gradients_and_running_statistics_match_float64(
    dtype: torch.dtype, layout: str, training: bool, shape: tuple[int, ...]
) -> None:
    c = case(shape, list(KINDS), edges=2, training=training, dtype=dtype, absent=(1,), layout=LAYOUTS[layout])
    assert_matches_float64(run(fused, on_gpu(c)), c)


@pytest.mark.parametrize("layout", DENSE)
def test_node_of_many_edges(layout: str) -> None:
    c = case((4, 16, 8, 8), [*KINDS, "stats", "plain", "affine"], edges=5, inactive=[3], layout=LAYOUTS[layout])
    assert_matches_float64(run(fused, on_gpu(c)), c)


@pytest.mark.parametrize("layout", DENSE)
def test_statistics_survive_means_of_ten_thousand_deviations(layout: str) -> None:
    c = case((64, 16, 32, 32), ["stats", "affine"], offset=1e4, layout=LAYOUTS[layout])
    found, exact = run(fused, on_gpu(c)), run(eager, c.to(torch.float64))
    for name, true in exact.items():
        if name.startswith("running"):
            torch.testing.assert_close(found[name].cpu().double(), true, rtol=1e-5, atol=0)
    theirs = run(eager, on_gpu(c))["y"].cpu().double()
    error, allowed = ((y - exact["y"]).abs().max() for y in (found["y"].cpu().double(), theirs))
    assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("layout", DENSE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_outside_the_tensors_is_read_or_written(dtype: torch.dtype, layout: str) -> None:
    c = on_gpu(case((5, 12, 7, 9), edges=2, dtype=dtype, inactive=[1], layout=LAYOUTS[layout]))
    surrounded = replace(c.mixture, outputs=tuple(in_margins(output, torch.nan)[0] for output in c.mixture.outputs))
    surrounded = replace(surrounded, grad=in_margins(c.mixture.grad, torch.nan)[0])
    expected = run(fused, c)
    with guarded_allocations():  # which also start as NaN
        found = run(fused, replace(c, mixture=surrounded))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@pytest.mark.parametrize("layout", DENSE)
def test_two_runs_are_bit_equal(layout: str) -> None:
    c = on_gpu(case((64, 16, 33, 31), edges=2, dtype=torch.bfloat16, layout=LAYOUTS[layout]))
    second = run(fused, c)
    assert all(torch.equal(tensor, second[name]) for name, tensor in run(fused, c).items())


def test_more_than_two_to_the_31_elements() -> None:
    shape = (2, 16, 8192, 8200)  # 2.15e9
    if torch.cuda.mem_get_info()[0] < 9 * 2 * 2 * 16 * 8192 * 8200:
        pytest.skip("needs 40 GB of free device memory")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.zeros(shape, dtype=torch.bfloat16, device="cuda").contiguous(memory_format=memory_format)
        x[1, :, -1, -1] = 1.0
        x.requires_grad_()
        norm = nn.BatchNorm2d(16, momentum=1.0).cuda()
        y = batch_norm_mixed_sum([x], torch.ones(1, device="cuda"), norms=[norm], training=True, relaxation="given")
        count = x.numel() / 16
        torch.testing.assert_close(norm.running_mean, torch.full_like(norm.running_mean, 1 / count))
        assert bool((y[1, :, -1, -1] > 100).all()) and y[:, :, 0, 0].abs().max() < 1e-3
        (d_x,) = torch.autograd.grad(y, x, torch.ones_like(y))  # the sum of what is normalised does not depend on x
        assert d_x.abs().max() < 1e-2
        del x, y, d_x


# ---- launches, streams, graphs ---------------------------------------------------------------------------------------


def test_four_launches_forward_and_three_backward() -> None:
    c = on_gpu(case((8, 16, 16, 16), list(KINDS), edges=3, inactive=[2]))
    run(fused, c)  # compiles
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run(fused, c)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    if not names:
        pytest.skip("the profiler sees no kernels on this machine")
    assert sorted(name for name in names if name.startswith(("batch_norm_mixed_sum", "batch_norm_running"))) == [
        "batch_norm_mixed_sum_bwd_kernel",
        "batch_norm_mixed_sum_bwd_sums_kernel",
        "batch_norm_mixed_sum_bwd_tables_kernel",
        "batch_norm_mixed_sum_fwd_kernel",
        "batch_norm_mixed_sum_fwd_tables_kernel",
        "batch_norm_mixed_sum_statistics_kernel",
        "batch_norm_running_statistics_kernel",
    ]


@pytest.mark.parametrize("layout", DENSE)
def test_normalised_activations_never_exist(layout: str) -> None:
    norms = [nn.BatchNorm2d(16, affine=False).cuda() for _ in range(7)]
    x = [LAYOUTS[layout](torch.randn(8, 16, 64, 64, device="cuda")) for _ in norms]
    alpha = torch.zeros(7, device="cuda")
    batch_norm_mixed_sum(x, alpha, norms=norms, training=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y = batch_norm_mixed_sum(x, alpha, norms=norms, training=True)
    assert torch.cuda.max_memory_allocated() - before < 1.5 * y.nbytes


def test_no_host_synchronisation() -> None:
    c = on_gpu(case((8, 16, 16, 16), ["stats", "plain"], edges=2, inactive=[0]))

    def step() -> None:
        outputs = [output.detach().requires_grad_() for output in c.mixture.outputs]
        torch.autograd.grad(fused(c, outputs, c.mixture.alpha, c.mixture.mask), outputs, c.mixture.grad)

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_captured_graph_follows_an_edge_switched_off_by_its_flag() -> None:
    c = on_gpu(case((8, 16, 16, 16), ["affine", "plain", "cumulative"], edges=2, inactive=[]))
    m = c.mixture
    leaves = [tensor.detach().requires_grad_() for tensor in (m.alpha, m.mask, *m.outputs)]

    def step() -> tuple[Tensor, ...]:
        y = fused(c, leaves[2:], leaves[0], leaves[1])
        return y.detach(), *torch.autograd.grad(y, leaves, m.grad)

    graph, found = captured(step)
    m.active[1] = False
    with torch.no_grad():
        for output in leaves[5:]:
            output.fill_(torch.nan)
    before = copy.deepcopy([dict(norm.named_buffers()) for norm in c.norms if norm is not None])
    graph.replay()
    after = [dict(norm.named_buffers()) for norm in c.norms if norm is not None]
    assert after[0]["num_batches_tracked"] == before[0]["num_batches_tracked"] + 1
    for old, new in zip(before[2:], after[2:], strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)
    for a, b in zip(found, step(), strict=True):
        assert torch.equal(a, b)
    y, d_alpha, d_mask, *d_outputs = found
    assert y.isfinite().all() and not any(d.any() for d in (d_alpha[1], d_mask[1], *d_outputs[3:]))


def test_runs_on_the_current_stream() -> None:
    c = on_gpu(case((32, 16, 32, 32)))
    expected = run(fused, c)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        found = run(fused, c)
    stream.synchronize()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


# ---- autograd, modules, torch.compile --------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative(training: bool) -> None:
    c = on_gpu(case((3, 2, 1, 2), ["affine", "plain"], training=training).to(torch.float64))
    leaves = [tensor.detach().requires_grad_() for tensor in (c.mixture.alpha, c.mixture.mask, *c.mixture.outputs)]
    assert gradgradcheck(lambda alpha, mask, *outputs: fused(c, outputs, alpha, mask), leaves)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_without_graph_breaks(training: bool) -> None:
    c = on_gpu(case((2, 3, 4, 4), ["affine", "plain", "cumulative"], training=training))
    expected = run(fused, c)
    torch._dynamo.reset()
    for name, found in run(torch.compile(fused, fullgraph=True), c).items():
        torch.testing.assert_close(found, expected[name])


def test_norm_of_several_entries_is_updated_by_one_after_the_other() -> None:
    ours, theirs = nn.BatchNorm2d(4).cuda(), nn.BatchNorm2d(4).cuda()
    x = [torch.randn(3, 4, 5, 5, device="cuda") + i for i in range(3)]
    batch_norm_mixed_sum(x, torch.zeros(3, device="cuda"), norms=[ours] * 3, training=True)
    for tensor in x:
        theirs(tensor)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)


def test_edge_folds_its_norms_and_trains() -> None:
    body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, affine=False))
    edge = FusedMixedEdge([body, nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8)), nn.Identity()]).cuda()
    x = torch.randn(4, 8, 16, 16, device="cuda")
    assert edge.candidate_outputs(x, True)[1] == [edge._ops[0][1], edge._ops[1][1], None]
    edge(x).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in edge.parameters())
