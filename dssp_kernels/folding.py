"""Which candidate operations end in a BatchNorm2d that can move into the mix, and what is left of them then."""

from __future__ import annotations

import dis
import functools
from collections.abc import Callable, Iterable, Sequence
from types import CodeType, FunctionType
from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from dssp_kernels.depthwise_conv.arguments import has_channels_last
from dssp_kernels.depthwise_conv.op import depthwise_conv2d
from dssp_kernels.separable_conv.arguments import can_normalise_rows
from dssp_kernels.separable_conv.op import SeparableConvolution, SeparablePair
from dssp_kernels.separable_conv.step import SeparableStep

Step = Callable[[Tensor], Tensor]


class Parts(NamedTuple):
    """A candidate taken apart: it computes norm(body[-1](... body[0](x)))."""

    body: Sequence[Step]
    norm: nn.BatchNorm2d

    def before_norm(self, x: Tensor, begun: Begun | None = None) -> Tensor:
        """What enters the norm. begun: what the first steps make of x, where they have run already."""
        body = self.body
        if begun is not None:
            x, body = begun.output, body[begun.steps :]
        for step in body:
            x = step(x)
        return x

    def separable_start(self, x: Tensor) -> tuple[SeparableConvolution | SeparablePair | None, int]:
        """The separable convolution that the body starts with, or two with a norm between, and how many steps it is.

        None if there is none whose kernel runs on x.
        """
        first, norm, second = (*self.body[:3], None, None, None)[:3]
        if not (isinstance(first, SeparableStep) and first.takes(x)):
            return None, 0
        if (
            type(norm) is nn.BatchNorm2d
            and can_normalise_rows(norm)
            and not is_watched(norm)
            and isinstance(second, SeparableStep)
            and second.takes(x)  # the layout is the same all the way
        ):
            return SeparablePair(first.convolution(), norm, second.convolution()), 3
        return first.convolution(), 1


class Begun(NamedTuple):
    """What the first steps of a body made of its input, and how many steps these were."""

    output: Tensor
    steps: int


def parts_of(candidate: nn.Module | None) -> Parts | str:
    """The candidate's parts, or why it cannot be taken apart; the reason is empty where it ends in no BatchNorm.

    Only what is certain is taken apart:

    - a plain nn.Sequential;
    - a module whose forward(x) is ``return self.op(x)`` and nothing else, with such an ``op`` (DARTS' convolutions);
    - a module whose forward(x) is that of DARTS' FactorizedReduce, statement for statement;
    - a module whose class defines ``forward`` and, next to it, ``body_and_norm()``, which returns the steps of forward
      before its BatchNorm2d, and that BatchNorm2d. Steps are callables x -> x; they and the norm are the candidate's
      children, children of these, methods of it, or SeparableSteps of such children.

    In the first two, a depthwise nn.Conv2d, the nn.ReLU before it and the pointwise nn.Conv2d after it become one step,
    see SeparableStep and depthwise_conv2d().

    Nobody may be watching either: with a hook on the norm or on a module that is taken apart, and with hooks on all
    modules, the candidate runs as it is.
    """
    if candidate is None:
        return ""
    opened = [candidate]
    body: Sequence[Any]
    sequence, reduction = _sequence_of(candidate), _factorized_reduce(candidate)
    if sequence is not None:
        opened += [] if sequence is candidate else [sequence]
        *body, norm = sequence._modules.values() or (None,)
    elif reduction is not None:
        *body, norm = reduction
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


class _Wrapper(nn.Module):
    """DARTS' convolutions."""

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)  # type: ignore[operator]  # never run: its code is what others are compared with


class _FactorizedReduce(nn.Module):
    """DARTS' reduction of a skip connection. Never run either."""

    relu: nn.Module
    conv_1: nn.Module
    conv_2: nn.Module
    bn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        out = self.bn(out)
        return out


class _ShorterFactorizedReduce(_FactorizedReduce):
    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(x)
        out = torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1)
        return self.bn(out)


_FORMS = {
    "wrapper": ((_Wrapper,), ("op",)),
    "factorized reduce": ((_FactorizedReduce, _ShorterFactorizedReduce), ("relu", "conv_1", "conv_2", "bn")),
}
"""Spellings of a forward(), and the children that it names."""


def _sequence_of(candidate: nn.Module) -> nn.Sequential | None:
    """The plain nn.Sequential that the candidate is, or that it runs and does nothing else."""
    kind = type(candidate)
    if kind is nn.Sequential:
        return candidate  # type: ignore[return-value]
    op = candidate._modules.get("op") if _has_form("wrapper", kind, kind.forward) else None
    return op if type(op) is nn.Sequential else None


def _factorized_reduce(candidate: nn.Module) -> tuple[Step, nn.Module] | None:
    """What the candidate does before its norm, and that, if it is DARTS' FactorizedReduce."""
    kind = type(candidate)
    if not _has_form("factorized reduce", kind, kind.forward):
        return None
    relu, conv_1, conv_2, norm = (candidate._modules.get(name) for name in _FORMS["factorized reduce"][1])
    if relu is None or conv_1 is None or conv_2 is None or norm is None:
        return None
    return functools.partial(_both_halves, relu, conv_1, conv_2), norm


def _has_form(form: str, cls: Any, forward: Any) -> bool:
    return _is_spelled_as(form, cls, forward)


# What torch.compiler.assume_constant_result does, without importing the compiler along with this package (seconds).
_has_form._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _is_spelled_as(form: str, cls: Any, forward: Any) -> bool:
    """Whether a class's forward() is one of a form's, and the names in it can only be children and torch itself."""
    spellings, children = _FORMS[form]
    return (
        isinstance(forward, FunctionType)
        and any(_signature(forward.__code__) == _signature(spelling.forward.__code__) for spelling in spellings)
        and forward.__globals__.get("torch", torch) is torch
        and not any(hasattr(cls, name) for name in children)
        and cls.__call__ is nn.Module.__call__
        and cls.__getattr__ is nn.Module.__getattr__
    )


def _signature(code: CodeType) -> tuple[object, ...]:
    """What a function computes, whatever its local variables are called and its docstring says."""
    shape = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_nlocals)
    instructions = [
        (step.opcode, repr(step.argval) if step.opcode in dis.hasconst else step.arg)
        for step in dis.get_instructions(code)
    ]
    return (*shape, code.co_flags & 0xFF & ~_NESTED, code.co_names, code.co_freevars, instructions)


_NESTED = 0x10  # CO_NESTED: a class inside a function


# ---- convolutions that run otherwise ---------------------------------------------------------------------------------


def _steps(modules: Sequence[nn.Module]) -> list[Step]:
    """The modules as steps; a depthwise convolution takes the ReLU before it and the pointwise one after it along."""
    steps: list[Step] = []
    left = list(modules)
    while left:
        module, relu = left.pop(0), None
        if left and is_plain_relu(module) and _is_depthwise(left[0]):
            module, relu = left.pop(0), module
        following = left[0] if left else None
        if not _is_depthwise(module):
            steps.append(module)
        elif following is not None and is_pointwise(following):
            steps.append(SeparableStep(module, following, relu is not None, channels_last_only=True))
            left.pop(0)
        else:
            steps.append(functools.partial(_depthwise, relu, module))
    return steps


def is_plain_relu(module: nn.Module) -> TypeGuard[nn.ReLU]:
    """Whether it is an nn.ReLU that writes into memory of its own, and nobody watches it."""
    return type(module) is nn.ReLU and not module.inplace and not is_watched(module)


def _is_plain_conv(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Without bias, padded with a known number of zeros, and not watched."""
    return (
        type(module) is nn.Conv2d
        and module._parameters["bias"] is None
        and module.padding_mode == "zeros"
        and isinstance(module.padding, tuple)
        and not is_watched(module)
    )


def _is_depthwise(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return _is_plain_conv(module) and 1 < module.groups == module.in_channels == module.out_channels


def is_pointwise(module: nn.Module, stride: int = 1) -> TypeGuard[nn.Conv2d]:
    """Whether it is an nn.Conv2d of 1x1 kernels without bias, padding and groups, and nobody watches it."""
    return (
        _is_plain_conv(module)
        and module.groups == 1
        and (module.kernel_size, module.stride, module.padding) == ((1, 1), (stride, stride), (0, 0))
    )


def _depthwise(relu: nn.Module | None, conv: nn.Conv2d, x: Tensor) -> Tensor:
    if has_channels_last(x):
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
        return depthwise_conv2d(x, conv.weight, relu=relu is not None, **geometry)
    return conv(x if relu is None else relu(x))


def _both_halves(relu: nn.Module, conv_1: nn.Module, conv_2: nn.Module, x: Tensor) -> Tensor:
    """cat([conv_1(relu(x)), conv_2(relu(x)[:, :, 1:, 1:])], dim=1).

    Pixels that a stride leaves out are not rectified at all. Picking the others beforehand is faster, and safe where
    the stride is not: in channels_last the gradient of a strided 1x1 convolution with fewer input channels than a
    vector holds writes out of bounds (oneDNN issue 6035).
    """
    if x.dim() == 4 and is_plain_relu(relu) and is_pointwise(conv_1, stride=2) and is_pointwise(conv_2, stride=2):
        even, odd = F.relu(x[:, :, ::2, ::2]), F.relu(x[:, :, 1::2, 1::2])
        return torch.cat([F.conv2d(even, conv_1.weight), F.conv2d(odd, conv_2.weight)], dim=1)
    x = relu(x)
    return torch.cat([conv_1(x), conv_2(x[:, :, 1:, 1:])], dim=1)


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
