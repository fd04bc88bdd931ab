"""The screen of a result under the protocol ``paper``: its own columns, and never the words robust accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from arena.cli.console import WIDE, cell, clock, count, percent, table
from arena.errors import ArenaError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

WHAT = "the paper's own protocol: not robust accuracy"
#: The verdict ``not_audited``, in words.
UNAUDITED = "not audited: the paper's attacks are replayed, not judged"


def is_paper(record: Mapping[str, Any]) -> bool:
    """Tell whether a record replays a paper's own evaluation."""
    return record.get("protocol") == "paper"


def brief(record: Mapping[str, Any]) -> str:
    """Write a result in a few words: how many points a paper's own attacks leave classified correctly."""
    known = [v for v in record["paper"]["accuracy"].values() if v is not None]
    if not known:
        return "the paper's own protocol, nothing was played"
    return f"{percent(min(known))} to {percent(max(known))} % (paper's own protocol, not robust accuracy)"


def refuse_threshold(protocols: Iterable[str | None], fail_under: float | None) -> None:
    """Refuse ``--fail-under`` where a match has no worst case.

    Raises:
        ArenaError: a threshold is given, and one of the protocols is ``paper``.
    """
    if fail_under is not None and "paper" in protocols:
        raise ArenaError("--fail-under: protocol paper has no worst case; leave one of them out")


def draw_attacks(console: Console, record: Mapping[str, Any], spaced: Callable[[str], str]) -> None:
    """Print a row for each attack, then what the paper publishes and what is wrong with its evaluation."""
    rules = any(a.get("violations") for a in record["attacks"])
    columns = ["attack", "=status", ">tried", ">correct", ">repaired", ">broken", ">only", ">forw.", ">backw.", ">time"]
    made = table(*columns, *(["violations"] if rules else []), tight=console.width < WIDE)
    for a in record["attacks"]:
        only = a.get("unique_broken")
        cells: list[str | Text] = [
            cell(spaced(a["name"])),
            cell(a["status"], style="" if a["status"] == "ok" else "yellow"),
            str(a["attempted"]),
            percent(a.get("paper_accuracy")),
            "-" if a.get("repaired") is None else str(a["repaired"]),
            str(a["broken"]),
            "-" if only is None else str(only),
            count(a.get("forwards")),
            count(a.get("backwards")),
            clock(a.get("seconds") or 0.0),
        ]
        if rules:
            cells.append(cell(", ".join(f"{n} {kind}" for kind, n in (a.get("violations") or {}).items())))
        made.add_row(*cells)
    console.print(made)
    console.print(
        cell("correct: % of all n classified correctly where the attack ends; broken, repaired, only: points", "dim")
    )
    _block(console, record["paper"])


def _block(console: Console, paper: Mapping[str, Any]) -> None:
    lines = [f"lowest row of {name}: {percent(value)} %" for name, value in (paper.get("sweeps") or {}).items()]
    if paper.get("published"):
        where = f" ({paper['published_on']})" if paper.get("published_on") else ""
        lines.append(f"published{where}: " + ", ".join(f"{k} {v:g} %" for k, v in paper["published"].items()))
    lines += [f"flaw: {flaw}" for flaw in paper.get("flaws") or ()]
    if lines:
        console.print()
    for line in lines:
        console.print(cell(line))
