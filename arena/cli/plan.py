"""``arena match --plan``: what a match would be, drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arena.cli.console import cell, count, foreign, installed, out, plain, table
from arena.cli.result import spaced
from arena.errors import ArenaError

if TYPE_CHECKING:
    from arena.question import Question, Running


def refuse_with(**given: object) -> None:
    """Refuse options that speak of a result.

    Raises:
        ArenaError: one is given.
    """
    for name, value in given.items():
        if value is not None:
            raise ArenaError(
                f"--plan plays nothing, so there is no result for --{name.replace('_', '-')}: leave it out"
            )


def show_plan(question: Question, running: Running) -> None:
    """Print the line-up of a match with the most it can cost; nothing is trained, attacked or written."""
    from arena.budget import said
    from arena.cli.options import settle
    from arena.foresight import foresee

    with foreign():
        seen = foresee(question, settle(running), installed())
    console, points = out(), seen.bill.points
    console.print(cell(" · ".join(plain(w) for w in (seen.name, *seen.words) if w), style="bold"))
    made = table("entry", "attack", ">forw.", ">backw.", ">passes")
    for bound in seen.bill.bounds:
        shown = ("unknown", "unknown", "unknown")
        if bound.passes is not None:
            shown = (*map(str, bound.passes), count(points * sum(bound.passes)))  # type: ignore[assignment]
        entry = "" if bound.entry == bound.name else spaced(bound.entry)
        made.add_row(cell(entry), cell(spaced(bound.name)), *shown)
    console.print(made)
    console.print(cell("forw., backw.: an example, at most; passes: both, of all points an attack can meet", "dim"))
    console.print(cell(seen.bill.line(seen.pace)), soft_wrap=True)
    left_out = [text for text in map(said, seen.groups) if text]
    for text in (*left_out, *(p for g in seen.groups for p in g.problems), *seen.remarks):
        console.print(cell(f"note: {plain(text)}"), soft_wrap=True)
