"""The points of a match. Pictures stay as they are stored and become float32 a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from arena.datasets import Images, to_float
from arena.referee import Referee

#: Most points that are float32 at a time, as stored pictures, returned points and an attack's own: what a match keeps
#: in memory grows up to here. A multiple of the referee's batch. Outcomes do not depend on it.
SHARD = 1024


class Rows(Protocol):
    """Float images (N, C, H, W) in [0, 1] by position: a tensor, or what is made or read when it is asked for."""

    @property
    def shape(self) -> Sequence[int]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: Any, /) -> Tensor: ...


@dataclass(frozen=True)
class Pictures:
    """Some stored pictures, as float images on a device."""

    stored: Tensor
    """(M, C, H, W), uint8 or float32 in [0, 1], on the CPU."""
    index: Tensor
    """(N,) rows of ``stored``, on the CPU."""
    device: str

    @property
    def shape(self) -> Sequence[int]:
        return (len(self.index), *self.stored.shape[1:])

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, rows: Any, /) -> Tensor:
        """Return float32 images (K, C, H, W), by a slice or positions (K,).

        They are made on the CPU, as ``arena verify`` makes them: a GPU divides by 255 with other last bits.
        """
        some = self.index[rows.cpu() if isinstance(rows, Tensor) else rows]
        return to_float(self.stored[some]).to(self.device)


@dataclass(frozen=True)
class Points:
    """Some of a match's points."""

    x: Tensor
    """(N, C, H, W)."""
    y: Tensor
    """(N,)."""
    index: Tensor
    """(N,) data-set indices."""

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Pool:
    """All points of a match."""

    x: Pictures
    y: Tensor
    """(n,) labels, on the device."""
    index: Tensor
    """(n,) data-set indices, on the device."""

    @classmethod
    def of(cls, images: Images, index: Tensor, device: str) -> Pool:
        """Make the pool of test points by their data-set indices (n,)."""
        return cls(Pictures(images.x_test, index, device), images.y_test[index].to(device), index.to(device))

    def __len__(self) -> int:
        return len(self.y)

    def take(self, rows: Tensor | slice) -> Points:
        """Return some points, their images as floats, by a slice or positions (K,)."""
        some = rows.to(self.y.device) if isinstance(rows, Tensor) else rows
        return Points(self.x[rows], self.y[some], self.index[some])

    def correct(self, referee: Referee) -> Tensor:
        """Return which points the referee's model classifies rightly without an attack, (n,) bool on the CPU."""
        found = [referee.score(p.x, p.y, p.index).predicted == p.y for p in map(self.take, spans(len(self)))]
        return torch.cat([f.cpu() for f in found]) if found else torch.zeros(0, dtype=torch.bool)


def spans(n: int, size: int | None = None) -> Iterator[slice]:
    """Cut ``n`` rows into consecutive spans of ``size``, ``SHARD`` if not given."""
    size = size or SHARD
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


@dataclass(frozen=True)
class Shard:
    """Consecutive ones of the points that an attack meets: what it is played on, judged on and forgotten at a time."""

    number: int
    """Its place among the attack's shards, from 0."""
    rows: Tensor
    """(M,) positions in the match."""
    before: int
    """Points in the shards before it."""
    met: int
    """Points in all of them."""
    size: int = SHARD
    """Points of a shard on its own: several devices play several at a time, and the journal knows them apart."""

    @property
    def parts(self) -> list[tuple[str, slice]]:
        """What each shard in it adds to the attack's name in the journal, the first nothing, and its points."""
        numbered = enumerate(spans(len(self), self.size), start=self.number)
        return [(f"-{number:04d}" if number else "", span) for number, span in numbered]

    def __len__(self) -> int:
        return len(self.rows)


def shards(rows: Tensor, chunk: int = 1, together: int = 1) -> list[Shard]:
    """Cut the positions (N,) that an attack meets into shards of whole chunks, so many ``together`` at a time.

    Points of one ``chunk`` are attacked together and draw from one seed, so no shard may cut through it.
    """
    size = max(SHARD // chunk, 1) * chunk
    cut = spans(len(rows), size * together)
    return [Shard(k * together, rows[s], s.start, len(rows), size) for k, s in enumerate(cut)]
