"""What holds for every search method: it finds a planted answer, and continues bit for bit wherever it was cut."""

from __future__ import annotations

import copy
from typing import Any, get_args, get_type_hints

import pytest
import torch

from dssp.bilevel import BilevelSearch
from dssp.config import SearchConfig
from dssp.methods import METHODS
from dssp.spaces.operations import OPERATIONS
from tests.search.small import small_search
from tests.search.test_skipped_steps import assert_unchanged, tensors, without_counters
from tests.search.toy import ANSWER, AverageAll, toy_search

# The zero-one loss follows the first signs of alpha wherever the loss says nothing: on the useless candidate, chance.
SETTINGS: dict[str, dict[str, Any]] = {"fair-darts": {"zero_one_weight": 0.0}}
EVERY_METHOD = pytest.mark.parametrize("method", METHODS)


def run(search: BilevelSearch, first: int, last: int, skip: int = 0) -> list[dict[str, Any]]:
    """The epochs from `first` to before `last`; of the first one, `skip` steps are done."""
    rows = []
    for epoch in range(first, last):
        for batch in search.batches(epoch, first=skip if epoch == first else 0):
            search.step(batch, epoch)
        rows.append(search.end_epoch(epoch))
    return rows


def test_the_configuration_knows_the_methods_and_no_others() -> None:
    assert get_args(get_type_hints(SearchConfig)["method"]) == tuple(METHODS)


@EVERY_METHOD
def test_the_planted_operation_is_found(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATIONS, "average_all", lambda c_in, c_out, stride, affine: AverageAll())
    search = toy_search(method, **SETTINGS.get(method, {}))
    with torch.no_grad():
        search.supernet.alpha["normal"][:, 0] += 0.5  # the other one has the better start
    assert search.method.derived() != ANSWER
    run(search, 0, search.epochs)
    assert search.derived() == ANSWER


COUNTERMEASURES = {"unrolled": True, "finite_difference": True, "beta_decay": 5.0, "early_stop": True, "max_skips": 0}


@pytest.mark.parametrize(("method", "options"), [*((method, {}) for method in METHODS), ("darts", COUNTERMEASURES)])
def test_search_cut_within_an_epoch_continues_to_the_same_bits(method: str, options: dict[str, Any]) -> None:
    settings: dict[str, Any] = {"method": method, "channels": 4, "nodes": 1, "epochs": 3, "held_out": 8, **options}
    settings["scored_paths"] = 4
    whole = small_search(**settings)
    rows = run(whole, 0, 3)
    first = small_search(**settings)
    run(first, 0, 1)
    first.step(next(first.batches(1)), 1)
    second = small_search(**settings)
    torch.rand(7)  # torch's own generator is in another state
    second.load_state_dict(first.state_dict())
    assert run(second, 1, 3, skip=1) == rows[1:]
    assert second.derived() == whole.derived()
    found, wanted = tensors(second.state_dict()), tensors(whole.state_dict())
    assert len(found) == len(wanted) and all(map(torch.equal, found, wanted))


@pytest.mark.parametrize(("method", "unrolled"), [*((method, False) for method in METHODS), ("darts", True)])
def test_step_on_a_poisoned_batch_changes_nothing(method: str, unrolled: bool) -> None:
    search = small_search(method=method, channels=4, nodes=1, epochs=4, unrolled=unrolled)
    batches = list(search.batches(1))
    search.step(batches[0], 1)
    before = copy.deepcopy(search.state_dict())
    train, valid, noise = batches[1]
    for half in (train, valid):
        if half is not None:
            half[0][0] = torch.nan
    values = search.step((train, valid, noise), 1)
    assert all(value.isnan() for value in values.values())
    after = search.state_dict()
    assert_unchanged(without_counters(after["supernet"]), without_counters(before["supernet"]))
    assert tensors(after["weight_optimizer"]["state"]) and len(tensors(after)) == len(tensors(before))
    for part in ("weight_optimizer", "architecture_optimizer"):
        assert all(map(torch.equal, tensors(after[part]["state"]), tensors(before[part]["state"])))
