"""CellOutput: modules that read what a cell puts out together, and those that must run by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dssp.relaxation import Mixture
from dssp.spaces import DARTS
from dssp.spaces.cell_output import CellOutput
from dssp.spaces.operations import FactorizedReduce, ReLUConvBN
from dssp.supernet import Supernet
from tests.kernels.backends import with_cpu_kernels


def some_maps() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 8, 6, 6, generator=generator).to(memory_format=torch.channels_last).requires_grad_()
        for _ in range(3)
    ]


def some_readers() -> list[nn.Module]:
    torch.manual_seed(0)
    plain = [ReLUConvBN(24, channels, 1, 1, 0, affine=False) for channels in (8, 16)]
    return [*plain, FactorizedReduce(24, 8, affine=False), ReLUConvBN(24, 8, 1, 1, 0, affine=True)]


@with_cpu_kernels
def test_what_is_read_is_what_each_module_makes_of_the_tensor() -> None:
    readers, maps = some_readers(), some_maps()
    alone, x = copy.deepcopy(readers), torch.cat(some_maps(), dim=1)
    output = CellOutput(maps, readers)
    read = [output.read_by(reader) for reader in readers]
    assert read[0].grad_fn is read[1].grad_fn and read[0].grad_fn.name() == "_PointwiseBatchNormBackward"
    for found, module in zip(read, alone, strict=True):
        torch.testing.assert_close(found, module(x))
    torch.testing.assert_close([r.state_dict() for r in readers], [r.state_dict() for r in alone])
    assert torch.equal(output.tensor, x)


@with_cpu_kernels
def test_module_that_is_no_announced_reader_runs_alone_and_may_read_again() -> None:
    [reader, *_], maps = some_readers(), some_maps()
    output = CellOutput(maps)
    first, again = output.read_by(reader), output.read_by(reader)
    assert torch.equal(first, again) and first.grad_fn is not again.grad_fn
    assert reader.op[2].num_batches_tracked == 2


@with_cpu_kernels
@pytest.mark.parametrize("watch", [lambda reader: reader, lambda reader: reader.op, lambda reader: reader.op[1]])
def test_watched_module_is_called(watch: object) -> None:
    readers, maps, seen = some_readers()[:2], some_maps(), []
    watch(readers[1]).register_forward_hook(lambda module, inputs, y: seen.append(y))  # type: ignore[operator]
    expected = copy.deepcopy(readers[1])(torch.cat(maps, dim=1))
    seen.clear()  # copies have the hook as well
    output = CellOutput(maps, readers)
    output.read_by(readers[0])
    assert not seen
    torch.testing.assert_close(output.read_by(readers[1]), expected)
    assert len(seen) == 1


def small_net() -> Supernet:
    torch.manual_seed(0)
    net = Supernet(DARTS, channels=8, cells=3, classes=4)
    return net.to(memory_format=torch.channels_last)


IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("position", range(3))
def test_watched_cell_is_called_with_tensors(position: int) -> None:
    net, seen = small_net(), []
    expected = copy.deepcopy(net)(IMAGES)
    hook = net.cells[position].register_forward_hook(lambda cell, inputs, y: seen.append((*inputs, y)))
    torch.testing.assert_close(net(IMAGES), expected)
    hook.remove()
    [(s0, s1, y)] = seen
    widths = [24, 24, 32, 64, 128]  # of the stem (twice) and the cells
    assert [x.shape[1] for x in (s0, s1, y)] == widths[position : position + 3]


def test_cell_with_a_forward_of_its_own_is_called() -> None:
    net = small_net()
    usual = type(net.cells[1])

    class Doubled(usual):  # type: ignore[misc, valid-type]
        def forward(self, *inputs: Tensor, **architecture: object) -> Tensor:
            return 2 * super().forward(*inputs, **architecture)

    found = [copy.deepcopy(net), copy.deepcopy(net)]
    found[0].cells[1].__class__ = Doubled
    found[1].cells[1].register_forward_hook(lambda cell, inputs, y: 2 * y)
    torch.testing.assert_close(found[0](IMAGES), found[1](IMAGES))


def test_cell_of_tensors_gives_what_it_puts_out() -> None:
    cell, maps = small_net().cells[0], some_maps()
    x = torch.cat(maps, dim=1).detach()
    mixture = Mixture(torch.full((14, 8), 0.125))
    together = cell.put_out(CellOutput(maps), CellOutput(maps), architecture=(mixture,))
    assert len(together.maps) == 4
    torch.testing.assert_close(cell(x, x, architecture=(mixture,)), together.tensor)
