"""A search with a known answer: of two candidates on one edge, one hides all that tells the classes apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.data import DataSet, MemoryStore, Split
from dssp.methods import METHODS
from dssp.spaces import CellSpace
from dssp.spaces.nasbench201 import Nasbench201Cell
from dssp.spaces.skeleton import BuildEdges, Skeleton
from dssp.supernet import Supernet

ANSWER = {"normal": [[("skip_connect", 0)]]}
CHANNELS = 4


class AverageAll(nn.Module):
    """Every pixel becomes the mean of its map."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True).expand_as(x).contiguous()


class Stem(nn.Module):
    """The image as the first channel (the one that partial channels mix), zeros beside it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x.new_zeros(len(x), CHANNELS - 1, *x.shape[2:])], dim=1)


class Cells(dict[str, Any]):
    """The derived edges as they are: all the genotype that this space needs."""

    @classmethod
    def from_cells(cls, cells: Mapping[str, Sequence[Any]], concat: Sequence[int]) -> Cells:
        return cls(cells)


def skeleton(edges: BuildEdges, *, channels: int, cells: int, image_channels: int, affine: bool, stem: str) -> Skeleton:
    """One cell of one edge between image and ReLU: what has mean zero stays zero unless the edge lets it through."""
    return Skeleton({"stem": Stem()}, [Nasbench201Cell(edges, channels)], nn.ReLU(), channels)


SPACE = CellSpace(
    name="toy",
    operations=("average_all", "skip_connect"),
    cell_types=("normal",),
    inputs=1,
    nodes=1,
    skeleton=skeleton,
    genotype=Cells,  # type: ignore[arg-type]  # not a genotype with a file, on purpose
)


def toy_data() -> DataSet:
    """Chequered images of mean zero; the class is their contrast."""
    labels = torch.arange(128) % 2
    chequered = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2 - 1
    pixels = (128 + chequered * (10 + 50 * labels)[:, None, None]).to(torch.uint8).unsqueeze(-1)
    mean, std = torch.tensor([128.0]), torch.tensor([40.0])

    def split(name: str, indices: Tensor) -> Split:
        return Split(name, MemoryStore(pixels), labels, indices, mean, std, padding=0, flip=False)

    first, second = torch.arange(128).chunk(2)
    both = split("train_valid", torch.arange(128))
    return DataSet("toy", ("faint", "strong"), (1, 4, 4), split("train", first), split("valid", second), both, both)


def toy_search(method: str, **settings: Any) -> BilevelSearch:
    """Four steps per epoch. OPERATIONS must know `average_all`."""
    rates = {"alpha_lr": 0.1, "weight_lr": 0.2, "epochs": 10, "batch_size": 16, "held_out": 32}
    shares = {"warmup_epochs": 2, "prune_strategy": "none", "max_edges_per_node": 1}
    config = SearchConfig(dataset="fake", image_size=4, method=method, **{**rates, **shares, **settings}).resolve()  # type: ignore[arg-type]
    torch.manual_seed(0)
    made = METHODS[method]
    parts: dict[str, Any] = {"gated": made.gated, "weighs_edges": made.weighs_edges, "edges": made.edges}
    supernet = Supernet(SPACE, channels=CHANNELS, cells=1, classes=2, image_channels=1, **parts)
    return BilevelSearch(config, supernet, toy_data())
