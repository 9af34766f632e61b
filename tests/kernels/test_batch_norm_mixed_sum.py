"""batch_norm_mixed_sum through its public function: every backend on the CPU, against float64 and against eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import gradgradcheck
from torch.library import opcheck
from torch.utils.flop_counter import FlopCounterMode

from dssp_kernels import batch_norm_mixed_sum, mixed_sum
from dssp_kernels.backend import WHY_NO_CPU_KERNELS
from dssp_kernels.batch_norm_mixed_sum import op
from tests.kernels import tensors
from tests.kernels.backends import with_cpu_kernels
from tests.kernels.derivatives import assert_differentiable_twice
from tests.kernels.mixtures import Mixture, mixture
from tests.kernels.tensors import LAYOUTS

SLACK = tensors.SLACK | {torch.float32: 2e-6, torch.float64: 1e-13}  # a division by the deviation comes in between
OPERATORS = torch.ops.dssp_kernels


# ---- cases: mixtures with norms --------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[int], nn.BatchNorm2d | None]] = {
    "plain": lambda c: None,
    "stats": lambda c: nn.BatchNorm2d(c, affine=False),
    "affine": lambda c: nn.BatchNorm2d(c, eps=1e-3, momentum=0.3),
    "cumulative": lambda c: nn.BatchNorm2d(c, momentum=None, affine=False),
    "untracked": lambda c: nn.BatchNorm2d(c, track_running_stats=False),
}


@dataclass(frozen=True)
class Case:
    """A mixture, a norm or None per entry, and whether the batch's statistics count."""

    mixture: Mixture
    norms: tuple[nn.BatchNorm2d | None, ...]
    training: bool = True

    def to(self, dtype: torch.dtype) -> Case:
        norms = tuple(norm if norm is None else copy.deepcopy(norm).to(dtype) for norm in self.norms)
        return Case(self.mixture.to(dtype), norms, self.training)


def case(
    shape: Sequence[int],
    kinds: Sequence[str] = ("stats", "plain", "affine"),
    *,
    edges: int = 1,
    training: bool = True,
    offset: float = 0.0,
    **options: object,
) -> Case:
    """An entry per kind and edge, with random running statistics, weights and biases; means are `offset` deviations."""
    m = mixture(shape, edges=edges, candidates=len(kinds), **options)  # type: ignore[arg-type]
    norms = tuple(KINDS[kind](shape[1]) for kind in tuple(kinds) * edges)
    if (
        m.grad.dtype is torch.float64
    ):  # nn.BatchNorm2d takes other inputs than its own dtype only where they are narrower
        norms = tuple(norm and norm.double() for norm in norms)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for norm in norms:
            for tensor in [] if norm is None else [norm.running_mean, norm.running_var, norm.weight, norm.bias]:
                if tensor is not None:
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        for output in m.outputs:
            if output is not None and offset:
                output += offset
    return Case(m, norms, training)


def fused(c: Case, outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None) -> Tensor:
    m = c.mixture
    return batch_norm_mixed_sum(
        outputs, alpha, mask, norms=c.norms, training=c.training, relaxation=m.relaxation, active=m.active
    )


def eager(c: Case, outputs: Sequence[Tensor | None], alpha: Tensor, mask: Tensor | None) -> Tensor:
    """The mix as DARTS code writes it: nn.BatchNorm2d, weights, gates, in the entries' own precision."""
    m = c.mixture
    dtype = next(output.dtype for output in outputs if output is not None)
    alpha = alpha.reshape(-1, alpha.shape[-1])
    weights = (alpha.softmax(-1) if m.relaxation == "softmax" else alpha).to(dtype)
    unused = [tensor for tensor in (alpha, mask, *parameters(c), *outputs) if tensor is not None]
    total = next(output for output in outputs if output is not None).detach() * 0
    total = total + sum((0.0 * tensor.detach().nan_to_num(0) * tensor).sum().nan_to_num(0) for tensor in unused).to(
        dtype
    )
    for i, (output, norm) in enumerate(zip(outputs, c.norms, strict=True)):
        edge, candidate = divmod(i, alpha.shape[1])
        if output is None or (m.active is not None and not m.active[edge]):
            continue
        gate = 1.0 if mask is None else mask.reshape(-1)[edge].to(dtype).sigmoid()
        total = total + gate * weights[edge, candidate] * (output if norm is None else norm.train(c.training)(output))
    return total


def parameters(c: Case) -> list[Tensor]:
    """Weights and biases of the norms whose entries are there."""
    present = [norm for norm, output in zip(c.norms, c.mixture.outputs, strict=True) if norm and output is not None]
    return [parameter for norm in present for parameter in norm.parameters()]


def run(compute: Callable[..., Tensor], c: Case) -> dict[str, Tensor]:
    """The result, the gradients of everything, and the norms' buffers afterwards, on copies of the norms."""
    c = replace(c, norms=copy.deepcopy(c.norms))
    m = c.mixture
    alpha, mask = m.alpha.detach().requires_grad_(), None if m.mask is None else m.mask.detach().requires_grad_()
    outputs = [None if output is None else output.detach().requires_grad_() for output in m.outputs]
    y = compute(c, outputs, alpha, mask)
    wanted = {"d_alpha": alpha, "d_mask": mask}
    wanted |= {f"d_outputs[{i}]": output for i, output in enumerate(outputs)}
    wanted |= {f"d_parameter[{i}]": parameter for i, parameter in enumerate(parameters(c))}
    wanted = {name: tensor for name, tensor in wanted.items() if tensor is not None}
    gradients = torch.autograd.grad(y, list(wanted.values()), m.grad.to(y.dtype), materialize_grads=True)
    buffers = {f"{name} of {i}": b for i, norm in enumerate(c.norms) if norm for name, b in norm.named_buffers()}
    return {"y": y.detach()} | dict(zip(wanted, gradients, strict=True)) | buffers


def assert_as_exact_as_eager(found: dict[str, Tensor], c: Case, slack: float | None = None) -> None:
    """Error against float64 at most twice eager's own, plus ``slack`` relative to the tensor's largest value."""
    slack = SLACK[c.mixture.grad.dtype] if slack is None else slack
    exact, theirs = run(eager, c.to(torch.float64)), run(eager, c)
    assert found.keys() == exact.keys()
    for name, true in exact.items():
        assert found[name].shape == true.shape and found[name].dtype == theirs[name].dtype
        if true.numel() == 0:
            continue
        error, allowed = ((tensor.double() - true).abs().max() for tensor in (found[name], theirs[name]))
        scale = max(1.0, float(true.abs().max()))
        assert float(error) <= 2 * float(allowed) + slack * scale, (
            f"{name}: error {error:.3g}, eager has {allowed:.3g}, values up to {scale:.3g}"
        )


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("layout", list(LAYOUTS))
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_result_gradients_and_running_statistics_match_float64(
    backend: str, dtype: torch.dtype, layout: str, training: bool
) -> None:
    c = case((3, 5, 7, 9), list(KINDS), edges=2, training=training, dtype=dtype, absent=(1,), layout=LAYOUTS[layout])
    assert_as_exact_as_eager(run(fused, c), c)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 1, 1), (1, 3, 1, 2), (2, 7, 3, 5), (5, 16, 4, 4), (4, 24, 9, 7), (1, 2, 71, 83), (300, 40, 1, 1)],
    ids=str,
)
def test_odd_sizes(backend: str, shape: tuple[int, ...], layout: str) -> None:
    c = case(shape, layout=LAYOUTS[layout])
    assert_as_exact_as_eager(run(fused, c), c)


@with_cpu_kernels
@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(("channels", "edges"), [(7, 3), (3, 5)], ids=["four at a time", "twelve at a time"])
def test_nodes_larger_than_the_cache(backend: str, layout: str, channels: int, edges: int) -> None:
    """kCachedBytes in cpu.cpp, or fewer: the sum of some entries is stored, that of the next ones added to it."""
    shape, cached = (4, channels, 137, 139), 12 << 20
    c = case(shape, list(KINDS), edges=edges, absent=(1,), inactive=(1,), layout=LAYOUTS[layout])
    assert sum(o.nbytes for o in c.mixture.outputs if o is not None) > cached > 5 * c.mixture.grad.nbytes
    assert_as_exact_as_eager(run(fused, c), c)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (16, 16, 8, 8)], ids=str)
def test_statistics_survive_means_of_ten_thousand_deviations(backend: str, layout: str, shape: tuple[int, ...]) -> None:
    c = case(shape, offset=1e4, layout=LAYOUTS[layout])
    found, exact = run(fused, c), run(eager, c.to(torch.float64))
    assert_as_exact_as_eager(found, c)
    for name, true in exact.items():
        if name.startswith("running_var"):
            torch.testing.assert_close(found[name].double(), true, rtol=1e-5, atol=0)


@with_cpu_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_gradient_has_no_product_with_deviations_from_a_large_mean(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 11, 31, 33, generator=torch.Generator().manual_seed(0)) + 1e4)
    alpha, norm = torch.zeros(1), nn.BatchNorm2d(11)
    y = batch_norm_mixed_sum([x], alpha, norms=[norm], training=True)
    y.backward(torch.ones_like(y))  # what rounding the mean to float32 leaves is 1e-4 of an element's
    assert norm.weight.grad is not None and float(norm.weight.grad.abs().max()) < 1e-5 * x.numel() / 11


@with_cpu_kernels
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_survive_a_first_image_unlike_all_others(layout: str) -> None:
    c = case((64, 16, 8, 8), ["stats"], layout=LAYOUTS[layout])
    c.mixture.outputs[0][:2] += 1e4
    found, exact = run(fused, c), run(eager, c.to(torch.float64))
    torch.testing.assert_close(found["running_var of 0"].double(), exact["running_var of 0"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("relaxation", ["softmax", "given"])
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "no gate"])
def test_node_of_several_edges(backend: str, relaxation: str, gated: bool) -> None:
    c = case((2, 3, 5, 5), list(KINDS), edges=5, relaxation=relaxation, gated=gated, inactive=[4])
    assert_as_exact_as_eager(run(fused, c), c)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_that_are_written_past_the_cache(backend: str, layout: str) -> None:
    c = case((40, 9, 33, 33), layout=LAYOUTS[layout])  # 4.7 MB of gradients, rows at odd addresses
    assert_as_exact_as_eager(run(fused, c), c)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    edges = draw(st.integers(1, 4))
    kinds = draw(st.lists(st.sampled_from(list(KINDS)), min_size=1, max_size=6))
    entries = edges * len(kinds)
    batch, channels, height, width = (draw(st.integers(1, high)) for high in (4, 20, 6, 6))
    return case(
        (batch + (batch * height * width == 1), channels, height, width),
        kinds,
        edges=edges,
        training=draw(st.booleans()),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        absent=sorted(draw(st.sets(st.integers(0, entries - 1), max_size=entries - 1))),
        gated=draw(st.booleans()),
        inactive=draw(st.none() | st.sets(st.integers(0, edges - 1)).map(sorted)),
        relaxation=draw(st.sampled_from(["softmax", "given"])),
        layout=LAYOUTS[draw(st.sampled_from(["contiguous", "channels_last"]))],
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=40, deadline=None)
@given(c=cases())
def test_any_mixture_of_norms(c: Case) -> None:
    # Where a channel hardly varies, 1 / sqrt(variance + eps) magnifies every rounding error: eager's and ours alike.
    assert_as_exact_as_eager(run(fused, c), c, slack=1e-4 if c.mixture.grad.dtype is torch.float32 else 1e-9)


def test_without_norms_it_is_mixed_sum(backend: str) -> None:
    c = case((2, 3, 4, 4), ["plain", "plain"])
    m = c.mixture
    torch.testing.assert_close(run(fused, c)["y"], mixed_sum(m.outputs, m.alpha, m.mask))


def test_mixed_dtypes_give_the_promoted_dtype(backend: str) -> None:
    outputs = [torch.randn(4, 5, 2, 2, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    norms = [nn.BatchNorm2d(5), None]
    y = batch_norm_mixed_sum(outputs, torch.zeros(2), norms=norms, training=False)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, (outputs[0].float() / (1 + 1e-5) ** 0.5 + outputs[1]) / 2)


# ---- running statistics and absent things ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stats", "cumulative"])
def test_running_statistics_follow_torch_over_several_batches(backend: str, kind: str) -> None:
    ours, theirs = KINDS[kind](4), KINDS[kind](4)
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5) + torch.randn(())
        batch_norm_mixed_sum([x], torch.zeros(1), norms=[ours], training=True)
        theirs(x)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)


def test_eval_changes_no_norm(backend: str) -> None:
    norm = nn.BatchNorm2d(4)
    before = copy.deepcopy(norm.state_dict())
    batch_norm_mixed_sum([torch.randn(3, 4, 5, 5)], torch.zeros(1), norms=[norm], training=False)
    assert all(torch.equal(norm.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inactive_edge_is_not_read_and_keeps_its_statistics(backend: str, layout: str) -> None:
    c = case((4, 3, 3, 3), ["affine", "plain", "cumulative"], edges=3, inactive=[1], layout=LAYOUTS[layout])
    outputs = [torch.full_like(o, float("nan")) if i // 3 == 1 else o for i, o in enumerate(c.mixture.outputs)]
    found = run(fused, replace(c, mixture=replace(c.mixture, outputs=tuple(outputs))))
    assert torch.equal(found["y"], run(fused, c)["y"])
    gradients = [found["d_alpha"][1], found["d_mask"][1], found["d_parameter[2]"], found["d_parameter[3]"]]
    for gradient in (*gradients, *(found[f"d_outputs[{i}]"] for i in (3, 4, 5))):
        assert not gradient.any() and not gradient.isnan().any()
    for i in (3, 5):
        for name, buffer in c.norms[i].named_buffers():
            assert torch.equal(found[f"{name} of {i}"], buffer)


def test_norm_of_an_absent_entry_stays_as_it_is(backend: str) -> None:
    norm = nn.BatchNorm2d(3)
    batch_norm_mixed_sum([None, torch.randn(2, 3, 4, 4)], torch.zeros(2), norms=[norm, None], training=True)
    assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_spoil_their_channel_only(backend: str, value: float) -> None:
    c = case((2, 3, 5, 5), ["stats", "plain"])
    c.mixture.outputs[0][1, 2, 4, 4] = value
    found = run(fused, c)
    assert found["y"][:, :2].isfinite().all() and found["y"][:, 2].isnan().all()
    assert not found["d_alpha"].isfinite().any()


def test_one_value_per_channel_is_torchs_own_error(backend: str) -> None:
    x = torch.randn(1, 3, 1, 1)
    with pytest.raises(ValueError) as theirs:
        nn.BatchNorm2d(3)(x)
    with pytest.raises(ValueError) as ours:
        batch_norm_mixed_sum([x, x], torch.zeros(2), norms=[None, nn.BatchNorm2d(3)], training=True)
    assert str(ours.value) == str(theirs.value)
    batch_norm_mixed_sum([x], torch.zeros(1), norms=[nn.BatchNorm2d(3)], training=False)


def test_empty_batch_counts_as_torch_counts_it(backend: str) -> None:
    c = case((0, 3, 4, 4), ["stats", "affine"])
    for name, tensor in run(eager, c).items():
        assert torch.equal(run(fused, c)[name], tensor)


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_gradcheck_and_gradgradcheck(backend: str, training: bool) -> None:
    c = case((3, 2, 1, 2), ["affine", "plain", "stats"], training=training, inactive=[]).to(torch.float64)
    tensors = [c.mixture.alpha, c.mixture.mask, *c.mixture.outputs]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]

    def mix(alpha: Tensor, mask: Tensor, *rest: Tensor) -> Tensor:
        return fused(c, rest[:3], alpha, mask)

    arguments = (*leaves, *parameters(c))
    assert_differentiable_twice(mix, arguments)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative_when_only_the_outputs_need_it(backend: str, training: bool) -> None:
    norms = [nn.BatchNorm2d(2, affine=False).double(), None]
    x = torch.randn(3, 2, 1, 2, dtype=torch.float64, requires_grad=True)

    def mix(x: Tensor) -> Tensor:
        return batch_norm_mixed_sum([x.sin(), x * x], alpha, norms=norms, training=training)

    alpha = torch.randn(2, dtype=torch.float64)
    assert gradgradcheck(mix, (x,))


def _saved_bytes(training: bool, alpha: bool, output: bool, affine: bool) -> int:
    saved: dict[int, int] = {}
    norms = [nn.BatchNorm2d(4).requires_grad_(affine) for _ in range(3)]
    outputs = [torch.randn(8, 4, 8, 8, requires_grad=output) for _ in norms]
    weights = torch.zeros(3, requires_grad=alpha)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
    ):
        batch_norm_mixed_sum(outputs, weights, norms=norms, training=training)
    return sum(size for size in saved.values() if size >= 8192)


@with_cpu_kernels
@pytest.mark.parametrize(
    ("training", "alpha", "output", "affine", "outputs_saved"),
    [
        (True, True, True, True, 3),
        (True, False, True, False, 3),
        (False, False, True, False, 0),
        (False, True, True, False, 3),
        (False, False, False, True, 3),
        (True, False, False, False, 0),
    ],
)
def test_saves_each_output_once_and_only_where_backward_reads_it(
    training: bool, alpha: bool, output: bool, affine: bool, outputs_saved: int
) -> None:
    assert _saved_bytes(training, alpha, output, affine) == outputs_saved * 8 * 4 * 8 * 8 * 4


# ---- the operators ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_and_any_number_of_threads_are_bit_equal(backend: str, layout: str) -> None:
    c = case((48, 8, 32, 32), ["stats", "affine", "plain"], layout=LAYOUTS[layout])
    first = run(fused, c)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        second = run(fused, c)
    finally:
        torch.set_num_threads(threads)
    third = run(fused, c)
    for name, tensor in first.items():
        assert torch.equal(tensor, third[name])
        assert backend == "reference" or torch.equal(tensor, second[name])  # PyTorch's own sums depend on the threads


def _operator_arguments(c: Case) -> tuple[list[object], list[object]]:
    m = c.mixture
    read = op._read_norms(m.outputs, c.norms, c.training)
    forward = [list(m.outputs), m.alpha, m.mask, m.active, *map(list, read.tensors()), read.kinds, read.eps, True]
    mean, variance = OPERATORS.batch_norm_mixed_sum_forward(*forward)[1:]
    needs_output = [output is not None for output in m.outputs]
    affine = [norm is not None and norm.affine for norm in c.norms]
    backward = [m.grad, *forward[:6], mean, variance, *forward[8:], needs_output, affine, affine, True]
    return forward, backward


@with_cpu_kernels  # without them the operators are autograd on the reference, which opcheck runs below autograd
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_opcheck(training: bool) -> None:
    c = case((2, 3, 2, 2), ["affine", "plain", "stats"], edges=2, training=training, inactive=[1])
    forward, backward = _operator_arguments(c)
    opcheck(OPERATORS.batch_norm_mixed_sum_forward, forward)
    opcheck(OPERATORS.batch_norm_mixed_sum_backward, backward)
    statistics = [[torch.rand(3), torch.rand(3)] for _ in range(2)]
    counters = [torch.tensor(3), torch.tensor(5)]
    mean, variance = torch.rand(6, 3, dtype=torch.float64), torch.rand(6, 3, dtype=torch.float64)
    update = (*statistics, counters, mean, variance, c.mixture.active, [0, 5], [0.1, -1.0], 8)
    opcheck(OPERATORS.batch_norm_update_running_statistics, update)


@with_cpu_kernels
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_operators_without_kernels_compute_the_same(training: bool) -> None:
    c = case((4, 3, 5, 5), ["affine", "plain", "stats"], edges=2, training=training, inactive=[1])
    forward, backward = _operator_arguments(c)
    for ours, theirs in (
        (OPERATORS.batch_norm_mixed_sum_forward(*forward)[0], op._reference_forward(*forward)[0]),
        (OPERATORS.batch_norm_mixed_sum_backward(*backward), op._reference_backward(*backward)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_compiles_without_graph_breaks(training: bool) -> None:
    c = case((2, 3, 4, 4), ["affine", "plain", "cumulative"], training=training, layout=LAYOUTS["channels_last"])
    expected = run(fused, c)
    torch._dynamo.reset()
    for name, found in run(torch.compile(fused, fullgraph=True), c).items():
        torch.testing.assert_close(found, expected[name])


def test_counts_flops() -> None:
    outputs = [torch.randn(2, 5, 1, 1, requires_grad=True) for _ in range(2)]
    with FlopCounterMode(display=False) as counter:
        alpha = torch.zeros(2, requires_grad=True)
        y = batch_norm_mixed_sum(outputs, alpha, norms=[nn.BatchNorm2d(5, affine=False), None], training=True)
        y.sum().backward()
    if WHY_NO_CPU_KERNELS is None:
        assert counter.get_total_flops() == (5 + 2) * 10 + (2 + 4 + 2 + 1) * 10


# ---- bad input -------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3, 4, 4)


@pytest.mark.parametrize(
    ("error", "words", "outputs", "norms", "training"),
    [
        (ValueError, r"norms: expected an entry per output \(2\), got 1", [X, X], [None], True),
        (TypeError, "norms: expected a list or tuple .*, got BatchNorm2d", [X], nn.BatchNorm2d(3), True),
        (
            TypeError,
            r"norms\[0\]: expected an nn.BatchNorm2d or None, got SyncBatchNorm",
            [X],
            [nn.SyncBatchNorm(3)],
            True,
        ),
        (TypeError, r"norms\[1\]: .*got BatchNorm1d", [X, X], [None, nn.BatchNorm1d(3)], True),
        (ValueError, r"norms\[0\]: .*channels \(3\), got 4", [X], [nn.BatchNorm2d(4)], True),
        (
            ValueError,
            r"outputs\[0\]: expected \[B, C, H, W\].*\[2, 3, 4\]",
            [X[0, :2].clone().view(2, 4, 4)[:, :3]],
            [nn.BatchNorm2d(3)],
            True,
        ),
        (
            ValueError,
            r"norms\[0\]: expected the outputs' device cpu, got meta",
            [X],
            [nn.BatchNorm2d(3).to("meta")],
            False,
        ),
        (TypeError, "training: expected a bool, got NoneType", [X], [nn.BatchNorm2d(3)], None),
        (ValueError, "outputs: expected at least one tensor", [None], [nn.BatchNorm2d(3)], True),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, outputs: list, norms: object, training: bool) -> None:
    with pytest.raises(error, match=words):
        batch_norm_mixed_sum(outputs, torch.zeros(len(outputs)), norms=norms, training=training)
