"""Write docs/defenses.md: every built-in defense, published against measured, from the registry and the store.

    ARENA_HOME=... python docs/make_defenses.py

Reads the store of ``ARENA_HOME``; a defense without a complete result there is "not measured". Nothing is attacked.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from arena.home import atomic_write
from arena.leaderboard import Row, Standings, percent, standings, worst
from arena.plugins import Registered, registry
from arena.specs import DatasetSpec, DefenseSpec
from arena.store import open_store
from arena.threat import Threat

HERE = Path(__file__).parent
PAGE = HERE / "defenses.md"
#: Module, or name of a bare recipe, to the page that explains it, in the order of the index.
PAGES = {
    "training": ("rt", "sat", "trades", "mart", "iat", "fat", "fd", "denoise", "sap"),
    "masks": ("fgaa", "ewas", "cas", "saa", "csaa", "cifs"),
    "fsr": ("fsr",),
    "conditional": ("afa", "oat"),
    "gradients": ("gfafirst", "gfadeep", "gnr", "gaie", "advmix"),
    "pcl": ("pcl",),
}
HEAD = """# Defenses

Made by `python docs/make_defenses.py`; do not edit. Each heading leads to the page that says what the defenses of its
table do, where they sit, what they expose, their switches, and where paper and code differ.
What they cost: [overheads](overheads.md); how they train: [training](training.md).

- **exposes**: what an attack may use besides the logits, under default options: heads (classifiers inside the model),
  gates, selections (hard choices), knobs (attributes that may be turned), randomness.
- **published**: percentages as a paper prints them, against its own attacks; where, stands below each table.
"""
MEASURED = """- **natural, autoattack, adaptive, worst case**: what arena measures on `{table.dataset}`, {table.norm}
  eps {table.eps}, backbone `{data.backbone}`, {table.n} points, default options, one training seed ({when}): % of all
  points; the worst case is per image over all attacks played, with a 95 % interval. No replication of the published
  numbers: these are other pictures.
"""


def defenses() -> list[Registered[DefenseSpec]]:
    """Return the built-in defenses, in the order of registration."""
    found = [r for r in registry().all("defense") if r.distribution == "adversarial-arena"]
    rank = {module: i for i, module in enumerate(m for modules in PAGES.values() for m in modules)}
    recipes = ("rt", "sat", "trades", "mart")
    lost = [r.name for r in found if group(r.spec) not in rank]
    if lost:
        raise SystemExit(f"{', '.join(lost)}: on no page; add the module to PAGES in {__file__}")
    last = len(recipes)
    return sorted(
        found,
        key=lambda r: (
            rank[group(r.spec)],
            recipes.index(r.spec.recipe_name) if r.spec.recipe_name in recipes else last,
        ),
    )


def group(spec: DefenseSpec) -> str:
    """Return what a defense is filed under."""
    return spec.module or spec.name


def measured(tables: Iterable[Standings], data: DatasetSpec) -> tuple[Standings | None, dict[str, Row]]:
    """Choose the table that ranks most of the defenses as they come, and of each its newest row.

    As they come: default threat model, backbone, options and seed. One table, so that the numbers can be compared.
    """
    best: tuple[Standings | None, dict[str, Row]] = (None, {})
    fraction = Threat.parse(data.norm, data.eps).fraction
    for table in tables:
        if (table.norm, Threat.parse(table.norm, table.eps).fraction) != (data.norm, fraction):
            continue
        rows: dict[str, Row] = {}
        for row in table.rows:
            plain = row.backbone == data.backbone and not row.train_seed and not row.trained_against
            if plain and (row.defense not in rows or row.date > rows[row.defense].date):
                rows[row.defense] = row
        if (len(rows), table.n) > (len(best[1]), best[0].n if best[0] else 0):
            best = table, rows
    return best


def exposes(spec: DefenseSpec) -> str:
    """Write how many parts of each kind a defense exposes."""
    exposed = spec.exposed
    if exposed is None:
        return "?"
    kinds = ("head", "gate", "selection", "knob")
    counts = [(len(getattr(exposed, f"{kind}s")), kind) for kind in kinds]
    parts = [f"{n} {kind}{'s' if n > 1 else ''}" for n, kind in counts if n]
    return ", ".join([*parts, *(["random"] if exposed.random else [])]) or "-"


def published(spec: DefenseSpec) -> str:
    """Write a paper's numbers."""
    return ", ".join(f"{k} {v:g}" for k, v in spec.published.items()) or "-"


def sources(specs: Iterable[DefenseSpec]) -> list[str]:
    """Say where the published numbers of a table are from: one line for each source."""
    found: dict[str, list[str]] = {}
    for spec in specs:
        if spec.published:
            found.setdefault(spec.published_on, []).append(f"`{spec.name}`")
    return [f"- published for {', '.join(names)}: {where}" for where, names in found.items()]


def line(cells: Iterable[Any]) -> str:
    """Write a row of a table."""
    return "| " + " | ".join(str(c).replace("|", "\\|") for c in cells) + " |"


def page(tables: Iterable[Standings]) -> str:
    """Return the whole page."""
    data = registry().get("dataset", "digits").spec
    table, rows = measured(tables, data)
    text = [HEAD]
    if table is None:
        text[0] += "- **natural, autoattack, adaptive, worst case**: not measured.\n"
    else:
        dates = sorted(row.date for row in rows.values())
        when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
        text[0] += MEASURED.format(table=table, data=data, when=when)
    for name, modules in PAGES.items():
        title = (HERE / "defenses" / f"{name}.md").read_text().partition("\n")[0].lstrip("# ")
        text.append(f"## [{title}](defenses/{name}.md)\n")
        text.append(
            line(("defense", "exposes", "published", "natural", "autoattack", "adaptive", "worst case", "verdict"))
        )
        text.append("|---|---|---|---:|---:|---:|---:|---|")
        entries = [entry for entry in defenses() if group(entry.spec) in modules]
        for entry in entries:
            row = rows.get(entry.name)
            numbers: tuple[str, ...] = ("not measured", "", "", "", "")
            if row is not None:
                numbers = (
                    percent(row.natural),
                    percent(row.autoattack),
                    percent(row.adaptive),
                    worst(row),
                    row.verdict,
                )
            text.append(line((f"`{entry.name}`", exposes(entry.spec), published(entry.spec), *numbers)))
        text += ["", *sources(entry.spec for entry in entries), ""]
    return re.sub("\n{3,}", "\n\n", "\n".join(text)).rstrip("\n") + "\n"


def main() -> int:
    """Write the page and say how many defenses were measured."""
    with open_store() as store:
        tables = standings(store, dataset="digits")
    text = page(tables)
    atomic_write(PAGE, text.encode())
    left = text.count("not measured |")
    print(f"{PAGE}: {len(defenses())} defenses, {left} not measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
