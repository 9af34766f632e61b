"""The parts of the field's recipe, each against its formula."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dssp.config import RetrainConfig
from dssp.derived.averaging import MovingAverage
from dssp.derived.retraining import Retraining
from dssp.genotype import Genotype
from dssp.network import DerivedEdges, DerivedNetwork, DropPath
from dssp.spaces import DARTS, NASBENCH201
from dssp.spaces.auxiliary import AuxiliaryHead
from dssp.spaces.operations import Identity
from tests.search.small import small_data

GENOTYPE = Genotype(
    normal=((("sep_conv_3x3", 0), ("skip_connect", 1)), (("avg_pool_3x3", 2),)),
    normal_concat=(2, 3),
    reduce=((("skip_connect", 0), ("max_pool_3x3", 1)), (("dil_conv_3x3", 2),)),
    reduce_concat=(2, 3),
)

NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def network(*, auxiliary: bool = False, cells: int = 3, seed: int = 0) -> DerivedNetwork:
    torch.manual_seed(seed)
    return DerivedNetwork(DARTS, GENOTYPE, channels=2, cells=cells, classes=10, auxiliary=auxiliary)


def retraining(derived: DerivedNetwork, **settings: Any) -> Retraining:
    config = RetrainConfig(genotype="g", dataset="fake", image_size=8, space="darts", batch_size=24, **settings)
    return Retraining(derived, small_data().train_valid, config.resolve())


def images(size: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(6, 3, size, size, generator=generator), torch.randint(0, 10, (6,), generator=generator)


# ---- drop-path -------------------------------------------------------------------------------------------------------


def test_drop_path_scales_are_zero_or_one_over_the_probability_to_stay() -> None:
    drop_path = DropPath()
    drop_path.probability, drop_path.generator = 0.2, torch.Generator().manual_seed(0)
    scales = drop_path.scales(8, torch.empty(4000, 1))
    assert scales.shape == (8, 4000, 1, 1, 1)
    assert set(scales.unique().tolist()) == {0.0, 1.25}
    torch.testing.assert_close(scales.mean((1, 2, 3, 4)), torch.ones(8), atol=0.05, rtol=0)  # 6 standard deviations


@pytest.mark.parametrize("stride", [1, 2], ids=["normal", "reduce"])
def test_all_operations_but_the_skip_of_stride_1_are_dropped(stride: int) -> None:
    drop_path = DropPath()
    nodes = GENOTYPE.reduce if stride == 2 else GENOTYPE.normal
    edges = DerivedEdges(nodes, (2, 3), inputs=2, channels=4, stride=stride, drop_path=drop_path)
    x0, x1 = (torch.randn(6, 4, 8, 8).to(memory_format=torch.channels_last) for _ in range(2))
    drop_path.probability, drop_path.generator = 0.5, torch.Generator().manual_seed(3)
    s0, s1, s2 = drop_path.scales(3, x0)
    drop_path.generator.manual_seed(3)
    node2, node3 = edges([x0, x1])[2:]
    first, second, third = edges
    if stride == 1:  # sep_conv, skip, pool
        assert isinstance(second, Identity)
        expected = s0 * first(x0) + x1
    else:  # FactorizedReduce, pool, dil_conv
        expected = s0 * first(x0) + s1 * second(x1)
    torch.testing.assert_close(node2, expected)
    torch.testing.assert_close(node3, s2 * third(node2))
    assert node2.is_contiguous(memory_format=torch.channels_last)


def test_nothing_is_dropped_in_evaluation_and_at_probability_0() -> None:
    derived, (x, _) = network().eval(), images(8)
    expected = derived(x)
    derived.drop_path.probability = 0.9
    assert torch.equal(derived(x), expected)
    derived.drop_path.probability = 0.0
    before = torch.get_rng_state()
    derived.train()(x)
    assert torch.equal(torch.get_rng_state(), before)


def test_drop_path_rises_linearly_and_is_a_function_of_seed_epoch_and_step() -> None:
    derived = network()
    task = retraining(derived, epochs=4, drop_path=0.2)
    drawn = []
    for epoch in (0, 1, 2, 3, 1):
        next(task.batches(epoch))
        assert derived.drop_path.probability == pytest.approx(0.2 * epoch / 4)
        drawn.append(derived.drop_path.scales(4, torch.empty(50, 1)).bool())
    assert drawn[0].all() and torch.equal(drawn[1], drawn[4]) and not torch.equal(drawn[1], drawn[2])
    next(task.batches(1, first=1))
    assert not torch.equal(drawn[1], derived.drop_path.scales(4, torch.empty(50, 1)).bool())


# ---- auxiliary head --------------------------------------------------------------------------------------------------


def test_auxiliary_head_computes_that_of_darts() -> None:
    head, x = AuxiliaryHead(5, 10).train(), torch.randn(4, 5, 8, 8)
    w = head.state_dict()
    h = F.avg_pool2d(x.relu(), 5, stride=3, count_include_pad=False)
    h = F.batch_norm(F.conv2d(h, w["features.2.weight"]), None, None, training=True).relu()
    h = F.batch_norm(F.conv2d(h, w["features.5.weight"]), None, None, training=True).relu()
    assert h.shape == (4, 768, 1, 1)
    torch.testing.assert_close(head(x), F.linear(h.view(4, -1), w["classifier.weight"], w["classifier.bias"]))
    assert head(torch.randn(2, 5, 20, 14)).shape == (2, 10)


@pytest.mark.parametrize(("cells", "position"), [(3, 2), (6, 4), (8, 5), (20, 13), (1, 0)])
def test_auxiliary_head_reads_the_cell_at_two_thirds(cells: int, position: int) -> None:
    derived, (x, _) = network(auxiliary=True, cells=cells), images()
    outputs: list[Tensor] = []
    derived.cells[position].register_forward_hook(lambda module, inputs, output: outputs.append(output))
    head = copy.deepcopy(derived.auxiliary_head)
    _, auxiliary = derived(x)
    assert torch.equal(auxiliary, head(outputs[0]))
    assert derived.tap is not None and outputs[0].shape[2] == 32 / 2**derived.tap.halvings


def test_auxiliary_head_adds_keys_of_darts_and_changes_no_other_weight() -> None:
    plain, with_head = network().state_dict(), network(auxiliary=True).state_dict()
    extra = with_head.keys() - plain.keys()
    assert all(torch.equal(plain[name], with_head[name]) for name in plain)
    norms = [f"{i}.{key}" for i in (3, 6) for key in NORM]
    names = ["features.2.weight", "features.5.weight", *(f"features.{n}" for n in norms)]
    assert extra == {f"auxiliary_head.{name}" for name in (*names, "classifier.weight", "classifier.bias")}


def test_auxiliary_head_runs_in_training_only_and_leaves_the_logits_alone() -> None:
    plain, with_head, (x, _) = network(), network(auxiliary=True), images()
    assert torch.equal(with_head(x)[0], plain(x))
    assert torch.equal(with_head.eval()(x), plain.eval()(x))


def test_space_without_a_place_for_it_is_named() -> None:
    arch = NASBENCH201.genotype.from_text("|none~0|+|none~0|none~1|+|skip_connect~0|none~1|none~2|")
    with pytest.raises(ValueError, match="auxiliary: space nasbench201 has no place for an auxiliary head"):
        DerivedNetwork(NASBENCH201, arch, channels=2, cells=1, classes=10, auxiliary=True)


# ---- the loss --------------------------------------------------------------------------------------------------------


def smoothed(logits: Tensor, labels: Tensor, share: float) -> Tensor:
    """(1 - share) * cross-entropy with the label + share * mean cross-entropy over all classes."""
    log_p = logits.log_softmax(1)
    return -((1 - share) * log_p.gather(1, labels[:, None])[:, 0] + share * log_p.mean(1)).mean()


def test_step_minimises_the_smoothed_losses_of_both_heads() -> None:
    derived, batch = network(auxiliary=True), images()
    logits, auxiliary = copy.deepcopy(derived)(batch[0])
    task = retraining(derived, epochs=2, auxiliary_weight=0.4, label_smoothing=0.1)
    expected = smoothed(logits, batch[1], 0.1) + 0.4 * smoothed(auxiliary, batch[1], 0.1)
    torch.testing.assert_close(task.step(batch, 0)["train_loss"], expected.detach())


def test_bfloat16_trains_with_everything_on() -> None:
    derived = network(auxiliary=True)
    settings = {"auxiliary_weight": 0.4, "drop_path": 0.5, "ema_decay": 0.9, "label_smoothing": 0.1}
    task = retraining(derived, epochs=2, precision="bfloat16", **settings)
    task.batches(1)
    losses = [float(task.step(images(), 1)["train_loss"]) for _ in range(8)]
    assert all(weight.dtype == torch.float32 for weight in derived.parameters()) and losses[-1] < losses[0]


# ---- moving average --------------------------------------------------------------------------------------------------


def test_average_follows_weights_and_buffers_by_its_formula() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    average = MovingAverage(module, decay=0.3)
    expected = {name: tensor.double() for name, tensor in module.state_dict().items()}
    for step in range(1, 8):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += torch.randn_like(parameter)
        module(torch.randn(2, 3, 5, 5))
        average.update()
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * a + (1 - decay) * module.state_dict()[name] for name, a in expected.items()}
    found = average.network.state_dict()
    assert found.pop("1.num_batches_tracked") == 7
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], msg=name)
    assert not any(parameter.requires_grad for parameter in average.network.parameters())


def test_average_is_what_is_used_and_kept() -> None:
    derived = network()
    assert retraining(derived, epochs=1).trained is derived
    task = retraining(derived, epochs=1, ema_decay=0.9)
    for batch in task.batches(0):
        task.step(batch, 0)
    assert task.trained is not derived
    assert not torch.equal(task.trained.classifier.weight, derived.classifier.weight)
    resumed = retraining(network(seed=5), epochs=1, ema_decay=0.9)
    resumed.load_state_dict(copy.deepcopy(task.state_dict()))
    torch.testing.assert_close(resumed.state_dict(), task.state_dict(), rtol=0, atol=0)
