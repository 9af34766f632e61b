"""mixed_sum through its public function: every backend that runs on the CPU, against float64 and against eager."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import mixed_sum
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.mixtures import Mixture, assert_as_exact_as_eager, mixture, oracle, run
from tests.kernels.tensors import LAYOUTS, SLACK


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_result_and_gradients_match_float64(backend: str, dtype: torch.dtype, layout: str) -> None:
    m = mixture((3, 5, 7, 9), edges=2, candidates=4, dtype=dtype, absent=(2,), layout=LAYOUTS[layout])
    assert_as_exact_as_eager(run(mixed_sum, m), m, SLACK[dtype])


@pytest.mark.parametrize("size", [0, 1, 63, 1000, 7186, 70001])
@pytest.mark.parametrize("candidates", [1, 2, 7, 33])
def test_odd_sizes(backend: str, size: int, candidates: int) -> None:
    m = mixture((size,), candidates=candidates)
    assert_as_exact_as_eager(run(mixed_sum, m), m)


@pytest.mark.parametrize("edges", [1, 2, 5, 6])
@pytest.mark.parametrize("relaxation", ["softmax", "given"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
def test_node_of_several_edges(backend: str, edges: int, relaxation: str, gated: bool) -> None:
    m = mixture((2, 3, 5, 5), edges=edges, candidates=7, relaxation=relaxation, gated=gated, inactive=[edges - 1])
    assert_as_exact_as_eager(run(mixed_sum, m), m)


@st.composite
def mixtures(draw: st.DrawFn) -> Mixture:
    edges, candidates = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    entries = edges * candidates
    absent = draw(st.sets(st.integers(0, entries - 1), max_size=entries - 1))
    return mixture(
        draw(st.lists(st.integers(1, 6), max_size=4)),
        edges=edges,
        candidates=candidates,
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        absent=sorted(absent),
        gated=draw(st.booleans()),
        inactive=draw(st.none() | st.sets(st.integers(0, edges - 1)).map(sorted)),
        relaxation=draw(st.sampled_from(["softmax", "given"])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=150, deadline=None)
@given(m=mixtures())
def test_any_mixture(m: Mixture) -> None:
    assert_as_exact_as_eager(run(mixed_sum, m), m)


def test_inactive_edge_is_not_read_and_has_zero_gradients(backend: str) -> None:
    m = mixture((4, 33), edges=3, candidates=2, inactive=[1])
    poisoned = [o if o is None or i // 2 != 1 else torch.full_like(o, float("nan")) for i, o in enumerate(m.outputs)]
    y, d_alpha, d_mask, *d_outputs = run(
        mixed_sum, Mixture(tuple(poisoned), m.alpha, m.mask, m.active, "softmax", m.grad)
    )
    assert torch.equal(y, run(mixed_sum, m)[0])
    for gradient in (d_alpha[1], d_mask[1], *d_outputs[2:4]):
        assert torch.equal(gradient, torch.zeros_like(gradient))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_propagate(backend: str, value: float) -> None:
    m = mixture((2, 40))
    m.outputs[0][1, 7] = value
    y, d_alpha, *_ = run(mixed_sum, m)
    assert y.isfinite().sum() == y.numel() - 1
    assert not d_alpha.isfinite().any()


def test_dropped_candidate_with_alpha_minus_infinity_has_no_weight(backend: str) -> None:
    m = mixture((5, 5), candidates=3, absent=(1,))
    m.alpha[0, 1] = float("-inf")
    y, d_alpha, *_ = run(mixed_sum, m)
    assert y.isfinite().all() and d_alpha.isfinite().all() and d_alpha[0, 1] == 0


@pytest.mark.parametrize("layout", list(LAYOUTS)[:3])
def test_output_keeps_the_layout(backend: str, layout: str) -> None:
    m = mixture((2, 3, 4, 5), layout=LAYOUTS[layout])
    assert run(mixed_sum, m)[0].stride() == m.outputs[0].stride()


def test_mixed_layouts_take_the_layout_of_the_majority(backend: str) -> None:
    m = mixture((2, 3, 4, 5), candidates=5)
    outputs = tuple(o if i == 0 else o.to(memory_format=torch.channels_last) for i, o in enumerate(m.outputs))
    mixed = Mixture(outputs, m.alpha, m.mask, None, "softmax", m.grad)
    found = run(mixed_sum, mixed)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert_as_exact_as_eager(found, mixed)


def test_expanded_inputs_and_gradients(backend: str) -> None:
    m = mixture((3, 1))
    expanded = Mixture(
        tuple(o.expand(3, 8) for o in m.outputs), m.alpha, m.mask, None, "softmax", torch.ones(1, 1).expand(3, 8)
    )
    assert_as_exact_as_eager(run(mixed_sum, expanded), expanded)


def test_mixed_dtypes_give_the_promoted_dtype(backend: str) -> None:
    outputs = [torch.randn(4, 5, dtype=dtype) for dtype in (torch.bfloat16, torch.float32, torch.float16)]
    y = mixed_sum(outputs, torch.zeros(3))
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, sum(output.float() for output in outputs) / 3)


def test_one_mask_serves_all_edges(backend: str) -> None:
    m = mixture((6,), edges=3)
    shared = torch.tensor([0.3], requires_grad=True)
    separate = shared.detach().expand(3).clone().requires_grad_()
    one, many = (mixed_sum(m.outputs, m.alpha, mask) for mask in (shared, separate))
    assert torch.equal(one, many)
    one.sum().backward()
    many.sum().backward()
    torch.testing.assert_close(shared.grad[0], separate.grad.sum())


def _double(m: Mixture) -> tuple[Tensor, ...]:
    tensors = [m.alpha, m.mask, *m.outputs]
    return tuple(tensor.double().detach().requires_grad_() for tensor in tensors if tensor is not None)


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
def test_gradcheck_and_gradgradcheck(backend: str, relaxation: str) -> None:
    m = mixture((2, 3), edges=2, candidates=2, inactive=[])

    def mix(alpha: Tensor, mask: Tensor, *outputs: Tensor) -> Tensor:
        return mixed_sum(outputs, alpha, mask, relaxation=relaxation, active=m.active)

    assert_differentiable_twice(mix, _double(m))


def test_second_derivative_when_one_output_depends_on_another(backend: str) -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    alpha = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def mix(x: Tensor, alpha: Tensor) -> Tensor:
        a = x.sin()
        return mixed_sum([x, a, a.exp()], alpha)

    assert gradgradcheck(mix, (x, alpha))


def test_second_derivative_without_parameter_gradients(backend: str) -> None:
    alpha = torch.randn(2, dtype=torch.float64)
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(lambda x: mixed_sum([x.sin(), x * x], alpha), (x,))


def test_two_runs_and_any_number_of_threads_are_bit_equal(backend: str) -> None:
    m = mixture((300_000,), candidates=7)
    first = run(mixed_sum, m)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = run(mixed_sum, m)
    finally:
        torch.set_num_threads(threads)
    third = run(mixed_sum, m)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, c)
        assert backend == "reference" or torch.equal(a, b)  # PyTorch's own sums depend on the number of threads


def _saved_bytes(alpha: Tensor, outputs: list[Tensor]) -> int:
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: sizes.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        mixed_sum(outputs, alpha)
    return sum(sizes)


@with_cpu_kernels
def test_weight_step_keeps_no_candidate_output_alive() -> None:
    outputs = [torch.randn(1000, requires_grad=True) for _ in range(4)]
    assert _saved_bytes(torch.zeros(4), outputs) == 16
    assert _saved_bytes(torch.zeros(4, requires_grad=True), outputs) == 16 + 4 * 4000


@pytest.mark.parametrize("size", [1003, 1 << 20], ids=["small", "streamed"])
def test_weight_step_gives_outputs_the_gradients_of_a_step_that_learns_alpha_too(backend: str, size: int) -> None:
    m = mixture((size,), edges=2, absent=[1], inactive=[1])
    found = []
    for learns_alpha in (False, True):
        outputs = [None if output is None else output.clone().requires_grad_() for output in m.outputs]
        alpha = m.alpha.clone().requires_grad_(learns_alpha)
        present = [output for output in outputs if output is not None]
        y = mixed_sum(outputs, alpha, m.mask, active=m.active)
        found.append(torch.autograd.grad(y, present, m.grad))
    assert all(map(torch.equal, *found)) and found[0][0].any() and not found[0][-1].any()


@pytest.mark.parametrize("absent", [(), (0, 3)], ids=["all there", "with None"])
@pytest.mark.parametrize("needs_parameter_grad", [True, False])
def test_opcheck(absent: tuple[int, ...], needs_parameter_grad: bool) -> None:
    m = mixture((2, 3, 4), edges=2, absent=absent, inactive=[1])
    arguments = (list(m.outputs), m.alpha, m.mask, m.active, True)
    opcheck(torch.ops.dssp_kernels.mixed_sum_forward, arguments)
    needs = [i % 2 == 1 and i not in absent for i in range(6)]
    opcheck(torch.ops.dssp_kernels.mixed_sum_backward, (m.grad, *arguments, needs, needs_parameter_grad))


def test_compiles_without_graph_breaks() -> None:
    m = mixture((2, 3, 4, 4), edges=2, candidates=3, absent=(4,), layout=LAYOUTS["channels_last"])
    compiled = torch.compile(mixed_sum, fullgraph=True)
    for found, expected in zip(run(compiled, m), run(mixed_sum, m), strict=True):
        torch.testing.assert_close(found, expected)


def test_counts_flops() -> None:
    outputs = [torch.randn(10, requires_grad=True), None, torch.randn(10, requires_grad=True)]
    with FlopCounterMode(display=False) as counter:
        mixed_sum(outputs, torch.zeros(3, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 2 * 2 * 10 + (2 + 2 * 2) * 10


X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("error", "words", "arguments", "keywords"),
    [
        (TypeError, r"outputs: .*list or tuple.*Tensor", (X, torch.zeros(2)), {}),
        (TypeError, r"outputs\[1\]: .*tensor or None.*int", ([X, 1], torch.zeros(2)), {}),
        (ValueError, r"outputs: .*at least one tensor.*0 entries", ([], torch.zeros(0)), {}),
        (ValueError, r"outputs: .*at least one tensor.*2 entries", ([None, None], torch.zeros(2)), {}),
        (TypeError, r"outputs\[0\]: .*int64", ([X.long(), X], torch.zeros(2)), {}),
        (ValueError, r"outputs\[1\]: .*\[2, 3\].*\[3, 2\]", ([X, X.T], torch.zeros(2)), {}),
        (ValueError, r"outputs\[1\]: .*cpu.*meta", ([X, X.to("meta")], torch.zeros(2)), {}),
        (TypeError, r"outputs\[0\]: .*sparse", ([X.to_sparse()], torch.zeros(1)), {}),
        (ValueError, r"alpha: .*= 2, got shape \[3\]", ([X, X], torch.zeros(3)), {}),
        (ValueError, r"alpha: .*got shape \[1, 1, 2\]", ([X, X], torch.zeros(1, 1, 2)), {}),
        (TypeError, r"alpha: .*tensor.*list", ([X, X], [0.0, 0.0]), {}),
        (TypeError, r"alpha: .*int64", ([X, X], torch.zeros(2).long()), {}),
        (ValueError, r"alpha: .*device cpu.*meta", ([X, X], torch.zeros(2, device="meta")), {}),
        (ValueError, r"mask: .*\[E\] = \[2\].*\[3\]", ([X, X], torch.zeros(2, 1), torch.zeros(3)), {}),
        (ValueError, r"relaxation: .*softmax, given.*'gumbel'", ([X], torch.zeros(1)), {"relaxation": "gumbel"}),
        (TypeError, r"active: .*bool.*float32", ([X], torch.zeros(1)), {"active": torch.ones(1)}),
        (ValueError, r"active: .*\[1\].*\[2\]", ([X], torch.zeros(1)), {"active": torch.ones(2, dtype=torch.bool)}),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, arguments: tuple, keywords: dict) -> None:
    with pytest.raises(error, match=words):
        mixed_sum(*arguments, **keywords)


def test_oracle_agrees_with_the_formula_written_out() -> None:
    a, b = torch.tensor([2.0]), torch.tensor([5.0])
    y = oracle([a, b], torch.tensor([0.0, torch.tensor(3.0).log()]), torch.zeros(1), relaxation="softmax", active=None)
    torch.testing.assert_close(y, 0.5 * (0.25 * a + 0.75 * b))
