"""BatchNorm over the global batch of all ranks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dssp.distributed import SumOverRanks, ranks


class SyncBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all ranks' batches together, which must be of one size:

        mean = mean_r(mean(x_r))          var = mean_r(mean((x_r - mean)^2))

    In two passes, so that |mean| >> std does no harm. In evaluation, and on held-out images (where running statistics
    are not tracked), it is BatchNorm2d and no rank waits for another. Unlike torch's SyncBatchNorm it runs on CPUs too,
    may be differentiated twice, and is a BatchNorm2d to whoever looks for one.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.track_running_stats):
            return super().forward(x)
        count, shape = ranks(), (1, -1, 1, 1)
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        mean = SumOverRanks.apply(wide.mean((0, 2, 3))) / count
        centred = wide - mean.view(shape)
        variance = SumOverRanks.apply(centred.square().mean((0, 2, 3))) / count
        self._track(mean.detach(), variance.detach(), count * x.numel() // x.shape[1])
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor, values: int) -> None:
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        self.num_batches_tracked += 1
        factor = 1.0 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean += factor * (mean - self.running_mean)
        self.running_var += factor * (variance * values / max(values - 1, 1) - self.running_var)


def synchronise_norms(module: nn.Module) -> None:
    """Turn every plain BatchNorm2d inside into a SyncBatchNorm2d, in place: parameters, buffers and names stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d
