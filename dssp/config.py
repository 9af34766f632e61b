"""Configuration of the commands: their fields, the presets of these, and the values that exclude each other."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dssp.options import ConfigError, Options, option, options_parser, parse_options

# What DARTS trains its networks with on CIFAR (arXiv:1806.09055, appendix A.1.2); elsewhere these fields are 0.
DARTS_RECIPE: dict[str, float] = {"cutout": 16, "auxiliary_weight": 0.4, "drop_path": 0.2}

# What a None stands for, by data set: field -> (digits, all others). Fields are typed as what resolve() makes of them.
PRESETS: dict[str, dict[str, tuple[Any, Any]]] = {
    "SearchConfig": {
        "epochs": (12, 50),
        "batch_size": (64, 64),
        "channels": (8, 16),
        "cells": (3, 8),
        "stem": (None, None),  # by image size, see _Config
        "alpha_lr": (3e-3, 3e-4),
        "mask_lr": (0.1, 3e-3),
        "warmup_epochs": (1, 15),
        "prune_strategy": ("measured", "measured"),
        "edge_budget": (0.4, 0.5),
        "path_epochs": (8, 25),
        "scored_paths": (96, 256),
        "held_out": (128, 1024),
        "compared_images": (360, 2048),
        "tie_break": ("capacity", "capacity"),
        "temperature": (10.0, 10.0),
        "temperature_min": (0.1, 0.1),
        "retrain_epochs": (40, 0),
        "retrain_batch_size": (64, 96),
        "retrain_channels": (16, 36),
        "retrain_cells": (3, 20),
        "threads": (1, None),
    },
    "RetrainConfig": {
        "epochs": (40, 600),
        "batch_size": (64, 96),
        "channels": (16, 36),
        "cells": (3, 20),
        "stem": (None, None),
        "threads": (1, None),
        **dict.fromkeys(DARTS_RECIPE, (0, None)),  # None: by space too, see RetrainConfig
    },
}

# The same by search space, where that differs from the data set's: space -> field -> (digits, all others).
SPACE_PRESETS: dict[str, dict[str, dict[str, tuple[Any, Any]]]] = {
    "SearchConfig": {
        "darts": {"nodes": (4, 4), "max_edges_per_node": (2, 2)},
        "nasbench201": {
            "nodes": (3, 3),
            "max_edges_per_node": (3, 3),
            "channels": (8, 16),
            "cells": (2, 5),
            "warmup_epochs": (2, 4),
            "edge_budget": (1.0, 1.0),
            "retrain_channels": (16, 16),
            "retrain_cells": (2, 5),
        },
        "chain": {
            "nodes": (3, 4),
            "max_edges_per_node": (1, 1),
            "cells": (3, 6),
            "edge_budget": (0.7, 0.75),
            "retrain_channels": (8, 16),
            "retrain_cells": (3, 6),
        },
    },
    "RetrainConfig": {
        "darts": {},
        "nasbench201": {"channels": (16, 16), "cells": (2, 5)},
        "chain": {"channels": (8, 16), "cells": (None, None)},  # the genotype says how many
    },
}
IMAGENET_PRESETS = {"channels": 48, "cells": 14}  # DARTS' derived network behind its ImageNet stem
IMAGENET_SIZE = 128  # from so many pixels on

PRUNING_METHODS = ("dssp", "dssp-paper")  # those with a mask per edge
BILEVEL_METHODS = ("darts", "pc-darts", "fair-darts")  # nothing but DARTS' bilevel steps on a mixture without noise
# Options that not every method can have -> the methods that can.
OPTION_METHODS = {
    "early_stop": BILEVEL_METHODS,
    "unrolled": ("dssp", "dssp-paper", *BILEVEL_METHODS),
    "beta_decay": ("dssp", "dssp-paper", *BILEVEL_METHODS, "snas", "gdas"),
    "max_skips": ("dssp-paper", *BILEVEL_METHODS, "snas", "gdas"),
    "raw_gates": ("dssp",),
    "offer_none": ("dssp",),
}
DETERMINISTIC = "only algorithms that give the same bits every time; ends where an operation has none"
RESIZED = ("imagefolder", "fake")  # the data sets whose images have no size of their own


@dataclass(frozen=True, kw_only=True)
class _Config(Options):
    """What search and retraining share."""

    dataset: Literal["digits", "cifar10", "cifar100", "imagefolder", "fake"] = option(
        "digits", "images to learn from", "data"
    )
    data_path: str | None = option(
        None, "folder of the data set (imagefolder), or where to keep downloads; default ~/.cache/dssp", "data"
    )
    image_size: int | None = option(
        None, "side in pixels of the square that images become (imagefolder, fake; default 32)", "data", low=1
    )
    batch_size: int = option(None, "images per step and rank", "data", low=1)
    space: Literal["darts", "nasbench201", "chain"] | None = option(
        None, "search space; default: that of the genotype", "model"
    )
    channels: int = option(None, "channels of the first cells", "model", low=1)
    cells: int = option(
        None,
        "cells in the network; nasbench201: in each of its three stages; chain: stages, up to 6, each with layers "
        "of its own; the retraining has those of the genotype",
        "model",
        low=1,
    )
    stem: Literal["cifar", "imagenet"] = option(
        None,
        "how images enter: cifar at full size; imagenet an eighth of it (darts: its two stems) or a half (chain); "
        f"default: imagenet where --image-size is {IMAGENET_SIZE} or more, but for nasbench201, which has cifar only; "
        "with it darts derives a network of 48 channels and 14 cells by default",
        "model",
    )
    seed: int = option(0, "fixes split, initial weights, order and augmentation", "run", low=0, high=2**63 - 1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", "run")
    precision: Literal["float32", "bfloat16"] = option(
        "float32", "bfloat16 runs the networks under autocast; weights and sums stay float32", "run"
    )
    sync_batch_norm: bool = option(
        False, "of several ranks, normalise over the batches of all (slower; norms leave the fused kernels)", "run"
    )
    run_dir: str | None = option(None, "run folder; default runs/<time>-<method>", "run")
    benchmark: str | None = option(
        None,
        "table of accuracies by arch string (csv or csv.gz): shows how good the derived cell is, chooses nothing",
        "run",
    )
    resume: bool = option(False, "continue the run in --run-dir where it stopped", "run")
    checkpoint_every: int | None = option(
        None, "steps between checkpoints within an epoch; default: ten minutes; each epoch ends with one", "run", low=1
    )
    max_skipped_steps: int = option(
        20, "steps in a row skipped, as loss or gradient is not finite, before the run gives up", "run", low=1
    )
    deterministic: bool = option(False, DETERMINISTIC, "run")
    threads: int | None = option(
        None, "CPU threads; default: torch's choice, for the tiny maps of digits 1", "run", low=1
    )
    workers: int = option(2, "threads that decode the images of an image folder", "run", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_device(self.device)
        if self.image_size is not None and self.dataset not in RESIZED:
            raise ConfigError("image_size", f"only {' and '.join(RESIZED)} are resized, got dataset {self.dataset}")
        if self.space == "nasbench201" and self.stem == "imagenet":
            raise ConfigError("stem", "space nasbench201 has cifar only, got imagenet")
        if self.space == "chain" and self.cells is not None and self.cells > 6:
            raise ConfigError("cells", f"space chain has up to 6 stages, got {self.cells}")

    def _presets(self) -> dict[str, Any]:
        column, kind = 0 if self.dataset == "digits" else 1, type(self).__name__
        rows = {**PRESETS[kind], **SPACE_PRESETS[kind].get(self.space or "", {})}
        presets = {field: values[column] for field, values in rows.items()}
        large = self.space != "nasbench201" and (self.image_size or 0) >= IMAGENET_SIZE
        presets["stem"] = "imagenet" if large else "cifar"
        if self.space == "darts" and (self.stem or presets["stem"]) == "imagenet":
            prefix = "retrain_" if "retrain_cells" in presets else ""
            presets |= {f"{prefix}{name}": value for name, value in IMAGENET_PRESETS.items()}
        return presets

    @classmethod
    def _preset_rows(cls) -> dict[str, dict[str, tuple[Any, Any]]]:
        return {"": PRESETS[cls.__name__], **SPACE_PRESETS[cls.__name__]}


@dataclass(frozen=True, kw_only=True)
class SearchConfig(_Config):
    """Everything that decides a search."""

    space: Literal["darts", "nasbench201", "chain"] = option("darts", "search space", "model")
    nodes: int = option(None, "nodes per cell beside its inputs; chain: layers per stage", "model", low=1)
    method: Literal["dssp", "dssp-paper", "darts", "pc-darts", "fair-darts", "snas", "gdas", "random"] = option(
        "dssp",
        "dssp: a mask per edge, edges and candidates leave by measured effect, then hard paths train; dssp-paper: "
        "masks under a penalty, edges leave, nothing else; darts: first order, 'none' among the candidates; "
        "pc-darts: a quarter of the channels mixes, edges are weighed; fair-darts: sigmoids, no softmax; "
        "snas: candidates sampled softly, single level; gdas: one candidate sampled per edge, and no other runs; "
        "random: hard paths train, drawn at random, and random ones are compared at the end",
        "search",
    )
    train_images: int | None = option(
        None,
        "how many of the training images the search learns from, both halves together; default: all",
        "data",
        low=4,
    )
    epochs: int = option(None, "passes over the training half, warm-up included", "search", low=1)
    no_cuda_graphs: bool = option(False, "launch every step from Python (on a GPU, steps are captured)", "run")
    weight_lr: float = option(0.025, "learning rate of the weights (SGD, cosine)", "search", low=0)
    weight_lr_min: float = option(0.001, "where the cosine ends", "search", low=0)
    momentum: float = option(0.9, "momentum of the weights", "search", low=0, high=1)
    weight_decay: float = option(3e-4, "weight decay of the weights", "search", low=0)
    grad_clip: float = option(5.0, "largest gradient norm of the weights; 0 = no clipping", "search", low=0)
    alpha_lr: float = option(None, "learning rate of the architecture parameters (Adam)", "search", low=0)
    alpha_weight_decay: float = option(1e-3, "weight decay of the architecture parameters", "search", low=0)
    unrolled: bool = option(
        False,
        "second order: alpha's gradient through the next step of the weights (DARTS' flag), exactly, about 9 times as "
        "long; not for methods that sample",
        "search",
    )
    finite_difference: bool = option(
        False,
        "with --unrolled: the second derivative as DARTS approximates it, 3 times as long as the first order, and far "
        "off where networks are small (see dssp/steps/hypergradient.py)",
        "search",
    )
    beta_decay: float = option(
        0.0,
        "largest weight of Beta-DARTS' loss on alpha, which grows linearly over the epochs (its authors: 50 on "
        "NAS-Bench-201); not for method random",
        "search",
        low=0,
    )
    early_stop: bool = option(
        False,
        "end the search when the loss becomes sharp in alpha (RobustDARTS: dominant eigenvalue of the Hessian, "
        "looked at after every epoch), and derive the cell of five epochs before; for bilevel methods without pruning",
        "search",
    )
    max_skips: int | None = option(
        None,
        "skip connections that the derived normal cell may have (P-DARTS: 2; default: any number); not for methods "
        "that derive a hard path",
        "search",
        low=0,
    )
    max_params: int | None = option(
        None,
        "parameters that the derived network may have, built as it will be retrained (--retrain-channels and -cells), "
        "auxiliary head aside: the strongest architecture that fits is derived, of hard paths the best that fits; "
        "default: any number",
        "search",
        low=1,
    )
    max_flops: int | None = option(
        None,
        "FLOPs per image that it may need, a multiply-add counted as two; default: any number",
        "search",
        low=1,
    )
    zero_one_weight: float = option(10.0, "weight of the zero-one loss (method fair-darts)", "search", low=0)
    sigmoid_threshold: float = option(
        0.85, "sigmoid that a candidate must reach to be derived (method fair-darts)", "search", low=0, high=1
    )
    temperature: float = option(
        None, "of the Gumbel softmax in the first epoch (methods snas, preset 1, and gdas)", "search", low=1e-3
    )
    temperature_min: float = option(None, "in the last epoch; it falls linearly", "search", low=1e-3)
    downsample: int = option(
        1,
        "average images over squares of this many pixels while architecture and weights learn; hard paths see them "
        "whole (method dssp): where the supernet is too slow, the first to go",
        "search",
        low=1,
    )
    warmup_epochs: int = option(
        None, "first epochs that train weights only; the preset scales with --epochs", "search", low=0
    )
    mask_lr: float = option(None, "learning rate of the masks (Adam)", "pruning", low=0)
    lambda_prune: float = option(0.01, "weight of the penalty: lambda * sum of sigmoid(mask)", "pruning", low=0)
    prune_strategy: Literal["measured", "budget", "relative", "absolute", "none"] = option(
        None,
        "measured: gates propose, the loss on held-out images decides, on a schedule down to --edge-budget; "
        "budget: lowest normalised gates first, on the same schedule; relative: gates below the threshold times their "
        "node's mean; absolute: gates below the threshold (the paper); none: nothing is pruned",
        "pruning",
    )
    prune_threshold: float = option(0.5, "threshold of relative and absolute pruning", "pruning", low=0)
    prune_every: int = option(1, "epochs between two pruning points", "pruning", low=1)
    edge_budget: float = option(
        None, "share of the edges still active at the end (strategies measured and budget)", "pruning", low=0, high=1
    )
    raw_gates: bool = option(
        False,
        "mix by the gates themselves, as the paper does, not relative to the others of their node (method dssp)",
        "pruning",
    )
    offer_none: bool = option(
        False, "`none` is a candidate too, though a mask that closes says the same (method dssp)", "pruning"
    )
    candidates_kept: int = option(2, "candidates that every edge keeps at the end (method dssp)", "pruning", low=1)
    any_kind: bool = option(
        False,
        "candidates leave an edge in the order of their worth alone; without this flag, of two or more that it keeps "
        "one has weights and one has none, where it had such (method dssp)",
        "pruning",
    )
    path_epochs: int = option(
        None,
        "last epochs that train hard paths, one candidate per edge, before these are compared (method dssp); the "
        "preset scales with --epochs; 0: derive by alpha and gates",
        "search",
        low=0,
    )
    scored_paths: int = option(
        None, "paths compared at the end: all, if there are not more (methods dssp and random)", "search", low=1
    )
    held_out: int = option(None, "validation images on which removals are measured", "search", low=2)
    compared_images: int = option(
        None, "validation images on which paths are compared at the end (methods dssp and random)", "search", low=2
    )
    tie_break: Literal["parsimony", "loss", "capacity"] = option(
        None,
        "which of the paths that tie on the held-out images is derived: that of the fewest parameters, of the lowest "
        "loss, or of the most parameters (a prior, found on NAS-Bench-201)",
        "search",
    )
    min_edges: int = option(1, "incoming edges that every node keeps", "pruning", low=1)
    max_edges_per_node: int = option(None, "incoming edges per node of the derived cell", "pruning", low=1)
    retrain_epochs: int = option(None, "passes over all training images; 0 = no retraining", "retraining", low=0)
    retrain_batch_size: int = option(None, "images per step and rank", "retraining", low=1)
    retrain_channels: int = option(None, "channels of the first cells", "retraining", low=1)
    retrain_cells: int = option(None, "cells in the derived network", "retraining", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs is not None and self.warmup_epochs is not None and self.warmup_epochs > self.epochs:
            raise ConfigError("warmup_epochs", f"expected at most the {self.epochs} epochs, got {self.warmup_epochs}")
        if self.space == "darts" and self.cells is not None and self.cells < 3:
            raise ConfigError(
                "cells", f"expected at least 3, or there is no normal cell beside the two reductions, got {self.cells}"
            )
        if self.method == "pc-darts" and self.channels is not None and self.channels % 4:
            raise ConfigError("channels", f"method pc-darts mixes a quarter of them, got {self.channels}")
        if self.space == "nasbench201" and self.nodes not in (None, 3):
            raise ConfigError("nodes", f"space nasbench201 has 3 beside its input, got {self.nodes}")
        if self.space == "chain":
            self._check_chain()
        if self.method not in PRUNING_METHODS and self.prune_strategy not in (None, "none"):
            raise ConfigError("prune_strategy", f"method {self.method} prunes nothing, got {self.prune_strategy}")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name, methods in OPTION_METHODS.items():
            if getattr(self, name) != defaults[name] and self.method not in methods:
                raise ConfigError(name, f"expected method {', '.join(methods)}, got {self.method}")
        if self.offer_none and self.candidates_kept < 2:
            raise ConfigError("candidates_kept", f"expected at least 2, one may be `none`, got {self.candidates_kept}")
        if self.finite_difference and not self.unrolled:
            raise ConfigError("finite_difference", "the first order has no second derivative, add --unrolled")
        if None not in (self.epochs, self.warmup_epochs, self.path_epochs):
            left = self.epochs - self.warmup_epochs
            if self.path_epochs > left:
                raise ConfigError(
                    "path_epochs", f"expected at most the {left} epochs after warm-up, got {self.path_epochs}"
                )

    def _check_chain(self) -> None:
        if self.method == "pc-darts":
            raise ConfigError("method", "pc-darts needs edges that keep the width, those of space chain change it")
        if self.max_skips is not None:
            raise ConfigError("max_skips", f"space chain has no skip connections to choose, got {self.max_skips}")
        if None not in (self.cells, self.retrain_cells) and self.cells != self.retrain_cells:
            expected = f"the {self.cells} stages of --cells, each has layers of its own"
            raise ConfigError("retrain_cells", f"expected {expected}, got {self.retrain_cells}")

    def _presets(self) -> dict[str, Any]:
        """The presets of the data set; phases keep their share of the epochs, what a method does not do is off."""
        presets = super()._presets()
        if self.space == "chain" and self.cells is not None:
            presets["retrain_cells"] = self.cells
        if self.method not in PRUNING_METHODS:
            presets["prune_strategy"] = "none"
        if self.method not in (*PRUNING_METHODS, "pc-darts"):
            presets["warmup_epochs"] = 0
        if self.method == "snas":
            presets["temperature"] = 1.0
        if self.method == "random":
            presets["tie_break"] = "loss"  # a baseline takes no prior from the space
        if self.method != "dssp":
            presets["path_epochs"] = 0
        epochs = presets["epochs"] if self.epochs is None else self.epochs
        phases = ("warmup_epochs", "path_epochs")
        scaled = {field: -(-presets[field] * epochs // presets["epochs"]) for field in phases}  # a started one counts
        for field, other in (phases, reversed(phases)):
            taken = scaled[other] if getattr(self, other) is None else getattr(self, other)
            presets[field] = max(min(scaled[field], epochs - taken - 1), 0)  # one epoch at least to search in
        return presets


@dataclass(frozen=True, kw_only=True)
class RetrainConfig(_Config):
    """Everything that decides a retraining."""

    genotype: str = option(
        dataclasses.MISSING, "genotype.json of a search, or a file with DARTS' text or an arch string", "model"
    )
    epochs: int = option(
        None, "passes over all training images; 0 = count parameters and FLOPs only", "training", low=0
    )
    lr: float = option(0.025, "learning rate (SGD, cosine down to 0)", "training", low=0)
    momentum: float = option(0.9, "momentum", "training", low=0, high=1)
    weight_decay: float = option(3e-4, "weight decay", "training", low=0)
    grad_clip: float = option(5.0, "largest gradient norm; 0 = no clipping", "training", low=0)
    cutout: int = option(
        None,
        "side in pixels of the square cut out of every training image; 0 = none (space darts on CIFAR: 16, else 0)",
        "training",
        low=0,
    )
    auxiliary_weight: float = option(
        None,
        "weight of the loss of an auxiliary head at 2/3 of the network, in training only; 0 = no such head "
        "(space darts on CIFAR: 0.4, else 0)",
        "training",
        low=0,
    )
    drop_path: float = option(
        None,
        "probability that an operation is left out for an image, rising linearly from 0 over the epochs "
        "(space darts on CIFAR: 0.2, else 0)",
        "training",
        low=0,
        high=1,
    )
    label_smoothing: float = option(
        0.0, "share of the target that is spread over all classes (ImageNet: 0.1 is usual)", "training", low=0, high=1
    )
    ema_decay: float = option(
        0.0,
        "decay per step of a moving average of weights and buffers, which is tested and kept instead of the last "
        "weights (0.9999 is usual); 0 = no average",
        "training",
        low=0,
        high=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.space in ("nasbench201", "chain") and self.auxiliary_weight:
            raise ConfigError(
                "auxiliary_weight", f"space {self.space} has no auxiliary head, expected 0, got {self.auxiliary_weight}"
            )

    def _presets(self) -> dict[str, Any]:
        """The presets of the data set, and DARTS' recipe where DARTS has one."""
        applies = self.space == "darts" and self.dataset in ("cifar10", "cifar100")
        return {**super()._presets(), **(DARTS_RECIPE if applies else {k: 0 * v for k, v in DARTS_RECIPE.items()})}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Everything that decides an evaluation."""

    run_dir: str = option(dataclasses.MISSING, "run folder of a retraining, or of a search that retrained", "run")
    dataset: Literal["digits", "cifar10", "cifar100", "imagefolder", "fake"] | None = option(
        None, "images to test on; default: those of the run", "data"
    )
    data_path: str | None = option(None, "where they are; default: where those of the run were", "data")
    batch_size: int = option(256, "images per step", "data", low=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", "run")
    deterministic: bool = option(False, DETERMINISTIC, "run")
    threads: int | None = option(None, "CPU threads; default: torch's choice", "run", low=1)
    workers: int = option(2, "threads that decode the images of an image folder", "run", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_device(self.device)


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Options):
    """Everything that decides an export."""

    run_dir: str = option(dataclasses.MISSING, "run folder of a retraining, or of a search that retrained", "run")
    format: Literal["torch", "onnx"] = option(
        dataclasses.MISSING, "torch: what torch.export saves (.pt2); onnx: what ONNX runtimes load", "run"
    )
    out: str = option(dataclasses.MISSING, "the file to write", "run")


def parse_search(argv: Sequence[str] | None = None) -> SearchConfig:
    """The configuration on the command line of `python -m dssp.search`; a bad one ends the process with one line."""
    return parse_options(
        SearchConfig, "dssp.search", "Search for a cell, prune the space while searching, derive a genotype.", argv
    )


def parse_retrain(argv: Sequence[str] | None = None) -> RetrainConfig:
    """The configuration on the command line of `python -m dssp.retrain`; a bad one ends the process with one line."""
    return parse_options(
        RetrainConfig, "dssp.retrain", "Train the network of a genotype from scratch and test it.", argv
    )


def parse_evaluate(argv: Sequence[str] | None = None) -> EvaluateConfig:
    """The configuration on the command line of `python -m dssp.evaluate`; a bad one ends the process with one line."""
    return parse_options(EvaluateConfig, "dssp.evaluate", "Test a trained network.", argv)


def parse_export(argv: Sequence[str] | None = None) -> ExportConfig:
    """The configuration on the command line of `python -m dssp.export`; a bad one ends the process with one line."""
    return parse_options(
        ExportConfig, "dssp.export", "Write a trained network as a file that other programs run.", argv
    )


def search_parser(prog: str, description: str, *, without: Collection[str] = ()) -> argparse.ArgumentParser:
    """The command line of a search as a parser of the fields that are given, all but some, to be extended."""
    return options_parser(SearchConfig, prog, description, without)


def _check_device(device: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise ConfigError("device", f"expected auto, cpu, cuda or cuda:N, got {device!r}")
