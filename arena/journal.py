"""The journal of an unfinished match: finished rows and snapshots, so that the same command goes on inside an attack.

One folder a question. Each process appends files of its own, written whole and renamed into place; resuming reads the
union of them all and deletes none before the result is stored. A finished row wins over a snapshot that holds it
active. Rows and snapshots do not wait for the disk: what a loss of power damages is noticed, and attacked again.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import time
import uuid
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from arena.attack import State, layout
from arena.engine import Row
from arena.home import atomic_write

#: Seconds between snapshots; a killed run repeats at most this much and one step. ``ARENA_SNAPSHOT_SECONDS`` overrides.
EVERY = float(os.environ.get("ARENA_SNAPSHOT_SECONDS", "10"))


@dataclass
class Journal:
    """All that is kept of one question."""

    folder: Path
    every: float = EVERY

    def open(self, model: str) -> bool:
        """Open for a model's id; return whether an earlier run left something. Rows of another model are dropped."""
        left = self.folder / "model"
        known = left.read_text() if left.exists() else ""
        if known and known != model:
            self.clear()
        atomic_write(left, model.encode())
        return known == model

    @property
    def stopped(self) -> str:
        """Name under which the examples of this match lie while a time limit holds it."""
        return f"stopped-{self.folder.name}"

    def keeper(self, name: str) -> AttackKeeper:
        """Return the keeper of one attack; ``name`` is safe as a file name and unique in the match."""
        return AttackKeeper(self.folder, name, self.every)

    def mark(self, name: str) -> None:
        """Leave a mark that lasts until the journal is cleared."""
        atomic_write(self.folder / name, b"")

    def marked(self, name: str) -> bool:
        """Tell whether a mark was left."""
        return (self.folder / name).exists()

    def clear(self) -> None:
        """Forget everything: the result is stored, or it is about another model."""
        shutil.rmtree(self.folder, ignore_errors=True)


@dataclass
class AttackKeeper:
    """Keeps one attack's rows."""

    folder: Path
    name: str
    every: float
    share: float = 1.0
    """Of the seconds that pass: they are shared where several keepers keep one attack at the same time."""
    _pending: dict[int, Row] = field(default_factory=dict)
    _last: float = field(default_factory=time.monotonic)
    _born: float = field(default_factory=time.monotonic)
    _id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def seconds(self) -> float:
        """Return the seconds spent on this attack by all processes, this one up to now."""
        earlier = 0.0
        for path in self.folder.glob(f"{self.name}.seconds-*"):
            if not path.name.endswith(self._id):
                with contextlib.suppress(OSError, ValueError):
                    earlier += float(path.read_text())
        return earlier + self._own()

    def _own(self) -> float:
        return self.share * (time.monotonic() - self._born)

    def restore(self) -> tuple[dict[int, Row], State | None, bool]:
        """Return the union of all finished rows, the newest readable snapshot, and whether a query had left x."""
        rows: dict[int, Row] = {}
        moved = False
        for path in sorted(self.folder.glob(f"{self.name}.rows-*.npz")):
            kept = _read(path)
            if kept is None:
                continue
            moved = moved or bool(kept["moved"])
            for name in ("seen", "again"):
                kept.setdefault(name, np.zeros_like(kept["index"]))
            rows |= unpacked(kept)
        kept = _read(self.folder / f"{self.name}.state.npz")
        if kept is None:
            return rows, None, moved
        moved = bool(kept.pop("moved")) or moved
        return rows, {k.removeprefix(_STATE): torch.from_numpy(v) for k, v in kept.items()}, moved

    def finished(self, rows: dict[int, Row], moved: bool) -> None:
        """Buffer finished rows until the next snapshot."""
        self._pending.update(rows)

    def due(self) -> bool:
        """Tell whether it is time for a snapshot."""
        return time.monotonic() - self._last >= self.every

    def snapshot(self, state: State | None, moved: bool) -> None:
        """Write pending rows, then the state of active ones: in this order, so a kill between the two loses nothing."""
        if self._pending:
            arrays = {**packed(self._pending), "moved": np.array(moved)}
            _write(self.folder / f"{self.name}.rows-{uuid.uuid4().hex}.npz", arrays)
            self._pending = {}
        path = self.folder / f"{self.name}.state.npz"
        if state is not None:
            _write(path, {**{_STATE + k: v.detach().cpu().numpy() for k, v in state.items()}, "moved": np.array(moved)})
        else:
            path.unlink(missing_ok=True)
        spent = f"{self._own():.3f}"
        atomic_write(self.folder / f"{self.name}.seconds-{self._id}", spent.encode(), durable=False)
        self._last = time.monotonic()


class Keepers:
    """Keeps several shards of one attack that are played at a time, each where it is kept when it is played alone."""

    def __init__(self, parts: Sequence[tuple[AttackKeeper, Sequence[int]]]) -> None:
        """Args: ``parts`` are the shards' own keepers with the data-set indices of their points."""
        self.keepers = [keeper for keeper, _ in parts]
        self._place = {i: k for k, (_, index) in enumerate(parts) for i in index}
        for keeper in self.keepers:
            keeper.share = 1 / len(parts)

    def seconds(self) -> float:
        """Return the seconds spent on these shards by all processes, this one up to now."""
        return sum(keeper.seconds() for keeper in self.keepers)

    def restore(self) -> tuple[dict[int, Row], State | None, bool]:
        """Return what all of them return."""
        rows: dict[int, Row] = {}
        states, moved = [], False
        for keeper in self.keepers:
            found, state, left = keeper.restore()
            rows |= found
            moved |= left
            states += [] if state is None else [state]
        return rows, joined(states), moved

    def finished(self, rows: dict[int, Row], moved: bool) -> None:
        """Buffer finished rows until the next snapshot."""
        for k, keeper in enumerate(self.keepers):
            keeper.finished({i: row for i, row in rows.items() if self._place[i] == k}, moved)

    def due(self) -> bool:
        """Tell whether it is time for a snapshot."""
        return self.keepers[0].due()

    def snapshot(self, state: State | None, moved: bool) -> None:
        """Write pending rows and the state of active ones."""
        for k, keeper in enumerate(self.keepers):
            own = None if state is None else some(state, [self._place[i] == k for i in state["index"].tolist()])
            keeper.snapshot(own, moved)


def joined(states: Sequence[State]) -> State | None:
    """Join states; one of another layout than the first is left out, and its points begin again."""
    same = [state for state in states if layout(state) == layout(states[0])]
    return {k: torch.cat([state[k] for state in same]) for k in same[0]} if same else None


def some(state: State, mask: Sequence[bool]) -> State | None:
    """Return some rows of a state, or None if these are none."""
    rows = torch.tensor(mask, dtype=torch.bool).nonzero().squeeze(1)
    return {k: v[rows.to(v.device)] for k, v in state.items()} if len(rows) else None


#: Keeps an attack's own state keys apart from the journal's and from the file format's.
_STATE = "state."
_NUMBERS = ((1, "forwards"), (2, "backwards"), (3, "claim"), (4, "seen"), (5, "again"))


def packed(rows: Mapping[int, Row]) -> dict[str, np.ndarray]:
    """Return finished rows, by data-set index, as arrays; none as no arrays."""
    if not rows:
        return {}
    return {
        "index": np.array(list(rows), dtype=np.int64),
        "x_adv": np.stack([r[0].detach().cpu().numpy() for r in rows.values()]),
        **{k: np.array([r[j] for r in rows.values()], dtype=np.int64) for j, k in _NUMBERS},
    }


def unpacked(arrays: Mapping[str, np.ndarray]) -> dict[int, Row]:
    """Return finished rows from ``packed``."""
    if not arrays:
        return {}
    x_adv = torch.from_numpy(arrays["x_adv"])
    numbers = zip(*(arrays[k].tolist() for k in ("index", *(k for _, k in _NUMBERS))), strict=True)
    return {i: (x_adv[k], *row) for k, (i, *row) in enumerate(numbers)}


def _write(path: Path, arrays: dict[str, np.ndarray]) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write(path, buffer.getvalue(), durable=False)


def _read(path: Path) -> dict[str, np.ndarray] | None:
    """Read a file of the journal; None if it is absent or damaged (its rows are then simply attacked again)."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return {k: file[k] for k in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None
