"""Draws what long work tells: a live bar on a terminal, plain lines elsewhere. All to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from arena.cli.console import clock, err, percent, plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID

    from arena.watch import Watch

#: Seconds between plain lines of one phase.
EVERY = 5.0


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
    if row.get("cumulative_accuracy") is not None:
        text += f", {percent(row['cumulative_accuracy'])} % left"
    elif row.get("robust_accuracy") is not None:
        text += f", {percent(row['robust_accuracy'])} % stand"
    if row["status"] != "ok":
        text += f", {row['status'].upper()}: {plain(row.get('error') or 'no reason given')}"
    return text + f" ({clock(row.get('seconds') or 0.0)})"


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

    def advance(self, done: int, note: str) -> None:
        """Take in a report."""
        if self.before < 0:
            self.before = done if note == "resumed" else 0
        self.done, self.note = done, plain(note)

    def line(self, now: float) -> str:
        """Tell how far it is, how long it took and how long it may take."""
        elapsed = now - self.began
        text = f"{self.name}: {self.done}/{self.total} {self.unit}" + (f", {self.note}" if self.note else "")
        fresh = self.done - max(self.before, 0)
        if self.done >= self.total or fresh <= 0:
            return f"{text}, {clock(elapsed)}"
        return f"{text}, {clock(elapsed)}, about {clock(elapsed * (self.total - self.done) / fresh)} left"


class Lines:
    """Plain lines: one when a phase begins, at most one every ``EVERY`` seconds, one when it ends."""

    def __init__(self, write: Callable[[str], object], now: Callable[[], float] = time.monotonic) -> None:
        self._write, self._now = write, now
        self._phase: Phase | None = None
        self._last = 0.0

    def phase(self, name: str, total: int, unit: str) -> None:
        self.close()
        self._last = self._now()
        self._phase = Phase(plain(name), total, plain(unit), self._last)
        if total:
            self._write(f"{self._phase.name}: {total} {self._phase.unit}")

    def advance(self, done: int, note: str = "") -> None:
        if self._phase is None:
            return
        self._phase.advance(done, note)
        if self._now() - self._last >= EVERY:
            self._last = self._now()
            self._write(self._phase.line(self._last))

    def say(self, text: str) -> None:
        self._write(plain(text))

    def row(self, attack: dict[str, Any]) -> None:
        self._phase = None
        self._write(summary(attack))

    def close(self) -> None:
        """End the phase; a line tells how it ended unless an attack's row did."""
        if self._phase is not None and self._phase.done:
            self._write(self._phase.line(self._now()))
        self._phase = None


class Live:
    """A bar that moves, with a line for each finished phase left standing above it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._phase: Phase | None = None

    def phase(self, name: str, total: int, unit: str) -> None:
        from rich import progress as p
        from rich.markup import escape
        from rich.table import Column

        self.close()
        self._phase = Phase(plain(name), total, plain(unit), time.monotonic())

        def fixed() -> Column:
            return Column(no_wrap=True)

        def cut() -> Column:
            return Column(no_wrap=True, overflow="ellipsis")

        self._bar = p.Progress(
            p.TextColumn("{task.description}", table_column=cut()),
            p.BarColumn(bar_width=10, table_column=fixed()),
            p.MofNCompleteColumn(table_column=fixed()),
            p.TimeElapsedColumn(table_column=fixed()),
            p.TextColumn("left", style="dim", table_column=fixed()),
            p.TimeRemainingColumn(compact=True, table_column=fixed()),
            p.TextColumn("{task.fields[note]}", style="dim", table_column=cut()),
            console=self._console,
            transient=True,
            speed_estimate_period=60,
        )
        self._bar.start()
        self._task = self._bar.add_task(escape(plain(name)), total=total, note="")

    def advance(self, done: int, note: str = "") -> None:
        from rich.markup import escape

        if self._bar is not None and self._task is not None and self._phase is not None:
            self._phase.advance(done, note)
            self._bar.update(self._task, completed=done, note=escape(plain(note)))

    def say(self, text: str) -> None:
        self._console.print(plain(text))

    def row(self, attack: dict[str, Any]) -> None:
        self._phase = None
        self._console.print(summary(attack))

    def close(self) -> None:
        """Take the bar away; a phase that was no attack leaves its last line."""
        if self._bar is not None:
            self._bar.stop()
        if self._phase is not None and self._phase.done:
            self._console.print(self._phase.line(time.monotonic()))
        self._bar = self._task = self._phase = None
