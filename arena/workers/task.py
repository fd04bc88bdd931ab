"""One attack on the points of one shard, cut into pieces of work for several workers, and put together again.

The shard's own keeper keeps it: the journal is that of a match without workers, so a match may go on with more workers,
fewer or none.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from arena.attack import State, Unsupported
from arena.batches import PAD
from arena.contender import Contender
from arena.engine import Keeper, Outcome, Row
from arena.journal import joined, packed, some, unpacked
from arena.lineup import Planned
from arena.workers.messages import Done, Job, Kept, Told, arrays, tensors

#: Workers that may be lost over one piece of work.
TRIES = 3
#: Rows of a piece of work, unless there are fewer.
FEWEST = 32
#: Pieces of work for each worker, where they are no smaller than a batch.
PIECES = 4


@dataclass
class Piece:
    """Some of the points that an attack meets: one worker's work."""

    places: Tensor
    """(M,) rows of what the attack is given."""
    rows: dict[int, Row]
    """Finished points, by data-set index."""
    state: State | None
    moved: bool
    number: int = 0
    """Of the job in hand."""
    forwards: int = 0
    finished: int = 0
    losses: list[str] = field(default_factory=list)
    """Why workers were lost over it."""
    done: Done | None = None


class Task:
    """One attack on the points of one shard, cut into pieces, with the shard's own keeper."""

    def __init__(self, planned: Planned, x: Tensor, y: Tensor, index: Tensor, keeper: Keeper, most: int) -> None:
        """Take in what an earlier run left.

        Args:
            planned: the attack.
            x: images (N, C, H, W).
            y: labels (N,).
            index: data-set indices (N,).
            keeper: keeps finished points and snapshots.
            most: forwards that a point costs at most; 0 for plain attacks, which do not say.
        """
        self.planned, self.x, self.y, self.index, self.keeper, self.most = planned, x, y, index, keeper, most
        self.numbers: list[int] = index.tolist()
        rows, self._state, self._moved = keeper.restore()
        self.restored: dict[int, Row] = {i: rows[i] for i in self.numbers if i in rows}
        self.pieces: list[Piece] = []
        self.waiting: deque[Piece] = deque()
        """Pieces that no worker has in hand."""
        self.error = self.trace = self.changed = ""
        self.unsupported: str | None = None
        self.malformed: dict[str, int] = {}

    def cut(self, workers: int, batch: int) -> None:
        """Cut what is left to do into pieces; ``batch`` is the number of rows from which on a row costs no less."""
        spec = self.planned.spec.spec
        left = [k for k, i in enumerate(self.numbers) if i not in self.restored]
        if spec.run:  # points of a chunk are attacked together: whole chunks, those of a match without workers
            spans = [range(*s.indices(len(self.numbers))) for s in cuts(len(self.numbers), workers, batch, spec.chunk)]
            parts = [[k for k in span if self.numbers[k] not in self.restored] for span in spans]
        else:
            parts = [left[s] for s in cuts(len(left), workers, batch)]
        for part in filter(None, parts):
            self.pieces.append(Piece(torch.tensor(part), {}, self._part(part), self._moved))
        self.waiting.extend(self.pieces)

    def _part(self, places: list[int]) -> State | None:
        if self._state is None:
            return None
        inside = {self.numbers[k] for k in places}
        return some(self._state, [i in inside for i in self._state["index"].tolist()])

    def job(self, piece: Piece, number: int, fp32: bool, lent: tuple[tuple[str, Contender], ...]) -> Job:
        """Write down a piece of work as it stands now."""
        piece.number = number
        at = piece.places.to(self.x.device)
        x, y, index = (t[at].cpu().numpy() for t in (self.x, self.y, self.index))
        rows, state = packed(piece.rows), arrays(piece.state)
        return Job(number, self.planned, x, y, index, fp32, lent, rows, state, piece.moved)

    def take(self, piece: Piece, message: Told | Kept | Done) -> None:
        """Take in what a worker says of a piece."""
        if isinstance(message, Told):
            piece.forwards, piece.finished = message.forwards, message.finished
            return
        rows = unpacked(message.rows)
        piece.rows |= rows
        piece.moved |= message.moved
        if rows:
            self.keeper.finished(rows, piece.moved)
        if isinstance(message, Kept):
            piece.state = tensors(message.state)
            if self.keeper.due():
                self.snapshot()
            return
        piece.done = message
        self.changed = self.changed or message.changed
        for kind, count in (message.malformed or {}).items():
            self.malformed[kind] = self.malformed.get(kind, 0) + count
        if message.unsupported is not None:
            self.unsupported = message.unsupported
        if message.error:
            self.fail(message.error, message.trace)

    def lose(self, piece: Piece, reason: str) -> None:
        """Let another worker go on with a piece whose worker is lost, unless that has happened too often."""
        piece.losses.append(reason)
        if len(piece.losses) < TRIES:
            self.waiting.appendleft(piece)
        else:
            self.fail(f"{len(piece.losses)} workers were lost at it: {'; '.join(dict.fromkeys(piece.losses))}")

    def fail(self, error: str, trace: str = "") -> None:
        """Note why the attack cannot go on; the first word stays."""
        if not self.error:
            self.error, self.trace = error, trace

    @property
    def over(self) -> bool:
        """Whether what is left is not worth doing."""
        return bool(self.error) or self.unsupported is not None

    @property
    def progress(self) -> tuple[int, int]:
        """(forwards, points finished); a finished point counts as having cost the most."""
        known = len(self.restored)
        return known * self.most + sum(p.forwards for p in self.pieces), known + sum(p.finished for p in self.pieces)

    @property
    def moved(self) -> bool:
        """Whether some query, or some returned point, differed from its image."""
        return self._moved or any(p.moved for p in self.pieces)

    def snapshot(self) -> None:
        """Keep what is known by now."""
        self.keeper.snapshot(joined([p.state for p in self.pieces if p.state is not None]), self.moved)

    def outcome(self) -> Outcome:
        """Return what the attack handed over.

        Raises:
            Unsupported: it does not work here.
        """
        if self.unsupported is not None:
            raise Unsupported(self.unsupported)
        outcome = Outcome.empty(self.x)
        place = {i: k for k, i in enumerate(self.numbers)}
        for rows in (self.restored, *(p.rows for p in self.pieces)):
            outcome.enter(place, rows)
        outcome.moved = self.moved
        outcome.malformed, outcome.most = self.malformed or None, self.most
        outcome.error, outcome.trace = self.error, self.trace
        return outcome


def cuts(n: int, workers: int, batch: int, chunk: int = 1) -> list[slice]:
    """Cut ``n`` rows for so many workers: one piece each, or up to ``PIECES`` where these still fill a ``batch``.

    Small pieces share the work out more evenly, but a row of a small batch costs more. All but the last are multiples
    of a physical batch and of ``chunk``.
    """
    each = max(1, min(PIECES, n // (workers * max(batch, 1))))
    unit = math.lcm(PAD, chunk)
    size = max(math.ceil(n / (workers * each)), FEWEST)
    size = -(-size // unit) * unit
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]
