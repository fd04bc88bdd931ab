"""Draws what long work tells: a live bar on a terminal, plain lines elsewhere. All to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arena.cli.console import cell, clock, count, err, percent, plain

if TYPE_CHECKING:
    from rich.console import Console

    from arena.watch import Watch

#: Seconds that a phase may last before plain lines tell of it, and between two such lines.
EVERY = 5.0
#: A time left is told from this share and after so many seconds: before, it is a guess.
SURE_SHARE, SURE_SECONDS = 0.05, 2.0
#: Units that mean nothing to a reader: the share is shown, and the numbers in brief.
INNER = ("forwards",)
#: Characters of the bar.
BAR = 10


@contextmanager
def watching(quiet: bool) -> Iterator[Watch]:
    """Give a watch that fits stderr; its drawing ends with the block."""
    from arena.watch import Silent

    console = err()
    if quiet:
        yield Silent()
    elif console.is_terminal:
        live = Live(console)
        try:
            yield live
        finally:
            live.close()
    else:
        lines = Lines(lambda text: console.print(text, soft_wrap=True))
        try:
            yield lines
        finally:
            lines.close()


def summary(row: dict[str, Any]) -> str:
    """Sum up a judged attack in one line."""
    name = f"{row['roster']} / {row['name']}" if row.get("roster") else row["name"]
    if not row["attempted"] and row["status"] == "ok":
        return f"{plain(name)}: nothing is left to attack"
    text = f"{plain(name)}: {row['broken']} of {row['attempted']} broken"
    if row.get("paper_accuracy") is not None:
        text += f", {percent(row['paper_accuracy'])} % of all points end classified correctly"
    elif row.get("cumulative_accuracy") is not None:
        text += f", {percent(row['cumulative_accuracy'])} % left"
    elif row.get("robust_accuracy") is not None:
        text += f", {percent(row['robust_accuracy'])} % alone"
    if row["status"] != "ok":
        text += f", {row['status'].upper()}: {plain(row.get('error') or 'no reason given')}"
    return text + f" ({clock(row.get('seconds') or 0.0)})"


def _swept(row: dict[str, Any]) -> tuple[str, str] | None:
    """Name the sweep a row belongs to: the same attack at other weights of the heads; None for other rows."""
    if "lam" not in (row.get("options") or {}) or row["status"] != "ok" or row.get("standalone") is False:
        return None
    return row.get("roster") or "", row["name"].partition("(")[0]


@dataclass
class Sweep:
    """Folds the rows of a sweep, which come one after the other, into one line."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def take(self, row: dict[str, Any]) -> list[str]:
        """Take in a row; return the lines that are due."""
        name = _swept(row)
        lines = [] if self.rows and name == _swept(self.rows[-1]) else self.end()
        if name is None:
            return [*lines, summary(row)]
        self.rows.append(row)
        return lines

    def end(self) -> list[str]:
        """Return the line of the sweep that has ended."""
        rows, self.rows = self.rows, []
        if len(rows) < 2:
            return [summary(row) for row in rows]
        roster, name = _swept(rows[0]) or ("", "")
        alone = [r["robust_accuracy"] for r in rows if r.get("robust_accuracy") is not None]
        text = f"{plain(f'{roster} / ' if roster else '')}{plain(name)}: {len(rows)} rows of a sweep"
        text += f", lowest {percent(min(alone))} % alone" if alone else ""
        return [f"{text} ({clock(sum(r.get('seconds') or 0.0 for r in rows))})"]


@dataclass
class Phase:
    """How far a piece of work is."""

    name: str
    total: int
    unit: str
    began: float
    done: int = 0
    note: str = ""
    before: int = -1
    """Steps that an earlier run had done; -1: not known yet."""
    since: float = 0.0
    """When the first step of this run began."""
    own: float | None = None
    """Seconds that the phase may take, told before it began."""
    after: float | None = None
    """Seconds that all work after it may take; None: it is not part of a greater work."""
    more: bool = False
    """Nobody knows how long some of that work takes."""

    def advance(self, done: int, note: str, now: float) -> None:
        """Take in a report."""
        if self.before < 0:
            # forwards are told of a few times a second, so the first report holds what an earlier run had done
            earlier = note == "resumed" or self.unit in INNER
            self.before, self.since = (done, now) if earlier else (0, self.began)
        self.done, self.note = done, plain(note)

    @property
    def share(self) -> float:
        """How much of the work is done, 0 to 1."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    def figure(self) -> str:
        """Write how far it is: ``12 %``, or ``3/30 epochs``."""
        if self.unit in INNER:
            return f"{int(100 * self.share)} %"
        return f"{count(self.done)}/{count(self.total)} {self.unit}"

    def left(self, now: float) -> float | None:
        """Return the seconds that are probably left, of the greater work if there is one; None: too early to tell, or
        nothing is."""
        here = 0.0 if self.done >= self.total else self._here(now)
        if here is None and self.own is not None:
            here = self.own * (1 - self.share)
        if here is None or self.after is None:
            return here or None
        return here + self.after or None

    def _here(self, now: float) -> float | None:
        elapsed, fresh = now - self.since, self.done - max(self.before, 0)
        if elapsed < SURE_SECONDS or fresh <= 0 or self.done >= self.total or fresh < SURE_SHARE * self.total:
            return None
        return elapsed * (self.total - self.done) / fresh

    def line(self, now: float) -> str:
        """Tell how far it is, how long it took and how long it may take."""
        text = f"{self.name}: {self.figure()}" + (f", {self.note}" if self.note else "")
        left = self.left(now)
        if left is None:
            return f"{text}, {clock(now - self.began)}"
        where = "" if self.after is None else " in the match"
        return f"{text}, {clock(now - self.began)}, {'over' if self.more else 'about'} {clock(left)} left{where}"


class Lines:
    """Plain lines: none before a phase has lasted ``EVERY`` seconds, then one in as many, and one when it ends."""

    def __init__(self, write: Callable[[str], object], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write, now
        self._phase: Phase | None = None
        self._last = 0.0
        self._sweep = Sweep()

    def phase(self, name: str, total: int, unit: str) -> None:
        self.close(sweep=False)
        self._last = self._now()
        self._phase = Phase(plain(name), total, plain(unit), self._last)

    def advance(self, done: int, note: str = "") -> None:
        if self._phase is None:
            return
        self._phase.advance(done, note, self._now())
        if done < self._phase.total and self._now() - self._last >= EVERY:  # the end has a line of its own
            self._last = self._now()
            self._write(self._phase.line(self._last))

    def ahead(self, own: float | None, after: float, more: bool) -> None:
        if self._phase is not None:
            self._phase.own, self._phase.after, self._phase.more = own, after, more

    def say(self, text: str) -> None:
        self._write(plain(text))

    def row(self, attack: dict[str, Any]) -> None:
        self._phase = None
        for line in self._sweep.take(attack):
            self._write(line)

    def close(self, sweep: bool = True) -> None:
        """End the phase; a line tells how it ended unless an attack's row did."""
        for line in self._sweep.end() if sweep else ():
            self._write(line)
        if self._phase is not None and self._phase.done:
            self._write(self._phase.line(self._now()))
        self._phase = None


def cut(text: str, width: int) -> str:
    """Shorten text to a width; the end gives way."""
    return text if len(text) <= width else text[: width - 1] + "…" if width > 1 else ""


def moving(phase: Phase, now: float, width: int) -> str:
    """Write the bar: share, time and time left in full; the note gives way first, then the name."""
    figures = f"{phase.figure()}  {clock(now - phase.began)}"
    left = phase.left(now)
    figures += "" if left is None else f", {'over ' if phase.more else ''}{clock(left)} left"
    full = int(BAR * phase.share)
    room = width - BAR - len(figures) - 4
    name = cut(phase.name, room)
    note = cut(phase.note, room - len(name) - 2)
    return "  ".join(t for t in (name, "━" * full + "─" * (BAR - full), figures, note) if t)


class Live:
    """A bar that moves, with a line for each finished phase left standing above it."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._console, self._now = console, now
        self._bar: Any = None
        self._phase: Phase | None = None
        self._sweep = Sweep()

    def phase(self, name: str, total: int, unit: str) -> None:
        from rich.live import Live as Redrawn

        self.close(sweep=False)
        self._phase = Phase(plain(name), total, plain(unit), self._now())
        self._bar = Redrawn(
            get_renderable=self._draw,
            console=self._console,
            transient=True,
            refresh_per_second=5,
            vertical_overflow="crop",
        )
        self._bar.start()

    def _draw(self) -> Any:
        phase = self._phase
        return cell("" if phase is None else moving(phase, self._now(), self._console.width - 1))

    def advance(self, done: int, note: str = "") -> None:
        if self._phase is not None:
            self._phase.advance(done, note, self._now())

    def ahead(self, own: float | None, after: float, more: bool) -> None:
        if self._phase is not None:
            self._phase.own, self._phase.after, self._phase.more = own, after, more

    def say(self, text: str) -> None:
        self._console.print(plain(text))

    def row(self, attack: dict[str, Any]) -> None:
        self._stop()
        self._phase = None
        for line in self._sweep.take(attack):
            self._console.print(line)

    def close(self, sweep: bool = True) -> None:
        """Take the bar away; a phase that was no attack leaves its last line."""
        self._stop()
        for line in self._sweep.end() if sweep else ():
            self._console.print(line)
        if self._phase is not None and self._phase.done:
            self._console.print(self._phase.line(self._now()))
        self._phase = None

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = None
