"""The Triton launchers of batch_norm_mixed_sum under Triton's interpreter, against float64 and against eager."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import FusedMixedEdge, batch_norm_mixed_sum, get_backend, set_backend
from tests.kernels.guards import guarded_allocations, in_margins
from tests.kernels.tensors import LAYOUTS
from tests.kernels.test_batch_norm_mixed_sum import (
    KINDS,
    SLACK,
    Case,
    assert_as_exact_as_eager,
    case,
    eager,
    fused,
    parameters,
    run,
)

pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, where NaN is due
pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET is not 1: tests/gpu has the claims for compiled kernels", allow_module_level=True)

from dssp_kernels.batch_norm_mixed_sum import triton_launchers  # noqa: E402  # imports triton, which may be absent

# The interpreter truncates float32 to bfloat16 where the hardware rounds: one unit in the last place.
TRITON_SLACK = SLACK | {torch.bfloat16: 2.0**-6}


@pytest.fixture(autouse=True)
def interpreter() -> Iterator[None]:
    before = get_backend()
    set_backend("triton")
    with guarded_allocations():
        yield
    set_backend(before)


def launch(c: Case) -> dict[str, Tensor]:
    """What the operator makes of the case, whose outputs and gradient lie amid NaN."""
    m = c.mixture
    outputs = tuple(output if output is None else in_margins(output, torch.nan)[0] for output in m.outputs)
    return run(fused, replace(c, mixture=replace(m, outputs=outputs, grad=in_margins(m.grad, torch.nan)[0])))


def assert_exact(c: Case) -> None:
    assert_as_exact_as_eager(launch(c), c, TRITON_SLACK[c.mixture.grad.dtype])


# ---- exactness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(SLACK), ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize(
    ("layout", "training"), [("contiguous", True), ("channels_last", True), ("channels_last", False)]
)
def test_result_gradients_and_running_statistics_match_float64(dtype: torch.dtype, layout: str, training: bool) -> None:
    assert_exact(
        case((3, 2, 7, 8), ["affine", "plain", "stats"], training=training, dtype=dtype, layout=LAYOUTS[layout])
    )


@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((2, 1, 1, 1), "contiguous"),
        ((1, 3, 1, 2), "channels_last"),
        ((2, 5, 3, 5), "contiguous"),
        ((2, 7, 3, 5), "channels_last"),
        ((4, 3, 2, 2), "contiguous"),
        ((4, 24, 9, 7), "channels_last"),
        ((1, 2, 71, 83), "contiguous"),
        ((30, 140, 1, 1), "contiguous"),
    ],
    ids=str,
)
def test_odd_sizes(shape: tuple[int, ...], layout: str) -> None:
    assert_exact(case(shape, ["affine", "plain"], layout=LAYOUTS[layout]))


def test_any_dense_order_of_dimensions() -> None:
    assert_exact(case((3, 2, 5, 7), ["affine", "plain"], layout=LAYOUTS["transposed"]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_blocks_of_channels_and_shares_of_units(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_launchers, "THREADS", 16)
    monkeypatch.setattr(triton_launchers, "MAX_WIDTH", 4)
    monkeypatch.setattr(triton_launchers, "PROGRAMS", 30)
    monkeypatch.setattr(triton_launchers, "TABLE_ELEMENTS", 8)
    assert_exact(case((5, 10, 3, 8), ["affine", "plain"], layout=LAYOUTS[layout]))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_survive_means_of_ten_thousand_deviations(layout: str) -> None:
    c = case((16, 2, 16, 16), ["affine", "plain"], offset=1e4, layout=LAYOUTS[layout])
    assert_exact(c)
    exact, found = run(eager, c.to(torch.float64)), launch(c)
    for name, true in exact.items():
        if name.startswith("running"):
            torch.testing.assert_close(found[name].double(), true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_statistics_survive_a_first_image_unlike_all_others(layout: str) -> None:
    c = case((64, 3, 8, 8), ["stats"], layout=LAYOUTS[layout])
    c.mixture.outputs[0][:2] += 1e4
    found, exact = launch(c), run(eager, c.to(torch.float64))
    torch.testing.assert_close(found["running_var of 0"].double(), exact["running_var of 0"], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("edges", "candidates", "training", "layout"),
    [
        (1, 1, True, "contiguous"),
        (1, 1, False, "channels_last"),
        (2, 5, True, "contiguous"),
        (3, 2, False, "contiguous"),
        (4, 8, True, "channels_last"),
        pytest.param(4, 8, True, "contiguous", marks=pytest.mark.slow),
        pytest.param(4, 8, False, "channels_last", marks=pytest.mark.slow),
    ],
)
def test_node_of_edges(edges: int, candidates: int, training: bool, layout: str) -> None:
    kinds = ["affine", "plain", "stats", "cumulative", "untracked", "stats", "affine", "plain"][:candidates]
    absent, inactive = ([], []) if edges == 1 else ([0, candidates + 1], [edges - 1])
    channels = 1 if layout == "contiguous" else 3  # a program each, and the interpreter runs one at a time
    options = {"training": training, "absent": absent, "inactive": inactive, "layout": LAYOUTS[layout]}
    assert_exact(case((2, channels, 4, 4), kinds, edges=edges, **options))


@pytest.mark.parametrize("options", [{"relaxation": "given"}, {"gated": False}], ids=str)
def test_given_weights_and_no_gate(options: dict[str, object]) -> None:
    assert_exact(case((2, 3, 4, 4), edges=2, layout=LAYOUTS["channels_last"], **options))


@pytest.mark.parametrize(
    ("wanted", "training"),
    [
        *((wanted, True) for wanted in ("alpha", "mask", "output", "weight", "bias", "plain output")),
        *((wanted, False) for wanted in ("output", "bias")),
    ],
)
def test_each_gradient_is_the_same_alone(wanted: str, training: bool) -> None:
    c = case((2, 3, 4, 4), ["affine", "plain", "stats"], training=training, layout=LAYOUTS["channels_last"])
    m, norm = c.mixture, c.norms[0]
    places = {"alpha": m.alpha, "mask": m.mask, "output": m.outputs[0], "plain output": m.outputs[1]}
    for parameter in norm.parameters():
        parameter.requires_grad_(False)
    tensor = (places | {"weight": norm.weight, "bias": norm.bias})[wanted].requires_grad_()
    alone = torch.autograd.grad(fused(c, m.outputs, m.alpha, m.mask), tensor, m.grad)[0]
    names = {"alpha": "d_alpha", "mask": "d_mask", "output": "d_outputs[0]", "plain output": "d_outputs[1]"}
    name = (names | {"weight": "d_parameter[0]", "bias": "d_parameter[1]"})[wanted]
    c.norms[0].requires_grad_(True)
    assert torch.equal(alone, launch(c)[name])


def test_parameters_of_another_dtype_get_gradients_in_it() -> None:
    c = case((2, 3, 4, 4), layout=LAYOUTS["channels_last"])
    other = replace(c, mixture=replace(c.mixture, alpha=c.mixture.alpha.double(), mask=c.mixture.mask.half()))
    found, expected = launch(other), launch(c)
    assert found["d_alpha"].dtype is torch.float64 and found["d_mask"].dtype is torch.float16
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].to(tensor.dtype), tensor, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_two_runs_are_bit_equal(layout: str) -> None:
    c = case((4, 2, 16, 16), ["affine", "plain"], layout=LAYOUTS[layout])
    second = launch(c)
    assert all(torch.equal(tensor, second[name]) for name, tensor in launch(c).items())


def test_memory_layout_is_kept() -> None:
    c = case((2, 3, 4, 4), layout=LAYOUTS["channels_last"])
    found = launch(c)
    for name in ("y", "d_outputs[0]", "d_outputs[1]"):
        assert found[name].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_second_derivative_is_that_of_the_reference(training: bool) -> None:
    c = case((3, 2, 1, 2), ["affine", "plain"], training=training).to(torch.float64)

    def second_derivative() -> tuple[Tensor, ...]:
        leaves = [tensor.detach().requires_grad_() for tensor in (c.mixture.alpha, c.mixture.mask, *c.mixture.outputs)]
        y = fused(replace(c, norms=copy.deepcopy(c.norms)), leaves[2:], leaves[0], leaves[1])
        first = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in first), leaves)

    found = second_derivative()
    set_backend("reference")
    torch.testing.assert_close(found, second_derivative())


# ---- edges that are switched off, entries that are not there, values that are not numbers ----------------------------


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_inactive_edge_is_not_read_and_keeps_its_statistics(layout: str) -> None:
    c = case((4, 2, 3, 3), ["affine", "plain", "cumulative"], edges=2, inactive=[1], layout=LAYOUTS[layout])
    outputs = tuple(torch.full_like(o, torch.nan) if i // 3 == 1 else o for i, o in enumerate(c.mixture.outputs))
    spoiled = replace(c.mixture, outputs=outputs, alpha=c.mixture.alpha.clone(), mask=c.mixture.mask.clone())
    spoiled.alpha[1], spoiled.mask[1] = torch.nan, torch.nan
    found, expected = launch(replace(c, mixture=spoiled)), launch(c)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    gradients = [found["d_alpha"][1], found["d_mask"][1], found["d_parameter[2]"], found["d_parameter[3]"]]
    assert not any(gradient.any() for gradient in (*gradients, *(found[f"d_outputs[{i}]"] for i in (3, 4, 5))))
    for i in (3, 5):
        for name, buffer in c.norms[i].named_buffers():
            assert torch.equal(found[f"{name} of {i}"], buffer)


def test_no_edge_is_active() -> None:
    c = case((2, 3, 4, 4), edges=2, inactive=[0, 1])
    c = replace(c, mixture=replace(c.mixture, grad=torch.full_like(c.mixture.grad, torch.nan)))
    assert not any(tensor.any() for name, tensor in launch(c).items() if name == "y" or name.startswith("d_"))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_nan_and_inf_spoil_their_channel_only(value: float, layout: str) -> None:
    c = case((2, 3, 5, 5), ["stats", "plain"], layout=LAYOUTS[layout])
    c.mixture.outputs[0][1, 2, 4, 4] = value
    found = launch(c)
    assert found["y"][:, :2].isfinite().all() and found["y"][:, 2].isnan().all()
    assert found["d_outputs[0]"][:, :2].isfinite().all() and found["d_outputs[0]"][:, 2].isnan().all()
    assert not found["d_alpha"].isfinite().any()


def test_empty_batch() -> None:
    c = case((0, 3, 4, 4), ["stats", "affine"])
    found = launch(c)
    assert all(torch.equal(found[name], tensor) for name, tensor in run(eager, c).items())


# ---- running statistics ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["stats", "cumulative"])
def test_running_statistics_follow_torch_over_several_batches(kind: str) -> None:
    ours, theirs = KINDS[kind](4), KINDS[kind](4)
    for _ in range(3):
        x = torch.randn(3, 4, 5, 5) + torch.randn(())
        batch_norm_mixed_sum([x], torch.zeros(1), norms=[ours], training=True)
        theirs(x)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)


def test_norm_of_several_entries_is_updated_by_one_after_the_other() -> None:
    ours, theirs = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
    x = [torch.randn(3, 4, 5, 5) + i for i in range(3)]
    batch_norm_mixed_sum(x, torch.zeros(3), norms=[ours] * 3, training=True)
    for tensor in x:
        theirs(tensor)
    for name, buffer in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], buffer)


def _columns_of_tables(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    """The norm with everything it holds per channel in the first column of a table, the second one full of NaN."""

    def column(values: Tensor) -> Tensor:
        return torch.stack([values.detach(), torch.full_like(values, torch.nan)], dim=1)[:, 0]

    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(column(getattr(norm, name))))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, column(getattr(norm, name)))
    return norm


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_norms_whose_values_lie_apart_are_read_and_updated_where_they_are(training: bool) -> None:
    c = case((3, 5, 4, 4), ["affine", "plain", "affine"], training=training, layout=LAYOUTS["channels_last"])
    apart = replace(c, norms=tuple(norm and _columns_of_tables(copy.deepcopy(norm)) for norm in c.norms))
    places = [buffer.data_ptr() for buffer in _buffers(apart)]
    for each in (c, apart):
        y = fused(each, c.mixture.outputs, c.mixture.alpha, c.mixture.mask)
        y.backward(c.mixture.grad)
    for ours, theirs in zip(parameters(apart), parameters(c), strict=True):
        assert ours.stride() == (2,) and torch.equal(ours.grad, theirs.grad)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(_buffers(apart), _buffers(c), strict=True))
    assert [buffer.data_ptr() for buffer in _buffers(apart)] == places


def _buffers(c: Case) -> list[Tensor]:
    return [buffer for norm in c.norms if norm for buffer in norm.buffers()]


def test_norm_whose_values_lie_apart_is_updated_by_one_entry_after_the_other() -> None:
    ours, theirs = _columns_of_tables(nn.BatchNorm2d(4)), nn.BatchNorm2d(4)
    x = [torch.randn(3, 4, 5, 5) + i for i in range(3)]
    batch_norm_mixed_sum(x, torch.zeros(3), norms=[ours] * 3, training=True)
    for tensor in x:
        theirs(tensor)
    for name, buffer in theirs.named_buffers():
        torch.testing.assert_close(ours.get_buffer(name), buffer)


def test_edge_folds_its_norms() -> None:
    edge = FusedMixedEdge([nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(4)), nn.Identity()])
    stock = copy.deepcopy(edge)
    x = torch.randn(2, 4, 6, 6)
    assert edge.candidate_outputs(x, True)[1] == [edge._ops[0][1], None]
    weights = stock.alpha.softmax(-1)
    expected = stock.mask.sigmoid() * sum(w * op(x) for w, op in zip(weights, stock._ops, strict=True))
    torch.testing.assert_close(edge(x), expected)
    assert torch.equal(edge._ops[0][1].num_batches_tracked, stock._ops[0][1].num_batches_tracked)
