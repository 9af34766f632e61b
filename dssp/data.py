"""Data sets: fixed, disjoint splits whose batches are a pure function of (seed, epoch)."""

from __future__ import annotations

import hashlib
import os
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

DEFAULT_IMAGE_SIZE = 32  # imagefolder and fake
IN_MEMORY_BYTES = 2 * 2**30  # larger image folders are decoded anew in every epoch
STATISTICS_IMAGES = 2048
TEST_SHARE = 5  # where a data set brings no test images, every fifth image of each class
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
FOLDER_LAYOUT = "expected train/<class>/* and test/<class>/* (or val/<class>/*), or only <class>/*"

# Per channel mean and standard deviation of the training images, in units of 0..255; the first row is DARTS' own.
CIFAR_STATISTICS = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}


class DataUnavailable(Exception):
    """A data set that is not there or cannot be read: one line with what is missing, where, and what to do."""


class ImageStore(Protocol):
    """Where the pixels of all images of a data set are."""

    def fetch(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        """Images `order` [n] in batches: uint8 [B, H, W, C] on the device of the data set."""
        ...


@dataclass(frozen=True)
class MemoryStore:
    """All pixels as one uint8 tensor [N, H, W, C] on the device."""

    pixels: Tensor

    def fetch(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        for chosen in order.to(self.pixels.device).split(batch_size):
            yield self.pixels[chosen]


@dataclass(frozen=True)
class FolderStore:
    """Image files, decoded by `workers` threads a few batches ahead (PIL releases the interpreter while it decodes).

    Every image becomes an RGB square of `size` pixels: resized to cover it, then cropped at the centre.
    """

    paths: tuple[Path, ...]
    size: int
    workers: int
    device: torch.device

    def fetch(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        waiting: deque[Future[Tensor]] = deque()
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        try:
            for chosen in order.split(batch_size):
                waiting.append(pool.submit(self._decode, chosen.tolist()))
                if len(waiting) > self.workers:
                    yield self._deliver(waiting.popleft().result())
            while waiting:
                yield self._deliver(waiting.popleft().result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _decode(self, chosen: list[int]) -> Tensor:
        return torch.stack([_decode_image(self.paths[index], self.size) for index in chosen])

    def _deliver(self, pixels: Tensor) -> Tensor:
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        return pixels.to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Split:
    """Some images of a data set. `len(split)` is their number.

    store, labels     all images of the data set and their classes, int64 [N] on the device
    indices           which of them belong to the split, int64 [n] on the CPU
    mean, std         per channel, float32 [C] on the device, in units of the stored pixels
    padding, flip     augmentation: shift by up to `padding` pixels (zeros move in); mirror every second image
    cutout            augmentation: side in pixels of the square that is cut out of each image; 0: none is
    """

    name: str
    store: ImageStore
    labels: Tensor
    indices: Tensor
    mean: Tensor
    std: Tensor
    padding: int
    flip: bool
    cutout: int = 0

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self,
        batch_size: int,
        *,
        epoch: int,
        seed: int,
        train: bool,
        first: int = 0,
        share: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches (images float32 [B, C, H, W] in channels_last, normalised; labels int64 [B]) on the device.

        train=True: shuffled and augmented, each a pure function of (seed, epoch) whatever the device; the last batch
        is dropped if it is not full, unless it is the only one. train=False: all images, in order, as they are.
        first: so many batches of a training epoch are left out, and not decoded either.
        share: (r, n) is part r of n of each training batch of n * batch_size images; together the n parts are what
        one process would have of that batch, augmentation included. Parts are of one size, also where all images are
        fewer than one batch: up to n - 1 are left out then.
        Raises DataUnavailable naming the file if an image file cannot be decoded, ValueError if there are fewer images
        than parts.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected at least 1")
        if not train:
            labels = self.labels[self.indices.to(self.labels.device)].split(batch_size)
            for pixels, targets in zip(self.store.fetch(self.indices, batch_size), labels, strict=True):
                yield self._normalised(pixels), targets
            return
        generator = keyed_generator(seed, epoch, self.name)
        part, parts = share
        used = len(self) - len(self) % (batch_size * parts) or len(self) - len(self) % parts
        if not used:
            raise ValueError(f"share: {len(self)} images of {self.name} cannot be divided among {parts}")
        mine = torch.arange(used).view(-1, parts, min(batch_size, used // parts))[:, part].flatten()
        order = self.indices[torch.randperm(len(self), generator=generator)[:used]]
        shifts = torch.randint(-self.padding, self.padding + 1, (used, 2), generator=generator)
        flips = (torch.rand(used, generator=generator) < 0.5) & self.flip
        centres = torch.randint(2**31, (used, 2), generator=generator)  # modulo the size, which only the images know
        if first * batch_size >= len(mine):
            return
        mine = mine[first * batch_size :]
        order, shifts, flips, centres = (drawn[mine] for drawn in (order, shifts, flips, centres))
        device = self.labels.device  # the plan of an epoch goes there in one piece
        plan = (self.labels[order.to(device)], shifts.to(device), flips.to(device), centres.to(device))
        planned = zip(*(each.split(batch_size) for each in plan), strict=True)
        for pixels, (targets, shift, flip, centre) in zip(self.store.fetch(order, batch_size), planned, strict=True):
            images = self._normalised(_shifted(pixels, shift, flip))
            yield _cut_out(images, centre, self.cutout) if self.cutout else images, targets

    def sample(self, count: int, *, seed: int) -> tuple[Tensor, Tensor]:
        """``count`` images as they are (or all, if there are fewer) and their labels, drawn at random by seed."""
        drawn = replace(self, indices=self._shuffled(seed)[:count])
        return next(drawn.batches(count, epoch=0, seed=seed, train=False))

    def without_sample(self, count: int, *, seed: int) -> Tensor:
        """Indices of the images that sample(count), and that of any smaller count, leaves."""
        return self._shuffled(seed)[count:]

    def _shuffled(self, seed: int) -> Tensor:
        return self.indices[torch.randperm(len(self), generator=keyed_generator(seed, "sample", self.name))]

    def _normalised(self, pixels: Tensor) -> Tensor:
        images = (pixels.to(torch.float32) - self.mean) / self.std
        return images.permute(0, 3, 1, 2)  # [B, H, W, C] in memory is channels_last


@dataclass(frozen=True)
class DataSet:
    """A data set in disjoint splits.

    A search learns from `train` and `valid` (halves of the training images, by seed, stratified) and never sees `test`,
    which does not depend on the seed. Retraining learns from `train_valid`, both halves, and reports on `test`.
    """

    name: str
    classes: tuple[str, ...]
    image_shape: tuple[int, int, int]
    train: Split
    valid: Split
    train_valid: Split
    test: Split

    def limited(self, count: int, *, seed: int) -> DataSet:
        """The same with ``count`` images in `train` and `valid` together, drawn at random by seed. All, if fewer."""

        def part(half: Split, size: int) -> Split:
            drawn = torch.randperm(len(half), generator=keyed_generator(seed, "limited", half.name))[:size]
            return replace(half, indices=half.indices[drawn].sort().values)

        return replace(self, train=part(self.train, count - count // 2), valid=part(self.valid, count // 2))


def load_data(
    name: str,
    *,
    data_path: str | Path | None = None,
    image_size: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    workers: int = 2,
) -> DataSet:
    """The data set called `name`.

    digits        scikit-learn's 1,797 images, 8x8, one channel; every fifth of a class is the test split
    cifar10, cifar100   through torchvision, downloaded into `data_path` (default ~/.cache/dssp); their own test images
    imagefolder   `data_path` with train/<class>/* and test/<class>/* (or val/), or only <class>/*: then a fixed fifth
                  of each class is the test split. Images become squares of `image_size` pixels (default 32). Kept in
                  memory on the device up to 2 GiB, decoded anew in every epoch by `workers` threads beyond.
    fake          1,024 random images of 10 classes with `image_size` pixels (default 32)

    Pixels are normalised per channel: CIFAR by the published statistics, the others by those of a fixed sample of up
    to 2,048 of their training images (both halves, so they do not depend on the seed).

    Raises DataUnavailable if the data are not there, ValueError if `name` or `image_size` is wrong.
    """
    device = torch.device(device)
    if name in ("digits", *CIFAR_STATISTICS) and image_size is not None:
        raise ValueError(f"image_size: {name} has a size of its own, expected None, got {image_size}")
    if name == "digits":
        return _load_digits(seed, device)
    if name == "fake":
        return _load_fake(image_size or DEFAULT_IMAGE_SIZE, seed, device)
    if name == "imagefolder":
        return _load_folder(data_path, image_size or DEFAULT_IMAGE_SIZE, seed, device, workers)
    if name in CIFAR_STATISTICS:
        return _load_cifar(name, Path(data_path) if data_path else Path.home() / ".cache" / "dssp", seed, device)
    raise ValueError(f"dataset: got {name!r}, expected digits, cifar10, cifar100, imagefolder or fake")


def _load_digits(seed: int, device: torch.device) -> DataSet:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataUnavailable("digits: scikit-learn is not installed; pip install scikit-learn") from None
    digits = load_digits()
    pixels = torch.from_numpy(digits.images.astype(np.uint8)).unsqueeze(-1)  # values 0..16
    labels = torch.from_numpy(digits.target.astype(np.int64))
    pool, test = _held_out(labels)
    classes = tuple(str(digit) for digit in digits.target_names)
    # A mirrored digit is no digit; of 8 pixels, one is a large shift already.
    return _assemble(
        "digits", classes, MemoryStore(pixels.to(device)), labels, pool, test, seed, device, padding=1, flip=False
    )


def _load_fake(size: int, seed: int, device: torch.device) -> DataSet:
    """Noise over a coarse pattern of 4x4 patches that the class decides."""
    images, classes, generator = 1024, 10, keyed_generator("fake images")
    labels = torch.arange(images) % classes
    patterns = torch.randint(0, 128, (classes, 4, 4, 3), generator=generator, dtype=torch.uint8)
    patch = torch.arange(size) * 4 // size
    noise = torch.randint(0, 128, (images, size, size, 3), generator=generator, dtype=torch.uint8)
    pixels = noise + patterns[:, patch][:, :, patch][labels]
    pool, test = _held_out(labels)
    names = tuple(str(label) for label in range(classes))
    return _assemble(
        "fake", names, MemoryStore(pixels.to(device)), labels, pool, test, seed, device, padding=size // 8, flip=True
    )


def _load_cifar(name: str, root: Path, seed: int, device: torch.device) -> DataSet:
    try:
        from torchvision import datasets
    except ImportError:
        raise DataUnavailable(f'{name}: torchvision is not installed; pip install "dssp[vision]"') from None
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        learn, test = (dataset(str(root), train=train, download=True) for train in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a damaged archive is a RuntimeError
        raise DataUnavailable(
            f"{name}: not in {root} and the download failed ({error}); connect this machine, or pass --data-path "
            "with the folder where torchvision put it on another one"
        ) from error
    pixels = torch.from_numpy(np.concatenate([learn.data, test.data]))
    labels = torch.tensor(learn.targets + test.targets)
    pool, held_out = torch.arange(len(labels)).split([len(learn), len(test)])
    mean, std = (255 * torch.tensor(channels) for channels in CIFAR_STATISTICS[name])
    return _assemble(
        name,
        tuple(learn.classes),
        MemoryStore(pixels.to(device)),
        labels,
        pool,
        held_out,
        seed,
        device,
        padding=4,
        flip=True,
        statistics=(mean, std),
    )


def _load_folder(data_path: str | Path | None, size: int, seed: int, device: torch.device, workers: int) -> DataSet:
    if data_path is None:
        raise DataUnavailable(f"imagefolder: no folder given; pass --data-path FOLDER, {FOLDER_LAYOUT}")
    root = Path(data_path)
    if not root.is_dir():
        raise DataUnavailable(f"imagefolder: {root} is no folder; pass --data-path FOLDER, {FOLDER_LAYOUT}")
    learn = root / "train" if (root / "train").is_dir() else root
    test = next((root / part for part in ("test", "val") if learn != root and (root / part).is_dir()), None)
    classes = tuple(folder.name for folder in _folders(learn))
    if len(classes) < 2:
        raise DataUnavailable(
            f"imagefolder: {learn} holds {len(classes)} class folders, at least 2 needed; {FOLDER_LAYOUT}"
        )
    paths, labels = _list_images(learn, classes)
    pool, held_out = torch.arange(len(paths)), torch.arange(0)
    if test is None:
        pool, held_out = _held_out(labels)
    else:
        test_paths, test_labels = _list_images(test, classes)
        held_out = torch.arange(len(paths), len(paths) + len(test_paths))
        paths, labels = paths + test_paths, torch.cat([labels, test_labels])
    files = FolderStore(tuple(paths), size, max(workers, 1), device)
    fits = len(paths) * size * size * 3 <= IN_MEMORY_BYTES
    store = MemoryStore(_decode_all(files)) if fits else files
    return _assemble("imagefolder", classes, store, labels, pool, held_out, seed, device, padding=size // 8, flip=True)


def _assemble(
    name: str,
    classes: tuple[str, ...],
    store: ImageStore,
    labels: Tensor,
    pool: Tensor,
    test: Tensor,
    seed: int,
    device: torch.device,
    *,
    padding: int,
    flip: bool,
    statistics: tuple[Tensor, Tensor] | None = None,
) -> DataSet:
    """Halve `pool` into train and valid, by seed and stratified, and normalise by its statistics."""
    if len(pool) < 2 or len(test) < 1:
        raise DataUnavailable(f"{name}: {len(pool)} training and {len(test)} test images, at least 2 and 1 needed")
    if wrong := ((labels < 0) | (labels >= len(classes))).nonzero().flatten().tolist():
        raise DataUnavailable(
            f"{name}: image {wrong[0]} has label {labels[wrong[0]]}, expected 0 to {len(classes) - 1}; mend its labels"
        )
    order = pool[_stratified(labels[pool], keyed_generator(seed, "halves"))]
    parts = {"train": order[0::2], "valid": order[1::2], "train_valid": pool, "test": test}
    mean, std = statistics or _statistics(store, pool)
    mean, std, labels = mean.to(device), std.to(device), labels.to(device)
    splits = {
        part: Split(part, store, labels, indices.sort().values, mean, std, padding, flip)
        for part, indices in parts.items()
    }
    _, height, width, channels = next(store.fetch(pool[:1], 1)).shape
    return DataSet(name, classes, (channels, height, width), **splits)


def keyed_generator(*key: int | str, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on every part of `key`: (1, 2) and (2, 1) are unrelated."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, "big"))


def _stratified(labels: Tensor, generator: torch.Generator) -> Tensor:
    """A random order of all images, class after class: every n-th of it has its share of each class."""
    shuffled = torch.randperm(len(labels), generator=generator)
    return shuffled[labels[shuffled].argsort(stable=True)]


def _held_out(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(training images, test images): the same fifth of each class whatever the seed."""
    order = _stratified(labels, keyed_generator("test split"))
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    is_test[order[::TEST_SHARE]] = True
    return torch.nonzero(~is_test).flatten(), torch.nonzero(is_test).flatten()


def _statistics(store: ImageStore, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation per channel over a fixed sample of `pool`, float32 [C] each."""
    sample = pool[:: -(-len(pool) // STATISTICS_IMAGES)]
    moments = [
        torch.stack([values.mean((0, 1, 2)), values.square().mean((0, 1, 2))]) * len(values)
        for values in (pixels.double() for pixels in store.fetch(sample, 64))
    ]
    mean, square = torch.stack(moments).sum(0) / len(sample)
    std = (square - mean.square()).clamp_min(0).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _shifted(pixels: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Each image mirrored where flips [B] says so, moved by its shifts [B, 2] (rows, columns); zeros move in."""
    batch, height, width, _ = pixels.shape
    device = pixels.device
    rows = torch.arange(height, device=device) + shifts[:, :1]  # [B, H]
    columns = torch.arange(width, device=device) + shifts[:, 1:]  # [B, W]
    inside = ((rows >= 0) & (rows < height))[:, :, None] & ((columns >= 0) & (columns < width))[:, None, :]
    columns = torch.where(flips[:, None], width - 1 - columns, columns)
    rows, columns = rows.clamp(0, height - 1), columns.clamp(0, width - 1)
    image = torch.arange(batch, device=device)[:, None, None]
    return pixels[image, rows[:, :, None], columns[:, None, :]] * inside.unsqueeze(-1)


def _cut_out(images: Tensor, centres: Tensor, side: int) -> Tensor:
    """Sets a square of side x side pixels of each image to 0, the mean pixel, in place; returns the images.

    The square lies around centres [B, 2] (row and column, modulo the size) and may reach beyond the border: Cutout,
    DeVries and Taylor 2017, arXiv:1708.04552. Of an even side, one pixel more lies before the centre, as in DARTS.
    """
    masks = []
    for axis, size in enumerate(images.shape[2:]):
        offsets = torch.arange(size, device=images.device) - centres[:, axis, None] % size  # [B, size]
        masks.append((offsets >= -(side // 2)) & (offsets < side - side // 2))
    return images.masked_fill_((masks[0][:, :, None] & masks[1][:, None, :])[:, None], 0.0)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))


def _list_images(root: Path, classes: tuple[str, ...]) -> tuple[list[Path], Tensor]:
    """All image files below root/<class>, sorted, and their labels."""
    paths: list[Path] = []
    labels: list[int] = []
    for folder in _folders(root):
        if folder.name not in classes:
            raise DataUnavailable(f"imagefolder: {folder} is no class of the training images ({', '.join(classes)})")
        found = sorted(
            Path(parent, file)
            for parent, _, files in os.walk(folder)
            for file in files
            if os.path.splitext(file)[1].lower() in SUFFIXES and not file.startswith(".")
        )
        if not found:
            raise DataUnavailable(f"imagefolder: {folder} holds no image; remove the folder or put images there")
        paths += found
        labels += [classes.index(folder.name)] * len(found)
    return paths, torch.tensor(labels, dtype=torch.int64)


def _decode_all(files: FolderStore) -> Tensor:
    pixels = torch.empty((len(files.paths), files.size, files.size, 3), dtype=torch.uint8, device=files.device)
    first = 0
    for batch in files.fetch(torch.arange(len(files.paths)), 256):
        pixels[first : first + len(batch)] = batch
        first += len(batch)
    return pixels


def _decode_image(path: Path, size: int) -> Tensor:
    """The image file as uint8 [size, size, 3]."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path) as image:
            if image.mode.startswith("I"):  # 16 bits per pixel, which convert() would cut off at 255
                rgb = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
            else:
                rgb = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataUnavailable(f"{path}: not a readable image ({error}); replace or remove it") from error
    if rgb.size != (size, size):
        rgb = ImageOps.fit(rgb, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(rgb))
