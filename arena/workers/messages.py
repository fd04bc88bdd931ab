"""What a match and its workers tell each other. Arrays are numpy's: they are pickled without the rest of a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

import numpy as np
import torch

from arena.attack import State
from arena.contender import Contender
from arena.ground import Ground
from arena.lineup import Planned
from arena.pace import Pace

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Order:
    """To a worker, before all else: the match."""

    contender: Contender
    ground: Ground
    probe: np.ndarray
    """First images of the match, float32 (N, C, H, W): the search copy is proven and timed on them."""
    most: int
    """Rows that a piece of work has at most: no batch is larger."""
    precision: str
    compile: bool
    batch_size: int | None
    passes: tuple[int, int]
    """The most forwards and backwards that a worker makes of the match, if all make as many."""
    every: float
    """Seconds between two snapshots."""
    threads: int
    """Of the CPU."""


@dataclass(frozen=True)
class Job:
    """To a worker: attack these points."""

    number: int
    """Ascending."""
    planned: Planned
    x: np.ndarray
    """float32 (N, C, H, W) in [0, 1]."""
    y: np.ndarray
    """(N,)."""
    index: np.ndarray
    """(N,) data-set indices."""
    fp32: bool
    """Search in fp32, whatever the match's precision is."""
    lent: tuple[tuple[str, Contender], ...]
    """Models of other defenses that the attack asks for, by name."""
    rows: Arrays
    """Points already finished (``arena.journal.packed``)."""
    state: Arrays | None
    """Snapshot to go on from."""
    moved: bool


@dataclass(frozen=True)
class Stop:
    """To a worker: leave the job after its next step, with a snapshot."""

    number: int


@dataclass(frozen=True)
class Ready:
    """From a worker, first: it has a search copy."""

    device: str
    """In words."""
    batch_size: int
    pace: Pace | None
    """What its bare passes cost; None where they raise."""
    versions: Mapping[str, str]
    compiled: bool = False
    """Its passes are compiled."""
    note: str = ""
    """Why less was done to its copy than could be."""


@dataclass(frozen=True)
class Refused:
    """From a worker, instead: why it cannot begin."""

    text: str


@dataclass(frozen=True)
class Told:
    """From a worker: how far a job is."""

    number: int
    forwards: int
    finished: int


@dataclass(frozen=True)
class Kept:
    """From a worker: a snapshot."""

    number: int
    rows: Arrays
    """Points finished since the last one."""
    state: Arrays | None
    moved: bool


@dataclass(frozen=True)
class Done:
    """From a worker: it has left a job."""

    number: int
    rows: Arrays
    """Points finished since the last snapshot."""
    moved: bool
    malformed: Mapping[str, int] | None = None
    unsupported: str | None = None
    """The attack does not work here: why."""
    error: str = ""
    trace: str = ""
    changed: str = ""
    """What of the search copy is no longer what it was."""


@dataclass(frozen=True)
class Lost:
    """Instead of a worker's next message: it is gone."""

    reason: str


def versions() -> dict[str, str]:
    """Return what must be the same in all processes for outcomes to be."""
    return {"arena": metadata.version("adversarial-arena"), "torch": torch.__version__}


def arrays(state: State | None) -> dict[str, np.ndarray] | None:
    """Return a state as arrays on the CPU."""
    return None if state is None else {k: v.detach().cpu().numpy() for k, v in state.items()}


def tensors(state: Arrays | None) -> State | None:
    """Return a state from ``arrays``."""
    return None if state is None else {k: torch.from_numpy(v) for k, v in state.items()}
