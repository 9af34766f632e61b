"""The search itself: architecture step and weight step in turn, pruning between epochs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dssp.architect import Architect
from dssp.benchmark import Benchmark
from dssp.capture import CapturedStep
from dssp.config import ConfigError, SearchConfig
from dssp.data import DataSet
from dssp.derivation import derive
from dssp.genotype import AnyGenotype
from dssp.optimization import cosine, set_learning_rate, sgd, weight_step
from dssp.pruning import GateTable, Pruner, PruningRules, batch_statistics, measured_effects
from dssp.skipped_steps import GuardedStep
from dssp.supernet import Supernet

HELD_OUT = 256  # images of the validation half on which candidates for removal are measured

Batch = tuple[Tensor, Tensor]


@contextmanager
def frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    """These parameters get no gradients, and autograd neither computes nor keeps anything for them."""
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class BilevelSearch:
    """DARTS' bilevel optimisation (Liu et al. 2019, algorithm 1, first order) of weights, alpha and masks; prunes.

    Every step updates alpha and masks on a batch of the validation half, then weights on a batch of the training half.
    The first ``warmup_epochs`` train weights only. A ``benchmark`` is asked after every epoch what the derived cell is
    worth; the answer goes into the epoch's row and nowhere else. A task of engine.Engine.
    """

    name = "search"

    def __init__(
        self, config: SearchConfig, supernet: Supernet, data: DataSet, benchmark: Benchmark | None = None
    ) -> None:
        self.config, self.supernet, self.data, self.benchmark = config, supernet, data, benchmark
        self.epochs = config.epochs
        self.architect = Architect(
            supernet,
            alpha_lr=config.alpha_lr,
            alpha_weight_decay=config.alpha_weight_decay,
            mask_lr=config.mask_lr,
            lambda_prune=config.lambda_prune,
            precision=config.precision,
        )
        self.weights = supernet.weights()
        self.optimizer = sgd(
            self.weights, lr=config.weight_lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.captured = CapturedStep(GuardedStep(self._bilevel_step, supernet), enabled=not config.no_cuda_graphs)
        rules = PruningRules(
            strategy=config.prune_strategy,
            threshold=config.prune_threshold,
            min_edges=config.min_edges,
            edge_budget=config.edge_budget,
            warmup_epochs=config.warmup_epochs,
            epochs=config.epochs,
            every=config.prune_every,
        )
        if config.prune_strategy != "none" and config.epochs > config.warmup_epochs and not rules.points():
            raise ConfigError("prune_every", f"no pruning point in {config.epochs} epochs, got {config.prune_every}")
        self.held_out = data.valid.sample(HELD_OUT, seed=config.seed)
        self.pruner = Pruner(supernet, rules, lambda edges: measured_effects(supernet, edges, *self.held_out))

    def is_warming_up(self, epoch: int) -> bool:
        """True while only weights are trained."""
        return epoch < self.config.warmup_epochs

    def derived(self) -> AnyGenotype:
        """What the search would end in if it ended now."""
        return derive(self.supernet, max_edges_per_node=self.config.max_edges_per_node)

    def tabulated(self) -> dict[str, float] | None:
        """The benchmark's accuracies of the derived cell, None without a benchmark."""
        return None if self.benchmark is None else self.benchmark.tabulated(self.derived())

    # ---- the engine's side -----------------------------------------------------------------------------------------

    def steps(self) -> int:
        """Steps per epoch: both halves are passed through once."""
        return max(1, min(len(self.data.train), len(self.data.valid)) // self.config.batch_size)

    def batches(self, epoch: int, *, first: int = 0) -> Iterator[tuple[Batch, Batch | None]]:
        """(training batch, validation batch); no validation batch during warm-up. From step ``first`` on."""
        config = self.config
        self.captured.reset()  # the learning rate changes, and edges may have gone
        set_learning_rate(
            self.optimizer, cosine(epoch, config.epochs, start=config.weight_lr, end=config.weight_lr_min)
        )
        train = self.data.train.batches(config.batch_size, epoch=epoch, seed=config.seed, train=True, first=first)
        if self.is_warming_up(epoch):
            return ((batch, None) for batch in train)
        valid = self.data.valid.batches(config.batch_size, epoch=epoch, seed=config.seed, train=True, first=first)
        return zip(train, valid, strict=False)  # the halves may differ by one batch

    def step(self, batch: tuple[Batch, Batch | None], epoch: int) -> dict[str, Tensor]:
        """One bilevel step; on a GPU, replayed from a CUDA graph."""
        train, valid = batch
        return self.captured(*train, *(valid or ()))

    def end_epoch(self, epoch: int) -> dict[str, Any]:
        """Record the gates, prune, look up what is left."""
        row: dict[str, Any] = {"phase": "warm-up" if self.is_warming_up(epoch) else "search"}
        if self.is_warming_up(epoch):
            row |= self._held_out_metrics()
        row |= self._architecture()
        row["active_edges"] = len(self.supernet.live_edges())
        row["total_edges"] = sum(1 for _ in self.supernet.edges())
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row["pruned"] = self.pruner.end_epoch(epoch, step=(epoch + 1) * self.steps())
        if row["pruned"]:
            self._forget_removed_weights()
        if (tabulated := self.tabulated()) is not None:
            row["tabulated"] = tabulated
        return row

    def state_dict(self) -> dict[str, Any]:
        return {
            "pruner": self.pruner.state_dict(),
            "supernet": self.supernet.state_dict(),
            "weight_optimizer": self.optimizer.state_dict(),
            "architecture_optimizer": self.architect.optimizer.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.pruner.load_state_dict(state["pruner"])
        self._forget_removed_weights()
        self.supernet.load_state_dict(state["supernet"])
        self.optimizer.load_state_dict(state["weight_optimizer"])
        self.architect.optimizer.load_state_dict(state["architecture_optimizer"])

    # ---- its parts -------------------------------------------------------------------------------------------------

    def _bilevel_step(self, images: Tensor, labels: Tensor, *valid: Tensor) -> dict[str, Tensor]:
        """Each half freezes the other's parameters, so nothing is computed that nobody uses."""
        values = {}
        if valid:
            with frozen(self.weights):
                values = self.architect.step(*valid)
        with frozen(self.supernet.architecture_parameters()):
            values |= weight_step(
                self.supernet,
                self.optimizer,
                images,
                labels,
                grad_clip=self.config.grad_clip,
                precision=self.config.precision,
            )
        return values

    def _forget_removed_weights(self) -> None:
        """Removed candidates leave the optimizer: no step, no momentum, no memory."""
        self.weights = self.supernet.weights()
        live = {id(weight) for weight in self.weights}
        self.optimizer.param_groups[0]["params"] = self.weights
        for weight in [weight for weight in self.optimizer.state if id(weight) not in live]:
            del self.optimizer.state[weight]

    @torch.no_grad()
    def _held_out_metrics(self) -> dict[str, float]:
        """Validation figures of an epoch that took no architecture step."""
        images, labels = self.held_out
        with batch_statistics(self.supernet):
            logits = self.supernet(images)
        return {
            "valid_loss": float(F.cross_entropy(logits, labels)),
            "valid_accuracy": float((logits.argmax(1) == labels).float().mean()),
            "prune_loss": float(self.supernet.gate_sum()),
        }

    def _architecture(self) -> dict[str, Any]:
        """Gates, normalised gates (None where an edge is gone) and softmax weights, by cell type."""
        supernet = self.supernet
        row: dict[str, Any] = {
            "alpha": {type: supernet.alpha[type].detach().softmax(-1).tolist() for type in supernet.cell_types},
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
