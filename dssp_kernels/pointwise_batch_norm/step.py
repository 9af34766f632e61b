"""relu_pointwise_norms: DARTS' ReLUConvBNs of kernel 1, run as one operator where that is certain to be the same."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dssp_kernels.backend import implementation_for
from dssp_kernels.folding import is_plain_relu, is_pointwise, is_watched
from dssp_kernels.pointwise_batch_norm.op import is_served, pointwise_batch_norm_group
from dssp_kernels.running_statistics import update_running_statistics
from dssp_kernels.separable_conv.arguments import can_normalise_rows

Stage = tuple[nn.Module, nn.Module, nn.Module]
"""A ReLU, a convolution and a norm."""


def relu_pointwise_norms(stages: Sequence[Stage], maps: Sequence[Tensor]) -> list[Tensor]:
    """[norm(conv(relu(x))) for relu, conv, norm in stages] with x = cat(maps, dim=1), running statistics included.

    Stages for which runs_as_one() are one operator, and x need not exist for them. The modules of the others run.
    """
    as_one = [stage for stage in stages if runs_as_one(stage, maps)]
    results: dict[Stage, Tensor] = {}
    if as_one:
        _, convs, norms = zip(*as_one, strict=True)
        found = pointwise_batch_norm_group(
            maps, [conv.weight for conv in convs], relu=True, eps=[norm.eps for norm in norms]
        )
        results = {stage: y for stage, (y, _, _) in zip(as_one, found, strict=True)}
        update_running_statistics(
            (norm, mean, variance) for norm, (_, mean, variance) in zip(norms, found, strict=True)
        )
    if len(as_one) < len(stages):
        x = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
        results |= {stage: _run(stage, x) for stage in stages if stage not in results}
    return [results[stage] for stage in stages]


def _run(stage: Stage, x: Tensor) -> Tensor:
    relu, conv, norm = stage
    return norm(conv(relu(x)))


def runs_as_one(stage: Stage, maps: Sequence[Tensor]) -> bool:
    """Whether pointwise_batch_norm_group() is certain to compute what the modules would, and has kernels for the maps.

    The modules are an nn.ReLU, a pointwise nn.Conv2d without bias and an nn.BatchNorm2d that goes by the statistics of
    the batch and has no weights, without hooks on them.
    """
    relu, conv, norm = stage
    return (
        is_plain_relu(relu)
        and is_pointwise(conv)
        and type(norm) is nn.BatchNorm2d
        and can_normalise_rows(norm)
        and not (is_watched(norm) or _has_any_global_hook())
        and maps[0].device.type == "cpu"
        and implementation_for(maps[0].device) == "cpu"
        and is_served(maps, [conv.weight])
    )
