"""Plays a match card: one question after the other, each resumable, then the standings of what was played."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arena.cli.answer import answer, judge, write
from arena.cli.options import chosen


def play_card(
    path: Path, given: dict[str, Any], json_to: str | None, fail_under: float | None, fail_on: str, quiet: bool
) -> int:
    """Play a card and return the worst exit code; a question that cannot be played is named and the rest goes on.

    ``given`` are the options of the command line; they win over the card.
    """
    from arena.cards import name_question, read_card
    from arena.cli.console import cell, installed, interval, out, percent
    from arena.cli.leaderboard import draw
    from arena.cli.paper import brief, is_paper, refuse_threshold
    from arena.entries import split
    from arena.errors import ArenaError
    from arena.leaderboard import standings
    from arena.store import open_store

    overrides = chosen(**given)
    # a flag that was not given, and the automatic device, leave the card's word
    overrides = {k: v for k, v in overrides.items() if v is not False and (k, v) != ("device", "auto")}
    if "vs" in overrides:
        overrides["vs"] = tuple(split(overrides["vs"]))
    if not path.exists():
        raise ArenaError(f"card {path}: no such file")
    card = read_card(path, overrides)
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
                click.echo(f"arena: error: {name}: {' '.join(str(error).split())}", err=True)
                worst = max(worst, 2)
                continue
            records.append(record)
            if json_to != "-":
                value = record["worst_case"]
                text = f"{name}: worst case {percent(value['robust_accuracy'])} % ({interval(value['ci95'])})"
                text = f"{name}: {brief(record)}" if is_paper(record) else text
                text += f", natural {percent(record['natural']['accuracy'])} %, result {record['id']}"
                console.print(cell(text + (" (stored)" if stored else "")), soft_wrap=True)
            worst = max(worst, judge(record, fail_under, fail_on))
        if json_to:
            write(json_to, records)
        if records and json_to != "-":
            console.print()
            draw(console, standings(store, results=[r["id"] for r in records]))
    return worst
