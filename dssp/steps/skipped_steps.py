"""Steps whose loss or gradient is not finite: they change nothing and are counted, and nobody waits for the device."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from dssp.distributed import average

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element


class Kept:
    """The values that tensors have now, to be given back to them later where a flag on the device says so.

    The bits are handled as integers: 0 * NaN is NaN, and 0 times the integer with the bits of a NaN is 0. So a few
    batched kernels choose between old and new, whatever either holds.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._groups = [(bits, [torch.empty_like(one) for one in bits]) for bits in _bits(tensors)]
        for bits, copies in self._groups:
            torch._foreach_copy_(copies, bits)

    def give_back_unless(self, good: Tensor) -> None:
        """The old values where ``good`` (bool scalar) is false. The copies are used up."""
        for bits, copies in self._groups:
            chosen = good.to(bits[0].dtype)
            torch._foreach_mul_(bits, chosen)
            torch._foreach_mul_(copies, 1 - chosen)
            torch._foreach_add_(bits, copies)


def _bits(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """The same memory as integers, grouped by type."""
    views = [tensor.detach().view(INTEGERS[tensor.element_size()]) for tensor in tensors]
    views.sort(key=lambda view: view.element_size())
    return [list(group) for _, group in groupby(views, key=lambda view: view.dtype)]


def step_if_finite(optimizer: torch.optim.Optimizer, loss: Tensor, gradient_norm: Tensor) -> Tensor:
    """optimizer.step() if loss and gradient norm are finite, else nothing changes; which of the two (bool scalar)."""
    good = loss.detach().isfinite() & gradient_norm.isfinite()
    if good.is_cuda:
        step_and_take_back_unless(good, optimizer)
    elif good:
        optimizer.step()
    return good


def step_and_take_back_unless(good: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """optimizer.step(), undone on the device where ``good`` (bool scalar) is false; may be captured in a CUDA graph."""
    held = _held(optimizer)
    kept = Kept(held)
    optimizer.step()
    kept.give_back_unless(good)
    known = {id(tensor) for tensor in held}
    for bits in _bits([tensor for tensor in _held(optimizer) if id(tensor) not in known]):
        torch._foreach_mul_(bits, good.to(bits[0].dtype))  # state made by this step starts from zeros


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a step changes on the device: parameters that have a gradient, and the optimizer's state there."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    state = [(parameter, value) for parameter, entry in optimizer.state.items() for value in entry.values()]
    return [
        *parameters,
        *(value for parameter, value in state if isinstance(value, Tensor) and value.device == parameter.device),
    ]


def reported(good: Tensor, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a step reports: its scalars, or NaN for each where it was skipped."""
    return {name: torch.where(good, value.detach(), torch.nan) for name, value in scalars.items()}


class GuardedStep:
    """step(*batch) -> scalars, after which BatchNorm's running statistics are as before if a scalar is not finite.

    A forward pass that overflows has moved them before anybody can know, and a NaN in them would stay for good. Of
    several ranks, the scalars are the means, so one that is not finite is seen by all. Norms may leave the model
    between steps, but none may come: looking for them took a twelfth of a step on hard paths.
    """

    def __init__(self, step: Callable[..., dict[str, Tensor]], model: nn.Module) -> None:
        self._step = step
        self._norms = [weakref.ref(norm) for norm in _norms(model)]

    def __call__(self, *batch: Any) -> dict[str, Tensor]:
        statistics = _running_statistics([norm for found in self._norms if (norm := found()) is not None])
        before = torch.cat(statistics) if statistics else None
        scalars = average(self._step(*batch))
        good = torch.stack(list(scalars.values())).isfinite().all()
        if before is not None and (good.is_cuda or not good):
            kept = torch.where(good, torch.cat(statistics), before)
            torch._foreach_copy_(statistics, kept.split([len(values) for values in statistics]))
        return scalars


@contextmanager
def unmoved_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm trains as ever, over all ranks where it does, and its running statistics are afterwards as before."""
    norms = _norms(model)
    counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
    groups = [group for group in (_running_statistics(norms), counters) if group]
    before = [[values.clone() for values in group] for group in groups]
    try:
        yield
    finally:
        for group, values in zip(groups, before, strict=True):
            torch._foreach_copy_(group, values)


def _running_statistics(norms: Sequence[nn.BatchNorm2d]) -> list[Tensor]:
    return [values for norm in norms for values in (norm.running_mean, norm.running_var) if values is not None]


def _norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


class SkippedSteps:
    """Steps with a scalar that is not finite: how many in this epoch, and the longest run of them in a row.

    Counted on the device; ``run()`` looks without waiting, so on a GPU it may be a few steps late.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None  # int64 [3]: of this epoch, in a row until now, most in a row so far
        self._look: tuple[Tensor, torch.cuda.Event] | None = None  # on its way from a GPU

    def update(self, good: Tensor) -> None:
        """Count one step; ``good`` (bool scalar) says that all its scalars were finite."""
        if self._counts is None:
            self._counts = torch.zeros(3, dtype=torch.int64)
        self._counts = self._counts.to(good.device)
        total, row, longest = self._counts.unbind()
        bad = good.logical_not().long()
        row = (row + 1) * bad
        self._counts = torch.stack([total + bad, row, torch.maximum(longest, row)])

    def start_epoch(self) -> None:
        """Count the epoch's steps from zero; a run of skipped steps goes on."""
        if self._counts is not None:
            self._counts[0] = 0

    def total(self) -> int:
        """Steps skipped in this epoch; waits for the device."""
        return 0 if self._counts is None else int(self._counts[0])

    def run(self) -> int:
        """The longest run of skipped steps, as far as it is known without waiting."""
        if self._counts is None:
            return 0
        if not self._counts.is_cuda:
            return int(self._counts[2])
        if self._look is None:
            arrived = torch.cuda.Event()
            self._look = self._counts.to("cpu", non_blocking=True), arrived
            arrived.record()
        counts, arrived = self._look
        if not arrived.query():
            return 0
        self._look = None
        return int(counts[2])

    def state_dict(self) -> dict[str, Any]:
        return {"counts": None if self._counts is None else self._counts.cpu()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._counts = state["counts"]
