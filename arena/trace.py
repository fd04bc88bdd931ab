"""What a training leaves in its folder while it runs: the state to go on from (``resume.pt``) and a log, one JSON line
an epoch (``train.jsonl``)."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arena.errors import ArenaError
from arena.home import atomic_write

STATE, LOG = "resume.pt", "train.jsonl"
#: Seconds between two writings of the log.
EVERY = 1.0


def save(
    folder: Path,
    model: nn.Module,
    optimizers: Sequence[torch.optim.Optimizer],
    history: list[dict[str, Any]],
    best: dict[str, Any],
    seconds: float,
) -> None:
    """Write the state to go on from."""
    buffer = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optimizers],
        "history": history,
        "best": best,
        "seconds": seconds,
    }
    torch.save(state, buffer)
    atomic_write(folder / STATE, buffer.getvalue())


def resume(folder: Path) -> dict[str, Any] | None:
    """Read the state to go on from, if there is one that can be read."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # a damaged state costs a fresh start, never the run
        path.unlink(missing_ok=True)
        return None
    return state


@dataclass
class Log:
    """The log of one training, kept in memory and written whole, so a reader never meets half a line."""

    folder: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    _written: float = 0.0

    @classmethod
    def open(cls, folder: Path, history: Sequence[Mapping[str, Any]]) -> Log:
        """Begin a log after the epochs of ``history``; what an earlier sitting wrote beyond them is dropped."""
        try:
            old = read(folder / LOG)
        except ArenaError:  # none yet, or damaged: the epochs' figures are in the history, only their times are lost
            old = []
        known = {(line.get("stage"), line.get("epoch")): line for line in old}
        return cls(folder, [known.get((h["stage"], h["epoch"]), dict(h)) for h in history])

    def add(self, entry: Mapping[str, Any]) -> None:
        """Add an epoch."""
        self.lines.append(dict(entry))
        if time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self) -> None:
        """Write all lines."""
        atomic_write(self.folder / LOG, "".join(json.dumps(line) + "\n" for line in self.lines).encode())
        self._written = time.monotonic()


def read(path: Path) -> list[dict[str, Any]]:
    """Read a log: one dict an epoch with ``stage``, ``epoch``, loss terms, ``lr``, ``seconds``, ``images_per_second``
    and, where the model was judged, ``natural`` and ``pgd``.

    Raises:
        ArenaError: no such file, or not a log.
    """
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise ArenaError(f"{path}: cannot be read ({e.strerror or e})") from None
    except ValueError:
        lines = [None]
    if not all(isinstance(line, dict) and {"stage", "epoch", "loss"} <= set(line) for line in lines):
        raise ArenaError(f"{path}: not a training log; 'arena train' writes one, {LOG}, beside the weights")
    return lines
