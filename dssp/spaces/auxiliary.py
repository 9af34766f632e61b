"""The auxiliary head: a second classifier on an inner cell, which gives the cells below it a gradient of their own."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn


class AuxiliaryHead(nn.Module):
    """DARTS' AuxiliaryHeadCIFAR, module names included (NASNet, arXiv:1707.07012): [B, C, H, W] -> logits.

    It is made for maps of 8x8 (`smallest`), of which one pixel with 768 channels is left; of larger maps the mean over
    the pixels that are left is classified. Smaller H and W leave none.
    """

    smallest: ClassVar[int] = 8
    stride: ClassVar[int] = 3  # of the pool
    last_norm: ClassVar[bool] = True

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.ReLU(),  # in place in DARTS: that changes the cell's output, to what its readers make of it anyway
            nn.AvgPool2d(5, stride=self.stride, padding=0, count_include_pad=False),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            *([nn.BatchNorm2d(768)] if self.last_norm else []),
            nn.ReLU(),
        )
        self.classifier = nn.Linear(768, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


class AuxiliaryHeadImageNet(AuxiliaryHead):
    """DARTS' AuxiliaryHeadImageNet, made for maps of 7x7; without the last BatchNorm, as published."""

    smallest: ClassVar[int] = 7
    stride: ClassVar[int] = 2
    last_norm: ClassVar[bool] = False
