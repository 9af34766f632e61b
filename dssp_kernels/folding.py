"""Which candidate operations end in a BatchNorm2d that can move into the mix, and what is left of them then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook


class Parts(NamedTuple):
    """A candidate taken apart: it computes norm(body[-1](... body[0](x)))."""

    body: Sequence[Callable[[Tensor], Tensor]]
    norm: nn.BatchNorm2d

    def before_norm(self, x: Tensor) -> Tensor:
        """What enters the norm."""
        for step in self.body:
            x = step(x)
        return x


def parts_of(candidate: nn.Module | None) -> Parts | str:
    """The candidate's parts, or why it cannot be taken apart; the reason is empty where it ends in no BatchNorm.

    Only what is certain is taken apart: a plain nn.Sequential, and a module whose class defines ``forward`` and, next
    to it, ``body_and_norm()``, which returns the steps of forward before its BatchNorm2d, and that BatchNorm2d. Steps
    are callables x -> x; they and the norm are the candidate's children, children of these, or methods of it.

    Nobody may be watching either: with a hook on the norm or on a module that is taken apart, and with hooks on all
    modules, the candidate runs as it is.
    """
    if candidate is None:
        return ""
    if type(candidate) is nn.Sequential and len(candidate) > 0:
        *body, norm = candidate
    elif hasattr(candidate, "body_and_norm"):
        if not _defined_together(type(candidate)):
            return f"{type(candidate).__name__} changes forward() or body_and_norm() alone"
        body, norm = candidate.body_and_norm()  # type: ignore[operator]  # the protocol's, not nn.Module's
    else:
        return ""
    if type(norm) is not nn.BatchNorm2d:
        return f"its norm is a {type(norm).__name__}" if isinstance(norm, _BatchNorm) else ""
    if _is_watched(norm):
        return "its norm has hooks"
    taken_apart = [child for child in candidate.children() if child is not norm and child not in body]
    if any(_is_watched(module) for module in (candidate, *taken_apart)):
        return "it has hooks"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    return Parts(body, norm)


def _defined_together(cls: type) -> bool:
    """Whether one class defines both methods: who overrides forward() alone computes something else."""
    forward, protocol = cls.forward, cls.body_and_norm  # type: ignore[attr-defined]
    return (forward.__module__, forward.__qualname__.rpartition(".")[0]) == (
        protocol.__module__,
        protocol.__qualname__.rpartition(".")[0],
    )


def _is_watched(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(hooks) or "forward" in module.__dict__


def norms_shared(candidates: Iterable[nn.Module | None]) -> list[bool]:
    """Per candidate: whether another one holds its last norm as well."""
    candidates = list(candidates)
    trees = [set() if candidate is None else set(candidate.modules()) for candidate in candidates]
    shared = []
    for i, candidate in enumerate(candidates):
        parts = parts_of(candidate)
        others = trees[:i] + trees[i + 1 :]
        shared.append(not isinstance(parts, str) and any(parts.norm in tree for tree in others))
    return shared


def describe(candidates: Iterable[nn.Module | None], shared: Sequence[bool]) -> str:
    """Which candidates fold, and why others that end in a BatchNorm do not."""
    folded, reasons = [], []
    for i, (candidate, is_shared) in enumerate(zip(candidates, shared, strict=True)):
        parts = "another candidate has the same norm" if is_shared else parts_of(candidate)
        if isinstance(parts, Parts):
            folded.append(str(i))
        elif parts:
            reasons.append(f"{i} not folded: {parts}")
    return "; ".join([f"BatchNorm folded: {', '.join(folded) or 'none'}", *reasons])
