"""What a single match and a card share: playing a question, writing its record, judging it against a threshold."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from arena.cli import options
from arena.errors import ArenaError

if TYPE_CHECKING:
    from arena.plugins import Registry
    from arena.question import Question, Running


def answer(question: Question, running: Running, registry: Registry, quiet: bool) -> tuple[dict[str, Any], bool]:
    """Play one question, drawing progress; return the record and whether it was stored already."""
    from arena.cli.console import foreign
    from arena.cli.progress import watching
    from arena.match import play

    running = options.settle(running)
    with spoken(), foreign(), watching(quiet) as watch:
        answered = play(question, running, registry, watch)
    return answered.record, answered.stored


@contextmanager
def spoken() -> Iterator[None]:
    """Say of what the key of a held lock stands for."""
    try:
        yield
    except ArenaError as error:
        for key, what in (("match-", "this match is being played"), ("model-", "this model is being trained")):
            if re.match(rf"{key}[0-9a-f]+ is in use by another arena process", str(error)):
                cure = "wait for it to end or stop it"
                raise ArenaError(f"{what} by another arena process; {cure}") from None
        raise


def check_destination(where: str | None) -> None:
    """Find out before an hour of attacks whether the JSON can be written.

    Raises:
        ArenaError: no such folder, a folder in its place, or no permission.
    """
    if where is None or where == "-":
        return
    path = Path(where).expanduser()
    if path.exists() and not path.is_file():
        raise ArenaError(f"--json '{where}': expected a file, got {'a folder' if path.is_dir() else 'something else'}")
    if not path.parent.is_dir():
        raise ArenaError(f"--json '{where}': no such folder '{path.parent}'")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ArenaError(f"--json '{where}': folder '{path.parent}' cannot be written")


def write(where: str, record: Any) -> None:
    """Write JSON to a file, whole or not at all, or to stdout for ``-``."""
    text = json.dumps(record, indent=2, ensure_ascii=False)
    if where == "-":
        click.echo(text)
        return
    from arena.home import atomic_write

    atomic_write(Path(where).expanduser(), (text + "\n").encode())


def judge(record: dict[str, Any], fail_under: float | None, fail_on: str) -> int:
    """Return 1, and say why on stderr, if a threshold failed or the verdict is void; 3 if a time limit stopped it."""
    name = record["defense"]
    if record.get("stopped"):
        click.echo(f"arena: {name}: stopped by the time limit; the same command goes on", err=True)
        return 3 if _holds(record, fail_under, fail_on) else 1
    if (record.get("audit") or {}).get("verdict") == "void":
        click.echo(f"arena: {name}: the verdict is void", err=True)
        return 1
    return 0 if _holds(record, fail_under, fail_on) else 1


def _holds(record: dict[str, Any], fail_under: float | None, fail_on: str) -> bool:
    """Tell whether a record keeps to a threshold, and say on stderr that it does not.

    The worst case of a match that was stopped can only sink.
    """
    name, worst = record["defense"], record["worst_case"]
    if fail_under is None:
        return True
    value = worst["robust_accuracy"] if fail_on == "point" else (worst["ci95"] or [None])[0]
    what = "worst case" if fail_on == "point" else "lower end of the worst case"
    if value is None or value < fail_under:
        shown = "missing" if value is None else f"{value:.2f} %"
        click.echo(f"arena: {name}: {what} {shown} is under --fail-under {fail_under:g}", err=True)
        return False
    return True
