"""``arena leaderboard``: the standings."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

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
@click.option("--unranked", is_flag=True, help="List results that are not ranked, with the reason.")
@click.option("--format", "form", type=click.Choice(FORMATS), default="table", help="[default: table]")
def command(
    dataset: str | None,
    norm: str | None,
    eps: str | None,
    n: int | None,
    defense: str | None,
    unranked: bool,
    form: str,
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
        known = () if tables else store.all()
    if form == "json":
        click.echo(json.dumps(as_json(tables), indent=2, ensure_ascii=False))
    elif form == "csv":
        click.echo(as_csv(tables), nl=False)
    elif form == "md":
        click.echo(as_markdown(tables), nl=False)
    elif tables:
        draw(out(), tables, unranked=unranked or defense is not None)
    else:
        what = missing(known, dataset=dataset, norm=norm, eps=eps, n=n, defense=defense)
        click.echo(f"{what} in {place}. Play one: arena match fgaa_sat --vs autoattack,adaptive")
    return 0


def missing(records: Sequence[Mapping[str, Any]], **filters: Any) -> str:
    """Say which filter no record passes, and what there is; just ``No results yet`` for an empty store."""
    if not records:
        return "No results yet"
    seen = {
        "dataset": ("data set", {r["asked"]["dataset"] for r in records}),
        "norm": ("norm", {r["asked"]["threat"]["norm"] for r in records}),
        "n": ("n", {str(r["asked"]["n"]) for r in records}),
        "defense": ("defense", {r["defense"] for r in records}),
    }
    for key, (name, there) in seen.items():
        wanted = filters.get(key)
        if wanted is not None and str(wanted) not in there | {d.partition("(")[0] for d in there}:
            shown = sorted(there)
            return f"No result of {name} '{wanted}' ({', '.join(shown[:8])}{', ...' * (len(shown) > 8)} exist)"
    return "No result fits all filters"


def draw(console: Console, tables: Sequence[Standings], *, unranked: bool = True) -> None:
    """Print the tables; a narrow screen shows the backbone only where it differs, and shorter heads.

    Results that are not ranked are listed, or with ``unranked`` false counted.
    """
    from arena.cli.console import WIDE, cell, count, table
    from arena.leaderboard import label, percent, span, title, worst

    wide = console.width >= WIDE
    for number, t in enumerate(tables):
        if number:
            console.print()
        everyone = (*t.rows, *t.unranked)
        several = len({r.backbone for r in everyone}) > 1
        console.print(
            cell(title(t) + ("" if several or not everyone[0].backbone else f" · {everyone[0].backbone}"), style="bold")
        )
        if t.rows:
            heads = ("natural", "autoattack", "adaptive") if wide else ("nat.", "auto", "adapt")
            columns = ["=rank", "defense", *(["backbone"] if several else []), f">{heads[0]}", ">worst (95 %)"]
            made = table(
                *columns,
                f">{heads[1]}",
                f">{heads[2]}",
                "verdict",
                ">passes",
                "=date",
                *(["=id"] if wide else []),
                tight=not wide,
            )
            for r in t.rows:
                cells: list[str | Text] = [span(r.rank), cell(label(r)), *([cell(r.backbone)] if several else [])]
                cells += [
                    percent(r.natural),
                    worst(r),
                    percent(r.autoattack),
                    percent(r.adaptive),
                    cell(r.verdict.replace("_", " ")),
                ]
                made.add_row(*cells, count(r.passes), r.date, *([r.result[:8]] if wide else []))
            console.print(made)
            if not wide:
                console.print(cell("ids: " + ", ".join(f"{label(r)} {r.result[:8]}" for r in t.rows), "dim"))
        if t.results > len(everyone):
            console.print(cell(f"ranks are among all {t.results} results with this data, threat model and n"))
        if t.unranked and not unranked:
            more = len(t.unranked) > 1
            number_of = f"{len(t.unranked)} result{'s' if more else ''}"
            rosters = all("roster" in r.reason or "played" in r.reason or "incomplete" in r.reason for r in t.unranked)
            what = "without complete rosters" if rosters else "not ranked"
            console.print(cell(f"{number_of} {what}: --unranked shows {'them' if more else 'it'}"))
        elif t.unranked:
            console.print(cell("not ranked:"))
            for r in t.unranked:
                console.print(cell(f"  {label(r)} ({r.result[:8]}): worst case {worst(r)}; {r.reason}"))
