"""The search itself: architecture step and weight step in turn, removals between epochs, all as the method says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dssp.architect import Architect
from dssp.benchmark import Benchmark
from dssp.config import SearchConfig
from dssp.data import DataSet, Split, keyed_generator
from dssp.derived.budget import Budget
from dssp.distributed import check_same, checksum, ranks, share
from dssp.early_stopping import EarlyStopping, dominant_eigenvalue
from dssp.genotype import AnyGenotype
from dssp.methods import METHODS
from dssp.methods.base import Noise
from dssp.pruning.edges import GateTable
from dssp.pruning.held_out import batch_statistics, held_out_logits, held_out_losses
from dssp.search_flops import EXACT, FINITE_DIFFERENCE, Pass, SearchFlops
from dssp.steps.capture import CapturedStep
from dssp.steps.optimization import frozen, set_learning_rate, sgd, weight_step
from dssp.steps.skipped_steps import GuardedStep
from dssp.supernet import Supernet

Batch = tuple[Tensor, Tensor]
Step = tuple[Batch, Batch | None, Noise]
"""A batch of the training half, one of the validation half unless only weights are trained, and what chance decides."""


class BilevelSearch:
    """DARTS' bilevel optimisation (Liu et al. 2019, algorithm 1) of weights and architecture, by one of METHODS.

    Every step updates alpha and masks on a batch of the validation half, then weights on a batch of the training half;
    in phases other than "search", weights only. A ``benchmark`` is asked after every epoch what the derived cell is
    worth; the answer goes into the epoch's row and nowhere else. A task of engine.Engine.
    """

    name = "search"

    def __init__(
        self, config: SearchConfig, supernet: Supernet, data: DataSet, benchmark: Benchmark | None = None
    ) -> None:
        self.config, self.supernet, self.data, self.benchmark = config, supernet, data, benchmark
        self.epochs = config.epochs
        self.early_stopping = EarlyStopping()
        self.method = METHODS[config.method](config, supernet, self._held_out_losses)
        self.method.budget = self._budget()
        self.weights = supernet.weights()
        self.optimizer = sgd(
            self.weights, lr=config.weight_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.architect = Architect(
            supernet,
            self.method,
            alpha_lr=config.alpha_lr,
            alpha_weight_decay=config.alpha_weight_decay,
            mask_lr=config.mask_lr,
            precision=config.precision,
            weight_optimizer=self.optimizer if config.unrolled else None,
            exact=not config.finite_difference,
        )
        self._uncaptured = GuardedStep(self._step, supernet)
        self.captured = CapturedStep(GuardedStep(self._captured_step, supernet), enabled=not config.no_cuda_graphs)
        self.held_out = data.valid.sample(config.held_out, seed=config.seed)
        self.flops = SearchFlops(supernet, self.method)

    def _budget(self) -> Budget | None:
        config = self.config
        limits = {"max_params": config.max_params, "max_flops": config.max_flops}
        given = {name: limit for name, limit in limits.items() if limit is not None}
        if not given:
            return None
        return Budget.of(
            self.supernet.space,
            given,
            channels=config.retrain_channels,
            cells=config.retrain_cells,
            classes=len(self.data.classes),
            image_shape=self.data.image_shape,
            stem=config.stem,
        )

    def derived(self) -> AnyGenotype:
        """What the search would end in if it ended now."""
        return self.early_stopping.genotype or self.method.derived()

    def tabulated(self) -> dict[str, float] | None:
        """The benchmark's accuracies of the derived cell, None without a benchmark."""
        return None if self.benchmark is None else self.benchmark.tabulated(self.derived())

    # ---- the engine's side -----------------------------------------------------------------------------------------

    def steps(self, epoch: int) -> int:
        """In an epoch: both halves are passed through once, by all ranks together."""
        images = len(self._training_images(epoch))
        if self.method.phase(epoch) != "paths":
            images = min(images, len(self.data.valid))
        return max(1, images // (self.config.batch_size * ranks()))

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[Step]:
        """What the steps of an epoch need, from step ``first`` on; the method makes itself ready for the epoch."""
        self.captured.reset()  # the learning rate changes, and edges may have gone
        self.method.start_epoch(epoch)
        set_learning_rate(self.optimizer, self.method.learning_rate(epoch))
        return self._batches(epoch, first)

    def _batches(self, epoch: int, first: int) -> Iterator[Step]:
        order: dict[str, Any] = {
            "epoch": epoch,
            "seed": self.config.seed,
            "train": True,
            "first": first,
            "share": share(),
        }
        chance = keyed_generator(self.config.seed, epoch, "noise")
        for _ in range(first):
            self.method.noise(chance, epoch)
        train = self._training_images(epoch).batches(self.config.batch_size, **order)
        if self.method.phase(epoch) != "search" or self.method.joint:
            for batch in train:
                yield batch, None, self.method.noise(chance, epoch)
            return
        valid = self.data.valid.batches(self.config.batch_size, **order)
        for batch, other in zip(train, valid, strict=False):  # the halves may differ by one batch
            yield batch, other, self.method.noise(chance, epoch)

    def step(self, batch: Step, epoch: int) -> dict[str, Tensor]:
        """One step of the epoch's phase; on a GPU, replayed from a CUDA graph where the method allows."""
        train, valid, noise = batch
        learns_both = self.method.joint and self.method.phase(epoch) == "search"
        ahead = FINITE_DIFFERENCE if self.config.finite_difference else EXACT
        passes: tuple[Pass, ...] = () if valid is None else ahead if self.config.unrolled else ("architecture",)
        self._count((*passes, "weights"), train[0], noise, times=ranks())
        if self.method.on_host:
            return self._uncaptured(train, valid, noise, learns_both)
        self._noise_names, self._learns_both = list(noise), learns_both
        device = self.held_out[0].device
        drawn = [value.to(device, non_blocking=True) for value in noise.values()]
        return self.captured(*train, *drawn, *(valid or ()))

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Record gates and alpha, let the method remove what it wants, look up what is left."""
        phase = self.method.phase(epoch)
        row: dict[str, Any] = {"phase": phase}
        if phase != "search" or self.method.joint:
            row |= self._held_out_metrics()
        row |= self._architecture()
        row["active_edges"] = len(self.supernet.live_edges())
        row["total_edges"] = sum(1 for _ in self.supernet.edges())
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row |= {"pruned": [], "dropped": []} | self.method.end_epoch(epoch, step=sum(map(self.steps, range(epoch + 1))))
        if row["pruned"] or row["dropped"]:
            self._forget_removed_weights()
        if phase == "search" and self.config.early_stop:
            row["alpha_eigenvalue"] = self._alpha_eigenvalue()
            if self.early_stopping.update(epoch, row["alpha_eigenvalue"], self.method.derived()):
                self.epochs = epoch + 1
        self.check_same(f"search, end of epoch {epoch + 1}")
        row["search_flops"] = self.flops.total
        if (tabulated := self.tabulated()) is not None:
            row["tabulated"] = tabulated
        return row

    def check_same(self, when: str) -> None:
        """Raises RanksApart if a rank has another architecture or other weights.

        Running statistics are each rank's own; rank 0's are saved.
        """
        if ranks() == 1:
            return
        supernet = self.supernet
        left = [flags(type) for type in supernet.cell_types for flags in (supernet.active, supernet.offered)]
        values = {
            "alpha and masks": checksum(supernet.architecture_parameters()),
            "edges and candidates": checksum(left),
            "weights": checksum(self.weights),
            "genotype": self.derived().to_dict(),
        }
        check_same(values, when)

    def state_dict(self) -> dict[str, Any]:
        return {
            "method": self.method.state_dict(),
            "early_stopping": self.early_stopping.state_dict(),
            "flops": self.flops.total,
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.optimizer.state_dict(),
            "architecture_optimizer": self.architect.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.method.load_state_dict(state["method"])
        self.early_stopping.load_state_dict(state["early_stopping"])
        self.epochs = self.early_stopping.stopped_after or self.config.epochs
        self.flops.total = state["flops"]
        self._forget_removed_weights()
        self.supernet.load_state_dict(state["supernet"])
        self.optimizer.load_state_dict(state["weight_optimizer"])
        self.architect.optimizer.load_state_dict(state["architecture_optimizer"])

    # ---- its parts -------------------------------------------------------------------------------------------------

    def _captured_step(self, images: Tensor, labels: Tensor, *rest: Tensor) -> dict[str, Tensor]:
        """The step as a function of tensors only: training batch, noise, validation batch."""
        count = len(self._noise_names)
        noise, valid = dict(zip(self._noise_names, rest[:count], strict=True)), rest[count:]
        return self._step((images, labels), (valid[0], valid[1]) if valid else None, noise, self._learns_both)

    def _step(self, train: Batch, valid: Batch | None, noise: Noise, learns_both: bool) -> dict[str, Tensor]:
        """Each half freezes the other's parameters, so nothing is computed that nobody uses."""
        config, values = self.config, {}
        if valid is not None:
            with frozen([] if config.unrolled else self.weights):
                values = self.architect.step(*valid, noise, train)
        architecture = [] if learns_both else self.supernet.architecture_parameters()
        with frozen(architecture):
            if learns_both:
                self.architect.optimizer.zero_grad()
            values |= weight_step(
                lambda images: self.method.logits(images, noise),
                self.optimizer,
                *train,
                grad_clip=config.grad_clip,
                precision=config.precision,
                penalty=self.method.penalty if learns_both else None,
            )
            if learns_both:
                self.architect.update(values["train_loss"])
        return values

    def _count(self, passes: Sequence[Pass], images: Tensor, noise: Noise | None = None, *, times: int = 1) -> None:
        """Add to the FLOPs of the search what the supernet now takes for these images, as often as said."""
        self.flops.add(passes, times * len(images), images.shape[1:], noise or {})

    def _forget_removed_weights(self) -> None:
        """Removed candidates leave the optimizer: no step, no momentum, no memory."""
        self.weights = self.supernet.weights()
        live = {id(weight) for weight in self.weights}
        self.optimizer.param_groups[0]["params"] = self.weights
        for weight in [weight for weight in self.optimizer.state if id(weight) not in live]:
            del self.optimizer.state[weight]

    def _logits(self, images: Tensor) -> Tensor:
        return self.method.logits(images, {})

    def _training_images(self, epoch: int) -> Split:
        return self._path_images if self.method.phase(epoch) == "paths" else self.data.train

    @cached_property
    def _path_images(self) -> Split:
        """Of both halves but the held-out images: paths are trained when alpha needs the validation half no more."""
        config, train = self.config, self.data.train
        held_out = max(config.held_out, config.compared_images)
        others = self.data.valid.without_sample(held_out, seed=config.seed)
        return replace(train, indices=torch.cat([train.indices, others]).sort().values)

    @cached_property
    def _compared_on(self) -> Batch:
        """Fetched when paths are compared: most methods never do, and the images take memory."""
        return self.data.valid.sample(self.config.compared_images, seed=self.config.seed)

    def _held_out_losses(self, *, comparing: bool = False) -> Tensor:
        images, labels = self._compared_on if comparing else self.held_out
        self._count(("forward",), images)
        return held_out_losses(self.supernet, self._logits, images, labels)

    def _held_out_metrics(self) -> dict[str, float]:
        """Validation figures of an epoch that took no architecture step."""
        images, labels = self.held_out
        self._count(("forward",), images)
        logits = held_out_logits(self.supernet, self._logits, images)
        return {
            "valid_loss": float(F.cross_entropy(logits, labels)),
            "valid_accuracy": float((logits.argmax(1) == labels).float().mean()),
            "prune_loss": float(self.supernet.gate_sum().detach()),
        }

    def _alpha_eigenvalue(self) -> float:
        """Of the Hessian of the loss in alpha, on as many held-out images as a step has."""
        images, labels = (part[: self.config.batch_size] for part in self.held_out)
        with batch_statistics(self.supernet), frozen(self.weights):
            loss = F.cross_entropy(self._logits(images), labels)
            return dominant_eigenvalue(loss, list(self.supernet.alpha.values()))

    def _architecture(self) -> dict[str, Any]:
        """Gates, normalised gates (None where an edge is gone) and the candidates' weights, by cell type."""
        supernet = self.supernet
        weights = {type: self.method.candidate_weights(type).tolist() for type in supernet.cell_types}
        row: dict[str, Any] = {
            "alpha": weights,
            "gates": None,
            "normalised_gates": None,
        }
        if supernet.mask:
            table = GateTable.of(supernet)
            per_type = len(supernet.space.edges)
            for key, values in (("gates", table.gates), ("normalised_gates", table.scores)):
                shown = [value if live else None for value, live in zip(values, table.live, strict=True)]
                row[key] = {
                    type: shown[i * per_type : (i + 1) * per_type] for i, type in enumerate(supernet.cell_types)
                }
        return row
