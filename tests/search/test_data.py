"""Splits are disjoint and complete, and batches are a pure function of (seed, epoch)."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dssp.data
from dssp.data import DataSet, DataUnavailable, FolderStore, MemoryStore, Split, load_data

Batches = list[tuple[torch.Tensor, torch.Tensor]]


def write_images(folder: Path, count: int, size: tuple[int, int] = (9, 7), suffix: str = ".png", tint: int = 0) -> None:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(tint)
    for index in range(count):
        noise = torch.randint(0, 100, (size[1], size[0], 3), generator=generator, dtype=torch.uint8) + tint
        Image.fromarray(noise.numpy()).save(folder / f"{index:03}{suffix}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes, 12 training and 2 test images each, PNG and JPEG."""
    for part, count in (("train", 12), ("test", 2)):
        write_images(tmp_path / part / "bird", count)
        write_images(tmp_path / part / "cat", count, suffix=".JPEG", tint=50)
        write_images(tmp_path / part / "dog", count, size=(8, 8), tint=100)
    return tmp_path


@pytest.fixture(params=["digits", "fake", "imagefolder"])
def load(request: pytest.FixtureRequest) -> Callable[[int], DataSet]:
    path = request.getfixturevalue("folder") if request.param == "imagefolder" else None
    size = None if request.param == "digits" else 8
    return lambda seed: load_data(request.param, data_path=path, image_size=size, seed=seed)


def batches(split: Split, size: int = 5, *, epoch: int = 0, seed: int = 0, train: bool = True) -> Batches:
    return list(split.batches(size, epoch=epoch, seed=seed, train=train))


def equal(left: Batches, right: Batches) -> bool:
    pairs = list(zip(left, right, strict=True))
    return all(torch.equal(a, b) for one, two in pairs for a, b in zip(one, two, strict=True))


def test_splits_are_disjoint_and_cover_everything(load: Callable[[int], DataSet]) -> None:
    data = load(0)
    parts = [data.train.indices, data.valid.indices, data.test.indices]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(len(data.train.labels)))
    assert torch.equal(torch.cat(parts[:2]).sort().values, data.train_valid.indices)


def test_halves_are_equal_in_size_and_in_classes(load: Callable[[int], DataSet]) -> None:
    data = load(3)
    assert 0 <= len(data.train) - len(data.valid) <= 1
    train, valid = (torch.bincount(s.labels[s.indices], minlength=len(data.classes)) for s in (data.train, data.valid))
    assert (train - valid).abs().max() <= 1


def test_seed_moves_the_halves_but_not_the_test_split_or_the_statistics(load: Callable[[int], DataSet]) -> None:
    one, two = load(0), load(1)
    assert not torch.equal(one.train.indices, two.train.indices)
    assert torch.equal(one.test.indices, two.test.indices)
    assert equal(batches(one.test, train=False), batches(two.test, train=False))


def test_same_seed_and_epoch_give_bit_equal_batches_in_another_load(load: Callable[[int], DataSet]) -> None:
    assert equal(batches(load(0).train, epoch=4, seed=9), batches(load(0).train, epoch=4, seed=9))


@pytest.mark.parametrize(("epoch", "seed"), [(5, 9), (4, 8), (9, 4)], ids=["epoch", "seed", "exchanged"])
def test_another_epoch_or_seed_gives_other_batches(load: Callable[[int], DataSet], epoch: int, seed: int) -> None:
    split = load(0).train
    assert not equal(batches(split, epoch=4, seed=9), batches(split, epoch=epoch, seed=seed))


def test_batches_leave_the_global_random_state_alone(load: Callable[[int], DataSet]) -> None:
    split = load(0).train
    before = torch.get_rng_state()
    batches(split)
    assert torch.equal(torch.get_rng_state(), before)


def test_batches_are_normalised_channels_last_floats_with_int64_labels(load: Callable[[int], DataSet]) -> None:
    data = load(0)
    images, labels = next(data.train.batches(6, epoch=0, seed=0, train=True))
    assert images.shape == (6, *data.image_shape) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert labels.shape == (6,) and labels.dtype == torch.int64
    everything = torch.cat([images for images, _ in batches(data.train_valid, train=False)])
    torch.testing.assert_close(everything.mean((0, 2, 3)), torch.zeros(data.image_shape[0]), atol=1e-4, rtol=0)
    torch.testing.assert_close(everything.std((0, 2, 3)), torch.ones(data.image_shape[0]), atol=2e-3, rtol=0)


def test_evaluation_yields_every_image_in_order() -> None:
    split = load_data("digits").valid
    images, labels = (torch.cat(part) for part in zip(*batches(split, 64, train=False), strict=True))
    expected = (split.store.pixels[split.indices].float() - split.mean) / split.std
    assert torch.equal(images, expected.permute(0, 3, 1, 2))
    assert torch.equal(labels, split.labels[split.indices])


def plain(count: int, padding: int, flip: bool, size: int = 6) -> Split:
    """Images whose every pixel tells its image, row and column."""
    image, row, column = torch.meshgrid(*(torch.arange(1, n + 1) for n in (count, size, size)), indexing="ij")
    pixels = torch.stack([image, row, column], dim=-1).to(torch.uint8)
    zero, one = torch.zeros(3), torch.ones(3)
    return Split("train", MemoryStore(pixels), torch.arange(count), torch.arange(count), zero, one, padding, flip)


@pytest.mark.parametrize(("batch_size", "sizes"), [(4, [4, 4]), (10, [10]), (11, [10]), (1, [1] * 10)])
def test_training_drops_the_last_batch_if_not_full_unless_it_is_the_only_one(batch_size: int, sizes: list[int]) -> None:
    seen = [labels for _, labels in batches(plain(10, 0, False), batch_size)]
    assert [len(labels) for labels in seen] == sizes
    assert len(torch.cat(seen).unique()) == sum(sizes)


def test_over_the_epochs_every_image_is_used() -> None:
    seen = {int(i) for epoch in range(20) for _, labels in batches(plain(10, 0, False), 4, epoch=epoch) for i in labels}
    assert seen == set(range(10))


def test_augmentation_shifts_within_the_padding_and_fills_with_zeros() -> None:
    padding, found = 2, set()
    for images, labels in batches(plain(200, padding, False), 50):
        for image, label in zip(images, labels, strict=True):
            inside = image[0] > 0
            assert (image[0][inside] == label + 1).all() and (image[:, ~inside] == 0).all()
            rows, columns = torch.nonzero(inside, as_tuple=True)
            shifts = (image[1][inside] - 1 - rows).unique(), (image[2][inside] - 1 - columns).unique()
            assert [len(shift) for shift in shifts] == [1, 1]
            down, right = (int(shift) for shift in shifts)
            assert inside.sum() == (6 - abs(down)) * (6 - abs(right))
            found.add((down, right))
    assert {down for down, _ in found} == {right for _, right in found} == set(range(-padding, padding + 1))


def test_flip_mirrors_about_half_of_the_images() -> None:
    ((images, _),) = batches(plain(200, 0, True), 200)
    columns = torch.arange(1.0, 7.0).expand(200, 6, 6)
    kept, mirrored = ((images[:, 2] == c).all((1, 2)) for c in (columns, columns.flip(2)))
    assert (kept ^ mirrored).all()
    assert 60 < mirrored.sum() < 140


def test_digits_are_never_mirrored() -> None:
    assert not load_data("digits").train.flip


def test_streamed_folder_yields_the_batches_of_the_folder_in_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_memory = load_data("imagefolder", data_path=folder, image_size=8)
    monkeypatch.setattr(dssp.data, "IN_MEMORY_BYTES", 0)
    streamed = load_data("imagefolder", data_path=folder, image_size=8, workers=3)
    assert isinstance(in_memory.train.store, MemoryStore) and isinstance(streamed.train.store, FolderStore)
    for train in (True, False):
        assert equal(batches(in_memory.train, 4, train=train), batches(streamed.train, 4, train=train))
    stream = streamed.train.batches(2, epoch=0, seed=0, train=True)
    next(stream)
    stream.close()  # stopping halfway must not hang


def test_folder_brings_its_own_test_split_and_sorted_classes(folder: Path) -> None:
    data = load_data("imagefolder", data_path=folder)
    assert data.classes == ("bird", "cat", "dog") and data.image_shape == (3, 32, 32)
    assert (len(data.train_valid), len(data.test)) == (36, 6)
    assert [int(label) for _, labels in batches(data.test, train=False) for label in labels] == [0, 0, 1, 1, 2, 2]


def test_val_folder_serves_as_test_split(folder: Path) -> None:
    (folder / "test").rename(folder / "val")
    assert len(load_data("imagefolder", data_path=folder, image_size=8).test) == 6


@pytest.mark.parametrize("nested", [True, False], ids=["train only", "classes only"])
def test_folder_without_test_images_gives_a_fixed_stratified_fifth(folder: Path, nested: bool) -> None:
    for path in (folder / "test").rglob("*.*"):
        path.unlink()
    for path in [*(folder / "test").iterdir(), folder / "test"]:
        path.rmdir()
    data = load_data("imagefolder", data_path=folder if nested else folder / "train", image_size=8, seed=5)
    assert (len(data.train_valid), len(data.test)) == (28, 8)
    assert torch.bincount(data.test.labels[data.test.indices]).tolist() in ([3, 3, 2], [3, 2, 3], [2, 3, 3])


def test_images_cover_the_square_without_distortion(tmp_path: Path) -> None:
    for name in ("a", "b"):
        folder = tmp_path / name
        folder.mkdir()
        for index in range(4):  # 16 wide, 8 high: black, then 8 columns of white in the centre, then black
            image = Image.new("L", (16, 8))
            image.paste(255, (4, 0, 12, 8))
            image.save(folder / f"{index}.png")
    data = load_data("imagefolder", data_path=tmp_path, image_size=8)
    assert (data.train.store.pixels == 255).all()


def test_sixteen_bit_images_keep_their_grey(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2):
            Image.fromarray(grey).save(tmp_path / name / f"{index}.png")
    data = load_data("imagefolder", data_path=tmp_path, image_size=8)
    assert torch.equal(data.train.store.pixels[0, :, :, 1], torch.from_numpy((grey >> 8).astype(np.uint8)))


def test_files_that_are_no_images_are_not_looked_at(folder: Path) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("no image")
    (folder / "train" / "cat" / "._001.JPEG").write_bytes(b"Mac OS keeps such things")
    (folder / "train" / ".cache").mkdir()
    assert len(load_data("imagefolder", data_path=folder, image_size=8).train_valid) == 36


def unavailable(name: str, path: Path | None) -> str:
    with pytest.raises(DataUnavailable) as raised:
        load_data(name, data_path=path)
    message = str(raised.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("content", [b"", b"no image", None], ids=["empty", "text", "truncated"])
def test_corrupt_image_is_named(folder: Path, content: bytes | None) -> None:
    path = folder / "train" / "dog" / "004.png"
    path.write_bytes(path.read_bytes()[:-40] if content is None else content)
    assert unavailable("imagefolder", folder).startswith(f"{path}: not a readable image")


def test_missing_folder_says_what_to_do(tmp_path: Path) -> None:
    assert "pass --data-path FOLDER" in unavailable("imagefolder", None)
    assert f"{tmp_path / 'nowhere'} is no folder" in unavailable("imagefolder", tmp_path / "nowhere")
    assert "holds 0 class folders" in unavailable("imagefolder", tmp_path)


def test_empty_class_and_unknown_test_class_are_named(folder: Path) -> None:
    write_images(folder / "test" / "fish", 1)
    assert f"{folder / 'test' / 'fish'} is no class of the training images" in unavailable("imagefolder", folder)
    (folder / "train" / "fish").mkdir()
    assert f"{folder / 'train' / 'fish'} holds no image" in unavailable("imagefolder", folder)


@pytest.mark.parametrize(
    ("name", "module", "install"),
    [("cifar10", "torchvision", 'pip install "dssp[vision]"'), ("digits", "sklearn", "pip install scikit-learn")],
)
def test_missing_package_says_how_to_install_it(
    name: str, module: str, install: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for loaded in [m for m in sys.modules if m == module or m.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    assert install in unavailable(name, None)


CIFAR_FILES = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "batches.meta", "label"),
    "cifar100": ("cifar-100-python", ["train"], "test", "meta", "fine_label"),
}


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_files_are_read_as_torchvision_reads_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("torchvision").datasets
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    folder, train, test, meta, key = CIFAR_FILES[name]
    (tmp_path / folder).mkdir()
    for number, file in enumerate([*train, test]):  # 20 images per file, in CIFAR's own layout: planes of 32x32
        planes = np.random.default_rng(number).integers(0, 256, (20, 3072), dtype=np.uint8)
        labels = {f"{key}s": [i % 10 for i in range(20)]}
        (tmp_path / folder / file).write_bytes(pickle.dumps({"data": planes, **labels}))
    (tmp_path / folder / meta).write_bytes(pickle.dumps({f"{key}_names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(dataset, "train_list", [[file, None] for file in train])  # None: any checksum
    monkeypatch.setattr(dataset, "test_list", [[test, None]])
    monkeypatch.setattr(dataset, "meta", {"filename": meta, "key": f"{key}_names", "md5": None})

    data = load_data(name, data_path=tmp_path)
    assert data.image_shape == (3, 32, 32) and data.classes == tuple("0123456789")
    assert (len(data.train_valid), len(data.test)) == (20 * len(train), 20)
    ((images, labels),) = batches(data.test, 20, train=False)
    own = dataset(tmp_path, train=False)
    expected = torch.stack([torch.from_numpy(np.array(own[i][0])).permute(2, 0, 1) for i in range(20)]) / 255
    mean, std = (torch.tensor(s)[:, None, None] for s in dssp.data.CIFAR_STATISTICS[name])
    torch.testing.assert_close(images, (expected - mean) / std)
    assert labels.tolist() == own.targets


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_missing_files_without_network_say_what_to_do(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchvision")
    for proxy in ("http_proxy", "https_proxy"):  # nothing listens there
        monkeypatch.setenv(proxy, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    message = unavailable(name, tmp_path)
    assert message.startswith(f"{name}: not in {tmp_path}") and "--data-path" in message


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="dataset: got 'mnist', expected digits"):
        load_data("mnist")
    with pytest.raises(ValueError, match="image_size: digits has a size of its own"):
        load_data("digits", image_size=16)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        batches(load_data("fake", image_size=4).train, 0)


def test_fake_images_depend_on_their_class() -> None:
    data = load_data("fake", image_size=8)
    assert (len(data.classes), data.image_shape, len(data.train_valid) + len(data.test)) == (10, (3, 8, 8), 1024)
    ((images, labels),) = batches(data.train, 1024, train=False)
    means = torch.stack([images[labels == label].mean(0) for label in range(10)])
    ((images, labels),) = batches(data.test, 1024, train=False)
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.9


# ---- cutout ----------------------------------------------------------------------------------------------------------


def interval(flags: torch.Tensor) -> tuple[int, int]:
    """(first, one after the last) of the True entries, which are neighbours."""
    found = flags.nonzero().flatten()
    assert torch.equal(found, torch.arange(int(found[0]), int(found[-1]) + 1))
    return int(found[0]), int(found[-1]) + 1


@pytest.mark.parametrize("side", [1, 4, 5, 8])
def test_cutout_sets_one_clipped_square_of_each_image_to_the_mean(side: int) -> None:
    split, size = load_data("fake", image_size=9).train, 9
    cut = torch.cat([images for images, _ in batches(replace(split, cutout=side), 64)])
    whole = torch.cat([images for images, _ in batches(split, 64)])
    squares = {(max(0, c - side // 2), min(size, c - side // 2 + side)) for c in range(size)}
    seen = set()
    for image, original in zip(cut, whole, strict=True):
        hole = (image == 0).all(0)  # no pixel of these images is the mean itself
        rows, columns = interval(hole.any(1)), interval(hole.any(0))
        assert hole.sum() == (rows[1] - rows[0]) * (columns[1] - columns[0])
        assert torch.equal(image, original.masked_fill(hole, 0.0))
        seen |= {("rows", *rows), ("columns", *columns)}
    assert seen == {(axis, *square) for axis in ("rows", "columns") for square in squares}
    assert cut.is_contiguous(memory_format=torch.channels_last)


def test_cutout_of_even_side_is_that_of_darts() -> None:
    """DARTS clips [y - length // 2, y + length // 2) to the image."""
    images = torch.ones(3, 2, 6, 7)
    found = dssp.data._cut_out(images, torch.tensor([[0, 0], [3, 3], [5 + 6, 6 + 7]]), 4)
    expected = torch.ones(3, 2, 6, 7)
    expected[0, :, 0:2, 0:2] = expected[1, :, 1:5, 1:5] = expected[2, :, 3:6, 4:7] = 0
    assert torch.equal(found, expected)


def test_cutout_is_a_function_of_seed_and_epoch_and_spares_evaluation() -> None:
    split = replace(load_data("fake", image_size=8).train, cutout=4)
    assert equal(batches(split, epoch=1), batches(split, epoch=1))
    assert not equal(batches(split, epoch=1), batches(split, epoch=2))
    assert equal(batches(split, train=False), batches(replace(split, cutout=0), train=False))
