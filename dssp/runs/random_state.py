"""The state of torch's default random generators, on the CPU and on every GPU."""

from __future__ import annotations

import torch
from torch import Tensor


def random_state() -> dict[str, list[Tensor]]:
    """What set_random_state() takes: {"cpu": [state], "cuda": [state per GPU]}."""
    return {"cpu": [torch.get_rng_state()], "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_random_state(state: dict[str, list[Tensor]]) -> None:
    """Continue the generators' sequences. GPUs that only one of the two machines has are left out."""
    torch.set_rng_state(state["cpu"][0])
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index, of_device in enumerate(state["cuda"][:count]):
        torch.cuda.set_rng_state(of_device, index)
