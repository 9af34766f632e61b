"""relu_pointwise_norm: DARTS' ReLUConvBN of kernel 1, run as one operator where that is certain to be the same."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dssp_kernels.backend import implementation_for
from dssp_kernels.folding import is_plain_relu, is_pointwise, is_watched
from dssp_kernels.pointwise_batch_norm.op import is_served, pointwise_batch_norm
from dssp_kernels.running_statistics import update_running_statistics
from dssp_kernels.separable_conv.arguments import can_normalise_rows


def relu_pointwise_norm(relu: nn.Module, conv: nn.Module, norm: nn.Module, x: Tensor) -> Tensor:
    """norm(conv(relu(x))), running statistics included.

    pointwise_batch_norm() runs where there are kernels for x and the modules are an nn.ReLU, a pointwise nn.Conv2d
    without bias and an nn.BatchNorm2d that goes by the statistics of the batch and has no weights, without hooks on
    them. Everywhere else the modules do.
    """
    if (
        is_plain_relu(relu)
        and is_pointwise(conv)
        and type(norm) is nn.BatchNorm2d
        and can_normalise_rows(norm)
        and not (is_watched(norm) or _has_any_global_hook())
        and implementation_for(x.device) == "cpu"
        and is_served(x, conv.weight)
    ):
        y, mean, variance = pointwise_batch_norm(x, conv.weight, relu=True, eps=norm.eps)
        update_running_statistics(norm, mean, variance)
        return y
    return norm(conv(relu(x)))
