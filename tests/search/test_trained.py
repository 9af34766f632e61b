"""The file of a trained network brings back all of it, or one line that says what is wrong with the file."""

from __future__ import annotations

import random
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dssp.derived.trained import NetworkUnavailable, load_trained, save_trained
from dssp.genotype import AnyGenotype
from dssp.network import DerivedNetwork
from dssp.spaces import DARTS
from tests.search.trained import ARCH, EVERY_OPERATION, small_trained


@pytest.mark.parametrize("genotype", [EVERY_OPERATION, ARCH], ids=["darts", "nasbench201"])
def test_file_brings_back_network_and_description(genotype: AnyGenotype, tmp_path: Path) -> None:
    saved, images = small_trained(genotype), torch.randn(4, 3, 9, 9)
    save_trained(tmp_path / "network.pt", saved)
    torch.manual_seed(99)
    found = load_trained(tmp_path / "network.pt")
    assert found.description() == saved.description() and found.genotype == genotype
    assert torch.equal(found.network(images), saved.network(images)) and not found.network.training
    assert list(tmp_path.iterdir()) == [tmp_path / "network.pt"]


def test_auxiliary_head_is_not_kept(tmp_path: Path) -> None:
    network = DerivedNetwork(DARTS, EVERY_OPERATION, channels=4, cells=3, classes=3, auxiliary=True).eval()
    save_trained(tmp_path / "network.pt", replace(small_trained(), network=network))
    images = torch.randn(2, 3, 9, 9)
    assert torch.equal(load_trained(tmp_path / "network.pt").network(images), network(images))


# ---- damaged and hostile files ---------------------------------------------------------------------------------------


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_trained(tmp_path / "network.pt", small_trained())
    return tmp_path / "network.pt"


def refusal(path: Path) -> str:
    with pytest.raises(NetworkUnavailable) as refused:
        load_trained(path)
    line = str(refused.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    return line


def test_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    assert "no such file; a retraining writes it" in refusal(tmp_path / "network.pt")


def flipped(data: bytes) -> bytes:
    middle = data.index(torch.tensor([4.0, 5.0, 6.0]).numpy().tobytes())
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda d: d[:-1], lambda d: d[: len(d) // 2], lambda d: b"", lambda d: b"x" * 99, flipped],
    ids=["one byte short", "half", "empty", "text", "one bit flipped"],
)
def test_damaged_file_is_one_line(path: Path, damage: Callable[[bytes], bytes]) -> None:
    path.write_bytes(damage(path.read_bytes()))
    assert "not the file of a trained network, or damaged" in refusal(path)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_reading_executes_nothing(path: Path) -> None:
    content = torch.load(path, weights_only=True)
    torch.save({**content, "space": Malicious(path.with_name("executed"))}, path)
    assert "more than tensors and plain values" in refusal(path)
    assert not path.with_name("executed").exists()


CLASSIFIER = "classifier.bias"


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("space", "darts2", "space: got 'darts2'"),
        ("space", "nasbench201", "genotype: space nasbench201 has cells normal"),
        ("genotype", {}, "genotype: expected an object"),
        ("channels", True, "channels: expected whole numbers"),
        ("channels", 10**9, "channels: expected whole numbers from 1 to 10000, got 1000000000"),
        ("channels", 5, "expected torch.float32"),
        ("cells", 10**9, "cells: expected whole numbers from 1 to 1000"),
        ("cells", 4, "state_dict: not that of its genotype"),
        ("classes", ["ant", "bee"], "state_dict: classifier."),
        ("classes", [1, 2, 3], "classes: expected names"),
        ("classes", [], "classes: expected names"),
        ("image_shape", [3, 9], "image_shape: expected channels, height and width"),
        ("image_shape", [3, 9, 0.5], "image_shape: expected whole numbers"),
        ("mean", torch.zeros(4), "mean: expected torch.float32 [3], got torch.float32 [4]"),
        ("std", torch.tensor([1.0, 0.0, 1.0]), "mean, std: expected finite numbers, std above 0"),
        ("std", 1.0, "std: expected Tensor, got float"),
        (CLASSIFIER, torch.zeros(3, dtype=torch.float64), f"{CLASSIFIER}: expected torch.float32 [3]"),
        (CLASSIFIER, torch.zeros(3).to_sparse(), f"{CLASSIFIER}: expected a dense tensor"),
        (CLASSIFIER, torch.zeros(3, device="meta"), f"{CLASSIFIER}: expected a dense tensor"),
        (CLASSIFIER, [0.0] * 3, f"{CLASSIFIER}: expected a tensor, got list"),
        ("state_dict", {1: torch.zeros(1)}, "state_dict: not that of its genotype"),
        ("extra", 1, "expected the entries space, genotype"),
    ],
)
def test_wrong_entry_is_named(path: Path, entry: str, value: Any, said: str) -> None:
    content = torch.load(path, weights_only=True)
    (content["state_dict"] if entry == CLASSIFIER else content)[entry] = value
    torch.save(content, path)
    assert said in refusal(path)


@pytest.mark.parametrize("seed", range(2))
def test_changed_pickle_with_right_checksums_is_read_or_refused(path: Path, seed: int) -> None:
    chance = random.Random(seed)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = (name for name in records if name.endswith("data.pkl"))
    for _ in range(60):
        changed = bytearray(records[pickled])
        changed[chance.randrange(len(changed))] = chance.randrange(256)
        with zipfile.ZipFile(path, "w") as archive:
            for name, record in records.items():
                archive.writestr(name, bytes(changed) if name == pickled else record)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of opcodes it does not know
            try:
                load_trained(path)
            except NetworkUnavailable as refused:
                assert "\n" not in str(refused)
