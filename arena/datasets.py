"""Data sets as ``Images``: the embedded ``digits``, files (``npz:FILE``, ``folder:DIR``), public and plugins' sets.

Pictures stay uint8 where they come as uint8 and become float32 in [0, 1] a batch at a time, on the device. Importing
this module does not import torch: it is an entry point, loaded for every ``arena list``.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arena.errors import ArenaError
from arena.hookspecs import hookimpl
from arena.plugins import Registry
from arena.specs import DatasetSpec, load

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

#: Seed of built-in splits and of the evaluation order: a constant of arena, never an option.
SPLIT_SEED = 20260
STRATIFIED = "stratified-v1"
FILE_ORDER = "file-order"


@dataclass(frozen=True)
class Images:
    """A data set in memory, on the CPU."""

    name: str
    x_train: Tensor
    """(N, C, H, W), uint8 or float32 in [0, 1]."""
    y_train: Tensor
    """(N,) int64."""
    x_test: Tensor
    y_test: Tensor
    n_classes: int
    keep_order: bool = False
    """Evaluate in file order (``npz:``) instead of the fixed stratified permutation."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        c, h, w = self.x_test.shape[1:]
        return int(c), int(h), int(w)

    @cached_property
    def sha256(self) -> str:
        """Hash over all pixels and labels of both splits."""
        digest = hashlib.sha256()
        for tensor in (self.x_train, self.y_train, self.x_test, self.y_test):
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype};".encode())
            digest.update(tensor.contiguous().numpy().data)  # the pixels themselves, no copy
        return digest.hexdigest()

    @property
    def subset_rule(self) -> str:
        """How ``-n N`` chooses points."""
        return FILE_ORDER if self.keep_order else STRATIFIED

    def subset(self, n: int) -> Tensor:
        """Return the test indices of the first ``n`` points, int64 (n,); a smaller n is inside a larger one.

        Raises:
            ArenaError: n below 1 or above the size of the test split.
        """
        size = len(self.y_test)
        if not 1 <= n <= size:
            raise ArenaError(f"-n {n}: expected 1 to {size}, the test points of data set '{self.name}'")
        return self._order[:n]

    @cached_property
    def _order(self) -> Tensor:
        import torch

        if self.keep_order:
            return torch.arange(len(self.y_test))
        return torch.from_numpy(stratified(self.y_test.numpy()))

    def missing_classes(self, index: Tensor) -> list[int]:
        """Return the classes that no point of ``index`` has."""
        present = set(self.y_test[index].tolist())
        return [c for c in range(self.n_classes) if c not in present]


def to_float(x: Tensor) -> Tensor:
    """Turn stored pixels into float32 in [0, 1]."""
    import torch

    return x.to(torch.float32) / 255 if x.dtype == torch.uint8 else x.to(torch.float32)


def stratified(labels: np.ndarray, seed: int = SPLIT_SEED) -> np.ndarray:
    """Permute so that every prefix holds each class in proportion, as nearly as whole points allow; int64 (N,).

    Within a class the order is random under ``seed``; the i-th of m points of a class is placed at (i + u) / m of the
    whole, with one u in (0, 1) a class, so prefixes are nested and balanced.
    """
    import numpy as np

    generator = np.random.Generator(np.random.PCG64(seed))
    place = np.empty(len(labels))
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        place[members] = (np.arange(len(members)) + generator.uniform(0.2, 0.8)) / len(members)
    return np.argsort(place, kind="stable").astype(np.int64)


def digits() -> Images:
    """Load scikit-learn's 1,797 real 8x8 scans (UCI optical recognition), 16 grey levels, split 1,197 / 600."""
    import numpy as np
    import torch

    # scikit-learn's own file, read directly: importing sklearn.datasets takes a second, reading it ten milliseconds.
    found = importlib.util.find_spec("sklearn")
    if found is None or not found.submodule_search_locations:
        raise ArenaError("data set 'digits' comes with scikit-learn, which is not installed")
    raw = np.loadtxt(Path(found.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.rint(raw[:, :-1].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    labels = raw[:, -1].astype(np.int64)
    order = stratified(labels)
    test, train = order[:600], order[600:]
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels)
    return Images("digits", x[train], y[train], x[test], y[test], 10)


def from_npz(path: Path) -> Images:
    """Load ``x_train, y_train, x_test, y_test`` from a file; pictures uint8 NHWC or float NCHW in [0, 1].

    Raises:
        ArenaError: missing or corrupt file, missing arrays, wrong shapes, types or ranges; names the array.
    """
    import numpy as np
    import torch

    where = f"data set 'npz:{path}'"
    try:
        with np.load(path, allow_pickle=False) as file:
            wanted = ("x_train", "y_train", "x_test", "y_test")
            lacking = [k for k in wanted if k not in file]
            if lacking:
                held = ", ".join(file.files) or "nothing"
                raise ArenaError(f"{where}: lacks {', '.join(lacking)}; it holds {held}")
            arrays = {k: file[k] for k in wanted}
    except FileNotFoundError:
        raise ArenaError(f"{where}: no such file") from None
    except ArenaError:
        raise
    except Exception as e:  # zip, zlib and numpy each have their own ways to refuse a damaged file
        why = " ".join(str(e).split()) or type(e).__name__
        if "pickle" in why:  # numpy's advice to load it all the same is not ours
            why = "no zip archive of plain arrays"
        raise ArenaError(f"{where}: not a readable npz file ({why})") from None
    made: dict[str, Any] = {}
    for split in ("train", "test"):
        made[f"x_{split}"] = _pictures(where, f"x_{split}", arrays[f"x_{split}"])
        made[f"y_{split}"] = _labels(where, f"y_{split}", arrays[f"y_{split}"], len(made[f"x_{split}"]))
    if made["x_train"].shape[1:] != made["x_test"].shape[1:]:
        shapes = tuple(made["x_train"].shape[1:]), tuple(made["x_test"].shape[1:])
        raise ArenaError(f"{where}: x_train holds {shapes[0]} pictures, x_test {shapes[1]}")
    if not len(made["x_test"]):
        raise ArenaError(f"{where}: x_test is empty")
    top = int(max(int(y.max()) for y in (made["y_train"], made["y_test"]) if y.numel()))
    tensors = {k: torch.from_numpy(v) if not isinstance(v, torch.Tensor) else v for k, v in made.items()}
    return Images(f"npz:{path.name}", **tensors, n_classes=max(top + 1, 2), keep_order=True)


def _pictures(where: str, key: str, x: np.ndarray) -> Tensor:
    import numpy as np
    import torch

    if x.ndim != 4:
        raise ArenaError(f"{where}: {key} has shape {x.shape}, expected 4 dimensions (uint8 NHWC or float NCHW)")
    if x.dtype == np.uint8:
        if x.shape[3] > 4 and x.shape[1] <= 4:
            raise ArenaError(f"{where}: {key} has shape {x.shape}, uint8 pictures are expected as N, H, W, C")
        return torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
    if x.dtype.kind != "f":
        raise ArenaError(f"{where}: {key} is {x.dtype}, expected uint8 NHWC or float NCHW in [0, 1]")
    if x.shape[1] > 4 and x.shape[3] <= 4:
        raise ArenaError(f"{where}: {key} has shape {x.shape}, float pictures are expected as N, C, H, W")
    if not np.isfinite(x).all() or (x.size and (x.min() < 0 or x.max() > 1)):
        low, high = (np.nanmin(x), np.nanmax(x)) if x.size else (0, 0)
        raise ArenaError(f"{where}: {key} runs from {low:g} to {high:g}, expected finite values in [0, 1]")
    return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))


def _labels(where: str, key: str, y: np.ndarray, n: int) -> Tensor:
    import numpy as np
    import torch

    if y.shape != (n,) or y.dtype.kind not in "iu":
        raise ArenaError(f"{where}: {key} is {y.dtype} {y.shape}, expected integers of shape ({n},)")
    if n and y.min() < 0:
        raise ArenaError(f"{where}: {key} holds the label {y.min()}, expected 0 and up")
    return torch.from_numpy(y.astype(np.int64))


NPZ, FOLDER = "npz:", "folder:"


def describe(name: str, registry: Registry) -> DatasetSpec:
    """Find a data set's spec by name; ``npz:FILE`` and ``folder:DIR`` are described without being read.

    Raises:
        ArenaError: unknown name.
    """
    if name.startswith(NPZ):
        return DatasetSpec("npz", "pictures from a file", "arena.datasets:from_npz", backbone="cnn")
    if name.startswith(FOLDER):
        return DatasetSpec("folder", "pictures from a folder", "arena.folders:from_folder")
    spec: DatasetSpec = registry.get("dataset", name).spec
    return spec


def open_images(name: str, registry: Registry) -> Images:
    """Load a data set by name, ``npz:FILE`` or ``folder:DIR``. Never downloads.

    Raises:
        ArenaError: unknown name, or files that are missing or unreadable.
    """
    for prefix in (NPZ, FOLDER):
        if name.startswith(prefix):
            made: Images = load(describe(name, registry).load)(Path(name.removeprefix(prefix)).expanduser())
            return made
    found = registry.get("dataset", name)
    try:
        images = load(found.spec.load)()
    except ArenaError:
        raise
    except Exception as e:  # a plugin's code: named
        said = " ".join(str(e).split())
        raise ArenaError(
            f"data set '{name}' of {found.origin}: {found.spec.load} raised {type(e).__name__}: {said}"
        ) from e
    if not isinstance(images, Images):
        got = type(images).__name__
        raise ArenaError(
            f"data set '{name}' of {found.origin}: {found.spec.load} returned {got}, expected arena.datasets.Images"
        )
    return images


@hookimpl
def arena_register_datasets() -> Iterable[DatasetSpec]:
    """Offer the embedded default and the public sets of ``arena.downloads``."""
    yield DatasetSpec(
        "digits",
        "1,797 real scans of handwritten digits, 8x8 grey (UCI, embedded in scikit-learn); the offline default",
        "arena.datasets:digits",
        norm="Linf",
        eps="0.2",
        backbone="cnn",
        cpu=True,
    )
    for name, summary, eps, backbone in (
        ("mnist", "70,000 scans of handwritten digits, 28x28 grey", "0.3", "cnn"),
        ("fashion_mnist", "70,000 pictures of clothes, 10 classes, 28x28 grey", "0.1", "resnet18"),
        ("cifar10", "60,000 pictures of 10 classes, 32x32 RGB", "8/255", "resnet18"),
        ("cifar100", "60,000 pictures of 100 classes, 32x32 RGB", "8/255", "resnet18"),
        ("svhn", "99,289 digits of house numbers, 32x32 RGB", "8/255", "resnet18"),
        ("tiny_imagenet", "110,000 pictures of 200 classes, 64x64 RGB; its validation set tests", "8/255", "resnet18"),
    ):
        summary += f" (arena data get {name})"
        yield DatasetSpec(name, summary, f"arena.downloads:{name}", norm="Linf", eps=eps, backbone=backbone)
