"""``arena list``: what there is."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from arena.errors import unknown

if TYPE_CHECKING:
    from rich.console import Console

    from arena.plugins import Registered, Registry

#: Kind as asked for and as the registry calls it.
KINDS = {
    "defenses": "defense",
    "attacks": "attack",
    "rosters": "roster",
    "datasets": "dataset",
    "backbones": "backbone",
}


@click.command("list")
@click.argument("kind", required=False, metavar="[KIND|NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print everything that is declared, as JSON.")
def command(kind: str | None, as_json: bool) -> int:
    """List defenses, attacks, rosters, data sets, backbones.

    KIND is defenses, attacks, rosters, datasets or backbones; NAME is one of them, which is described in full.

    \b
    Examples:
      arena list
      arena list attacks
      arena list fgaa_sat
      arena list defenses --json
    """
    from arena.cli.console import installed, out, problems

    found = installed()
    if kind is not None and kind not in KINDS:
        return _one(kind, found, as_json)
    kinds = [kind] if kind else list(KINDS)
    if as_json:
        data = {k: [describe(r) for r in found.all(KINDS[k])] for k in kinds}
        click.echo(json.dumps(data[kind] if kind else data, indent=2, ensure_ascii=False))
        return 0
    console = out()
    if not kind:
        console.print(", ".join(_count(len(found.all(KINDS[k])), k) for k in kinds))
    for k in kinds:
        if not kind:
            console.print()
        _draw(console, k, found)
    if found.problems:
        click.echo(f"arena: {problems(len(found.problems))}", err=True)
    return 0


def _one(text: str, found: Registry, as_json: bool) -> int:
    from arena.cli.console import out
    from arena.cli.describing import draw

    name = text.partition("(")[0].partition(":")[0]
    fits = [(kind, found.get(kind, name)) for kind in KINDS.values() if found.has(kind, name)]
    if not fits:
        names = [n for kind in KINDS.values() for n in found.names(kind) if "/" not in n or "/" in name]
        raise unknown("kind or name", text, [*KINDS, *names])
    if as_json:
        data = [{"kind": kind, **describe(registered)} for kind, registered in fits]
        click.echo(json.dumps(data[0] if len(data) == 1 else data, indent=2, ensure_ascii=False))
        return 0
    console = out()
    for number, (kind, registered) in enumerate(fits):
        if number:
            console.print()
        draw(console, kind, registered)
    return 0


def _count(number: int, kinds: str) -> str:
    return f"1 {KINDS[kinds]}" if number == 1 else f"{number} {kinds}"


def describe(registered: Registered[Any]) -> dict[str, Any]:
    """Return a spec as plain data, with name and origin as the registry gives them."""
    spec = registered.spec
    data: dict[str, Any] = {"name": registered.name, "origin": registered.origin}
    for field in fields(spec):
        data.setdefault(field.name, _jsonable(getattr(spec, field.name)))
    if "exposes" in data:
        data |= {"recipe_name": spec.recipe_name, "exposes": _jsonable(spec.exposed)}
    return data


def short(paper: str) -> str:
    """Shorten ``A et al., A Title, ICLR 2018`` to ``A et al., ICLR 2018``, and ``EWAS: A Title`` to ``EWAS``."""
    first, *rest = paper.split(", ")
    where = rest[-1:] if rest and re.fullmatch(r"[A-Z].* \d{4}", rest[-1]) else []
    return ", ".join([first.partition(":")[0], *where])


def _jsonable(value: Any) -> Any:
    from fractions import Fraction

    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    if hasattr(value, "items"):
        return {str(k): _jsonable(v) for k, v in value.items()}
    return [_jsonable(v) for v in value] if isinstance(value, list | tuple) else value


def _draw(console: Console, kind: str, found: Registry) -> None:
    from arena.cli.console import cell, table

    entries = found.all(KINDS[kind])
    if not entries:
        console.print(f"{kind}: none")
        return
    if kind == "defenses":
        return _draw_defenses(console, entries)
    made = table(kind, "about", "options")
    for r in entries:
        about = r.spec.summary + _extra(kind, r.spec)
        made.add_row(cell(r.name), cell(about), cell(_options(r.spec)))
    if not any(_options(r.spec) for r in entries):
        made.columns.pop()
    console.print(made)


def _draw_defenses(console: Console, entries: list[Registered[Any]]) -> None:
    from arena.cli.console import WIDE, cell, table

    wide = console.width >= WIDE
    made = table("defenses", "module", "recipe", ">heads", ">gates", *(["paper"] if wide else []), "about", tight=True)
    for r in entries:
        spec, exposed, paper = r.spec, r.spec.exposed, short(r.spec.paper)
        counts = [str(len(exposed.heads)), str(len(exposed.gates))] if exposed else ["?", "?"]
        notes = [
            paper if not wide else "",
            "random" if exposed and exposed.random else "",
            f"beside {spec.twin}" if spec.twin not in ("", spec.recipe_name) else "",
        ]
        told = "; ".join(filter(None, notes))
        cells = [r.name, spec.module or "-", spec.recipe_name, *counts, *([paper or "-"] if wide else [])]
        made.add_row(*map(cell, cells), cell(spec.summary + (f" [{told}]" if told else "")))
    console.print(made)
    lines = ["arena list NAME: options, paper, and by name what is exposed to attacks"]
    if any(r.spec.twin for r in entries):
        lines.append("a module's result is shown beside that of its recipe alone")
    if not all(r.spec.exposed for r in entries):
        lines.append("?: its author does not say; a match shows it")
    for line in lines:
        console.print(cell(line, "dim"))


def _extra(kind: str, spec: Any) -> str:
    if kind == "attacks":
        return f" [{', '.join(spec.norms)}; {spec.knowledge}]"
    if kind == "datasets":
        return f" [{spec.norm} eps {spec.eps}, {spec.backbone}]"
    return ""


def _options(spec: Any) -> str:
    from arena.specs import text

    declared = {**getattr(spec, "options", {}), **getattr(spec, "eval_options", {})}
    return " ".join(f"{name}={text(option.default) or '(none)'}" for name, option in declared.items())
