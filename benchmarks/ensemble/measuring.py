"""What is measured, cell by cell and in which order; a cell that is there is not measured again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from arena.errors import ArenaError
from arena.lineup import describe, line_up
from arena.plugins import Registry
from arena.results import unpacked
from arena.surface import Surface
from arena.watch import Silent

from . import games
from .bare import HALF, SHARE
from .cases import Case, Subject, named, subject
from .cells import Cells
from .peers import Environment
from .style import Style

#: The reference's members by arena's names, and a variant of torchattacks' that shows what a difference comes from:
#: Square with squares that reach the last row and column, which its own never do.
MEMBERS = (("apgd_ce", ""), ("apgd_t", ""), ("fab_t", ""), ("square", ""), ("square", "to the rim"))
#: What the overhead is measured on, and in how many turns at least.
PGD_STEPS, PGD_TURNS = 20, 9
#: And how.
AMONG_LOOKS = "bare passes of a batch that a match may have, timed all through"
IN_HALF = f"{AMONG_LOOKS}, half of the time"
#: Whole evaluations: the two rosters, the full one driven plainly, and the reference.
WAYS = ("fast", "full", "plain", "reference")
#: The overhead's peers.
PGD_PEERS = ("torchattacks", "foolbox", "art")


@dataclass(frozen=True)
class Settings:
    """What the command line asks for."""

    cases: tuple[str, ...]
    seeds: tuple[int, ...]
    n: int
    cifar: Path | None
    cifar_n: int
    fast: str
    full: str
    bf16: bool
    """Play both rosters in bf16 too."""
    compile: bool
    """Play the full roster with compiled passes too."""
    devices: tuple[str, ...]
    """Share the full roster among these too; then it and the plain run, on as many threads, are compared."""
    frontier: tuple[str, ...]
    pairs: int
    threads: tuple[int, ...]
    members: tuple[str, ...]
    """Cases on which members are compared."""
    overhead: tuple[str, ...]
    """Cases on which the overhead is measured."""
    overhead_n: tuple[int, ...]
    """Its points on CIFAR-10."""
    steps: int
    queries: int
    parts: tuple[str, ...]
    ways: tuple[str, ...] = WAYS
    """Whole evaluations that are played."""


@dataclass(frozen=True)
class Run:
    """A cell with what it is an answer to."""

    case: str
    seed: int
    way: str
    threads: int
    pair: int
    cell: Mapping[str, Any]

    @property
    def n(self) -> int:
        """Points."""
        return int(self.cell["n"])

    @property
    def natural(self) -> np.ndarray:
        """(n,) bool: naturally correct."""
        return unpacked(self.cell["natural"], self.n)

    @property
    def broken(self) -> np.ndarray:
        """(n,) bool, by the referee's word."""
        return unpacked(self.cell["broken"], self.n)

    @property
    def standing(self) -> int:
        """Points left."""
        return int((self.natural & ~self.broken).sum())

    @property
    def images(self) -> str:
        """Name of the images, which cases share."""
        return "cifar" if named(self.case).cifar else "digits"


@dataclass
class Found:
    """All cells that are known, by part."""

    runs: list[Run] = field(default_factory=list)
    """Whole evaluations: ``fast``, ``full``, ``plain``, ``reference``, and the entries of the frontier."""
    members: list[Run] = field(default_factory=list)
    """Ways are ``MEMBER, arena`` and ``MEMBER, torchattacks``."""
    overhead: list[Run] = field(default_factory=list)
    """Ways are ``pgd, LIBRARY`` and the full roster."""
    left_out: dict[str, str] = field(default_factory=dict)
    """What could not be measured, and why."""


Say = Callable[[str], None]


def opposing(member: str, variant: str = "") -> str:
    """Name the way of torchattacks' member, or of a variant of it."""
    return ", ".join(word for word in (member, "torchattacks", variant) if word)


def spoken(text: str) -> None:
    """Say something on stderr."""
    print(text, file=sys.stderr, flush=True)


class Watching(Silent):
    """Says what is being trained."""

    def say(self, text: str) -> None:
        spoken(text)


class Bench:
    """Measures what is missing, or finds it."""

    def __init__(self, settings: Settings, cells: Cells, registry: Registry, peers: Environment, say: Say) -> None:
        self.settings, self.cells, self.registry, self.peers, self.say = settings, cells, registry, peers, say
        self.found = Found(left_out=dict(peers.missing))
        self._warm = False

    def run(self) -> Found:
        """Go through all parts."""
        parts = {"runs": self._runs, "members": self._members, "overhead": self._overhead, "frontier": self._frontier}
        for part in self.settings.parts:
            parts[part]()
        return self.found

    # -- the parts -------------------------------------------------------------------------------------------------

    def _runs(self) -> None:
        for on, threads, pair in self._turns(self.settings.cases, self.settings.seeds):
            ways = self.taking_turns()
            for way in ways if pair % 2 == 0 else ways[::-1]:
                self._whole(on, way, threads, pair)
            shared = self.settings.devices and threads == self.settings.threads[0]
            for way in self.taking_turns(shared=True) if shared else ():
                self._whole(on, way, len(self.settings.devices), pair)

    def styles(self, entry: str) -> dict[str, tuple[str, Style]]:
        """Return the styles in which an entry is played on one device, and the entry, by the way's name."""
        s = self.settings
        compiled = (False, True) if s.compile and entry == s.full else (False,)
        found = [Style(p, c) for p in (("fp32", "bf16") if s.bf16 else ("fp32",)) for c in compiled]
        return {style.way(entry): (entry, style) for style in found}

    def shared(self) -> dict[str, tuple[str, Style]]:
        """Return the same of the full roster on all devices."""
        devices = self.settings.devices
        found = [(entry, replace(style, devices=devices)) for entry, style in self.styles(self.settings.full).values()]
        return {style.way(entry): (entry, style) for entry, style in found} if devices else {}

    def taking_turns(self, shared: bool = False) -> list[str]:
        """List the whole evaluations that take turns; if ``shared``, on as many cores as there are devices."""
        s = self.settings
        known = {
            "fast": [] if shared else [*self.styles(s.fast)],
            "full": [*(self.shared() if shared else self.styles(s.full))],
            "plain": [f"{s.full}, plain"],
            "reference": [] if shared or not self.peers.has("pyautoattack") else ["reference"],
        }
        return [way for name in s.ways for way in known[name]]

    def _whole(self, on: Subject, way: str, threads: int, pair: int) -> None:
        """Measure one whole evaluation, with attack seed 0."""
        s = self.settings
        if way == "reference":
            asked = self._asked(on, way, threads, pair, self.peers.version("pyautoattack"))
            work = self._peer(on, "reference", "pyautoattack", threads, 0)
        elif way == f"{s.full}, plain":
            asked = self._asked(on, way, threads, pair, self._made_of(s.full, on))
            work = lambda: games.play_plainly(on, s.full, 0, threads, self.registry)  # noqa: E731
        else:
            known = self.styles(s.fast) | self.styles(s.full) | self.shared()
            entry, style = known.get(way, (way, games.EAGERLY))
            asked = self._asked(on, way, threads, pair, self._made_of(entry, on))
            work = self._in_turn(on, entry, threads, style)
        self._keep("runs", self.found.runs, on, asked, work)

    def _members(self) -> None:
        s = self.settings
        for on, threads, pair in self._turns(s.members, s.seeds, once=True):
            for name, variant in MEMBERS:
                option = f"queries={s.queries}" if name == "square" else f"steps={s.steps}"
                entry, way = f"{name}({option})", f"{name}, arena"
                asked = self._asked(on, way, None, pair, self._made_of(entry, on))
                if not variant:
                    self._keep("members", self.found.members, on, asked, self._engine(on, entry, on.seed, threads))
                if not self.peers.has("torchattacks"):
                    continue
                way = opposing(name, variant)
                asked = self._asked(on, way, None, pair, [option, self.peers.version("torchattacks")])
                work = self._peer(on, "member", "torchattacks", threads, on.seed, member=name, variant=variant)
                self._keep("members", self.found.members, on, asked, work)

    def _engine(self, on: Subject, entry: str, seed: int, threads: int) -> Callable[[], dict[str, Any]]:
        return lambda: games.play(on, entry, games.EAGERLY, seed, threads, self.registry)

    def _overhead(self) -> None:
        pictures = [name for name in self.settings.overhead if named(name).cifar]
        for k, n in enumerate(self.settings.overhead_n):
            self._overheads(pictures if k else self.settings.overhead, n, k == 0)

    def _overheads(self, cases: Sequence[str], n: int, whole: bool) -> None:
        """Measure on so many pictures of CIFAR-10; ``whole``: the full roster's too, which takes long."""
        s = self.settings
        for on, threads, pair in self._turns(cases, s.seeds[:1], cifar_n=n, pairs=PGD_TURNS):
            entry = f"pgd(steps={PGD_STEPS})"
            asked = self._asked(on, "pgd, arena", threads, pair, [IN_HALF, *self._made_of(entry, on)])
            self._keep("overhead", self.found.overhead, on, asked, self._among_looks(on, entry, threads, HALF))
            if pair == 0 and whole:  # it takes long enough to be its own median
                asked = self._asked(on, s.full, threads, pair, [AMONG_LOOKS, *self._made_of(s.full, on)])
                self._keep("overhead", self.found.overhead, on, asked, self._among_looks(on, s.full, threads, SHARE))
            for library in PGD_PEERS:
                if self.peers.has(library):
                    asked = self._asked(on, f"pgd, {library}", threads, pair, self.peers.version(library))
                    work = self._peer(on, "pgd", library, threads, 0, steps=PGD_STEPS)
                    self._keep("overhead", self.found.overhead, on, asked, work)
                else:
                    self.found.left_out.setdefault(library, "not installed")

    def _in_turn(
        self, on: Subject, entry: str, threads: int, style: Style = games.EAGERLY
    ) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            self._warm_up(on)
            return games.play_in_turn(on, entry, 0, threads, self.registry, style)

        return work

    def _among_looks(self, on: Subject, entry: str, threads: int, share: float) -> Callable[[], dict[str, Any]]:
        def work() -> dict[str, Any]:
            self._warm_up(on)
            return games.play_among_looks(on, entry, 0, threads, self.registry, share)

        return work

    def _warm_up(self, on: Subject) -> None:
        """Play one step, so that no first match of a process pays for what is loaded once."""
        if not self._warm:
            games.play(on, "pgd(steps=1)", games.EAGERLY, 0, 1, self.registry)  # moves also where gradients vanish
        self._warm = True

    def _frontier(self) -> None:
        s = self.settings
        done = {(r.case, r.seed, r.way) for r in self.found.runs}
        for on, threads, pair in self._turns(s.cases, s.seeds, once=True):
            for entry in dict.fromkeys((*s.frontier, s.fast, s.full)):
                if (on.case.name, on.seed, entry) not in done:
                    self._whole(on, entry, threads, pair)

    # -- cells -----------------------------------------------------------------------------------------------------

    def _turns(
        self,
        cases: Sequence[str],
        seeds: Sequence[int],
        once: bool = False,
        cifar_n: int | None = None,
        pairs: int = 1,
    ) -> Iterator[tuple[Subject, int, int]]:
        """Yield (subject, threads, pair), at least so many pairs.

        ``once``: one number of threads and one pair, for exact figures only; ``cifar_n``: so many pictures of CIFAR-10.
        """
        cifar_n = cifar_n or self.settings.cifar_n
        for name in cases:
            case = named(name)
            if case.cifar and self.settings.cifar is None:
                self.found.left_out[f"case {name}"] = "no --cifar FILE was given"
                continue
            for seed in seeds:
                on = self._subject(case, seed, cifar_n)
                for threads in self.settings.threads[: 1 if once else None]:
                    for pair in range(1 if once else max(self.settings.pairs, pairs)):
                        yield on, threads, pair

    def _subject(self, case: Case, seed: int, cifar_n: int) -> Subject:
        s = self.settings
        return subject(case, seed, cifar_n if case.cifar else s.n, s.cifar, self.registry, Watching())

    def _asked(self, on: Subject, way: str, threads: int | None, pair: int, what: Any) -> dict[str, Any]:
        """Return a cell's question; ``threads`` None: it is about outcomes and passes, which threads do not change."""
        timed = {} if threads is None else {"threads": threads}
        return {**on.asked, "way": way, **timed, "pair": pair, "what": what}

    def _made_of(self, entry: str, on: Subject) -> list[Any]:
        """Return what decides what an entry is: its version, and the attacks of its roster with their options."""
        groups = line_up((entry,), self.registry, Surface(), on.threat, on.images.n_classes)
        return [describe((entry,), self.registry), [p.name for g in groups for p in g.attacks]]

    def _peer(
        self,
        on: Subject,
        what: str,
        library: str,
        threads: int,
        seed: int,
        member: str = "",
        variant: str = "",
        steps: int | None = None,
    ) -> Callable[[], dict[str, Any]]:
        s = self.settings
        job = {
            "what": what,
            "library": library,
            "member": member,
            "variant": variant,
            "case": on.case.name,
            "train_seed": on.seed,
            "n": len(on.index),
            "cifar": str(s.cifar or ""),
            "seed": seed,
            "steps": s.steps if steps is None else steps,
            "queries": s.queries,
            "threads": threads,
        }

        def work() -> dict[str, Any]:
            on.obtain()  # the peer's process trains nothing
            return self.peers.ask(job)

        return work

    def _keep(
        self, part: str, into: list[Run], on: Subject, asked: dict[str, Any], work: Callable[[], dict[str, Any]]
    ) -> None:
        fresh = self.cells.read(part, asked) is None
        where = f"{part}: {on.case.name}, train seed {on.seed}, {asked['way']}"
        try:
            cell, why = self.cells.measure(part, asked, work), "not measured"
        except ArenaError as e:  # hours of other cells need not wait for it
            cell, why = None, str(e)
            self.say(f"{where}: {why}")
        if cell is None:
            self.found.left_out[where] = why
            return
        threads = asked.get("threads", cell["threads"])
        run = Run(on.case.name, on.seed, asked["way"], threads, asked["pair"], cell)
        into.append(run)
        if fresh:
            self.say(f"{where}: {run.standing} of {run.n} stand, {cell['seconds']:.1f} s")
