"""Where text goes: results to stdout, progress and remarks to stderr, foreign text made harmless."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, redirect_stdout
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from arena.plugins import Registry

#: Width of what goes to a file or a pipe, unless COLUMNS says otherwise.
PIPED = 120
#: From this width on, tables have room.
WIDE = 100


def foreign() -> AbstractContextManager[object]:
    """Send what plugins and models print to stderr: stdout is for results."""
    return redirect_stdout(sys.stderr)


def installed() -> Registry:
    """Return the registry of this process, loaded without a word on stdout."""
    from arena.plugins import registry

    with foreign():
        return registry()


def problems(number: int) -> str:
    """Point at what is wrong with plugins."""
    return f"{number} plugin problem{'s' if number > 1 else ''}: see 'arena plugins doctor'"


def out() -> Console:
    """Return the console for results."""
    from rich.console import Console

    class Out(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # rich would exit with 1, which says that a threshold failed

        def print(self, *objects: Any, **options: Any) -> None:
            if self.is_terminal or options.get("soft_wrap"):
                return super().print(*objects, **options)
            with self.capture() as text:
                super().print(*objects, **options)
            lines = [line.rstrip(" ") for line in text.get().split("\n")]
            self.file.write("\n".join(lines))
            self.file.flush()

    width = None if sys.stdout.isatty() or os.environ.get("COLUMNS") else PIPED
    return Out(file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=False, width=width)


def err() -> Console:
    """Return the console for progress."""
    from rich.console import Console

    return Console(file=sys.stderr, highlight=False, markup=False, emoji=False)


def plain(value: Any) -> str:
    """Return text from a plugin or a record without line breaks and control characters."""
    return "".join(c if c.isprintable() else " " if c in "\n\t\r" else "?" for c in str(value))


def cell(value: Any, style: str = "") -> Text:
    """Return foreign text for a table: never read as markup."""
    from rich.text import Text

    return Text(plain(value), style=style)


def table(*columns: str, tight: bool = False) -> Table:
    """Return an empty table that is legible without a terminal, too; ``tight`` has one space between columns.

    A column's name may begin with ``>`` (right-justified, never broken) or ``=`` (never broken).
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, padding=(0, 0 if tight else 1, 0, 0), show_edge=False, pad_edge=False)
    for name in columns:
        bare = name.lstrip(">=")
        right = name.startswith(">")
        made.add_column(bare, justify="right" if right else "left", no_wrap=bare != name, overflow="fold")
    return made


def percent(value: float | None) -> str:
    """Write a percentage with one digit after the point, ``-`` for none."""
    return "-" if value is None else f"{value:.1f}"


def interval(ci95: Any) -> str:
    """Write an interval: ``31.0 to 39.4``."""
    return f"{ci95[0]:.1f} to {ci95[1]:.1f}" if ci95 else "-"


def count(value: Any) -> str:
    """Write a number in at most five characters: ``950``, ``12.3k``, ``1.20M``."""
    if value is None:
        return "-"
    number = float(value)
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:
            return f"{number / size:.3g}{letter}" if number < 999.5 * size else f"{number / size:.0f}{letter}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Write a duration: ``4.2 s``, ``3:07``, ``1:02:03``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
