"""What was measured: one JSON file a cell, so that a benchmark that was stopped goes on."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from arena import __version__
from arena.home import atomic_write


@dataclass(frozen=True)
class Cells:
    """The cells of a folder."""

    folder: Path
    known: bool = False
    """Measure nothing: what is not there is left out."""
    again: tuple[str, ...] = ()
    """Ways that are measured although they are there."""

    def path(self, part: str, asked: Mapping[str, Any]) -> Path:
        """Return where a cell is, or will be, kept; ``asked`` is everything that decides what is measured."""
        digest = hashlib.sha256(json.dumps([part, asked], sort_keys=True).encode()).hexdigest()[:12]
        name = "-".join(str(asked[k]) for k in ("case", "train_seed", "way", "pair") if k in asked)
        return self.folder / part / f"{re.sub(r'[^A-Za-z0-9._=-]', '_', name)}-{digest}.json"

    def read(self, part: str, asked: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return a cell; None if it was not measured, or not to the end."""
        try:
            return dict(json.loads(self.path(part, asked).read_bytes()))
        except (FileNotFoundError, ValueError):
            return None

    def measure(self, part: str, asked: Mapping[str, Any], work: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
        """Return a cell, measured now where it is not yet there; None if it is not to be measured."""
        found = self.read(part, asked)
        if self.known or (found is not None and asked.get("way") not in self.again):
            return found
        began, load = time.strftime("%Y-%m-%d", time.gmtime()), os.getloadavg()[0]
        made = {"asked": dict(asked), "date": began, "load": round(load, 2), **stamps(), **work()}
        atomic_write(self.path(part, asked), json.dumps(made).encode())
        return made


def stamps() -> dict[str, str]:
    """Return the versions that every cell holds."""
    return {"arena": __version__, "torch": torch.__version__}
