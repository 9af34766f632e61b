"""SharedOutputs: candidates without parameters, run once for all edges that leave the same state."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from torch import Tensor, nn

from dssp_kernels.folding import Parts, Step, is_watched, parts_of
from dssp_kernels.pool_batch_norm.op import pool_batch_norm
from dssp_kernels.pool_batch_norm.reference import batch_norm_with_statistics
from dssp_kernels.running_statistics import update_running_statistics

_POOL_SETTINGS: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MaxPool2d: ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices"),
    nn.AvgPool2d: ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
}


def parameter_free(step: Step) -> Step:
    """Marks a function of a state alone, such as a ReLU and a choice of pixels, as one that edges may share.

    As the first step of several candidates (see dssp_kernels.folding) it then runs once per state, not once per edge.
    """
    step.is_parameter_free = True  # type: ignore[attr-defined]  # of a function
    return step


class SharedOutputs:
    """What pools, and ReLUs that candidates start with, have made of the states of a cell during one forward pass.

    A pool has no parameters, and neither has the BatchNorm2d(affine=False) that DARTS puts after it: on every edge that
    leaves a state it computes the same tensor from the same batch statistics. Edges given one SharedOutputs compute it
    once. Each edge's norm still updates its own running statistics, as torch.nn.BatchNorm2d does; in eval mode, where
    these decide, only the pool is shared. Likewise an nn.ReLU, or another step that is parameter_free(), which several
    candidates start with: their gradients meet after it, and pass through it once.
    """

    def __init__(self) -> None:
        self._outputs: dict[Hashable, Tensor] = {}
        self._batch_norms: dict[Hashable, tuple[Tensor, Tensor, Tensor]] = {}
        self._inputs: list[Tensor] = []  # kept alive, so that no other tensor can take the id() of one of them

    def of(
        self, candidate: nn.Module | None, x: Tensor, parts: Parts | str | None = None
    ) -> tuple[Tensor, nn.BatchNorm2d | None] | None:
        """What a candidate that is a pool makes of x, and its norm if that is still to be applied; None for any other.

        A pool with hooks, or whose norm does not fold (see dssp_kernels.folding), counts as any other candidate.
        ``parts`` is parts_of(candidate), where the caller has asked already.
        """
        found = pool_of(candidate, parts)
        if found is None:
            return None
        pool, norm = found
        if norm is not None and norm.training and norm.weight is None and norm.momentum is not None:
            return self._normalised(pool, norm, x), None
        return self._pooled(pool, x), norm

    def after_first_step(self, parts: Parts, x: Tensor) -> Tensor | None:
        """What a candidate's first step makes of x, if that can be shared."""
        step = parts.body[0] if parts.body else None
        kind: Hashable = None
        if type(step) is nn.ReLU and not step.inplace and not is_watched(step):
            kind = nn.ReLU
        elif getattr(step, "is_parameter_free", False):
            kind = step
        if step is None or kind is None:
            return None
        key = id(x), kind
        if key not in self._outputs:
            self._inputs.append(x)
            self._outputs[key] = step(x)
        return self._outputs[key]

    @staticmethod
    def _key(pool: nn.Module, x: Tensor) -> tuple[Hashable, ...]:
        return id(x), type(pool), *(getattr(pool, name) for name in _POOL_SETTINGS[type(pool)])

    def _pooled(self, pool: nn.Module, x: Tensor) -> Tensor:
        key = self._key(pool, x)
        if key not in self._outputs:
            self._inputs.append(x)
            self._outputs[key] = pool(x)
        return self._outputs[key]

    def _normalised(self, pool: nn.Module, norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
        """norm(pool(x)) by batch statistics; updates the norm's running ones."""
        key = *self._key(pool, x), norm.eps
        if key not in self._batch_norms:
            self._inputs.append(x)
            self._batch_norms[key] = _pool_and_norm(pool, norm, x)
        y, mean, variance = self._batch_norms[key]
        update_running_statistics([(norm, mean, variance)])
        return y


def pool_of(
    candidate: nn.Module | None, parts: Parts | str | None = None
) -> tuple[nn.Module, nn.BatchNorm2d | None] | None:
    """The pool that a candidate is, or starts with, and the norm that it ends in; None if it is anything else.

    Nobody may be watching the pool. ``parts`` is parts_of(candidate), where the caller has asked already.
    """
    if parts is None and type(candidate) not in (*_POOL_SETTINGS, nn.Sequential):
        return None
    parts = parts_of(candidate) if parts is None else parts
    if isinstance(parts, Parts):
        pool, norm = (parts.body[0] if len(parts.body) == 1 else None), parts.norm
    else:
        pool, norm = candidate, None
    if not isinstance(pool, nn.Module) or type(pool) not in _POOL_SETTINGS or is_watched(pool):
        return None
    return pool, norm


_USUAL: dict[str, object] = {"dilation": 1, "ceil_mode": False, "return_indices": False, "divisor_override": None}


def settings_of(pool: nn.Module) -> dict[str, Any] | None:
    """kernel_size, stride and padding of a pool and, of an average, count_include_pad; None if others are not usual."""
    settings = {name: getattr(pool, name) for name in _POOL_SETTINGS[type(pool)]}
    return settings if all(settings.pop(name, usual) == usual for name, usual in _USUAL.items()) else None


def _pool_and_norm(pool: nn.Module, norm: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """norm(pool(x)) by batch statistics, and these: mean and unbiased variance."""
    settings = settings_of(pool)
    if settings is not None:
        return pool_batch_norm(x, "max" if type(pool) is nn.MaxPool2d else "avg", eps=norm.eps, **settings)
    return batch_norm_with_statistics(pool(x), norm.eps)
