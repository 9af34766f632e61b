"""batch_norm_mixed_sum: the public function, its argument checks, the autograd.Function, the registered operators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from dssp_kernels.arguments import checked_mixture, empty_as, with_strides
from dssp_kernels.backend import HAS_TRITON, WHY_NO_CPU_KERNELS, backward_is_transformed, implementation_for
from dssp_kernels.batch_norm_mixed_sum.reference import (
    BATCH,
    PLAIN,
    RUNNING,
    batch_norm_mixed_sum_reference,
    update_running_statistics_reference,
)

Entries = Sequence[Tensor | None]
_T = TypeVar("_T")


def batch_norm_mixed_sum(
    outputs: Sequence[Tensor | None],
    alpha: Tensor,
    mask: Tensor | None = None,
    *,
    norms: Sequence[nn.BatchNorm2d | None],
    training: bool,
    relaxation: str = "softmax",
    active: Tensor | None = None,
) -> Tensor:
    """mixed_sum of candidates that end in BatchNorm2d (Ioffe and Szegedy 2015), normalised inside the mix:

        y = sum_e sigmoid(mask_e) * sum_k w_ek * norm_ek(outputs[e*K + k]),    w = softmax(alpha, -1)

    The normalised candidates never exist in memory: one pass over the outputs finds their statistics, one adds them up;
    backward, one pass finds all sums (d alpha_k = <g, norm_k(o_k)> is made of those BatchNorm needs anyway), one writes
    the gradients. Kept for backward: the outputs as they came, and the statistics per channel.

    Args:
        outputs: E*K entries [B, C, H, W], edge-major, as in mixed_sum.
        alpha, mask, relaxation, active: as in mixed_sum.
        norms: E*K entries; the nn.BatchNorm2d(C) of an entry, or None where it enters the mix as it is. Affine or not,
            with running statistics or without, momentum a float or None (cumulative).
        training: True: statistics of the batch, and running statistics and batch counters are updated as
            nn.BatchNorm2d does; False: running statistics (of the batch where a norm has none). ``norm.training`` is
            not asked.

    An inactive edge is neither read nor added, its gradients are exact zeros and its running statistics stay. So do
    those of an entry that is None.

    Returns:
        A tensor [B, C, H, W] of the outputs' promoted dtype and layout, as mixed_sum does. Statistics of half-precision
        outputs are those of the values in float32; float64 is kept for the sums of partial sums.

    Differentiable twice with respect to every output, alpha, mask, and every weight and bias of the norms.
    Bit-reproducible, on CPU tensors whatever the number of threads.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; as nn.BatchNorm2d does for a batch
            with one value per channel.
        RuntimeError: the backend asked for with set_backend() cannot run on this device.
    """
    given = outputs
    outputs, alpha, mask = checked_mixture(outputs, alpha, mask, relaxation, active)
    active = None if active is None else active.contiguous()  # a column of a table, say
    normalisation = _read_norms(given, norms, training)
    first = next(output for output in outputs if output is not None)
    count = first.numel() // first.shape[1] if BATCH in normalisation.kinds else 0
    if count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {first.shape}")
    softmax = relaxation == "softmax"
    implementation = implementation_for(alpha.device)
    if implementation != "reference":
        groups = (outputs, *normalisation.tensors())
        sizes = [len(group) for group in groups]
        interpreted, tensors = implementation == "interpreter", itertools.chain(*groups)
        y, mean, variance = _BatchNormMixedSum.apply(
            interpreted, sizes, normalisation.kinds, normalisation.eps, softmax, alpha, mask, active, *tensors
        )
        update: Callable[..., None] = _operators(interpreted).batch_norm_update_running_statistics
    else:
        y, mean, variance = batch_norm_mixed_sum_reference(
            outputs, alpha, mask, active, *normalisation.tensors(), normalisation.kinds, normalisation.eps, softmax
        )
        update = update_running_statistics_reference
    tracked = normalisation.tracked
    if tracked.entries:
        with torch.no_grad():
            update(
                tracked.means,
                tracked.variances,
                tracked.counters,
                mean,
                variance,
                active,
                tracked.entries,
                tracked.momenta,
                count,
            )
    return y


# ---- norms -----------------------------------------------------------------------------------------------------------


@dataclass
class _Tracked:
    """The norms whose running statistics this call updates."""

    entries: list[int] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    variances: list[Tensor] = field(default_factory=list)
    counters: list[Tensor] = field(default_factory=list)
    momenta: list[float] = field(default_factory=list)  # negative: cumulative average

    def add(self, entry: int, norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor) -> None:
        counter, momentum = norm._buffers["num_batches_tracked"], norm.momentum
        if momentum is None:
            momentum = -1.0 if counter is not None else 0.0
        self.entries.append(entry)
        self.means.append(mean)
        self.variances.append(variance)
        self.counters.append(torch.zeros((), dtype=torch.int64, device=mean.device) if counter is None else counter)
        self.momenta.append(momentum)


class _Normalisation:
    """What the operators need of E*K norms: an entry each."""

    def __init__(self, entries: int) -> None:
        self.kinds = [PLAIN] * entries
        self.eps = [0.0] * entries
        self.weights: list[Tensor | None] = [None] * entries
        self.biases: list[Tensor | None] = [None] * entries
        self.means: list[Tensor | None] = [None] * entries
        self.variances: list[Tensor | None] = [None] * entries
        self.tracked = _Tracked()

    def add(self, i: int, norm: nn.BatchNorm2d, training: bool) -> None:
        buffers, parameters = norm._buffers, norm._parameters  # a tenth of the time that norm.running_mean takes
        mean, variance = buffers["running_mean"], buffers["running_var"]
        self.eps[i] = norm.eps
        self.weights[i], self.biases[i] = parameters["weight"], parameters["bias"]
        self.kinds[i] = BATCH if training or (mean is None and variance is None) else RUNNING
        if self.kinds[i] == RUNNING:
            self.means[i], self.variances[i] = mean, variance
        elif training and norm.track_running_stats and mean is not None and variance is not None:
            self.tracked.add(i, norm, mean, variance)

    def tensors(self) -> tuple[Entries, Entries, Entries, Entries]:
        """Weights, biases, running means and variances; each without entries where no norm has any."""
        groups = (self.weights, self.biases, self.means, self.variances)
        return tuple(group if any(tensor is not None for tensor in group) else () for group in groups)  # type: ignore[return-value]  # mypy: tuple[X, ...]


def _read_norms(outputs: Entries, norms: Sequence[nn.BatchNorm2d | None], training: bool) -> _Normalisation:
    if not isinstance(training, bool):
        raise TypeError(f"training: expected a bool, got {type(training).__name__}")
    if not isinstance(norms, (list, tuple)):
        raise TypeError(f"norms: expected a list or tuple of nn.BatchNorm2d or None, got {type(norms).__name__}")
    if len(norms) != len(outputs):
        raise ValueError(f"norms: expected an entry per output ({len(outputs)}), got {len(norms)}")
    normalisation = _Normalisation(len(norms))
    for i, (norm, output) in enumerate(zip(norms, outputs, strict=True)):
        if norm is None:
            continue
        if type(norm) is not nn.BatchNorm2d:  # a subclass may compute anything
            raise TypeError(f"norms[{i}]: expected an nn.BatchNorm2d or None, got {type(norm).__name__}")
        if output is None:
            continue
        if output.dim() != 4:
            raise ValueError(f"outputs[{i}]: expected [B, C, H, W] for an nn.BatchNorm2d, got {list(output.shape)}")
        if norm.num_features != output.shape[1]:
            raise ValueError(
                f"norms[{i}]: expected as many features as the outputs have channels ({output.shape[1]}), "
                f"got {norm.num_features}"
            )
        normalisation.add(i, norm, training)
        for tensor in (normalisation.weights[i], normalisation.means[i]):
            if tensor is not None and tensor.device != output.device:
                raise ValueError(f"norms[{i}]: expected the outputs' device {output.device}, got {tensor.device}")
    return normalisation


# ---- autograd --------------------------------------------------------------------------------------------------------


def _operators(triton: bool) -> Any:
    """Where the operators are functions by their names: Triton's launchers, or what is registered for each device."""
    if triton:
        from dssp_kernels.batch_norm_mixed_sum import triton_launchers

        return triton_launchers
    return torch.ops.dssp_kernels


def _split(values: Sequence[_T], sizes: Sequence[int]) -> Iterator[Sequence[_T]]:
    end = 0
    for size in sizes:
        end += size
        yield values[end - size : end]


def _flags(needed: Sequence[bool], entries: int) -> list[bool]:
    return list(needed) if needed else [False] * entries


def _needs_values(output: Tensor | None, kind: int, weight: Tensor | None) -> bool:
    """Whether the gradient of an output or of its norm's weight depends on what the output holds."""
    if output is None:
        return False
    return (kind == BATCH and output.requires_grad) or (weight is not None and weight.requires_grad)


class _BatchNormMixedSum(torch.autograd.Function):
    """Saves the outputs that backward reads (none in a weight step with running statistics), no other activation."""

    @staticmethod
    def forward(
        ctx: Any,
        interpreted: bool,
        sizes: list[int],
        kinds: list[int],
        eps: list[float],
        softmax: bool,
        alpha: Tensor,
        mask: Tensor | None,
        active: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        outputs, weights, biases, running_means, running_variances = _split(tensors, sizes)
        y, mean, variance = _operators(interpreted).batch_norm_mixed_sum_forward(
            outputs, alpha, mask, active, weights, biases, running_means, running_variances, kinds, eps, softmax
        )
        needs_parameter_grad = alpha.requires_grad or (mask is not None and mask.requires_grad)
        kept = [
            output if needs_parameter_grad or _needs_values(output, kind, weight) else None
            for output, kind, weight in zip(outputs, kinds, weights or [None] * len(outputs), strict=True)
        ]
        ctx.save_for_backward(alpha, mask, active, mean, variance, *kept, *weights, *biases)
        ctx.mark_non_differentiable(mean, variance)
        ctx.set_materialize_grads(False)
        ctx.interpreted, ctx.sizes, ctx.kinds, ctx.eps = interpreted, sizes, kinds, eps
        ctx.softmax, ctx.strides = softmax, y.stride()
        return y, mean, variance

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_statistics: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (8 + sum(ctx.sizes))
        alpha, mask, active, mean, variance, *tensors = ctx.saved_tensors
        outputs, *vectors = _split(tensors, ctx.sizes[:3])
        alpha, mask, active, mean, variance = (
            None if tensor is None else tensor.contiguous() for tensor in (alpha, mask, active, mean, variance)
        )
        weights, biases = ([None if v is None else v.contiguous() for v in group] for group in vectors)
        outputs = [None if output is None else with_strides(output, ctx.strides) for output in outputs]
        needs_alpha, needs_mask, _, *needed = ctx.needs_input_grad[5:]
        needs_output, needs_weight, needs_bias = (_flags(f, len(outputs)) for f in _split(needed, ctx.sizes[:3]))
        given: Any = (outputs, alpha, mask, active, weights, biases, mean, variance, ctx.kinds, ctx.eps, ctx.softmax)
        if backward_is_transformed(grad):
            gradients = _reference_gradients(
                *(grad, *given, needs_alpha, needs_mask, needs_output, needs_weight, needs_bias),
                create_graph=torch.is_grad_enabled(),
            )
        else:
            grad = with_strides(grad, ctx.strides)
            requested, d_alpha, d_mask = _operators(ctx.interpreted).batch_norm_mixed_sum_backward(
                grad, *given, needs_output, needs_weight, needs_bias, needs_alpha or needs_mask
            )
            found = iter(requested)
            gradients = [d_alpha if needs_alpha else None, d_mask if needs_mask else None]
            gradients += [next(found) if need else None for need in (*needs_output, *needs_weight, *needs_bias)]
        d_outputs, d_weights, d_biases = _split(gradients[2:], [len(outputs)] * 3)
        return (
            *(None, None, None, None, None),
            *(gradients[0], gradients[1], None),
            *d_outputs,
            *d_weights[: len(weights)],
            *d_biases[: len(biases)],
            *(None,) * sum(ctx.sizes[3:]),
        )


def _reference_gradients(
    grad: Tensor,
    outputs: Entries,
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    weights: Entries,
    biases: Entries,
    mean: Tensor,
    variance: Tensor,
    kinds: Sequence[int],
    eps: Sequence[float],
    softmax: bool,
    needs_alpha: bool,
    needs_mask: bool,
    needs_output: Sequence[bool],
    needs_weight: Sequence[bool],
    needs_bias: Sequence[bool],
    *,
    create_graph: bool,
) -> list[Tensor | None]:
    """Gradients of (alpha, mask, *outputs, *weights, *biases), None where nobody needs them: autograd on the reference.

    Fresh views stand for the inputs, so that an output computed from another one does not count twice. Zeros stand for
    an output that was not saved: y is linear in it, and its value does not matter.
    """

    def fresh(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.view_as(tensor) if create_graph else tensor.detach().requires_grad_()

    with torch.enable_grad():
        alpha, mask = fresh(alpha), fresh(mask)  # type: ignore[assignment]
        outputs = [
            torch.zeros_like(grad, requires_grad=True) if output is None and (needs or bias) else fresh(output)
            for output, needs, bias in zip(outputs, needs_output, needs_bias, strict=True)
        ]
        weights, biases = [fresh(weight) for weight in weights], [fresh(bias) for bias in biases]
        y = batch_norm_mixed_sum_reference(
            outputs, alpha, mask, active, weights, biases, mean.unbind(), variance.unbind(), kinds, eps, softmax
        )[0]
        absent = [None] * len(outputs)
        inputs = (alpha, mask, *outputs, *(weights or absent), *(biases or absent))
        needed = (needs_alpha, needs_mask, *needs_output, *needs_weight, *needs_bias)
        wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
        found = iter(torch.autograd.grad(y, wanted, grad, create_graph=create_graph, materialize_grads=True))
    return [next(found) if need else None for need in needed]


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("dssp_kernels", "FRAGMENT")
_library.define(
    "batch_norm_mixed_sum_forward(Tensor?[] outputs, Tensor alpha, Tensor? mask, Tensor? active, Tensor?[] weights, "
    "Tensor?[] biases, Tensor?[] running_means, Tensor?[] running_variances, int[] kinds, float[] eps, bool softmax) "
    "-> (Tensor y, Tensor mean, Tensor variance)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
_library.define(
    "batch_norm_mixed_sum_backward(Tensor grad, Tensor?[] outputs, Tensor alpha, Tensor? mask, Tensor? active, "
    "Tensor?[] weights, Tensor?[] biases, Tensor mean, Tensor variance, int[] kinds, float[] eps, bool softmax, "
    "bool[] needs_output_grad, bool[] needs_weight_grad, bool[] needs_bias_grad, bool needs_parameter_grad) "
    "-> (Tensor[], Tensor, Tensor)",
    tags=(torch.Tag.needs_exact_strides, torch.Tag.pt2_compliant_tag),
)
# The one operator that writes into its arguments: a functional one would hand back 2 * E * K tensors to be copied.
_library.define(
    "batch_norm_update_running_statistics(Tensor(a!)[] running_means, Tensor(b!)[] running_variances, "
    "Tensor(c!)[] counters, Tensor mean, Tensor variance, Tensor? active, int[] entries, float[] momenta, "
    "SymInt count) "
    "-> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)


@torch.library.register_fake("dssp_kernels::batch_norm_mixed_sum_forward", lib=_library)
def _forward_fake(outputs: Entries, *_arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    first = next(output for output in outputs if output is not None)
    mean = first.new_empty((len(outputs), first.shape[1]), dtype=torch.float64)
    return empty_as(first), mean, torch.empty_like(mean)


@torch.library.register_fake("dssp_kernels::batch_norm_mixed_sum_backward", lib=_library)
def _backward_fake(
    grad: Tensor,
    _outputs: Entries,
    alpha: Tensor,
    mask: Tensor | None,
    _active: Tensor | None,
    weights: Entries,
    biases: Entries,
    _mean: Tensor,
    _variance: Tensor,
    _kinds: Sequence[int],
    _eps: Sequence[float],
    _softmax: bool,
    needs_output_grad: Sequence[bool],
    needs_weight_grad: Sequence[bool],
    needs_bias_grad: Sequence[bool],
    needs_parameter_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    requested = [empty_as(grad) for needed in needs_output_grad if needed]
    for values, flags in ((weights, needs_weight_grad), (biases, needs_bias_grad)):
        requested += [torch.empty_like(value) for value, needed in zip(values, flags) if needed]  # type: ignore[arg-type]  # noqa: B905  # values may be ()
    d_alpha = torch.empty_like(alpha) if needs_parameter_grad else alpha.new_empty(0)
    d_mask = torch.empty_like(mask) if needs_parameter_grad and mask is not None else alpha.new_empty(0)
    return requested, d_alpha, d_mask


@torch.library.register_fake("dssp_kernels::batch_norm_update_running_statistics", lib=_library)
def _update_fake(*_arguments: Any) -> None:
    return None


@torch.no_grad()
def _reference_forward(outputs: Entries, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    y, mean, variance = batch_norm_mixed_sum_reference(outputs, *arguments)
    return empty_as(next(output for output in outputs if output is not None)).copy_(y), mean, variance


def _reference_backward(
    grad: Tensor, outputs: Entries, alpha: Tensor, mask: Tensor | None, *arguments: Any
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The registered backward where no kernels are there."""
    *values, needs_output_grad, needs_weight_grad, needs_bias_grad, needs_parameter_grad = arguments
    needed = (needs_parameter_grad, needs_parameter_grad and mask is not None)
    d_alpha, d_mask, *gradients = _reference_gradients(
        *(grad, outputs, alpha, mask, *values, *needed, needs_output_grad, needs_weight_grad, needs_bias_grad),
        create_graph=False,
    )
    d_outputs = [empty_as(grad).copy_(d) for d in gradients[: len(outputs)] if d is not None]
    rest = [d for d in gradients[len(outputs) :] if d is not None]
    nothing = alpha.new_empty(0)
    return d_outputs + rest, nothing if d_alpha is None else d_alpha, nothing if d_mask is None else d_mask


def _cuda_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _operators(True).batch_norm_mixed_sum_forward(*arguments)


def _cuda_backward(*arguments: Any) -> tuple[list[Tensor], Tensor, Tensor]:
    return _operators(True).batch_norm_mixed_sum_backward(*arguments)


def _cuda_update(*arguments: Any) -> None:
    _operators(True).batch_norm_update_running_statistics(*arguments)


_without_kernels = (_reference_forward, _reference_backward, update_running_statistics_reference)
_implementations = {"CUDA": (_cuda_forward, _cuda_backward, _cuda_update) if HAS_TRITON else _without_kernels}
if WHY_NO_CPU_KERNELS is not None:
    _implementations["CPU"] = _without_kernels
for _key, (_forward, _backward, _update) in _implementations.items():
    _library.impl("batch_norm_mixed_sum_forward", _forward, _key)
    _library.impl("batch_norm_mixed_sum_backward", _backward, _key)
    _library.impl("batch_norm_update_running_statistics", _update, _key)


@register_flop_formula(torch.ops.dssp_kernels.batch_norm_mixed_sum_forward)
def _forward_flops(outputs_shape: Sequence[Any], *arguments: Any, **_keywords: Any) -> int:
    """Per element and entry that is there: two operations for the mix, three more for the statistics of a batch."""
    kinds = arguments[7]
    present = [(shape, kind) for shape, kind in zip(outputs_shape, kinds, strict=True) if shape is not None]
    return sum(5 if kind == BATCH else 2 for _, kind in present) * torch.Size(present[0][0]).numel()


@register_flop_formula(torch.ops.dssp_kernels.batch_norm_mixed_sum_backward)
def _backward_flops(grad_shape: Any, outputs_shape: Sequence[Any], *arguments: Any, **_keywords: Any) -> int:
    """Per element: two operations per sum of products with the gradient, four per gradient of an entry normalised by
    its batch, one per gradient of any other."""
    kinds, (needs_output_grad, needs_weight_grad, _, needs_parameter_grad) = arguments[7], arguments[10:14]
    operations = 0
    for i, kind in enumerate(kinds):
        from_batch = kind == BATCH and needs_output_grad[i]
        products = outputs_shape[i] is not None and (needs_parameter_grad or from_batch or needs_weight_grad[i])
        operations += 2 * products + (4 if from_batch else int(needs_output_grad[i]))
    return operations * torch.Size(grad_shape).numel()
