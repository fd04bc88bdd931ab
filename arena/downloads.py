"""Public data sets that are not shipped: read from a folder, downloaded only when somebody asks (``arena data get``).

The folder is ``ARENA_DATA``, or ``data`` in the arena's home. It has torchvision's layout, so files that torchvision
downloaded elsewhere are found when ``ARENA_DATA`` names their folder. Importing this module imports no torch.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.datasets import Images
from arena.errors import ArenaError, unknown
from arena.folders import class_names, picture_files, pictures
from arena.home import home, lock

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"


@dataclass(frozen=True)
class Source:
    """One downloadable data set."""

    read: Callable[[Path, bool, bool], tuple[Tensor, Tensor]]
    """(root, training split?, download?) -> uint8 pictures (N, C, H, W) and labels (N,)."""
    n_classes: int
    files: tuple[str, ...]
    """What lies under the root when the set is there."""


def _torchvision(kind: str) -> Callable[[Path, bool, bool], tuple[Tensor, Tensor]]:
    def read(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
        import numpy as np
        import torch
        from torchvision import datasets

        split: dict[str, Any] = {"split": "train" if train else "test"} if kind == "SVHN" else {"train": train}
        found = getattr(datasets, kind)(str(root), download=download, **split)
        x = np.asarray(found.data)
        if x.ndim == 3:  # grey: N, H, W
            x = x[:, None]
        elif kind != "SVHN":  # N, H, W, C
            x = x.transpose(0, 3, 1, 2)
        y: np.ndarray = np.asarray(found.labels if kind == "SVHN" else found.targets, dtype=np.int64)
        return torch.from_numpy(np.array(x, order="C")), torch.from_numpy(np.array(y))

    return read


def _tiny(root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    """Read Tiny ImageNet; the labeled validation pictures are the test split, since the test labels are not public."""
    import torch

    folder = root / "tiny-imagenet-200"
    if download and not folder.is_dir():
        from torchvision.datasets.utils import download_and_extract_archive

        download_and_extract_archive(TINY_URL, str(root), md5=TINY_MD5)
    names = class_names(folder / "train")
    files: list[Path] = []
    labels: list[int] = []
    if train:
        for label, name in enumerate(names):
            found = picture_files(folder / "train" / name)
            files += found
            labels += [label] * len(found)
    else:
        for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
            file, name = line.split("\t")[:2]
            files.append(folder / "val" / "images" / file)
            labels.append(names.index(name))
    return pictures("data set 'tiny_imagenet'", files, channels=3), torch.tensor(labels, dtype=torch.int64)


SOURCES = {
    "mnist": Source(_torchvision("MNIST"), 10, ("MNIST",)),
    "fashion_mnist": Source(_torchvision("FashionMNIST"), 10, ("FashionMNIST",)),
    "cifar10": Source(_torchvision("CIFAR10"), 10, ("cifar-10-batches-py",)),
    "cifar100": Source(_torchvision("CIFAR100"), 100, ("cifar-100-python",)),
    "svhn": Source(_torchvision("SVHN"), 10, ("train_32x32.mat", "test_32x32.mat")),
    "tiny_imagenet": Source(_tiny, 200, ("tiny-imagenet-200",)),
}


def root() -> Path:
    """Return the folder of the data sets: ``ARENA_DATA``, or ``data`` in the arena's home. It need not exist."""
    named = os.environ.get("ARENA_DATA")
    return Path(named).expanduser().absolute() if named else home() / "data"


def present(name: str) -> bool:
    """Tell whether a data set's files are there; they are not opened."""
    return all((root() / file).exists() for file in SOURCES[name].files)


def read(name: str) -> Images:
    """Load a data set from the folder; never downloads.

    Raises:
        ArenaError: the files are missing or damaged; one line that says what to run or where to put them.
    """
    source, folder = SOURCES[name], root()
    if not present(name):
        raise ArenaError(
            f"data set '{name}' is not in {folder}: download it with: arena data get {name} (or put torchvision's "
            f"{' and '.join(source.files)} there, or name another folder by ARENA_DATA)"
        )
    return _load(name, folder, download=False)


def _load(name: str, folder: Path, download: bool) -> Images:
    source = SOURCES[name]
    try:
        x_train, y_train = source.read(folder, True, download)
        x_test, y_test = source.read(folder, False, download)
        for x, y in ((x_train, y_train), (x_test, y_test)):
            if len(x) != len(y) or not len(y) or x.shape[1:] != x_test.shape[1:]:
                raise ValueError(f"{len(x)} pictures of {tuple(x.shape[1:])} with {len(y)} labels")
            if int(y.min()) < 0 or int(y.max()) >= source.n_classes:
                raise ValueError(f"labels {int(y.min())} to {int(y.max())}, expected 0 to {source.n_classes - 1}")
    except Exception as e:  # torchvision, numpy, scipy and Pillow each have their own ways to refuse a damaged file
        why = " ".join(str(e).split()).replace(" You can use download=True to download it", "") or type(e).__name__
        if download:
            raise ArenaError(f"data set '{name}' could not be downloaded ({why}); nothing was kept") from None
        raise ArenaError(
            f"data set '{name}' in {folder} is incomplete or damaged ({why}); remove "
            f"{' and '.join(source.files)} there and run: arena data get {name}"
        ) from None
    return Images(name, x_train, y_train, x_test, y_test, source.n_classes)


def get(name: str) -> tuple[Path, bool]:
    """Download a data set unless it is there; return its folder and whether anything was downloaded.

    Files are unpacked and read in a folder beside and moved only when they are whole, so a kill leaves no half set.

    Raises:
        ArenaError: unknown name, no network, damaged files, or another process is at it.
    """
    if name not in SOURCES:
        raise unknown("data set to download", name, SOURCES)
    folder, source = root(), SOURCES[name]
    with lock(f"data-{name}"):
        if present(name):
            read(name)
            return folder, False
        part = folder / f".{name}.part"
        try:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            _load(name, part, download=True)
            for file in source.files:
                kept, old = part / file, folder / file
                if kept.is_dir():
                    for archive in kept.rglob("*.gz"):
                        archive.unlink()
                if old.is_dir():
                    shutil.rmtree(old)
                os.replace(kept, old)
        except OSError as error:
            raise ArenaError(f"{folder} cannot be written ({error.strerror or error})") from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder, True


# What the specs name: functions without arguments.


def mnist() -> Images:
    """Load MNIST, 60,000 and 10,000 scans of digits, 28x28 grey."""
    return read("mnist")


def fashion_mnist() -> Images:
    """Load Fashion-MNIST, 60,000 and 10,000 pictures of clothes, 28x28 grey."""
    return read("fashion_mnist")


def cifar10() -> Images:
    """Load CIFAR-10, 50,000 and 10,000 pictures of 10 classes, 32x32 RGB."""
    return read("cifar10")


def cifar100() -> Images:
    """Load CIFAR-100 with its 100 fine classes, 50,000 and 10,000 pictures, 32x32 RGB."""
    return read("cifar100")


def svhn() -> Images:
    """Load SVHN, 73,257 and 26,032 house-number digits, 32x32 RGB; the extra split is not used."""
    return read("svhn")


def tiny_imagenet() -> Images:
    """Load Tiny ImageNet, 100,000 pictures of 200 classes and the 10,000 validation pictures as test, 64x64 RGB."""
    return read("tiny_imagenet")
