"""Launchers of batch_norm_mixed_sum's Triton kernels: three launches forward, three backward, whatever E and K.

Forward: statistics (reads every entry normalised by its batch once), tables (tiny: mean and scale per entry and
channel), the mix (reads every entry once, writes the result). Backward: sums (reads gradient and entries once), tables
(tiny), gradients (reads both once more, writes the gradients, and those of alpha and mask in programs of their own).
Running statistics take one launch more. Nothing else touches as much as an activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dssp_kernels.batch_norm_mixed_sum import reference
from dssp_kernels.batch_norm_mixed_sum.triton_kernels import (
    batch_norm_mixed_sum_bwd_kernel,
    batch_norm_mixed_sum_bwd_sums_kernel,
    batch_norm_mixed_sum_bwd_tables_kernel,
    batch_norm_mixed_sum_fwd_kernel,
    batch_norm_mixed_sum_fwd_tables_kernel,
    batch_norm_mixed_sum_statistics_kernel,
    batch_norm_running_statistics_kernel,
)
from dssp_kernels.triton_launch import THREADS, cdiv, launch, power_of_two, sum_dtype

MAX_WIDTH = 64  # channels of a block: a row of them is 128 bytes or more
# Candidates that a program reads together; two 16-byte loads each are in flight per thread. Half of mixed_sum's group,
# because what is known per channel takes registers beside them: channels_last has 16 bytes of channels in a thread.
GROUP = 4
IN_FLIGHT = 8  # 16-byte loads in flight per thread, in kernels that read several entries
IN_FLIGHT_ALONE = 4  # in the one that reads one entry, with half the registers and so twice the programs resident
# Programs of a reduction over one or all entries. Constants, so that the partial sums stay few and results do not
# depend on the device; enough to fill the largest GPU.
PROGRAMS = 2048
MAX_SPLITS = 256
TABLE_ELEMENTS = 1024  # partial sums that a program of the tables' kernels reads at a time

Entries = Sequence[Tensor | None]


# ---- how programs walk -----------------------------------------------------------------------------------------------


class _Walk(NamedTuple):
    """How programs walk a dense tensor (see the top of triton_kernels.py)."""

    channels: int
    units: int  # per block of channels
    run: int | None  # units of a channel that are neighbours in memory; None: channels are
    columns: int  # channels per block
    width: int  # elements of a unit
    align: int  # elements that offsets and units are multiples of, 16 bytes at most
    vector: int  # elements per 16 bytes

    @property
    def blocks(self) -> int:
        return cdiv(self.channels, self.columns)

    @property
    def positions(self) -> int:
        """Elements of a channel in a unit."""
        return self.width // self.columns

    def lanes(self, vectors: int) -> int:
        """Units of a tile in which every thread has that many vectors."""
        return THREADS * self.vector * vectors // self.width

    def splits(self, entries: int, vectors: int) -> tuple[int, int]:
        """(programs that share the units of a block, units of each)."""
        tile = self.lanes(vectors)
        wanted = max(1, min(PROGRAMS // (entries * self.blocks), MAX_SPLITS))
        share = cdiv(cdiv(self.units, wanted), tile) * tile
        return cdiv(self.units, share), share

    def constants(self, vectors: int) -> dict[str, int]:
        return {"LANES": self.lanes(vectors), "WIDTH": self.width, "COLUMNS": self.columns, "ALIGN": self.align}


def _walk(tensor: Tensor) -> _Walk:
    channels, vector = tensor.shape[1], 16 // tensor.element_size()
    inner = tensor.numel() if channels == 1 else tensor.stride(1)
    if inner > 1:
        width = min(vector, inner & -inner)
        return _Walk(channels, tensor.numel() // (channels * width), inner // width, 1, width, width, vector)
    width = min(power_of_two(channels), MAX_WIDTH)
    return _Walk(channels, tensor.numel() // channels, None, width, width, min(vector, channels & -channels), vector)


# ---- the operators ---------------------------------------------------------------------------------------------------


def _some(tensors: Entries) -> tuple[Tensor | None, ...]:
    """The tensors, or nothing where every one is None."""
    return tuple(tensors) if any(tensor is not None for tensor in tensors) else ()


def _grouped(tensors: Entries, candidates: int, group: int) -> tuple[Tensor | None, ...]:
    """Each edge's K entries in groups, the last one filled up with None."""
    filling = (None,) * (-candidates % group)
    rows = (tuple(tensors[i : i + candidates]) + filling for i in range(0, len(tensors), candidates))
    return tuple(tensor for row in rows for tensor in row)


def _table_tile(splits: int, channels: int) -> dict[str, int]:
    rows = power_of_two(splits)
    return {"ROWS": rows, "CHANNELS": min(power_of_two(channels), max(1, TABLE_ELEMENTS // rows))}


def batch_norm_mixed_sum_forward(
    outputs: Entries,
    alpha: Tensor,
    mask: Tensor | None,
    active: Tensor | None,
    weights: Entries,
    biases: Entries,
    running_means: Entries,
    running_variances: Entries,
    kinds: Sequence[int],
    eps: Sequence[float],
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The registered operator on CUDA. Relies on op.py: entries of one shape, dtype, device and dense strides."""
    first = next(output for output in outputs if output is not None)
    y, dtype, device = torch.empty_like(first), sum_dtype(first), first.device
    candidates, channels, entries = alpha.shape[-1], first.shape[1], len(outputs)
    edges = entries // candidates
    mean, variance = (torch.empty((entries, channels), dtype=torch.float64, device=device) for _ in range(2))
    if y.numel() == 0:
        return y, mean.zero_(), variance.fill_(1.0)
    walk = _walk(first)
    batch = [output if kind == reference.BATCH else None for output, kind in zip(outputs, kinds, strict=True)]
    partials, splits, share = None, 1, walk.units
    with torch.cuda.device_of(y):
        if _some(batch):
            splits, share = walk.splits(entries, IN_FLIGHT_ALONE)
            partials = torch.empty((entries, splits, 3, channels), dtype=dtype, device=device)
            launch(
                batch_norm_mixed_sum_statistics_kernel,
                (walk.blocks, splits, entries),
                *(tuple(batch), partials, active, walk.units, share, walk.run, channels),
                E=edges, K=candidates, VECTORS=IN_FLIGHT_ALONE, **walk.constants(1),
            )  # fmt: skip
        weights, biases, running_means, running_variances = (
            _some([None if tensor is None else tensor.contiguous() for tensor in group])  # a column of a table, say
            for group in (weights, biases, running_means, running_variances)
        )
        shifted = len(biases) > 0
        tables = torch.empty((3 if shifted else 2, entries, channels), dtype=dtype, device=device)
        tile = _table_tile(splits, channels)
        launch(
            batch_norm_mixed_sum_fwd_tables_kernel,
            (entries, cdiv(channels, tile["CHANNELS"])),
            *(mean, variance, tables, partials, alpha, mask, active),
            *(weights, biases, running_means, running_variances, walk.units, share, splits, channels),
            E=edges, K=candidates, KINDS=tuple(kinds), EPS=tuple(eps), SOFTMAX=softmax,
            WEIGHTS=len(weights), BIASES=len(biases), RUNNING_MEANS=len(running_means),
            CANDIDATES=power_of_two(candidates), POSITIONS=walk.positions, **tile,
        )  # fmt: skip
        group = min(GROUP, candidates)
        constants = walk.constants(min(4, IN_FLIGHT // group))
        launch(
            batch_norm_mixed_sum_fwd_kernel,
            (cdiv(walk.units, constants["LANES"]) * walk.blocks,),
            *(y, _grouped(outputs, candidates, group), tables, active, walk.units, walk.run, channels),
            K=candidates, GROUPS=edges * cdiv(candidates, group), GROUP=group, SHIFTED=shifted, **constants,
        )  # fmt: skip
    return y, mean, variance


def batch_norm_mixed_sum_backward(
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
    needs_output_grad: Sequence[bool],
    needs_weight_grad: Sequence[bool],
    needs_bias_grad: Sequence[bool],
    needs_parameter_grad: bool,
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The registered operator on CUDA: gradients asked for (outputs, weights, biases); of alpha; of mask."""
    entries, candidates, channels = len(outputs), alpha.shape[-1], grad.shape[1]
    edges = entries // candidates
    grads = [torch.empty_like(grad) if needed else None for needed in needs_output_grad]
    grad_weights, grad_biases = (
        [torch.empty_like(values[i]) if need else None for i, need in enumerate(flags)]  # type: ignore[arg-type]  # not None
        for values, flags in ((weights, needs_weight_grad), (biases, needs_bias_grad))
    )
    requested = [tensor for tensor in (*grads, *grad_weights, *grad_biases) if tensor is not None]
    grad_alpha = torch.empty_like(alpha) if needs_parameter_grad else alpha.new_empty(0)
    grad_mask = torch.empty_like(mask) if needs_parameter_grad and mask is not None else alpha.new_empty(0)
    if grad.numel() == 0:
        return [tensor.zero_() for tensor in requested], grad_alpha.zero_(), grad_mask.zero_()
    from_batch = [need and kind == reference.BATCH for need, kind in zip(needs_output_grad, kinds, strict=True)]
    reads = [
        output if needs_parameter_grad or from_batch[i] or needs_weight_grad[i] else None
        for i, output in enumerate(outputs)
    ]
    if not requested and not needs_parameter_grad:
        return requested, grad_alpha, grad_mask
    walk, dtype, device = _walk(grad), sum_dtype(grad), grad.device
    group = min(GROUP, candidates)
    groups = edges * cdiv(candidates, group)
    partials, splits = None, 1
    with torch.cuda.device_of(grad):
        if needs_parameter_grad or any(from_batch) or any(needs_weight_grad) or any(needs_bias_grad):
            vectors = IN_FLIGHT // GROUP
            splits, share = walk.splits(groups, vectors)
            partials = torch.empty((groups, group + 1, splits, channels), dtype=dtype, device=device)
            launch(
                batch_norm_mixed_sum_bwd_sums_kernel,
                (walk.blocks * groups, splits),
                *(grad, _grouped(reads, candidates, group), partials, mean, active),
                *(walk.units, share, walk.run, channels),
                K=candidates, GROUPS=groups, GROUP=group, VECTORS=vectors, **walk.constants(vectors),
            )  # fmt: skip
        tile = _table_tile(splits, channels)
        blocks = cdiv(channels, tile["CHANNELS"])
        tables = torch.empty((4, entries, channels), dtype=dtype, device=device)
        dots = None
        if needs_parameter_grad:
            dots = torch.empty((edges, blocks, power_of_two(candidates)), dtype=dtype, device=device)
        weights, biases, written_weights, written_biases = map(_some, (weights, biases, grad_weights, grad_biases))
        launch(
            batch_norm_mixed_sum_bwd_tables_kernel,
            (entries, blocks),
            *(tables, dots, written_weights, written_biases, partials, mean, variance, alpha, mask, active),
            *(weights, biases, grad.numel() // channels, splits, channels),
            E=edges, K=candidates, GROUP=group, KINDS=tuple(kinds), EPS=tuple(eps), SOFTMAX=softmax,
            WEIGHTS=len(weights), BIASES=len(biases),
            GRAD_WEIGHTS=len(written_weights), GRAD_BIASES=len(written_biases),
            CANDIDATES=power_of_two(candidates), **tile,
        )  # fmt: skip
        written = _some(grads)
        if not written and dots is None:
            return requested, grad_alpha, grad_mask
        constants = walk.constants(IN_FLIGHT // GROUP)
        tiles = 0 if not written else cdiv(walk.units, constants["LANES"]) * walk.blocks * groups
        values = _some([output if need else None for output, need in zip(outputs, from_batch, strict=True)])
        launch(
            batch_norm_mixed_sum_bwd_kernel,
            (tiles + (0 if dots is None else edges),),
            *(grad, _grouped(values, candidates, group), _grouped(written, candidates, group)),
            *(tables, dots, grad_alpha, grad_mask, alpha, mask, active, walk.units, walk.run, channels, blocks),
            E=edges, K=candidates, GROUPS=groups, GROUP=group, READS=len(values) > 0, WRITES=len(written) > 0,
            SOFTMAX=softmax, CANDIDATES=power_of_two(candidates), DOT_ROWS=min(power_of_two(blocks), 256), **constants,
        )  # fmt: skip
    return requested, grad_alpha, grad_mask


def batch_norm_update_running_statistics(
    running_means: Sequence[Tensor],
    running_variances: Sequence[Tensor],
    counters: Sequence[Tensor],
    mean: Tensor,
    variance: Tensor,
    active: Tensor | None,
    entries: Sequence[int],
    momenta: Sequence[float],
    count: int,
) -> None:
    """The registered operator on CUDA. One launch; a norm that several entries share is updated by one at a time.

    Statistics that are not contiguous are updated in a copy, one for all entries that share them.
    """
    if not all(tensor.is_contiguous() for tensor in (*running_means, *running_variances)):
        given = {tensor.data_ptr(): tensor for tensor in (*running_means, *running_variances)}
        dense = {place: tensor.contiguous() for place, tensor in given.items()}
        means, variances = ([dense[t.data_ptr()] for t in group] for group in (running_means, running_variances))
        batch_norm_update_running_statistics(
            means, variances, counters, mean, variance, active, entries, momenta, count
        )
        for place, tensor in given.items():
            tensor.copy_(dense[place])
        return
    rounds: list[list[int]] = [[]]
    met: list[set[int]] = [set()]
    for t, running_mean in enumerate(running_means):
        place = running_mean.data_ptr()
        at = next((i for i, seen in enumerate(met) if place not in seen), len(met))
        if at == len(met):
            rounds.append([])
            met.append(set())
        rounds[at].append(t)
        met[at].add(place)
    with torch.cuda.device_of(mean):
        for chosen in rounds:
            groups = (running_means, running_variances, counters)
            launch(
                batch_norm_running_statistics_kernel,
                (len(chosen),),
                *(tuple(group[t] for t in chosen) for group in groups),
                *(mean, variance, active, count, mean.shape[1]),
                K=mean.shape[0] if active is None else mean.shape[0] // active.numel(),
                ENTRIES=tuple(entries[t] for t in chosen),
                MOMENTA=tuple(momenta[t] for t in chosen),
                CHANNELS=min(power_of_two(mean.shape[1]), 1024),
            )  # fmt: skip
