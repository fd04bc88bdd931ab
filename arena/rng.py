"""Counter-based random numbers per example: Philox4x32-10 (Salmon et al., SC 2011) in tensor operations.

A number depends only on (seed, attack's canonical name) = the key and (data-set index, restart, step, position) = the
counter, never on the batch a row happens to sit in. That is what makes outcomes equal across batch sizes, refills,
resumes and devices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
#: Counters that go through the rounds together on a CPU: they and what is made of them stay in its cache.
_CACHED = 2**14


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> Tensor:
    """Run ten Philox rounds on counter words; returns int64 (..., 4).

    The words are int64 tensors in [0, 2^32) whose shapes broadcast: one number a row stays that for a few rounds.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1  # wraps in int64; shift and mask recover both halves of the unsigned product
        c0, c2 = (
            ((p1 >> 32).bitwise_and_(_MASK) ^ c1).bitwise_xor_(k0),
            ((p0 >> 32).bitwise_and_(_MASK) ^ c3).bitwise_xor_(k1),
        )
        c1, c3 = p1.bitwise_and_(_MASK), p0.bitwise_and_(_MASK)
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), dim=-1)


@dataclass(frozen=True)
class Stream:
    """All random numbers of one attack under one seed."""

    key: tuple[int, int]

    @classmethod
    def of(cls, seed: int, name: str) -> Stream:
        """Make the stream of ``seed`` (any integer) and the attack's canonical name."""
        digest = hashlib.sha256(f"{seed}\n{name}".encode()).digest()
        return cls((int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")))

    def bits(self, rows: Tensor, restart: Tensor | int, step: Tensor | int, count: int) -> Tensor:
        """Return 32 random bits as int64 (N, count) for data-set indices ``rows`` (N,).

        ``restart`` and ``step`` are integers below 2^32 or one per row, shape (N,).
        """
        return _joined(list(self._parts(rows, restart, step, count)))

    def uniform(self, rows: Tensor, step: Tensor | int, shape: tuple[int, ...], restart: Tensor | int = 0) -> Tensor:
        """Return float32 numbers in (0, 1), shape (N, *shape)."""
        parts = self._parts(rows, restart, step, math.prod(shape))
        found = [part.bitwise_right_shift_(9).to(torch.float32).add_(0.5).mul_(2.0**-23) for part in parts]
        return _joined(found).view(rows.shape[0], *shape)

    def _parts(self, rows: Tensor, restart: Tensor | int, step: Tensor | int, count: int) -> Iterator[Tensor]:
        """Yield ``bits`` a few rows at a time."""
        blocks = -(-count // 4)
        words = torch.arange(blocks, device=rows.device).view(1, -1)
        at_once = len(rows) if rows.is_cuda else _CACHED // max(blocks, 1)

        def column(value: Tensor | int) -> Tensor:
            if isinstance(value, Tensor):
                return value.to(torch.int64).view(-1, 1)
            return torch.full((len(rows), 1), int(value), device=rows.device)

        for counter in zip(*(column(value).split(max(at_once, 1)) for value in (rows, restart, step)), strict=True):
            yield philox((*counter, words), self.key).flatten(1)[:, :count]

    def normal(self, rows: Tensor, step: Tensor | int, shape: tuple[int, ...], restart: Tensor | int = 0) -> Tensor:
        """Return float32 standard normal numbers, shape (N, *shape), by the inverse of the distribution function."""
        return torch.special.ndtri(self.uniform(rows, step, shape, restart).double()).float()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
