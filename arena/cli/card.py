"""Plays a match card: one question after the other, each resumable, then the standings of what was played."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arena.cli.answer import answer, judge, write
from arena.cli.options import chosen

if TYPE_CHECKING:
    from arena.cards import Card
    from arena.errors import ArenaError
    from arena.question import Question


def plan_card(path: Path, given: dict[str, Any]) -> int:
    """Show what each match of a card would be; return the worst exit code."""
    from arena.cli.plan import show_plan
    from arena.errors import ArenaError

    worst, card = 0, _read(path, given)
    for number, question in enumerate(card.questions):
        if number:
            click.echo()
        try:
            show_plan(question, card.running)
        except ArenaError as error:
            _refused(question, error)
            worst = 2
    return worst


def _refused(question: Question, error: ArenaError) -> None:
    from arena.cards import name_question

    click.echo(f"arena: error: {name_question(question)}: {' '.join(str(error).split())}", err=True)


def _read(path: Path, given: dict[str, Any]) -> Card:
    from arena.cards import read_card
    from arena.entries import split
    from arena.errors import ArenaError

    overrides = chosen(**given)
    # a flag that was not given, and the automatic device, leave the card's word
    overrides = {k: v for k, v in overrides.items() if v is not False and (k, v) != ("device", "auto")}
    if "vs" in overrides:
        overrides["vs"] = tuple(split(overrides["vs"]))
    if not path.exists():
        raise ArenaError(f"card {path}: no such file")
    return read_card(path, overrides)


def play_card(
    path: Path, given: dict[str, Any], json_to: str | None, fail_under: float | None, fail_on: str, quiet: bool
) -> int:
    """Play a card and return the worst exit code; a question that cannot be played is named and the rest goes on.

    ``given`` are the options of the command line; they win over the card.
    """
    from arena.cards import name_question
    from arena.cli.console import cell, installed, interval, out, percent
    from arena.cli.leaderboard import draw
    from arena.cli.paper import brief, is_paper, refuse_threshold
    from arena.errors import ArenaError
    from arena.leaderboard import standings
    from arena.store import open_store

    card = _read(path, given)
    refuse_threshold((q.protocol for q in card.questions), fail_under)
    console = out()
    records: list[dict[str, Any]] = []
    worst = 0
    with open_store() as store:
        for number, question in enumerate(card.questions, start=1):
            name = name_question(question)
            if not quiet:
                click.echo(f"[{number}/{len(card.questions)}] {name}", err=True)
            try:
                record, stored = answer(question, card.running, installed(), quiet)
            except ArenaError as error:
                _refused(question, error)
                worst = max(worst, 2)
                continue
            records.append(record)
            if json_to != "-":
                value = record["worst_case"]
                text = f"{name}: worst case {percent(value['robust_accuracy'])} % ({interval(value['ci95'])})"
                text = f"{name}: {brief(record)}" if is_paper(record) else text
                text += f", natural {percent(record['natural']['accuracy'])} %, result {record['id']}"
                console.print(
                    cell(text + (" (stored)" if stored else " (stopped)" if record.get("stopped") else "")),
                    soft_wrap=True,
                )
            worst = max(worst, judge(record, fail_under, fail_on))
        if json_to:
            write(json_to, records)
        kept = [r["id"] for r in records if not r.get("stopped")]
        if kept and json_to != "-":
            console.print()
            draw(console, standings(store, results=kept))
    return worst
