"""Pictures from files: a folder a split, a folder a class (torchvision's ImageFolder layout).

Importing this module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from arena.datasets import Images
from arena.errors import ArenaError, nearest

if TYPE_CHECKING:
    from torch import Tensor

#: Files taken for pictures, by the end of their names.
ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".ppm", ".pgm", ".webp", ".tif", ".tiff")
#: Pillow's modes that hold 8 bits a channel and turn into grey or RGB without loss or guessing.
GREY, COLOUR = ("1", "L"), ("RGB", "P")


def from_folder(path: Path) -> Images:
    """Load ``train/CLASS/PICTURE`` and ``test/CLASS/PICTURE``, all of one size, as uint8.

    Labels number the folders of ``train`` by name; pictures follow in the order of class and file name, at any depth.
    One channel if every picture is grey, else three.

    Raises:
        ArenaError: a missing or empty folder, a class of ``test`` that ``train`` lacks, a picture that cannot be read,
            has another size than the first, or more than 8 bits or an alpha channel; names the first such file.
    """
    import torch

    where = f"data set 'folder:{path}'"
    for folder in (path, path / "train", path / "test"):
        if not folder.is_dir():
            raise ArenaError(f"{where}: no folder '{folder}'; expected train/CLASS/PICTURE and test/CLASS/PICTURE")
    names = class_names(path / "train")
    files: dict[str, list[Path]] = {}
    labels: dict[str, list[int]] = {}
    for split in ("train", "test"):
        files[split], labels[split] = [], []
        for name in class_names(path / split):
            if name not in names:
                raise ArenaError(f"{where}: class '{name}' is in test but not in train{nearest(name, names)}")
            found = picture_files(path / split / name)
            files[split] += found
            labels[split] += [names.index(name)] * len(found)
        if not files[split]:
            raise ArenaError(f"{where}: no pictures under {split}/CLASS/ ({', '.join(ENDINGS)})")
    x = pictures(where, files["train"] + files["test"])
    cut = len(files["train"])
    y_train, y_test = (torch.tensor(labels[split], dtype=torch.int64) for split in ("train", "test"))
    return Images(f"folder:{path.resolve().name}", x[:cut], y_train, x[cut:], y_test, max(len(names), 2))


def class_names(folder: Path) -> list[str]:
    """Return the names of the folders inside, sorted; hidden ones are left out."""
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def picture_files(folder: Path) -> list[Path]:
    """Return the pictures in a folder at any depth, sorted by path; hidden ones are left out."""
    found = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and not p.name.startswith("."))
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix())


def pictures(where: str, paths: Sequence[Path], channels: int | None = None) -> Tensor:
    """Read pictures of one size, uint8 (N, C, H, W); ``channels`` None: 1 if all are grey, else 3.

    Raises:
        ArenaError: see ``from_folder``; the message begins with ``where``.
    """
    import numpy as np
    import torch
    from PIL import Image

    size: tuple[int, int] | None = None
    grey = True
    for path in paths:  # headers only
        try:
            with Image.open(path) as picture:
                seen, mode = picture.size, picture.mode
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
            raise _unreadable(where, path, e) from None
        size = size or seen
        if seen != size:
            raise ArenaError(
                f"{where}: '{path}' has {seen[0]}x{seen[1]} pixels, expected {size[0]}x{size[1]} like '{paths[0]}'"
            )
        if mode not in GREY + COLOUR:
            raise ArenaError(f"{where}: '{path}' is of mode {mode}, expected 8-bit grey or RGB")
        grey = grey and mode in GREY
    assert size is not None
    channels = channels or (1 if grey else 3)
    x = np.empty((len(paths), size[1], size[0], channels), np.uint8)
    for row, path in zip(x, paths, strict=True):
        try:
            with Image.open(path) as picture:
                row[...] = np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(row.shape)
        except (OSError, ValueError, SyntaxError) as e:
            raise _unreadable(where, path, e) from None
    return torch.from_numpy(x).permute(0, 3, 1, 2).contiguous()


def _unreadable(where: str, path: Path, error: Exception) -> ArenaError:
    why = " ".join(str(error).split()) or type(error).__name__
    return ArenaError(f"{where}: '{path}' cannot be read as a picture ({why})")
