"""FusedMixedEdge, FusedMixedNode, PruningMask and prune_matrix."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from dssp_kernels import FusedMixedEdge, FusedMixedNode, PruningMask, prune_matrix


class Zero(nn.Module):
    """The zero op: returns None."""

    def forward(self, x: Tensor) -> None:
        return None


def _candidates(stride: int = 1) -> list[nn.Module]:
    return [
        nn.Conv2d(4, 4, 3, stride, padding=1),
        Zero(),
        nn.AvgPool2d(3, stride, padding=1),
        nn.Sequential(nn.Conv2d(4, 4, 1, stride), nn.BatchNorm2d(4, affine=False)),
    ]


def _darts(ops: list[nn.Module], x: Tensor, alpha: Tensor, mask: Tensor) -> Tensor:
    outputs = [op(x) for op in ops]
    return mask.sigmoid() * sum(w * o for w, o in zip(alpha.softmax(-1), outputs, strict=True) if o is not None)


X = torch.randn(2, 4, 6, 6)


def test_edge_computes_the_darts_mix_and_its_gradients() -> None:
    ops = _candidates()
    edge = FusedMixedEdge(ops)
    edge(X).square().sum().backward()
    found = [edge.alpha.grad.clone(), edge.mask.grad.clone(), ops[0].weight.grad.clone()]
    edge.zero_grad()
    _darts(ops, X, edge.alpha, edge.mask).square().sum().backward()
    for ours, theirs in zip(found, (edge.alpha.grad, edge.mask.grad, ops[0].weight.grad), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_own_mask_starts_at_one_and_alpha_nearly_uniform() -> None:
    edge = FusedMixedEdge(_candidates())
    assert edge.mask.tolist() == [1.0]
    assert edge.alpha.shape == (4,) and edge.alpha.abs().max() < 0.01


def test_alpha_and_mask_can_be_given_per_call() -> None:
    edge = FusedMixedEdge(_candidates(), alpha=False, mask=False).eval()
    assert not [name for name, _ in edge.named_parameters() if not name.startswith("_ops")]
    alpha = torch.randn(4)
    torch.testing.assert_close(edge(X, alpha, torch.tensor([0.0])), 0.5 * edge(X, alpha))
    with pytest.raises(ValueError, match="alpha: this edge owns none"):
        edge(X)


def test_given_weights_are_not_normalised() -> None:
    edge = FusedMixedEdge(
        [nn.Identity(), nn.Identity()], alpha=torch.tensor([2.0, 3.0]), mask=False, relaxation="given"
    )
    torch.testing.assert_close(edge(X), 5 * X)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_pruned_edge_runs_no_candidate_and_gives_zeros(stride: int, memory_format: torch.memory_format) -> None:
    edge = FusedMixedEdge(_candidates(stride)).eval()
    x = X.to(memory_format=memory_format)
    before = edge(x)
    calls: list[nn.Module] = []
    for op in edge._ops:
        op.register_forward_hook(lambda module, *_: calls.append(module))
    edge.prune()
    y = edge(x)
    assert edge.is_pruned and not [
        op for op in calls if next(op.parameters(), X).device.type != "meta" and op in edge._ops
    ]
    assert y.shape == before.shape and y.stride() == before.stride() and not y.any()
    edge.restore()
    torch.testing.assert_close(edge(x), before)


def test_removed_edge_frees_its_candidates_for_good() -> None:
    edge = FusedMixedEdge(_candidates(stride=2))
    expected = edge(X).shape
    edge.remove()
    assert not list(edge._ops.parameters()) and edge(X).shape == expected
    with pytest.raises(RuntimeError, match="removed for good"):
        edge.restore()


def test_pruning_shows_in_repr() -> None:
    edge = FusedMixedEdge(_candidates())
    assert "pruned" not in repr(edge)
    edge.prune()
    assert "pruned" in repr(edge)


def test_state_dict_keys_are_those_of_a_darts_mixed_op() -> None:
    edge = FusedMixedEdge(_candidates(), alpha=False, mask=False)
    assert set(edge.state_dict()) == {f"_ops.{key}" for key in nn.ModuleList(edge._ops).state_dict()}


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_compute_the_same(clone) -> None:
    edge = FusedMixedEdge(_candidates()).eval()
    assert torch.equal(clone(edge)(X), edge(X))
    edge.remove()
    assert clone(edge).is_pruned and clone(edge)(X).shape == X.shape


def test_node_is_the_sum_of_its_edges() -> None:
    edges = [FusedMixedEdge(_candidates()).eval() for _ in range(3)]
    states = [torch.randn_like(X) for _ in edges]
    node = FusedMixedNode(edges)
    torch.testing.assert_close(node(states), sum(edge(state) for edge, state in zip(edges, states, strict=True)))
    edges[1].prune()
    torch.testing.assert_close(node(states), edges[0](states[0]) + edges[2](states[2]))


def test_pruned_edges_of_a_node_get_zero_gradients() -> None:
    edges = [FusedMixedEdge(_candidates()) for _ in range(2)]
    edges[0].prune()
    FusedMixedNode(edges)([X, X]).sum().backward()
    assert not edges[0].alpha.grad.any() and not edges[0].mask.grad.any()
    assert edges[1].alpha.grad.any()


def test_node_without_live_edges_gives_zeros() -> None:
    edges = [FusedMixedEdge(_candidates(stride=2)) for _ in range(2)]
    for edge in edges:
        edge.prune()
    assert FusedMixedNode(edges)([X, X]).shape == (2, 4, 3, 3)


def test_autocast_mixes_what_the_candidates_give() -> None:
    edge = FusedMixedEdge([nn.Conv2d(4, 4, 1), nn.Identity()])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = edge(X)
    assert y.dtype is torch.float32  # bfloat16 from the convolution, float32 from the identity
    y.sum().backward()
    assert edge._ops[0].weight.grad.isfinite().all()


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    edge = FusedMixedEdge([nn.Conv2d(4, 4, 1), nn.Tanh()])
    gradients = []
    for checkpointed in (False, True):
        edge.zero_grad()
        y = torch.utils.checkpoint.checkpoint(edge, X, use_reentrant=False) if checkpointed else edge(X)
        y.square().sum().backward()
        gradients.append([p.grad.clone() for p in edge.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_edge_compiles_without_graph_breaks() -> None:
    edge = FusedMixedEdge(_candidates()).eval()
    torch.testing.assert_close(torch.compile(edge, fullgraph=True)(X), edge(X))


@pytest.mark.parametrize(
    ("error", "words", "build"),
    [
        (ValueError, "ops: expected at least one module, got 0", lambda: FusedMixedEdge([])),
        (ValueError, "ops: expected at least one module, got 2", lambda: FusedMixedEdge([None, None])),
        (ValueError, "relaxation: .*'max'", lambda: FusedMixedEdge([nn.Identity()], relaxation="max")),
        (TypeError, "mask: .*got bool", lambda: FusedMixedEdge([nn.Identity()], mask=True)),
        (TypeError, "alpha: .*got list", lambda: FusedMixedEdge([nn.Identity()], alpha=[1.0])),
        (ValueError, "edges: expected at least one", lambda: FusedMixedNode([])),
        (TypeError, r"edges\[0\]: expected a FusedMixedEdge, got Identity", lambda: FusedMixedNode([nn.Identity()])),
        (
            ValueError,
            r"edges\[1\]: expected 1 candidates",
            lambda: FusedMixedNode([FusedMixedEdge([nn.Identity()] * k) for k in (1, 2)]),
        ),
        (
            ValueError,
            r"states: expected one tensor per edge \(1\), got 2",
            lambda: FusedMixedNode([FusedMixedEdge([nn.Identity()])])([X, X]),
        ),
    ],
)
def test_bad_input_is_named(error: type[Exception], words: str, build) -> None:
    with pytest.raises(error, match=words):
        build()


def test_pruning_mask_gates_with_the_sigmoid_of_one() -> None:
    mask = PruningMask()
    assert mask.mask.tolist() == [1.0]
    torch.testing.assert_close(mask(X), torch.sigmoid(torch.tensor(1.0)) * X)


def test_prune_matrix_zeroes_where_the_mask_does() -> None:
    matrix = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
    expected = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
    for mask in (torch.eye(2), torch.eye(2, dtype=torch.bool), torch.eye(2, dtype=torch.int64)):
        assert torch.equal(prune_matrix(matrix, mask), expected)


def test_prune_matrix_names_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\].*\[3, 2\]"):
        prune_matrix(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="only 0 and 1"):
        prune_matrix(torch.zeros(2), torch.full((2,), 0.5))
