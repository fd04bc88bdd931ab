"""What is asked of a match, and how it is to be answered. Importing this imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: The protocols, and what a match that names no attacks is played against under each.
PROTOCOLS = {"standard": ("autoattack", "adaptive"), "paper": ("papers",)}


@dataclass(frozen=True)
class Question:
    """What is asked: everything that decides the answer."""

    defense: str
    vs: tuple[str, ...]
    dataset: str = "digits"
    backbone: str | None = None
    norm: str | None = None
    eps: str | None = None
    n: int | None = None
    seed: int = 0
    """Feeds attack randomness only."""
    train_seed: int = 0
    """Part of the model's identity."""
    train_norm: str | None = None
    """Norm that adversarial recipes train against; None: the data set's default, whatever the match's norm is."""
    train_eps: str | None = None
    """Radius that adversarial recipes train against; None: the data set's default, whatever the match's eps is."""
    checkpoint: Path | None = None
    surface: Path | None = None
    budget: int | None = None
    """Most passes (forwards and backwards) a roster may cost an example; None: what the roster says."""
    protocol: str = "standard"
    """``standard``, or ``paper``: a paper's own evaluation replayed (``arena.paper``)."""
    card: str | None = None


@dataclass(frozen=True)
class Running:
    """How it is answered: with precision and compilation as exceptions, nothing here changes what the attacks find."""

    device: str = "auto"
    batch_size: int | None = None
    """Largest physical batch; None chooses."""
    precision: str = "fp32"
    """Of the search, ``fp32`` or ``bf16``; the referee judges in fp32."""
    compile: bool = False
    """Search with compiled passes; the referee's are eager."""
    replay: bool = False
    """Attack again although a result is stored."""
    retrain: bool = False
    audit: str = "normal"
    """``normal | deep | none``: how much the audit looks at; it changes no attack, only the verdict."""
    time_limit: float | None = None
    """Seconds that the attacks may take; a match that it stops is not stored and goes on when asked again."""
    matrix: bool = False
    """Let every attack meet every naturally correct point: fills ``unique_broken``, costs passes."""
    devices: tuple[str, ...] = ()
    """Devices that share the points, a worker each: ``cuda:0, cuda:1``; with at most one, ``device`` does it all. Of
    engine ``ray``: nothing, or ``cpu`` or ``cuda`` where its workers must be on such a device."""
    engine: str = "local"
    """``local``, or ``ray``: the workers are actors of a Ray cluster."""
    ray_address: str | None = None
    """Of a running cluster, ``auto`` for this machine's; None starts one here."""
    workers: int | None = None
    """Actors; None: one for each GPU of the cluster, or, where there is none, for each CPU."""
