"""The stock supernet of NAS-Bench-201: as Dong and Yang search it with DARTS (D-X-Y/AutoDL-Projects), for PyTorch 2.

Module names and parameter shapes are theirs: model_search's TinyNetworkDarts with SearchCell, cell_operations.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OP_NAMES = ("none", "skip_connect", "nor_conv_1x1", "nor_conv_3x3", "avg_pool_3x3")
MAX_NODES = 4


class ReLUConvBN(nn.Module):
    def __init__(self, c_in: int, c_out: int, kernel_size: int, stride: int, padding: int, affine: bool) -> None:
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(inplace=False),
            nn.Conv2d(c_in, c_out, kernel_size, stride=stride, padding=padding, bias=False),
            nn.BatchNorm2d(c_out, affine=affine),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Pooling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.op = nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.op(inputs)


class Identity(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Zero(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mul(0.0)


OPS: dict[str, Any] = {
    "none": lambda c: Zero(),
    "skip_connect": lambda c: Identity(),
    "nor_conv_1x1": lambda c: ReLUConvBN(c, c, 1, 1, 0, affine=False),
    "nor_conv_3x3": lambda c: ReLUConvBN(c, c, 3, 1, 1, affine=False),
    "avg_pool_3x3": lambda c: Pooling(),
}


class SearchCell(nn.Module):
    def __init__(self, c: int) -> None:
        super().__init__()
        self.edges = nn.ModuleDict(
            {
                f"{i}<-{j}": nn.ModuleList(OPS[op_name](c) for op_name in OP_NAMES)
                for i in range(1, MAX_NODES)
                for j in range(i)
            }
        )
        self.edge2index = {key: index for index, key in enumerate(sorted(self.edges))}

    def forward(self, inputs: Tensor, weightss: Tensor) -> Tensor:
        nodes: list[Any] = [inputs]
        for i in range(1, MAX_NODES):
            inter_nodes = []
            for j in range(i):
                key = f"{i}<-{j}"
                weights = weightss[self.edge2index[key]]
                layers: Any = self.edges[key]
                inter_nodes.append(sum(layer(nodes[j]) * w for layer, w in zip(layers, weights, strict=True)))
            nodes.append(sum(inter_nodes))
        return nodes[-1]


class ResNetBasicblock(nn.Module):
    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv_a = ReLUConvBN(c_in, c_out, 3, 2, 1, affine=True)
        self.conv_b = ReLUConvBN(c_out, c_out, 3, 1, 1, affine=True)
        self.downsample = nn.Sequential(
            nn.AvgPool2d(kernel_size=2, stride=2, padding=0), nn.Conv2d(c_in, c_out, 1, bias=False)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        return self.downsample(inputs) + self.conv_b(self.conv_a(inputs))


class TinyNetwork(nn.Module):
    def __init__(self, c: int, n: int, num_classes: int, image_channels: int = 3) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(image_channels, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
        self.cells = nn.ModuleList()
        for stage in range(3):
            if stage > 0:
                self.cells.append(ResNetBasicblock(c, 2 * c))
                c *= 2
            self.cells.extend(SearchCell(c) for _ in range(n))
        self.lastact = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(inplace=True))
        self.global_pooling = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(c, num_classes)
        edges = sum(range(MAX_NODES))
        self.arch_parameters = nn.Parameter(1e-3 * torch.randn(edges, len(OP_NAMES)))

    def forward(self, inputs: Tensor) -> Tensor:
        alphas = F.softmax(self.arch_parameters, dim=-1)
        feature = self.stem(inputs)
        for cell in self.cells:
            feature = cell(feature, alphas) if isinstance(cell, SearchCell) else cell(feature)
        out = self.global_pooling(self.lastact(feature))
        return self.classifier(out.view(out.size(0), -1))
