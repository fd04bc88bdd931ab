"""Measures arena's rosters against the reference AutoAttack, torchattacks, foolbox and ART, and prints the tables.

    python benchmarks/ensemble.py --cifar cifar10.npz --table docs/ensemble.md           hours; goes on where it stopped
    python benchmarks/ensemble.py --cases cnn --seeds 0 -n 16 --results tried            a trial, some minutes

Models that are missing are trained first. Every cell that is measured is kept as a file under ``--results`` and is not
measured again; ``--known`` measures nothing and prints what is there. The peers are unpacked into a folder of their
own, once, and each runs in a process of its own; one that cannot be had is named, and its cells are left out. The parts
are in ``ensemble/`` beside this file.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from ensemble import page, peers
from ensemble.cases import CASES, named
from ensemble.cells import Cells
from ensemble.measuring import PGD_PEERS, WAYS, Bench, Settings, spoken

from arena.entries import split
from arena.errors import ArenaError, unknown
from arena.home import home
from arena.lineup import check_entries
from arena.plugins import registry

PARTS = ("runs", "members", "overhead", "frontier")
FRONTIER = "apgd_ce(steps=10),apgd_t(steps=20),staged,staged(lanes=8),staged(lanes=8,rounds=10,hope=0.5,fade=0.7)"


def settings_of(given: argparse.Namespace) -> Settings:
    """Read the options.

    Raises:
        ArenaError: an unknown case or part, no such file, or a number that is none.
    """
    for name in (*_names(given.cases), *_names(given.members), *_names(given.overhead)):
        named(name)
    for part in _names(given.parts):
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    if given.cifar is not None and not given.cifar.exists():
        raise ArenaError(f"--cifar: no such file '{given.cifar}'")
    for way in _names(given.ways):
        if way not in WAYS:
            raise unknown("way", way, WAYS)
    cases = _names(given.cases)
    return Settings(
        cases=cases,
        seeds=_numbers("--seeds", given.seeds, 0),
        n=given.n,
        cifar=given.cifar,
        cifar_n=given.cifar_n,
        fast=given.fast,
        full=given.full,
        bf16=given.bf16,
        compile=given.compile,
        devices=_names(given.devices),
        frontier=tuple(split(given.frontier)) if given.frontier else (),
        pairs=given.pairs,
        threads=_numbers("--threads", given.threads, 1),
        members=tuple(c for c in _names(given.members) if c in cases),
        overhead=tuple(c for c in _names(given.overhead) if c in cases),
        overhead_n=tuple(int(n) for n in _names(given.overhead_n)),
        steps=given.steps,
        queries=given.queries,
        parts=_names(given.parts),
        ways=_names(given.ways),
    )


def _names(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(option: str, text: str, least: int) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArenaError(f"{option}: expected whole numbers joined by commas, got '{text}'") from None
    if min(found) < least:
        raise ArenaError(f"{option}: expected numbers of at least {least}, got '{text}'")
    return found


def parser() -> argparse.ArgumentParser:
    """Make the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--cases", default=",".join(c.name for c in CASES), help="models, joined by commas")
    made.add_argument("--seeds", default="0,1,2", help="train seeds")
    made.add_argument("-n", type=int, default=500, help="points on digits")
    made.add_argument("--cifar", type=Path, metavar="FILE", help="npz file of CIFAR-10 pictures; else that case is out")
    made.add_argument("--cifar-n", type=int, default=256, help="points on CIFAR-10, in the file's order")
    made.add_argument("--fast", default="quick", help="the roster that is to be as good for less")
    made.add_argument("--full", default="autoattack", help="the roster that it is compared with")
    made.add_argument("--bf16", action="store_true", help="play both rosters in bf16 too")
    made.add_argument("--compile", action="store_true", help="play the full roster with compiled passes too")
    made.add_argument("--devices", default="", help="share the full roster among these too, such as cpu,cpu")
    made.add_argument("--frontier", default=FRONTIER, help="more entries to set against passes")
    made.add_argument("--pairs", type=int, default=1, help="runs of each way; ways take turns")
    made.add_argument("--threads", default=str(torch.get_num_threads()), help="torch's threads; 2,1 measures both")
    made.add_argument("--members", default="cnn,cifar", help="cases on which members meet torchattacks'")
    made.add_argument("--overhead", default="cnn,cifar", help="cases on which the overhead is measured")
    made.add_argument(
        "--overhead-n",
        default="512,1000",
        help="points of the overhead on CIFAR-10, comma-separated; the long roster meets the first number alone",
    )
    made.add_argument("--steps", type=int, default=100, help="iterations of the members; the reference keeps its own")
    made.add_argument("--queries", type=int, default=5000, help="queries of the members' Square")
    made.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    made.add_argument("--ways", default=",".join(WAYS), help="whole evaluations to play")
    made.add_argument("--results", type=Path, help="folder of the cells; by default ensemble/ in the arena's home")
    made.add_argument("--peers", type=Path, help="folder of the peers; by default in the user's cache")
    made.add_argument("--no-peers", action="store_true", help="leave out what would have to be unpacked")
    made.add_argument("--known", action="store_true", help="measure nothing, print what is known")
    made.add_argument("--again", default="", help="measure these ways again, such as quick")
    made.add_argument("--table", type=Path, metavar="FILE", help="write the page there, its figure to figures/ beside")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    given = parser().parse_args(arguments)
    words = [*(sys.argv[1:] if arguments is None else arguments)]
    try:
        settings, found = settings_of(given), registry()
        check_entries(tuple(dict.fromkeys((settings.fast, settings.full, *settings.frontier))), found)
        cells = Cells(
            given.results or home() / "ensemble", given.known, tuple(split(given.again)) if given.again else ()
        )
        there = _peers(given)
        bench = Bench(settings, cells, found, there, spoken)
        result = bench.run()
        versions = [there.version(name) for name in ("pyautoattack", *PGD_PEERS) if there.has(name)]
        command = shlex.join(["python", "benchmarks/ensemble.py", *(w for w in words if w != "--known")])
        text = page.write(given.table, result, settings, page.Ways(settings.fast, settings.full), command, versions)
    except ArenaError as e:
        print(e, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 3
    if given.table is None:
        print(text)
    return 0


def _peers(given: argparse.Namespace) -> peers.Environment:
    if given.no_peers:
        return peers.Environment(missing=dict.fromkeys(peers.PINS, "left out by --no-peers"))
    if given.known:  # what they once answered is read; nothing is unpacked
        return peers.Environment(folders={name: Path() for name in peers.PINS})
    return peers.provide(given.peers or peers.default_folder())


if __name__ == "__main__":
    sys.exit(main())
