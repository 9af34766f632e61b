"""The Triton launchers of mixed_sum under Triton's interpreter, against float64 and against eager."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.mixtures import Mixture, eager, mixture, oracle, run

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, where NaN is due
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: tests/gpu has the claims for compiled kernels", allow_module_level=True)

from dssp_kernels.mixed_sum import triton_launchers  # noqa: E402  # imports triton, which may be absent

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
# The interpreter truncates float32 to bfloat16 where the hardware rounds: one unit in the last place.
SLACK = {torch.float32: 1e-6, torch.float64: 1e-14, torch.float16: 1e-4, torch.bfloat16: 2.0**-7}


@pytest.fixture(autouse=True)
def guarded_memory() -> Iterator[None]:
    with guarded_allocations():
        yield


def launch(
    m: Mixture, needs_output_grad: Sequence[bool] | None = None, needs_parameter_grad: bool = True
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """y, gradients of the outputs asked for, gradient of alpha, gradient of mask. NaN lies around every input."""
    outputs = [None if output is None else in_margins(output, torch.nan)[0] for output in m.outputs]
    grad = in_margins(m.grad, torch.nan)[0]
    if needs_output_grad is None:
        needs_output_grad = [output is not None for output in outputs]
    softmax = m.relaxation == "softmax"
    y = triton_launchers.mixed_sum_forward(outputs, m.alpha, m.mask, m.active, softmax)
    saved = outputs if needs_parameter_grad else [None] * len(outputs)
    return y, *triton_launchers.mixed_sum_backward(
        grad, saved, m.alpha, m.mask, m.active, softmax, needs_output_grad, needs_parameter_grad
    )


def assert_as_exact_as_eager(m: Mixture) -> None:
    """Error against float64 at most twice eager's own plus what the interpreter rounds differently."""
    y, d_outputs, d_alpha, d_mask = launch(m)
    found = [y, d_alpha, *([] if m.mask is None else [d_mask]), *d_outputs]
    for ours, theirs, exact in zip(found, run(eager, m), run(oracle, m.to(torch.float64)), strict=True):
        assert ours.shape == exact.shape and ours.dtype == theirs.dtype
        size = exact.abs() if exact.shape == m.grad.shape else exact.abs().max()  # dot products partly cancel
        allowed = 2 * (theirs.double() - exact).abs().max() + SLACK[ours.dtype] * size.clamp_min(1.0)
        error = (ours.double() - exact).abs()
        assert (error <= allowed).all(), f"error {error.max():.3g} where at most {allowed.min():.3g} is allowed"


@pytest.mark.parametrize("size", [1, 63, 1000, 7186])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_result_and_gradients_match_float64(dtype: torch.dtype, size: int) -> None:
    assert_as_exact_as_eager(mixture((size,), edges=2, candidates=3, dtype=dtype, absent=(1,)))


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
@pytest.mark.parametrize("candidates", [1, 2, 4, 7, 8, 9, 17, 33])
def test_any_number_of_candidates(candidates: int, relaxation: str) -> None:
    assert_as_exact_as_eager(mixture((1000,), candidates=candidates, relaxation=relaxation))


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
@pytest.mark.parametrize("edges", [1, 2, 3, 4, 5, 6])
def test_any_number_of_edges(edges: int, gated: bool) -> None:
    m = mixture((63,), edges=edges, candidates=8, gated=gated, absent=range(0, 8 * edges - 1, 8))
    assert_as_exact_as_eager(m)
    assert_as_exact_as_eager(replace(m, active=torch.arange(edges) % 2 == 0))


def test_edge_whose_candidates_are_all_absent_adds_nothing() -> None:
    assert_as_exact_as_eager(mixture((100,), edges=2, candidates=9, absent=range(9)))


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
def test_many_edges_of_many_candidates(relaxation: str) -> None:
    assert_as_exact_as_eager(mixture((130,), edges=6, candidates=33, relaxation=relaxation, inactive=[2]))


@pytest.mark.parametrize("active", [None, (True, False, True)], ids=["all active", "one inactive"])
def test_one_mask_for_all_edges_collects_their_gradients(active: tuple[bool, ...] | None) -> None:
    m = mixture((1000,), edges=3, candidates=4)
    m = replace(m, mask=torch.full((3,), 0.3), active=None if active is None else torch.tensor(active))
    y, d_outputs, d_alpha, d_mask = launch(m)
    shared_y, shared_d_outputs, shared_d_alpha, shared_d_mask = launch(replace(m, mask=torch.full((1,), 0.3)))
    assert torch.equal(shared_y, y) and torch.equal(shared_d_alpha, d_alpha)
    assert all(map(torch.equal, shared_d_outputs, d_outputs))
    torch.testing.assert_close(shared_d_mask, d_mask.sum().reshape(1))


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
def test_inactive_edge_is_not_read_and_its_gradients_are_zero(relaxation: str) -> None:
    m = mixture((1001,), edges=3, candidates=9, relaxation=relaxation, inactive=[1])
    assert m.mask is not None
    for tensor in (*m.outputs[9:18], m.alpha[1], m.mask[1]):
        assert tensor is not None
        tensor.fill_(torch.nan)
    y, d_outputs, d_alpha, d_mask = launch(m)
    assert all((d_output == 0).all() for d_output in d_outputs[9:18])
    assert (d_alpha[1] == 0).all() and d_mask[1] == 0
    outputs = m.outputs[:9] + m.outputs[18:]
    rest = replace(m, outputs=outputs, alpha=m.alpha[::2].contiguous(), mask=m.mask[::2].contiguous(), active=None)
    y_rest, d_outputs_rest, d_alpha_rest, d_mask_rest = launch(rest)
    assert torch.equal(y, y_rest) and torch.equal(d_alpha[::2], d_alpha_rest) and torch.equal(d_mask[::2], d_mask_rest)
    assert all(map(torch.equal, d_outputs[:9] + d_outputs[18:], d_outputs_rest))


def test_inactive_edge_does_not_read_the_gradient() -> None:
    m = mixture((1001,), edges=1, candidates=2, inactive=[0])
    _, d_outputs, d_alpha, d_mask = launch(replace(m, grad=torch.full_like(m.grad, torch.nan)))
    assert all((d == 0).all() for d in (*d_outputs, d_alpha, d_mask))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("place", ["output", "grad", "alpha", "mask"])
def test_nan_and_inf_propagate_as_in_eager(place: str, value: float) -> None:
    m = mixture((70,), edges=2, candidates=3, inactive=[])
    spoiled = {"output": m.outputs[4], "grad": m.grad, "alpha": m.alpha[1], "mask": m.mask}[place]
    assert spoiled is not None
    spoiled[1] = value
    y, d_outputs, d_alpha, d_mask = launch(m)
    for ours, theirs in zip([y, d_alpha, d_mask, *d_outputs], run(oracle, m), strict=True):
        assert torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("wanted", [(), (0,), (5,), (1, 2, 6)], ids=str)
@pytest.mark.parametrize("needs_parameter_grad", [True, False], ids=["parameters too", "outputs only"])
def test_only_gradients_asked_for_are_computed(wanted: tuple[int, ...], needs_parameter_grad: bool) -> None:
    m = mixture((300,), edges=2, candidates=4, absent=(3,))
    place = [i for i in range(8) if i != 3]
    _, every, d_alpha, d_mask = launch(m)
    _, d_outputs, d_alpha_asked, d_mask_asked = launch(m, [i in wanted for i in range(8)], needs_parameter_grad)
    assert len(d_outputs) == len(wanted)
    assert all(torch.equal(ours, every[place.index(i)]) for i, ours in zip(wanted, d_outputs, strict=True))
    if needs_parameter_grad:
        assert torch.equal(d_alpha_asked, d_alpha) and torch.equal(d_mask_asked, d_mask)
    else:
        assert d_alpha_asked.numel() == 0 and d_mask_asked.numel() == 0


def test_gradient_of_an_absent_mask_is_empty() -> None:
    assert launch(mixture((10,), gated=False))[3].numel() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_parameters_of_another_dtype_get_gradients_in_it(dtype: torch.dtype) -> None:
    m = mixture((500,), edges=2, candidates=3)
    assert m.mask is not None
    m = replace(m, alpha=m.alpha.to(dtype), mask=m.mask.to(dtype))
    y, _, d_alpha, d_mask = launch(m)
    exact = run(oracle, m.to(torch.float64))
    tolerance = 1e-2 if dtype is torch.bfloat16 else 1e-3
    assert y.dtype is torch.float32 and d_alpha.dtype is dtype and d_mask.dtype is dtype
    torch.testing.assert_close(y.double(), exact[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close([d_alpha.double(), d_mask.double()], exact[1:3], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "layout",
    [lambda t: t.to(memory_format=torch.channels_last), lambda t: t.permute(3, 1, 0, 2)],
    ids=["channels_last", "permuted"],
)
def test_memory_layout_is_kept(layout: Callable[[Tensor], Tensor]) -> None:
    m = mixture((3, 5, 7, 9), edges=2, candidates=3, layout=layout)
    m = replace(m, grad=layout(m.grad))
    y, d_outputs, _, _ = launch(m)
    assert y.stride() == m.grad.stride() and all(d.stride() == m.grad.stride() for d in d_outputs)
    assert_as_exact_as_eager(m)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)], ids=str)
def test_empty_tensors(shape: tuple[int, ...]) -> None:
    y, d_outputs, d_alpha, d_mask = launch(mixture(shape, edges=2, candidates=3))
    assert y.shape == shape and len(d_outputs) == 6 and all(d.shape == shape for d in d_outputs)
    assert (d_alpha == 0).all() and (d_mask == 0).all()


@pytest.mark.parametrize("size", [2048, 8001])
def test_programs_loop_over_what_is_too_large_for_one_step(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launchers, "PROGRAMS", 3)
    monkeypatch.setattr(triton_launchers, "FINISH_ELEMENTS", 16)  # two rows of partial sums at a time
    assert_as_exact_as_eager(mixture((size,), edges=2, candidates=5, inactive=[]))


def test_two_runs_are_bit_equal() -> None:
    m = mixture((2001,), edges=2, candidates=7)
    first, second = launch(m), launch(m)
    assert torch.equal(first[0], second[0]) and all(map(torch.equal, first[1], second[1]))
    assert torch.equal(first[2], second[2]) and torch.equal(first[3], second[3])
