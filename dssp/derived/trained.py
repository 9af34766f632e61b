"""The file of a trained network: its weights, and all that is needed to build it and to feed it."""

from __future__ import annotations

import pickle
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dssp.checkpoint import read_plain
from dssp.genotype import AnyGenotype, genotype_from_dict
from dssp.network import DerivedNetwork
from dssp.runs.files import write_atomically
from dssp.spaces import get_space

NAME = "network.pt"
LARGEST = {"channels": 10_000, "cells": 1_000, "image_shape": 10_000}  # beyond, a file is damaged or means harm
TYPES = {
    "space": str,
    "genotype": dict,
    "channels": int,
    "cells": int,
    "stem": str,
    "classes": list,
    "image_shape": list,
    "mean": Tensor,
    "std": Tensor,
    "state_dict": dict,
}
# What torch.load and zipfile raise for bytes that are no checkpoint, or one that was changed by accident or on purpose.
UNREADABLE = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError, OSError, RuntimeError),
    *(ValueError, TypeError, LookupError, AttributeError, AssertionError, OverflowError),
)


class NetworkUnavailable(Exception):
    """The file of a trained network that is not there or cannot be used; one line that says why."""


@dataclass(frozen=True)
class TrainedNetwork:
    """A trained network and what it was built from.

    network       in evaluation mode; its auxiliary head, if it has one, is not kept in files
    space, genotype, channels, cells, stem   as DerivedNetwork takes them
    classes       their names, in the order of the logits
    image_shape   (C, H, W) of the images it was trained on
    mean, std     per channel, float32 [C]: the network takes (pixel - mean) / std, pixels from 0 to 255 (digits: to 16)
    """

    network: DerivedNetwork
    space: str
    genotype: AnyGenotype
    channels: int
    cells: int
    stem: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    mean: Tensor
    std: Tensor

    def description(self) -> dict[str, Any]:
        """All but the weights, as JSON types."""
        return {
            "space": self.space,
            "genotype": self.genotype.to_dict(),
            "channels": self.channels,
            "cells": self.cells,
            "stem": self.stem,
            "classes": list(self.classes),
            "image_shape": list(self.image_shape),
            "mean": self.mean.tolist(),
            "std": self.std.tolist(),
        }


def save_trained(path: Path, trained: TrainedNetwork) -> None:
    """Write the file, whole or not at all: a dictionary that torch.load(path, weights_only=True) reads."""
    weights = {
        name: tensor.detach().cpu().contiguous()
        for name, tensor in trained.network.state_dict().items()
        if not name.startswith("auxiliary_head.")
    }
    tensors = {"mean": trained.mean.cpu(), "std": trained.std.cpu(), "state_dict": weights}
    write_atomically(path, lambda file: torch.save({**trained.description(), **tensors}, file.name))


def load_trained(path: Path) -> TrainedNetwork:
    """The network in a file, on the CPU, in evaluation mode. Nothing in the file is executed.

    Raises NetworkUnavailable if it is not there, damaged, or does not fit together.
    """
    try:
        return _built(_checked(read_plain(path)))
    except FileNotFoundError:
        raise NetworkUnavailable(f"{path}: no such file; a retraining writes it when it ends") from None
    except UNREADABLE as error:
        not_plain = isinstance(error, pickle.UnpicklingError)  # torch explains that at length
        reason = "it holds more than tensors and plain values" if not_plain else str(error).split("\n")[0][:200]
        raise NetworkUnavailable(f"{path}: not the file of a trained network, or damaged ({reason})") from None


def _checked(content: object) -> dict[str, Any]:
    """What a file holds, each entry of its type and within its bounds. Raises ValueError naming the one that is not."""
    if not isinstance(content, dict) or set(content) != set(TYPES):
        raise ValueError(f"expected the entries {', '.join(TYPES)}")
    for name, expected in TYPES.items():
        if not isinstance(content[name], expected):
            raise ValueError(f"{name}: expected {expected.__name__}, got {type(content[name]).__name__}")
    if not content["classes"] or not all(isinstance(label, str) for label in content["classes"]):
        raise ValueError("classes: expected names, at least one")
    shape = content["image_shape"]
    if len(shape) != 3:
        raise ValueError(f"image_shape: expected channels, height and width, got {len(shape)} entries")
    for name, sizes in {"channels": [content["channels"]], "cells": [content["cells"]], "image_shape": shape}.items():
        if not all(type(size) is int and 1 <= size <= LARGEST[name] for size in sizes):
            raise ValueError(f"{name}: expected whole numbers from 1 to {LARGEST[name]}, got {content[name]!r}")
    for name in ("mean", "std"):
        _check_tensor(name, content[name], torch.empty(shape[0]))
    if not (content["mean"].isfinite().all() and content["std"].isfinite().all() and (content["std"] > 0).all()):
        raise ValueError("mean, std: expected finite numbers, std above 0")
    return content


def _built(content: dict[str, Any]) -> TrainedNetwork:
    """The network that a file describes. Raises ValueError if genotype, sizes and weights do not fit together."""
    genotype, (image_channels, height, width) = genotype_from_dict(content["genotype"]), content["image_shape"]
    with torch.device("meta"):  # no memory yet for what the file only claims to hold
        network = DerivedNetwork(
            get_space(content["space"]),
            genotype,
            channels=content["channels"],
            cells=content["cells"],
            classes=len(content["classes"]),
            image_channels=image_channels,
            stem=content["stem"],
        )
    weights, expected_weights = content["state_dict"], network.state_dict()
    if weights.keys() != expected_weights.keys():
        odd = sorted(map(str, weights.keys() ^ expected_weights.keys()))
        raise ValueError(f"state_dict: not that of its genotype; {len(odd)} entries too many or too few, as {odd[0]}")
    for name, tensor in weights.items():
        _check_tensor(f"state_dict: {name}", tensor, expected_weights[name])
    network.load_state_dict(weights, assign=True)
    return TrainedNetwork(
        network.eval(),
        content["space"],
        genotype,
        content["channels"],
        content["cells"],
        content["stem"],
        tuple(content["classes"]),
        (image_channels, height, width),
        content["mean"],
        content["std"],
    )


def _check_tensor(name: str, tensor: object, expected: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
        wanted, came = (f"{t.dtype} {list(t.shape)}" for t in (expected, tensor))
        raise ValueError(f"{name}: expected {wanted}, got {came}")
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise ValueError(f"{name}: expected a dense tensor, got {tensor.layout} on {tensor.device}")
