"""Builds the permanent record of a match (JSON schema 1) from the referee's words.

Accuracies are percentages of all n points. A naturally misclassified point is lost to all attacks and broken by none.
"""

from __future__ import annotations

import platform
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arena.lineup import Group, Planned
from arena.specs import text
from arena.statistics import wilson

SCHEMA = 1


@dataclass
class Played:
    """One attack, judged. Masks are over all n points of the match."""

    planned: Planned
    group: str
    """Entry of ``--vs`` it belongs to."""
    roster: str | None
    status: str
    met: Tensor
    """(n,) bool: points it was given."""
    attempted: Tensor
    """(n,) bool: points it finished."""
    broken: Tensor
    """(n,) bool: breaks that the referee confirmed."""
    cumulative: Tensor
    """(n,) bool: points still standing after it, within its entry."""
    forwards: int = 0
    backwards: int = 0
    seconds: float = 0.0
    violations: dict[str, int] = field(default_factory=dict)
    borderline: int = 0
    nonfinite: int = 0
    """Points at which the model's logits were not finite; they count as broken."""
    silent: int = 0
    """Points that it saw broken and handed over unbroken."""
    given_up: int = 0
    """Points that it left unbroken before its passes were spent, because it saw nothing more to win."""
    right: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    """(n,) bool: what it handed over is classified correctly; of a point it was not given, the image."""
    error: str = ""
    trace: str = ""
    """Traceback of a crash."""
    begun: bool = True
    """False: the time limit was up before its turn."""

    @property
    def worked(self) -> bool:
        """Whether its silence about a point says anything."""
        return self.status == "ok" or (self.status == "partial" and bool(self.attempted.any()))


def share(standing: Tensor) -> tuple[float, list[float]]:
    """Return the percentage of True and its Wilson 95 % interval."""
    n, k = len(standing), int(standing.sum())
    low, high = wilson(k, n)
    return 100.0 * k / n, [low, high]


def attack_row(played: Played, correct: Tensor, unique: int | None = None) -> dict[str, Any]:
    """Return an attack's row of the record; ``correct`` (n,) are the naturally correct points."""
    complete = played.status == "ok" and bool((played.attempted | ~correct).all())
    robust = share(correct & ~played.broken) if complete else None
    return {
        "name": played.planned.name,
        "options": {k: text(v) for k, v in played.planned.options.items()},
        "roster": played.roster,
        "entry": played.group,
        "plugin": played.planned.spec.origin,
        "standalone": played.planned.standalone,
        "status": played.status,
        "attempted": int(played.attempted.sum()),
        "broken": int(played.broken.sum()),
        "robust_accuracy": robust[0] if robust else None,
        "cumulative_accuracy": None if played.planned.standalone else share(played.cumulative)[0],
        "ci95": robust[1] if robust else None,
        "unique_broken": unique,
        "broken_points": None if unique is None else packed(played.broken),
        "forwards": played.forwards,
        "backwards": played.backwards,
        "seconds": round(played.seconds, 3),
        "violations": played.violations,
        "borderline": played.borderline,
        "nonfinite": played.nonfinite,
        "silent": played.silent,
        "given_up": played.given_up,
        "error": played.error or None,
        "trace": played.trace or None,
    }


def packed(mask: Tensor) -> str:
    """Write a mask (n,) of points as hexadecimal digits, the first point in the highest bit."""
    return np.packbits(mask.cpu().numpy()).tobytes().hex()


def unpacked(digits: str, n: int) -> np.ndarray:
    """Read what ``packed`` wrote: (n,) bool, in the order of the match's points."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(digits), np.uint8), count=n).astype(bool)


def roster_row(group: Group, rows: Sequence[Played], correct: Tensor) -> dict[str, Any]:
    """Return the row of one entry of ``--vs``: its own per-example worst case and cost; no number if nothing worked."""
    standing = correct.clone()
    for played in rows:
        standing &= ~played.broken
    met_all = all(bool((p.attempted | p.broken | ~p.met).all()) for p in rows)
    whole = len(rows) == len(group.attacks) and met_all and not group.problems and not group.cut
    complete = whole and all(p.status == "ok" for p in rows)
    robust, interval = share(standing) if _speak(rows) else (None, None)
    return {
        "name": group.name,
        "robust_accuracy": robust,
        "ci95": interval,
        "members": [p.planned.name for p in rows],
        "complete": complete,
        "budget": group.budget,
        "cut": group.cut,
        "left_out": {one.name: one.passes for one in group.left_out},
        "forwards": sum(p.forwards for p in rows),
        "backwards": sum(p.backwards for p in rows),
        "seconds": round(sum(p.seconds for p in rows), 3),
    }


def sweep_rows(rows: Sequence[Played], correct: Tensor) -> list[dict[str, Any]]:
    """Return one row per sweep: the per-example minimum over its members (papers.md 8)."""
    found = []
    for name in dict.fromkeys(p.planned.spec.spec.sweep for p in rows if p.planned.spec.spec.sweep):
        members = [p for p in rows if p.planned.spec.spec.sweep == name]
        standing = correct.clone()
        for played in members:
            standing &= ~played.broken
        robust, interval = share(standing) if _speak(members) else (None, None)
        found.append(
            {"name": name, "robust_accuracy": robust, "ci95": interval, "members": [p.planned.name for p in members]}
        )
    return found


def worst_case(rows: Sequence[Played], correct: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Return the headline, and which points stand (n,).

    ``broken_by`` gives each broken point to the first attack, in the order of play, that broke it.
    """
    standing = correct.clone()
    first: Counter[str] = Counter()
    for played in rows:
        fresh = standing & played.broken
        if bool(fresh.any()):
            first[played.planned.name] += int(fresh.sum())
        standing &= ~played.broken
    robust, interval = share(standing) if _speak(rows) else (None, None)
    return {"robust_accuracy": robust, "ci95": interval, "broken_by": dict(first)}, standing


def _speak(rows: Sequence[Played]) -> bool:
    """Tell whether there is a number at all: some attack worked, or a break was verified."""
    return any(p.worked or bool(p.broken.any()) for p in rows)


def unique_breaks(rows: Sequence[Played]) -> list[int]:
    """Return, for each attack, how many points only it broke; meaningful when all met all points."""
    by_name: dict[str, Tensor] = {}  # an attack that stands in two entries is one attack
    for p in rows:
        by_name[p.planned.name] = by_name.get(p.planned.name, torch.zeros_like(p.broken)) | p.broken
    total = torch.stack([b.long() for b in by_name.values()]).sum(0) if rows else torch.zeros(0)
    return [int((by_name[p.planned.name] & (total == 1)).sum()) for p in rows]


# -- provenance -------------------------------------------------------------------------------------------------

PACKAGES = ("torch", "torchvision", "numpy", "adversarial-robustness-toolbox", "foolbox", "pluggy", "scikit-learn")


def provenance(plugins: Sequence[str], device: str, precision: str, started: str) -> dict[str, Any]:
    """Return versions, machine settings and source revision."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "arena": metadata.version("adversarial-arena"),
        "python": platform.python_version(),
        "packages": versions,
        "plugins": sorted(set(plugins)),
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "started": started,
        "seconds": 0.0,
        "git": _git(),
    }


def device_name(device: str) -> str:
    """Return a device in words."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else f"cpu ({platform.machine()})"


def _git() -> dict[str, Any] | None:
    """Revision of arena's own source, when it runs from a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        commit = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=True
        )
        dirty = subprocess.run(
            ["git", "-C", str(root), "status", "--porcelain", "-uno"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit.stdout.strip(), "dirty": bool(dirty.stdout.strip())}
