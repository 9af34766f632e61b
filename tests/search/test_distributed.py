"""What ranks average and agree on, each against what one process would have."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dssp import distributed, evaluate
from dssp.distributed import (
    RanksApart,
    average,
    average_gradients,
    check_same,
    checksum,
    divided,
    highest,
    in_turn,
    on_main,
    rank,
    ranks,
    share,
)
from dssp.network import DropPath
from dssp.steps.sync_batch_norm import SyncBatchNorm2d, synchronise_norms
from tests.search.ranks import results_of_ranks
from tests.search.small import small_data

RANKS = 2
pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch was built without gloo"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
Results = list[dict[str, Any]]


def some_gradients(of_rank: int) -> list[nn.Parameter]:
    """Both ranks have a gradient, only rank 1 has, none has, and one of another type; not all contiguous."""
    generator = torch.Generator().manual_seed(of_rank)
    shapes = [(4, 3, 3, 3), (5,), (2, 2), (3,), (1,)]
    types = [torch.float32, torch.float32, torch.float32, torch.float64, torch.float32]
    parameters = [nn.Parameter(torch.zeros(s, dtype=t)) for s, t in zip(shapes, types, strict=True)]
    parameters[0].data = parameters[0].data.to(memory_format=torch.channels_last)
    for i, parameter in enumerate(parameters):
        if i != 2 and (i != 1 or of_rank == 1):
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    parameters[0].grad = parameters[0].grad.to(memory_format=torch.channels_last)  # type: ignore[union-attr]
    return parameters


def whole_images() -> Tensor:
    """Far from zero, as statistics must survive it."""
    return torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 1000.0


def some_norms() -> nn.Module:
    norms = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3), nn.BatchNorm2d(3, momentum=None))
    return norms.to(memory_format=torch.channels_last)


def through_norms(norms: nn.Module, x: Tensor, weights: Tensor) -> dict[str, Any]:
    for _ in range(2):
        x = x.detach().requires_grad_()
        y = norms(x)
        (y * weights).mean().backward()
    eval_output = norms.eval()(x)
    return {"y": y, "x": x.grad, "buffers": norms.state_dict(), "eval": eval_output}


def work() -> dict[str, Any]:
    me, found = rank(), {}
    for name, elements in (("one bucket", 2**24), ("small buckets", 6)):
        distributed.BUCKET = elements
        parameters = some_gradients(me)
        found[name] = average_gradients(parameters, torch.tensor(float(me))), [p.grad for p in parameters]
    found["scalars"] = average({"loss": torch.tensor(me + 1.0), "accuracy": torch.tensor(me / 2)})
    parts = [torch.full((n, 2), float(n)) for n in (3, 2, 4)]
    found["divided"] = divided(lambda part: part * torch.arange(2) + me, parts)
    found["one part"] = divided(lambda part: part + 1, parts[:1])
    found["highest"] = highest(me * 7)
    found["on main"] = on_main(lambda: ("rank", rank()))
    for name, act in (("failure", lambda: 1 / 0), ("check", None)):
        try:
            check_same({"seed": 3, "weights": me}, "now") if act is None else on_main(act)
        except (RanksApart, ZeroDivisionError) as error:
            found[name] = type(error).__name__, str(error)
    with in_turn():
        found["share"] = share()
    norms = some_norms()
    synchronise_norms(norms)
    lot = slice(2 * me, 2 * me + 2)
    found["norms"] = through_norms(norms, whole_images()[lot], torch.arange(300.0).view(4, 3, 5, 5)[lot])
    found["norm gradients"] = (
        average_gradients(norms.parameters(), torch.zeros(())),
        [p.grad for p in norms.parameters()],
    )
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return results_of_ranks(RANKS, work, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("buckets", ["one bucket", "small buckets"])
def test_gradients_become_their_means_and_none_stays_where_no_rank_has_one(results: Results, buckets: str) -> None:
    each = [[parameter.grad for parameter in some_gradients(r)] for r in range(RANKS)]
    for loss, gradients in (result[buckets] for result in results):
        assert loss == 0.5 and gradients[2] is None
        for found, first, second in zip(gradients, *each, strict=True):
            if found is not None:
                expected = ((0 if first is None else first) + second) / 2
                assert torch.equal(found, expected) and found.dtype == second.dtype
                assert found.stride() == second.stride()


def test_scalars_become_their_means(results: Results) -> None:
    assert all(result["scalars"] == {"loss": 1.5, "accuracy": 0.25} for result in results)


def test_divided_work_is_known_to_all(results: Results) -> None:
    for result in results:
        expected = [torch.full((n, 1), float(n)) * torch.arange(2) + owner for n, owner in ((3, 0), (2, 1), (4, 0))]
        assert all(map(torch.equal, result["divided"], expected))
        assert torch.equal(result["one part"][0], torch.full((3, 2), 4.0))


def test_ranks_agree(results: Results) -> None:
    assert all(result["highest"] == 7 and result["on main"] == ("rank", 0) for result in results)
    assert [result["share"] for result in results] == [(0, 2), (1, 2)]


def test_failure_of_rank_0_ends_the_others(results: Results) -> None:
    assert results[0]["failure"][0] == "ZeroDivisionError"
    assert results[1]["failure"] == ("RanksApart", "rank 0 cannot go on; its own line says why")


def test_ranks_that_differ_are_named_on_every_rank(results: Results) -> None:
    expected = ("RanksApart", "now: weights of rank 1 differ from those of rank 0")
    assert [result["check"] for result in results] == [expected] * RANKS


def test_synchronised_norms_are_those_of_the_whole_batch(results: Results) -> None:
    norms = some_norms()
    expected = through_norms(norms, whole_images(), torch.arange(300.0).view(4, 3, 5, 5))
    for name in ("y", "eval"):
        together = torch.cat([result["norms"][name] for result in results])
        torch.testing.assert_close(together, expected[name], rtol=1e-4, atol=1e-4)
    x_gradients = torch.cat([result["norms"]["x"] for result in results])
    torch.testing.assert_close(x_gradients / RANKS, expected["x"], rtol=1e-4, atol=1e-5)
    for result in results:
        for key, buffer in expected["buffers"].items():
            torch.testing.assert_close(result["norms"]["buffers"][key], buffer, rtol=1e-4, atol=1e-4)
        for found, parameter in zip(result["norm gradients"][1], norms.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-4)


def test_norms_keep_parameters_buffers_and_names() -> None:
    norms = some_norms()
    before = copy.copy(norms.state_dict(keep_vars=True))
    synchronise_norms(norms)
    after = norms.state_dict(keep_vars=True)
    assert after.keys() == before.keys() and all(after[key] is before[key] for key in before)
    assert all(type(norm) is SyncBatchNorm2d for norm in norms)  # type: ignore[union-attr]


def test_process_that_is_alone_has_no_group_and_changes_nothing() -> None:
    parameters = some_gradients(1)
    gradients, loss = [parameter.grad for parameter in parameters], torch.tensor(1.0)
    assert (rank(), ranks(), share()) == (0, 1, (0, 1)) and not torch.distributed.is_initialized()
    assert average_gradients(parameters, loss) is loss
    assert all(found.grad is before for found, before in zip(parameters, gradients, strict=True))
    check_same({"x": object()}, "now")
    assert on_main(lambda: 3) == 3 and highest(2) == 2 and average({"loss": loss})["loss"] is loss


def test_checksum_tells_tensors_apart() -> None:
    one = torch.randn(3, 2)
    other = one.clone()
    assert checksum([one]) == checksum([other]) and checksum([one.to(memory_format=torch.contiguous_format)])
    other[0, 0] += 1e-3
    assert checksum([one]) != checksum([other]) and checksum([torch.tensor(True)]) != checksum([torch.tensor(False)])


def test_new_start_believes_no_address_of_an_old_one() -> None:
    store, names = torch.distributed.HashStore(), []
    for key, value in (("hello/1", "dead"), ("answer/1", "dead gone")):
        store.set(key, value)

    def settle(me: int) -> None:
        names.append(distributed._name_of_this_start(store, me, 2, seconds=30.0))

    for _ in range(2):  # torchrun starts the ranks again and again, in one store
        names.clear()
        threads = [threading.Thread(target=settle, args=(me,)) for me in (1, 0)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(names) == 2 and len({*names, "gone"}) == 2


def test_ranks_that_do_not_come_are_missed() -> None:
    with pytest.raises(RuntimeError, match="2 were started, after 0.1 seconds some are missing"):
        distributed._name_of_this_start(torch.distributed.HashStore(), 0, 2, seconds=0.1)


def test_command_for_one_process_refuses_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match="rank 1: this command runs in one process, got 2"):
        evaluate.main(["--run-dir", "nowhere"])


# ---- shares of a batch -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [2, 3])
@pytest.mark.parametrize("first", [0, 1])
def test_shares_join_to_the_batches_of_one_process(parts: int, first: int) -> None:
    split = small_data().train
    order: dict[str, Any] = {"epoch": 3, "seed": 1, "train": True, "first": first}
    whole = list(split.batches(12, **order))
    shared = [list(split.batches(12 // parts, **order, share=(part, parts))) for part in range(parts)]
    assert len(whole) == 4 - first
    for images, labels, *lots in ((*batch, *lot) for batch, *lot in zip(whole, *shared, strict=True)):
        assert torch.equal(torch.cat([lot[0] for lot in lots]), images)
        assert torch.equal(torch.cat([lot[1] for lot in lots]), labels)


def test_shares_of_fewer_images_than_one_batch_are_of_one_size() -> None:
    split = small_data().train  # 48 images
    order: dict[str, Any] = {"epoch": 0, "seed": 0, "train": True}
    sizes = [[len(labels) for _, labels in split.batches(1000, **order, share=(part, 5))] for part in range(5)]
    assert sizes == [[9]] * 5
    with pytest.raises(ValueError, match="share: 48 images of train cannot be divided among 49"):
        next(split.batches(1, **order, share=(0, 49)))


def test_dropped_paths_of_shares_are_those_of_the_whole_batch() -> None:
    def scales(images: int, share: tuple[int, int]) -> Tensor:
        drop = DropPath()
        drop.probability, drop.generator, drop.share = 0.5, torch.Generator().manual_seed(0), share
        return drop.scales(7, torch.empty(images))

    assert torch.equal(torch.cat([scales(4, (part, 3)) for part in range(3)], dim=1), scales(12, (0, 1)))
