"""Which candidate operations end in a BatchNorm2d that can move into the mix, and what is left of them then."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from dssp_kernels.depthwise_conv.op import depthwise_conv2d

Step = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """A candidate taken apart: it computes norm(body[-1](... body[0](x)))."""

    body: Sequence[Step]
    norm: nn.BatchNorm2d

    def before_norm(self, x: Tensor) -> Tensor:
        """What enters the norm."""
        for step in self.body:
            x = step(x)
        return x


def parts_of(candidate: nn.Module | None) -> Parts | str:
    """The candidate's parts, or why it cannot be taken apart; the reason is empty where it ends in no BatchNorm.

    Only what is certain is taken apart:

    - a plain nn.Sequential;
    - a module whose forward(x) is ``return self.op(x)`` and nothing else, with such an ``op`` (DARTS' convolutions);
    - a module whose class defines ``forward`` and, next to it, ``body_and_norm()``, which returns the steps of forward
      before its BatchNorm2d, and that BatchNorm2d. Steps are callables x -> x; they and the norm are the candidate's
      children, children of these, or methods of it.

    In the first two, a depthwise nn.Conv2d and the nn.ReLU before it become one step, see depthwise_conv2d().

    Nobody may be watching either: with a hook on the norm or on a module that is taken apart, and with hooks on all
    modules, the candidate runs as it is.
    """
    if candidate is None:
        return ""
    opened = [candidate]
    body: Sequence[Any]
    sequence = _sequence_of(candidate)
    if sequence is not None:
        opened += [] if sequence is candidate else [sequence]
        *body, norm = sequence._modules.values() or (None,)
    elif hasattr(type(candidate), "body_and_norm"):
        if not _defined_together(type(candidate)):
            return f"{type(candidate).__name__} changes forward() or body_and_norm() alone"
        body, norm = candidate.body_and_norm()  # type: ignore[operator]  # the protocol's, not nn.Module's
        opened += [child for child in candidate.children() if child is not norm and child not in body]
    else:
        return ""
    if type(norm) is not nn.BatchNorm2d:
        return f"its norm is a {type(norm).__name__}" if isinstance(norm, _BatchNorm) else ""
    if is_watched(norm):
        return "its norm has hooks"
    for module in opened:
        if is_watched(module):
            return "it has hooks"
    if _has_any_global_hook():
        return "there are hooks on all modules"
    return Parts(body if sequence is None else _steps(body), norm)


# ---- modules whose forward() is known --------------------------------------------------------------------------------


def _sequence_of(candidate: nn.Module) -> nn.Sequential | None:
    """The plain nn.Sequential that the candidate is, or that it runs and does nothing else."""
    kind = type(candidate)
    if kind is nn.Sequential:
        return candidate  # type: ignore[return-value]
    op = candidate._modules.get("op") if _forwards_to_op(kind, kind.forward) else None
    return op if type(op) is nn.Sequential else None


class _Wrapper(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[operator]  # never run: its code is what others are compared with


def _signature(code: CodeType) -> tuple[object, ...]:
    """What a function without constants computes, whatever its local variables are called."""
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_nlocals)
    return (*shape, code.co_flags & 0xFF & ~_NESTED, code.co_code, code.co_names)


_NESTED = 0x10  # CO_NESTED: a class inside a function


def _forwards_to_op(cls: Any, forward: Any) -> bool:
    return _computes_op_of_x(cls, forward)


# What torch.compiler.assume_constant_result does, without importing the compiler along with this package (seconds).
_forwards_to_op._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _computes_op_of_x(cls: Any, forward: Any) -> bool:
    """Whether a class's forward(x) is ``return self.op(x)``, and op can only be a child module."""
    return (
        isinstance(forward, FunctionType)
        and _signature(forward.__code__) == _signature(_Wrapper.forward.__code__)
        and not hasattr(cls, "op")
        and cls.__call__ is nn.Module.__call__
        and cls.__getattr__ is nn.Module.__getattr__
    )


# ---- depthwise convolutions ------------------------------------------------------------------------------------------


def _steps(modules: Sequence[nn.Module]) -> list[Step]:
    """The modules as steps; a depthwise convolution takes the ReLU before it along."""
    steps: list[Step] = []
    for module in modules:
        if type(module) is nn.Conv2d and _is_depthwise(module):
            before = steps[-1] if steps else None
            relu = before if type(before) is nn.ReLU and not before.inplace and not is_watched(before) else None
            if relu is not None:
                steps.pop()
            steps.append(functools.partial(_depthwise, relu, module))
        else:
            steps.append(module)
    return steps


def _is_depthwise(conv: nn.Conv2d) -> bool:
    return (
        1 < conv.groups == conv.in_channels == conv.out_channels
        and conv._parameters["bias"] is None
        and conv.padding_mode == "zeros"
        and isinstance(conv.padding, tuple)
        and not is_watched(conv)
    )


def _depthwise(relu: nn.ReLU | None, conv: nn.Conv2d, x: Tensor) -> Tensor:
    if x.dim() == 4 and x.stride(1) == 1:  # channels_last, which our kernels are made for
        return depthwise_conv2d(
            x,
            conv.weight,
            stride=conv.stride,
            padding=conv.padding,  # type: ignore[arg-type]  # a word only where _is_depthwise() says no
            dilation=conv.dilation,
            relu=relu is not None,
        )
    return conv(x if relu is None else relu(x))


# ---- who is watching, who shares -------------------------------------------------------------------------------------


def _defined_together(cls: type) -> bool:
    """Whether one class defines both methods: who overrides forward() alone computes something else."""
    forward, protocol = cls.forward, cls.body_and_norm  # type: ignore[attr-defined]
    return (forward.__module__, forward.__qualname__.rpartition(".")[0]) == (
        protocol.__module__,
        protocol.__qualname__.rpartition(".")[0],
    )


def is_watched(module: nn.Module) -> bool:
    """Whether somebody would notice that the module was not called: it has hooks, or a forward() of its own."""
    state = module.__dict__  # asked several times per candidate and step: a third of the time that attributes take
    return bool(
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
    )


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
