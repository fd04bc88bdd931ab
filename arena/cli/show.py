"""``arena show``: a stored result again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from arena.errors import ArenaError

#: Results named below the newest.
EARLIER = 5


@click.command("show")
@click.argument("result", required=False)
@click.option("--all", "everything", is_flag=True, help="Give each row of a sweep its own line.")
@click.option("--json", "as_json", is_flag=True, help="Print the whole record.")
def command(result: str | None, everything: bool, as_json: bool) -> int:
    """Show a stored result again.

    RESULT is a result's id, the beginning of one, or a JSON file written by 'match --json'; without it, the newest
    result is shown and the ones before it are named.

    \b
    Examples:
      arena show
      arena show 3f9a
      arena show 3f9a --json | jq .worst_case
    """
    from arena.cli.console import cell, out, percent
    from arena.cli.paper import brief, is_paper
    from arena.cli.result import draw
    from arena.store import open_store

    console = out()
    with open_store() as store:
        if result is None:
            newest = store.latest()
            if newest is None:
                raise ArenaError("no results yet; play a match first: arena match fgaa_sat")
            result = str(newest["id"])
            earlier = store.all()[-1 - EARLIER : -1][::-1]
        else:
            earlier = []
        record = read(Path(result)) if result.endswith(".json") else store.get(result)
        if as_json:
            click.echo(json.dumps(record, indent=2, ensure_ascii=False))
        else:
            try:
                draw(console, record, store, everything=everything, indicators=True)
            except (KeyError, TypeError, AttributeError) as error:
                if not result.endswith(".json"):
                    raise
                raise ArenaError(f"{result}: not a result of arena ({type(error).__name__}: {error})") from None
            for one in earlier:
                asked, worst = one["asked"], f"{percent(one['worst_case']['robust_accuracy'])} %"
                worst = brief(one) if is_paper(one) else worst
                threat = f"{asked['threat']['norm']} eps {asked['threat']['eps']}"
                about = f"{one['defense']} · {asked['dataset']} · {threat} · n {asked['n']} · {worst}"
                console.print(cell(f"earlier   {one['id'][:8]}  {about}"))
    return 0


def read(path: Path) -> dict[str, Any]:
    """Read a JSON result.

    Raises:
        ArenaError: no such file, or no result.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArenaError(f"{path}: no such file") from None
    except OSError as error:
        raise ArenaError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ArenaError(f"{path}: not a JSON result ({error})") from None
    if (
        not isinstance(record, dict)
        or not isinstance(record.get("model"), dict)
        or not {"id", "defense", "asked", "model", "natural", "worst_case"} <= set(record)
    ):
        raise ArenaError(f"{path}: not a result of arena")
    return record
