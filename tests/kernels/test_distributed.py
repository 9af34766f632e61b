"""DistributedDataParallel over fused edges: two processes on the CPU, with edges that close while training runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dssp_kernels import FusedMixedEdge, FusedMixedNode

RANKS = 2
pytestmark = [
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]


class Supernet(nn.Module):
    """An edge, and a node of two; nothing in it depends on the batch as a whole."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.edge = FusedMixedEdge([nn.Conv2d(4, 4, 3, padding=1), nn.Identity()])
        self.node = FusedMixedNode(FusedMixedEdge([nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 1, 1)]) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.node([x, self.edge(x)]).mean((1, 2, 3))


def prune_the_edge(supernet: Supernet) -> None:
    supernet.edge.prune()


def remove_an_edge_of_the_node(supernet: Supernet) -> None:
    supernet.node.edges[0].remove()


CHANGES: list[Callable[[Supernet], None]] = [prune_the_edge, remove_an_edge_of_the_node]


def train(supernet: Supernet, forward: Callable[[Tensor], Tensor], x: Tensor) -> list[dict[str, Tensor | None]]:
    """The gradients of three SGD steps; before the second and third something is pruned."""
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1)
    gradients = []
    for change in (None, *CHANGES):
        if change is not None:
            change(supernet)
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        gradients.append({name: p.grad for name, p in supernet.named_parameters()})
        gradients[-1] = {name: None if grad is None else grad.clone() for name, grad in gradients[-1].items()}
        optimizer.step()
    return gradients


def images() -> Tensor:
    return torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(1))


def train_a_share(rank: int, folder: str) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # no look-up of the machine's name
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)
    supernet = Supernet()
    parallel = DistributedDataParallel(supernet, find_unused_parameters=True)
    torch.save(train(supernet, parallel, images().chunk(RANKS)[rank]), f"{folder}/gradients{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def gradients(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor | None]]]:
    """Of each rank and step."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.start_processes(train_a_share, (str(folder),), nprocs=RANKS, start_method="fork")
    return [torch.load(folder / f"gradients{rank}.pt") for rank in range(RANKS)]


def test_ranks_agree_bit_for_bit(gradients: list[list[dict[str, Tensor | None]]]) -> None:
    for first, second in zip(*gradients, strict=True):
        assert first.keys() == second.keys()
        for name, grad in first.items():
            assert (grad is None and second[name] is None) or torch.equal(grad, second[name])


@pytest.mark.parametrize("step", range(3), ids=["nothing pruned", "edge pruned", "edge of the node removed"])
def test_gradients_are_those_of_the_full_batch(gradients: list[list[dict[str, Tensor | None]]], step: int) -> None:
    supernet = Supernet()
    expected = train(supernet, supernet, images())[step]
    found = gradients[0][step]
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        if grad is None:
            assert found[name] is None or not found[name].any()
        else:
            torch.testing.assert_close(found[name], grad)
