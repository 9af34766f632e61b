"""PC-DARTS: a quarter of the channels is mixed, the others pass, the shuffle mingles them; edges are normalised."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.config import SearchConfig
from dssp.methods.pc_darts import PcDarts
from dssp.options import ConfigError
from dssp.partial_channels import PartialEdges, interleaved
from dssp.relaxation import Mixture, softmax_per_node
from dssp.spaces import DARTS
from tests.search.small import small_search

SPACE = replace(DARTS, operations=("none", "max_pool_3x3", "skip_connect", "sep_conv_3x3"), nodes=2)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The authors' channel_shuffle."""
    batch, channels, height, width = x.shape
    return x.view(batch, groups, channels // groups, height, width).transpose(1, 2).reshape(batch, -1, height, width)


def by_the_paper(edges: PartialEdges, inputs: list[Tensor], alpha: Tensor, beta: Tensor, stride: int) -> list[Tensor]:
    """The authors' cell: edge by edge, softmax(alpha), softmax(beta) over the edges of a node."""
    states, weights = list(inputs), alpha.softmax(-1)
    for node in SPACE.node_states:
        positions = SPACE.edges_into(node)
        shares, total = beta[positions[0] : positions[-1] + 1].softmax(0), torch.zeros(())
        for source, e in enumerate(positions):
            x = states[source]
            quarter = x.shape[1] // 4
            outputs = [op(x[:, :quarter]) for op in edges.mixed_edge(e)._ops]
            mixed = sum(w * y for w, y in zip(weights[e], outputs, strict=True) if y is not None)
            rest = F.max_pool2d(x[:, quarter:], 2, 2) if stride == 2 and source < 2 else x[:, quarter:]
            total = total + shares[source] * shuffled(torch.cat([mixed, rest], dim=1), 4)  # type: ignore[list-item]
        states.append(total)
    return states


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("stride", [1, 2])
def test_cell_and_its_gradients_are_those_of_the_paper(stride: int, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    edges = PartialEdges(SPACE, 8, stride).double()
    alpha = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    beta = torch.randn(5, dtype=torch.float64, requires_grad=True)
    inputs = [torch.randn(3, 8, 6, 6, dtype=torch.float64).to(memory_format=layout) for _ in range(2)]
    nodes = torch.tensor([node for _, node in SPACE.edges])
    shares = softmax_per_node(beta, torch.ones(5, dtype=torch.bool), nodes)
    mixture = Mixture(shares.unsqueeze(1) * alpha.softmax(-1))
    found = edges(inputs, mixture)[2:]
    expected = by_the_paper(edges, inputs, alpha, beta, stride)[2:]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert all(state.is_contiguous(memory_format=layout) for state in found)
    parameters = [alpha, beta, *edges.parameters()]
    signs = [torch.randn_like(state) for state in found]
    gradients = [
        torch.autograd.grad(sum((s * y).sum() for s, y in zip(signs, states, strict=True)), parameters)  # type: ignore[arg-type]
        for states in (found, expected)
    ]
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-8, atol=1e-10)


def test_interleaving_is_the_channel_shuffle() -> None:
    x = torch.randn(2, 12, 3, 3)
    assert torch.equal(interleaved(x.chunk(4, dim=1)), shuffled(x, 4))


def test_odd_maps_are_halved_like_the_candidates_do() -> None:
    edges = PartialEdges(SPACE, 8, 2)
    states = edges([torch.randn(2, 8, 7, 5)] * 2, Mixture(torch.rand(5, 4)))
    assert [tuple(state.shape[1:]) for state in states[2:]] == [(8, 4, 3)] * 2


def pc_darts() -> PcDarts:
    method = small_search(method="pc-darts", channels=4).method
    assert isinstance(method, PcDarts)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in method.supernet.architecture_parameters():
            nn.init.normal_(parameter)
    return method


def test_an_edges_weights_sum_to_its_share_of_the_node_and_the_shares_to_one() -> None:
    method = pc_darts()
    shares = method.mixture("normal").weights.sum(1)
    assert shares[:2].sum().item() == pytest.approx(1) and shares[2:].sum().item() == pytest.approx(1)
    torch.testing.assert_close(shares[2:], method.supernet.beta["normal"][2:].softmax(0))


def test_shares_of_edges_that_are_gone_go_to_the_others() -> None:
    method = pc_darts()
    method.supernet.remove_edge("normal:0->3")
    shares = method.mixture("normal").weights.sum(1)
    torch.testing.assert_close(shares[3:], method.supernet.beta["normal"][3:].softmax(0))
    gradient = torch.autograd.grad(shares.square().sum(), method.supernet.beta["normal"])[0]
    assert shares[2] == 0 and gradient[2] == 0 and gradient.isfinite().all()


def test_derivation_ranks_edges_by_beta_times_alpha() -> None:
    method = pc_darts()
    operations = method.supernet.space.operations
    with torch.no_grad():
        for type in method.supernet.cell_types:
            method.supernet.alpha[type].zero_()
            method.supernet.alpha[type][:, operations.index("sep_conv_3x3")] = torch.tensor([1.0, 1.0, 3.0, 2.9, 2.0])
            method.supernet.beta[type].copy_(torch.tensor([0.0, 0.0, -2.0, 0.0, 0.5]))  # the strongest alpha loses
    nodes = method.derived().cells["normal"][0]
    assert nodes[1] == (("sep_conv_3x3", 1), ("sep_conv_3x3", 2))


def test_beta_learns_with_alpha_in_the_architecture_step_alone() -> None:
    search = small_search(method="pc-darts", channels=4, warmup_epochs=1)
    betas = [beta.detach().clone() for beta in search.supernet.beta.values()]
    search.step(next(search.batches(0)), 0)
    assert all(torch.equal(now, was) for now, was in zip(search.supernet.beta.values(), betas, strict=True))
    search.step(next(search.batches(1)), 1)
    assert not any(torch.equal(now, was) for now, was in zip(search.supernet.beta.values(), betas, strict=True))


def test_weights_only_train_first_and_channels_come_in_quarters() -> None:
    assert SearchConfig(dataset="cifar10", method="pc-darts").resolve().warmup_epochs == 15
    with pytest.raises(ConfigError, match="channels: method pc-darts mixes a quarter of them, got 6"):
        SearchConfig(method="pc-darts", channels=6)
    with pytest.raises(ValueError, match="channels: expected a multiple of 4 for partial channels, got 6"):
        PartialEdges(SPACE, 6, 1)
