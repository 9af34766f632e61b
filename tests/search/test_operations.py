"""The operations compute what DARTS' operations.py computes, under the same state_dict keys."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dssp.spaces import DARTS, get_space
from dssp.spaces.darts import reduction_cells
from dssp.spaces.operations import OPERATIONS, FactorizedReduce, ReLUConvBN, build_candidate, build_operation

STRIDES = pytest.mark.parametrize("stride", [1, 2], ids=["stride1", "stride2"])


def batch(channels: int = 4, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(0))


def convolution_keys(*positions: int) -> list[str]:
    return [f"op.{position}.weight" for position in positions]


def test_candidates_are_darts_primitives_in_darts_order() -> None:
    assert tuple(OPERATIONS)[: len(DARTS.operations)] == DARTS.operations


@STRIDES
@pytest.mark.parametrize("size", [8, 7, 2, 1])
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name != "none"])
def test_stride_divides_the_map_rounding_up(name: str, size: int, stride: int) -> None:
    out = -(-size // stride)
    assert build_candidate(name, 4, stride)(batch(size=size)).shape == (2, 4, out, out)
    assert build_operation(name, 4, stride)(batch(size=size)).shape == (2, 4, out, out)


@STRIDES
def test_none_returns_none(stride: int) -> None:
    assert build_candidate("none", 4, stride)(batch()) is None


@pytest.mark.parametrize(
    ("name", "convolutions", "norms"),
    [
        ("sep_conv_3x3", [1, 2, 5, 6], [3, 7]),
        ("sep_conv_5x5", [1, 2, 5, 6], [3, 7]),
        ("dil_conv_3x3", [1, 2], [3]),
        ("dil_conv_5x5", [1, 2], [3]),
    ],
)
def test_state_dict_keys_are_those_of_darts(name: str, convolutions: list[int], norms: list[int]) -> None:
    statistics = [f"op.{i}.{s}" for i in norms for s in ("running_mean", "running_var", "num_batches_tracked")]
    candidate, derived = build_candidate(name, 4, 1), OPERATIONS[name](4, 4, 1, True)
    assert sorted(candidate.state_dict()) == sorted(convolution_keys(*convolutions) + statistics)
    affine = [f"op.{i}.{p}" for i in norms for p in ("weight", "bias")]
    assert sorted(derived.state_dict()) == sorted(convolution_keys(*convolutions) + statistics + affine)


def test_factorized_reduce_keys_are_those_of_darts() -> None:
    keys = {key.split(".")[0] for key in FactorizedReduce(4, 6).state_dict()}
    assert keys == {"conv_1", "conv_2", "bn"}


@STRIDES
@pytest.mark.parametrize(("name", "kernel"), [("sep_conv_3x3", 3), ("sep_conv_5x5", 5)])
def test_sep_conv_is_two_depthwise_pointwise_pairs(name: str, kernel: int, stride: int) -> None:
    x, operation = batch(), build_operation(name, 4, stride).eval()
    w = operation.state_dict()
    expected, pad = x, kernel // 2
    for depthwise, pointwise, step in (("op.1", "op.2", stride), ("op.5", "op.6", 1)):
        expected = F.conv2d(expected.relu(), w[f"{depthwise}.weight"], stride=step, padding=pad, groups=4)
        expected = F.conv2d(expected, w[f"{pointwise}.weight"]) / (1 + 1e-5) ** 0.5  # fresh BatchNorm in eval mode
    torch.testing.assert_close(operation(x), expected)


@STRIDES
@pytest.mark.parametrize(("name", "padding"), [("dil_conv_3x3", 2), ("dil_conv_5x5", 4)])
def test_dil_conv_is_one_dilated_depthwise_pointwise_pair(name: str, padding: int, stride: int) -> None:
    x, operation = batch(), build_operation(name, 4, stride).eval()
    w = operation.state_dict()
    expected = F.conv2d(x.relu(), w["op.1.weight"], stride=stride, padding=padding, dilation=2, groups=4)
    expected = F.conv2d(expected, w["op.2.weight"]) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(operation(x), expected)


def test_factorized_reduce_is_darts_formula_on_even_maps() -> None:
    x, operation = batch(), FactorizedReduce(4, 6).eval()
    r = x.relu()
    weights = operation.conv_1.weight, operation.conv_2.weight
    halves = [F.conv2d(part, w, stride=2) for part, w in zip((r, r[:, :, 1:, 1:]), weights, strict=True)]
    torch.testing.assert_close(operation(x), operation.bn(torch.cat(halves, 1)))


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_factorized_reduce_of_few_channels_has_the_right_gradients_in_channels_last(channels: int) -> None:
    operation = FactorizedReduce(channels, 6)  # a strided convolution corrupts memory here (oneDNN issue 6035)
    x, direction = torch.randn(64, channels, 8, 8), torch.randn(64, 6, 4, 4)
    (expected,) = torch.autograd.grad(operation(x), operation.conv_1.weight, direction)
    for _ in range(20):
        (found,) = torch.autograd.grad(
            operation(x.to(memory_format=torch.channels_last)), operation.conv_1.weight, direction
        )
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


def test_relu_conv_bn_starts_with_relu_and_leaves_its_input_alone() -> None:
    x = batch()
    before = x.clone()
    operation = ReLUConvBN(4, 4, 1, 1, 0)
    torch.testing.assert_close(operation(x), operation(x.relu()))
    assert torch.equal(x, before)


@STRIDES
def test_average_pool_does_not_count_the_padding(stride: int) -> None:
    ones = torch.ones(1, 4, 8, 8)
    assert torch.equal(build_operation("avg_pool_3x3", 4, stride)(ones), ones[:, :, ::stride, ::stride])


@pytest.mark.parametrize("name", ["max_pool_3x3", "avg_pool_3x3"])
def test_pools_are_normalised_in_the_supernet_only(name: str) -> None:
    candidate = build_candidate(name, 4, 1)
    assert isinstance(candidate, nn.Sequential)
    assert isinstance(candidate[1], nn.BatchNorm2d) and not candidate[1].affine
    assert type(build_operation(name, 4, 1)) is type(candidate[0])


def test_no_candidate_has_norm_parameters() -> None:
    for name in OPERATIONS:
        for stride in (1, 2):
            norms = [m for m in build_candidate(name, 4, stride).modules() if isinstance(m, nn.BatchNorm2d)]
            assert not any(norm.affine for norm in norms)


def test_unknown_operation_and_unknown_space_are_named() -> None:
    with pytest.raises(ValueError, match="operation: got 'conv_9x9', expected one of none, max_pool_3x3"):
        build_operation("conv_9x9", 4, 1)
    with pytest.raises(ValueError, match="space: got 'nasnet', expected one of darts"):
        get_space("nasnet")


def test_edges_of_the_darts_space_are_in_darts_order() -> None:
    assert len(DARTS.edges) == 14
    assert DARTS.edges[:5] == ((0, 2), (1, 2), (0, 3), (1, 3), (2, 3))
    assert DARTS.concat == (2, 3, 4, 5)


@pytest.mark.parametrize(("inputs", "nodes"), [(2, 4), (2, 1), (1, 3), (3, 2)])
def test_edges_into_cover_all_edges_once_in_order(inputs: int, nodes: int) -> None:
    space = replace(DARTS, nodes=nodes, inputs=inputs)
    positions = [position for node in space.node_states for position in space.edges_into(node)]
    assert positions == list(range(len(space.edges)))
    for node in space.node_states:
        assert [space.edges[p] for p in space.edges_into(node)] == [(source, node) for source in range(node)]


def test_impossible_cells_are_refused() -> None:
    with pytest.raises(ValueError, match="nodes: got 0"):
        replace(DARTS, nodes=0)
    with pytest.raises(ValueError, match="node: got 6, expected one of 2 to 5"):
        DARTS.edges_into(6)


@pytest.mark.parametrize(("cells", "expected"), [(8, {2, 5}), (20, {6, 13}), (3, {1, 2}), (2, {0, 1}), (1, {0})])
def test_reduction_cells_sit_at_a_third_and_two_thirds(cells: int, expected: set[int]) -> None:
    assert reduction_cells(cells) == expected
