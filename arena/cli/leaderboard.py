"""``arena leaderboard``: the standings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.text import Text

    from arena.leaderboard import Standings

FORMATS = ("table", "json", "csv", "md")


@click.command("leaderboard")
@click.option("--dataset", metavar="NAME", help="Only this data set.")
@click.option("--norm", metavar="NORM", help="Only this norm.")
@click.option("--eps", metavar="EPS", help="Only this radius; 1/5 and 0.2 are equal.")
@click.option("-n", type=int, metavar="N", help="Only results on so many points.")
@click.option("--defense", metavar="NAME", help="Show only this defense; ranks stay those among all.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", help="[default: table]")
def command(
    dataset: str | None, norm: str | None, eps: str | None, n: int | None, defense: str | None, form: str
) -> int:
    """Rank all results of the store.

    One table for each data set, threat model and number of points. Ranked are results with complete rosters
    autoattack and adaptive; defenses whose points do not tell them apart share ranks (exact McNemar tests, Holm's
    correction, 5 %).

    \b
    Examples:
      arena leaderboard
      arena leaderboard --dataset digits -n 500 --format md
    """
    from arena.cli.console import out
    from arena.leaderboard import as_csv, as_json, as_markdown, standings
    from arena.store import open_store
    from arena.threat import Threat

    norm = Threat.parse(norm, "0").norm if norm else None
    with open_store() as store:
        tables = standings(store, dataset=dataset, norm=norm, eps=eps, n=n, defense=defense)
        place = store.place
    if form == "json":
        click.echo(json.dumps(as_json(tables), indent=2, ensure_ascii=False))
    elif form == "csv":
        click.echo(as_csv(tables), nl=False)
    elif form == "md":
        click.echo(as_markdown(tables), nl=False)
    elif tables:
        draw(out(), tables)
    else:
        filtered = any(v is not None for v in (dataset, norm, eps, n, defense))
        what = "No result fits" if filtered else "No results yet"
        click.echo(f"{what} in {place}. Play one: arena match fgaa_sat --vs autoattack,adaptive")
    return 0


def draw(console: Console, tables: Sequence[Standings]) -> None:
    """Print the tables; a narrow screen shows the backbone only where it differs, and shorter heads."""
    from arena.cli.console import WIDE, cell, count, table
    from arena.leaderboard import label, percent, span, title, worst

    wide = console.width >= WIDE
    for number, t in enumerate(tables):
        if number:
            console.print()
        everyone = (*t.rows, *t.unranked)
        several = len({r.backbone for r in everyone}) > 1
        console.print(cell(title(t) + ("" if several else f" · {everyone[0].backbone}"), style="bold"))
        if t.rows:
            heads = ("natural", "autoattack", "adaptive") if wide else ("nat.", "auto", "adapt")
            columns = ["=rank", "defense", *(["backbone"] if several else []), f">{heads[0]}", ">worst (95 %)"]
            made = table(*columns, f">{heads[1]}", f">{heads[2]}", "verdict", ">passes", "=date", tight=not wide)
            for r in t.rows:
                cells: list[str | Text] = [span(r.rank), cell(label(r)), *([cell(r.backbone)] if several else [])]
                cells += [
                    percent(r.natural),
                    worst(r),
                    percent(r.autoattack),
                    percent(r.adaptive),
                    cell(r.verdict.replace("_", " ")),
                ]
                made.add_row(*cells, count(r.passes), r.date)
            console.print(made)
        if t.results > len(everyone):
            console.print(cell(f"ranks are among all {t.results} results with this data, threat model and n"))
        if t.unranked:
            console.print(cell("not ranked:"))
            for r in t.unranked:
                console.print(cell(f"  {label(r)} ({r.result[:6]}): worst case {worst(r)}; {r.reason}"))
