"""The peers' environment: made on demand, apart from arena's own; each peer runs in a process that sees both.

foolbox and ART are among arena's own needs. torchattacks and the reference AutoAttack are not, and their metadata asks
for versions that arena does not have, so they are unpacked into folders of their own, without their needs, and run with
arena's torch. A peer that cannot be had is named and its cells are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from arena.errors import ArenaError

#: What is unpacked, by the name it is imported under. ``pyautoattack`` is a packaging of the authors' AutoAttack.
PINS = {"torchattacks": "torchattacks==3.5.1", "pyautoattack": "pyautoattack==0.2.0"}
#: Distributions of the peers that arena has itself.
OWN = {"foolbox": "foolbox", "art": "adversarial-robustness-toolbox"}
#: What the peers import beyond torch and what arena needs.
NEEDS = {"torchattacks": ("tqdm", "scipy"), "pyautoattack": ()}
#: The package this module is in is found there.
BENCHMARKS = Path(__file__).resolve().parent.parent


@dataclass
class Environment:
    """Where the peers are."""

    folders: dict[str, Path] = field(default_factory=dict)
    """By import name."""
    missing: dict[str, str] = field(default_factory=dict)
    """Why a peer is not there."""
    paths: list[Path] = field(default_factory=list)
    """What a peer's process has on its path, ahead of what this one has."""

    def has(self, library: str) -> bool:
        """Tell whether a peer can run."""
        if library in OWN:
            return _installed(OWN[library]) is not None
        return library in self.folders

    def version(self, library: str) -> str:
        """Return name and version of a peer, as the page prints them."""
        if library in OWN:
            return f"{OWN[library]} {_installed(OWN[library])}"
        return PINS[library].replace("==", " ")

    def ask(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """Run a job (``ensemble.peer``) in a process of its own and return its answer.

        Raises:
            ArenaError: the process failed; its last line is told.
        """
        with tempfile.TemporaryDirectory() as folder:
            asked, answered = Path(folder) / "job.json", Path(folder) / "answer.json"
            asked.write_text(json.dumps(dict(job)))
            path = [str(BENCHMARKS), *map(str, self.paths), os.environ.get("PYTHONPATH", "")]
            environ = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in path if p)}
            words = [sys.executable, "-m", "ensemble.peer", str(asked), str(answered)]
            ran = subprocess.run(words, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if ran.returncode or not answered.exists():
                said = (ran.stdout.strip().splitlines() or ["nothing was said"])[-1]
                raise ArenaError(f"peer '{job['library']}', {job['what']} on {job['case']}: {said}")
            return dict(json.loads(answered.read_text()))


def _installed(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def default_folder() -> Path:
    """Return where the environment is unless the user says otherwise: stamped with all versions that decide it."""
    from platformdirs import user_cache_path

    stamp = [*PINS.values(), *(n for needs in NEEDS.values() for n in needs), platform.python_version()]
    digest = hashlib.sha256(json.dumps([*stamp, torch.__version__]).encode()).hexdigest()[:8]
    return user_cache_path("arena", appauthor=False) / f"peers-{digest}"


def provide(folder: Path) -> Environment:
    """Unpack what is not yet there; what cannot be had is told in ``missing``."""
    made = Environment()
    for name, pin in PINS.items():
        packages = [pin, *(need for need in NEEDS[name] if _installed(need) is None)]
        for package in packages:
            place = folder / package.replace("==", "-")
            why = "" if (place / "complete").exists() else _unpack(package, place)
            if why:
                made.missing[name] = why
                break
            if place not in made.paths:
                made.paths.append(place)
        else:
            made.folders[name] = folder / pin.replace("==", "-")
    return made


def _unpack(package: str, place: Path) -> str:
    """Install one distribution, without its needs, into a folder; return why it could not be, or nothing."""
    place.parent.mkdir(parents=True, exist_ok=True)
    half = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(half), package]
        ran = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if ran.returncode:
            lines = [line for line in ran.stdout.splitlines() if line.startswith("ERROR")] or ran.stdout.splitlines()
            return (lines or ["pip failed"])[-1].strip()
        (half / "complete").touch()
        shutil.rmtree(place, ignore_errors=True)
        half.rename(place)
        return ""
    finally:
        shutil.rmtree(half, ignore_errors=True)
