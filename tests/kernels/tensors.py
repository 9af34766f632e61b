"""The memory layouts operators are tried in, and the slack their results have beside eager's own error, by dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

SLACK = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-6, torch.float64: 1e-14}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "transposed": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "sliced channels": lambda t: torch.cat([t, t], 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]],
    "sliced columns": lambda t: torch.cat([t, t], 3).contiguous(memory_format=torch.channels_last)[..., : t.shape[3]],
    "every second column": lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
}
