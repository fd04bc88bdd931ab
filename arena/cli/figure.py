"""``arena figure``: plots of what was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from arena.cli import options
from arena.errors import ArenaError, unknown

KINDS = ("training",)


@click.command("figure")
@click.argument("kind", metavar="KIND")
@click.argument("sources", nargs=-1, required=True, metavar="RESULT...")
@click.option("-o", "output", type=options.FILE, required=True, metavar="FILE", help="A .png, .svg or .pdf to write.")
def command(kind: str, sources: tuple[str, ...], output: Path) -> int:
    """Draw a figure.

    KIND is training: accuracies and loss by epoch. RESULT is a result's id, or a training log (train.jsonl) or its
    folder, as 'arena train' names them. Needs matplotlib.

    \b
    Examples:
      arena figure training 3f9a -o curves.png
      arena figure training 3f9a 77b0 -o two.svg
    """
    if kind not in KINDS:
        raise unknown("figure", kind, KINDS)
    from arena import figures
    from arena.cli.console import out

    figures.check(output)
    logs: dict[str, Any] = {}
    for source in sources:
        name, lines = _log(source)
        logs[name if name not in logs else f"{name} ({source})"] = lines
    figures.training(logs, output)
    out().print(str(output), soft_wrap=True)
    return 0


def _log(source: str) -> tuple[str, list[dict[str, Any]]]:
    """Find a training log by path or by a result."""
    import json

    from arena.home import home
    from arena.store import open_store
    from arena.trace import LOG, read

    path = Path(source)
    if path.is_dir() or path.suffix == ".jsonl":
        path = path / LOG if path.is_dir() else path
        try:
            name = json.loads((path.parent / "model.json").read_bytes())["defense"]
        except (OSError, ValueError, KeyError):  # a log alone, or a training that goes on: only the label suffers
            name = path.parent.name
        return str(name), read(path)
    with open_store() as store:
        record = store.get(source)
    key = (record["model"].get("trained") or {}).get("key")
    path = home() / "models" / str(key)[:16] / LOG
    if key is None or not path.exists():
        raise ArenaError(f"result '{source}': no training log of '{record['defense']}' is kept here")
    return str(record["defense"]), read(path)
