"""What README.md shows of the search runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dssp.spaces.operations import OPERATIONS

README = Path(__file__).parents[2] / "README.md"


def test_snippet_that_adds_an_operation_and_a_space_derives_a_network_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    section = README.read_text().split("### Add an operation, add a space")[1].split("\n### ")[0]
    (snippet,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    monkeypatch.setitem(OPERATIONS, "conv_5x5", None)  # the snippet sets it; afterwards it is taken out again
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(snippet, names)
    network, supernet = names["network"], names["supernet"]
    assert network(torch.randn(2, 1, 8, 8)).shape == (2, 10)
    assert any(isinstance(module, nn.Conv2d) and module.kernel_size == (5, 5) for module in supernet.modules())
    chosen = {name for nodes, _ in names["search"].derived().cells.values() for node in nodes for name, _ in node}
    assert chosen and chosen <= set(names["space"].operations)
