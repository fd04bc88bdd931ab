"""Verified breaks: on disk while a match is played, in an npz beside its result, read back to be verified."""

from __future__ import annotations

import hashlib
import math
import shutil
import tempfile
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from arena.errors import ArenaError
from arena.home import atomic_file, home
from arena.points import Rows, spans

#: Largest unpacked examples file that is read, bytes.
LIMIT = 8 * 2**30
#: Breaks that are in memory at a time when they are written.
CHUNK = 256


class Filed:
    """Images (M, C, H, W) in a file, float32, read when they are asked for."""

    def __init__(self, file: IO[bytes] | None, start: int, image: Sequence[int], places: Sequence[int]) -> None:
        """Take an open file whose images begin at byte ``start``; ``places`` (M,) says which of them are meant."""
        self._file, self._start, self._image, self._places = file, start, tuple(image), places

    @property
    def shape(self) -> Sequence[int]:
        """(M, C, H, W)."""
        return (len(self), *self._image)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Return the images of a slice, float32 (K, C, H, W), on the CPU."""
        read, size = [], 4 * math.prod(self._image)
        for place in self._places[rows]:
            assert self._file is not None
            self._file.seek(self._start + place * size)
            read.append(np.frombuffer(self._file.read(size), dtype="<f4").reshape(self._image))
        return torch.from_numpy(np.stack(read) if read else np.empty((0, *self._image), "<f4"))


class Breaks:
    """The first verified break of each point of a match, in a file that no name leads to and no kill leaves behind."""

    def __init__(self, folder: Path, image: Sequence[int]) -> None:
        """Begin with none; the file is made in ``folder`` when there is one. ``image`` is (C, H, W)."""
        self._folder, self._image = folder, tuple(image)
        self._size = 4 * math.prod(self._image)
        self._place: dict[int, int] = {}
        self._file: IO[bytes] | None = None

    def __len__(self) -> int:
        return len(self._place)

    @property
    def shape(self) -> Sequence[int]:
        """(M, C, H, W)."""
        return (len(self), *self._image)

    @property
    def points(self) -> list[int]:
        """Positions in the match, (M,), in ascending order."""
        return sorted(self._place)

    def add(self, rows: Tensor, x_adv: Tensor) -> None:
        """Put away what breaks points (K, C, H, W), by their positions (K,); a point that has a break keeps it.

        Raises:
            ArenaError: it cannot be written.
        """
        fresh = [(k, int(row)) for k, row in enumerate(rows.tolist()) if int(row) not in self._place]
        try:
            if fresh and self._file is None:
                self._folder.mkdir(parents=True, exist_ok=True)
                self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 - open as long as the match
            for k, row in fresh:
                assert self._file is not None
                self._file.seek(len(self._place) * self._size)
                self._file.write(_pixels(x_adv[k]).tobytes())
                self._place[row] = len(self._place)
        except OSError as error:
            raise ArenaError(f"breaks cannot be kept in {self._folder} ({error.strerror or error})") from None

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Return the breaks of a slice of ``points``, float32 (K, C, H, W), on the CPU."""
        return Filed(self._file, 0, self._image, [self._place[k] for k in self.points])[rows]


def _pixels(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.detach().cpu().numpy(), dtype="<f4")


def examples_hash(x_adv: Rows | np.ndarray, index: np.ndarray) -> str:
    """Hash over the uncompressed arrays (M, C, H, W) and (M,), so that recompressing a file does not change it."""
    return _hashed(x_adv.shape, _chunks(x_adv), index)


def _chunks(x_adv: Rows | np.ndarray) -> Iterator[np.ndarray]:
    for span in spans(len(x_adv), CHUNK):
        some = x_adv[span]
        yield _pixels(some) if isinstance(some, Tensor) else np.ascontiguousarray(some, dtype="<f4")


def _hashed(shape: Sequence[int], chunks: Iterable[np.ndarray], index: np.ndarray) -> str:
    digest = hashlib.sha256()
    digest.update(f"{tuple(shape)};".encode())
    for chunk in chunks:
        digest.update(chunk.tobytes())
    digest.update(f"{index.shape};".encode())
    digest.update(np.ascontiguousarray(index, dtype="<i8").tobytes())
    return digest.hexdigest()


def keep_examples(name: str, x_adv: Rows, index: Tensor) -> dict[str, str]:
    """Write the verified breaks (M, C, H, W) with data-set indices (M,); return the record's ``examples``.

    ``name`` is the result's id, or says which match was stopped.
    """
    rows = index.cpu().numpy().astype("<i8")
    path = home() / "examples" / f"{name}.npz"
    with atomic_file(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:

        def written() -> Iterator[np.ndarray]:
            with archive.open("x_adv.npy", "w", force_zip64=True) as member:
                header = {"descr": "<f4", "fortran_order": False, "shape": tuple(x_adv.shape)}
                np.lib.format.write_array_header_1_0(member, header)
                for chunk in _chunks(x_adv):
                    member.write(chunk.tobytes())
                    yield chunk

        sha256 = _hashed(x_adv.shape, written(), rows)
        with archive.open("index.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array(member, rows, allow_pickle=False)
    return {"file": str(path.relative_to(home())), "sha256": sha256}


def drop_examples(name: str) -> None:
    """Forget what ``keep_examples`` wrote under a name."""
    (home() / "examples" / f"{name}.npz").unlink(missing_ok=True)


def read_examples(path: Path) -> tuple[Rows, Tensor]:
    """Read ``x_adv`` float32 (M, C, H, W) and ``index`` int64 (M,); sizes are checked before anything is unpacked.

    ``x_adv`` is unpacked into a file that no name leads to.

    Raises:
        ArenaError: missing, corrupt, oversized or malformed file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(i.file_size for i in archive.infolist())
            if size > LIMIT:
                raise ArenaError(f"{path}: unpacks to {size / 2**30:.1f} GiB, expected at most {LIMIT / 2**30:.0f}")
            with np.load(path, allow_pickle=False) as file:
                lacking = [k for k in ("x_adv", "index") if k not in file]
                if lacking:
                    held = ", ".join(file.files) or "nothing"
                    raise ArenaError(f"{path}: lacks {', '.join(lacking)}; it holds {held}")
                index = file["index"]
                dtype, x_adv = _unpacked(archive) or _loaded(file["x_adv"])
    except FileNotFoundError:
        raise ArenaError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as e:
        raise ArenaError(f"{path}: not a readable npz file ({e})") from None
    if dtype != np.float32 or len(x_adv.shape) != 4:
        raise ArenaError(f"{path}: x_adv is {dtype} {tuple(x_adv.shape)}, expected float32 (M, C, H, W)")
    if index.dtype != np.int64 or index.shape != x_adv.shape[:1]:
        raise ArenaError(f"{path}: index is {index.dtype} {index.shape}, expected int64 ({len(x_adv)},)")
    if len(np.unique(index)) != len(index):
        raise ArenaError(f"{path}: index names a point twice")
    return x_adv, torch.from_numpy(index)


def _loaded(x_adv: np.ndarray) -> tuple[np.dtype[Any], Rows]:
    floats = x_adv if x_adv.dtype == np.float32 else np.zeros(x_adv.shape, np.float32)
    return x_adv.dtype, torch.from_numpy(floats)


def _unpacked(archive: zipfile.ZipFile) -> tuple[np.dtype[Any], Rows] | None:
    """Unpack ``x_adv`` as ``keep_examples`` writes it into a file; None if it is written in another way."""
    if "x_adv.npy" not in archive.namelist():
        return None
    with archive.open("x_adv.npy") as member:
        if np.lib.format.read_magic(member) != (1, 0):
            return None
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        if fortran or dtype != np.float32 or len(shape) != 4:
            return None
        file = tempfile.TemporaryFile(dir=home())  # noqa: SIM115 - open as long as it is read from
        shutil.copyfileobj(member, file)
    if file.tell() != dtype.itemsize * math.prod(shape):
        raise ValueError(f"x_adv holds {file.tell()} bytes, its header says {shape}")
    return dtype, Filed(file, 0, shape[1:], range(shape[0]))
