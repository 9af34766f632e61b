"""Held-out images judge what masking costs, each edge and candidate alone, and nothing is disturbed by it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dssp.pruning.held_out import BATCH, batch_statistics, candidate_effects, edge_effects, held_out_losses
from dssp.supernet import Supernet
from tests.search.small import small_supernet


def measurable() -> tuple[Supernet, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    supernet = small_supernet(nodes=2, light=False)
    for parameter in (supernet.classifier.weight, *supernet.alpha.values()):
        nn.init.normal_(parameter)
    return supernet, torch.randn(16, 1, 8, 8), torch.arange(16) % 2


def losses_of(supernet: Supernet, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: held_out_losses(supernet, supernet, images, labels)


def test_effect_is_what_masking_the_edge_alone_adds_to_each_loss() -> None:
    supernet, images, labels = measurable()
    edges = ["normal:0->2", "reduce:2->3"]
    effects = edge_effects(supernet, edges, losses_of(supernet, images, labels))
    full = F.cross_entropy(supernet(images), labels, reduction="none")
    for edge, effect in zip(edges, effects, strict=True):
        cell_type, position = supernet.locate(edge)
        with torch.no_grad():
            kept = supernet.mask[cell_type][position].clone()
            supernet.mask[cell_type][position] = -1e4
            losses = F.cross_entropy(supernet(images), labels, reduction="none")
            supernet.mask[cell_type][position] = kept
        torch.testing.assert_close(effect, (losses - full).detach(), atol=1e-5, rtol=0)
        assert effect.any()


def test_effect_of_a_candidate_is_that_of_an_alpha_of_minus_infinity() -> None:
    supernet, images, labels = measurable()
    candidates = [("normal:0->2", "sep_conv_3x3"), ("reduce:2->3", "skip_connect")]
    effects = candidate_effects(supernet, candidates, losses_of(supernet, images, labels))
    full = F.cross_entropy(supernet(images), labels, reduction="none")
    for (edge, operation), effect in zip(candidates, effects, strict=True):
        cell_type, position = supernet.locate(edge)
        k = supernet.space.operations.index(operation)
        with torch.no_grad():
            kept = supernet.alpha[cell_type][position, k].clone()
            supernet.alpha[cell_type][position, k] = -torch.inf
            losses = F.cross_entropy(supernet(images), labels, reduction="none")
            supernet.alpha[cell_type][position, k] = kept
        torch.testing.assert_close(effect, (losses - full).detach(), atol=1e-5, rtol=0)
        assert effect.any()


def test_measuring_changes_neither_weights_nor_statistics_nor_randomness() -> None:
    supernet, images, labels = measurable()
    before = {name: value.clone() for name, value in supernet.state_dict().items()}
    randomness, losses = torch.get_rng_state(), losses_of(supernet, images, labels)
    edge_effects(supernet, list(supernet.edges()), losses)
    candidate_effects(supernet, [("normal:0->2", name) for name in supernet.space.operations], losses)
    assert all(torch.equal(value, before[name]) for name, value in supernet.state_dict().items())
    assert torch.equal(torch.get_rng_state(), randomness)
    assert len(supernet.live_edges()) == 10 and supernet.training and supernet.offered("normal").all()
    assert not any(mixed_edge.is_pruned for edge in supernet.edges() for mixed_edge in supernet.mixed_edges(edge))
    assert all(parameter.grad is None for parameter in supernet.parameters())
    supernet(images)
    assert not torch.equal(supernet.stem[1].running_mean, before["stem.1.running_mean"])  # statistics run on again


def test_many_images_are_judged_in_parts_of_about_one_size() -> None:
    sizes: list[int] = []
    images = torch.randn(2 * BATCH + 10, 4)

    def logits(part: torch.Tensor) -> torch.Tensor:
        sizes.append(len(part))
        return part

    losses = held_out_losses(nn.Identity(), logits, images, torch.zeros(len(images), dtype=torch.long))
    assert len(losses) == len(images) and max(sizes) <= BATCH and max(sizes) - min(sizes) <= 1


def test_statistics_run_on_when_a_measurement_fails() -> None:
    norm = nn.BatchNorm2d(2)
    with pytest.raises(RuntimeError, match="stop"), batch_statistics(norm):
        assert not norm.track_running_stats
        raise RuntimeError("stop")
    assert norm.track_running_stats
