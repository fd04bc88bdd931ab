"""Plays the audit's gallery: defenses that are broken by construction, and honest ones.

    python benchmarks/audit_gallery.py --half fixing              # the half on which thresholds are fixed
    python benchmarks/audit_gallery.py --half held-out            # the other half, once
    python benchmarks/audit_gallery.py --half both --table docs/audit_gallery.md

Every cell (member; recipe x backbone x norm, all train seeds together) belongs to one half by a rule that knows no
result: cells are ordered by the sha256 of their name and dealt in turn. Results are kept in the arena's store, so the
script goes on where it stopped. What it asks of a broken member: robust accuracy at or below its undefended twin's plus
2 points (intervals overlapping counts), or a verdict other than ``clear``; of an honest one: ``clear``.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GALLERY = ROOT / "tests" / "packages" / "gallery"
RECIPES, BACKBONES = ("rt", "sat", "trades", "mart"), ("cnn", "mlp", "resnet_small")
#: Norm and radius; the recipes train against the data set's default, Linf 0.2, whatever they are then attacked with.
THREATS = {"Linf": "0.2", "L2": "0.5"}
#: Points of robust accuracy that a broken member may have above its twin.
SLACK = 2.0


@dataclass(frozen=True)
class Cell:
    """What is dealt to a half."""

    kind: str
    """``broken`` or ``honest``."""
    defense: str
    backbone: str
    norm: str

    @property
    def name(self) -> str:
        """Name that is hashed."""
        return f"{self.kind}/{self.defense}/{self.backbone}/{self.norm}"


def cells() -> dict[str, list[Cell]]:
    """Deal all cells: {"fixing": [...], "held-out": [...]}."""
    sys.path.insert(0, str(GALLERY))
    from arena_gallery import MEMBERS

    dealt: dict[str, list[Cell]] = {"fixing": [], "held-out": []}
    broken = [Cell("broken", f"broken_{m}", "cnn", "Linf") for m in MEMBERS]
    honest = [Cell("honest", r, b, n) for r in RECIPES for b in BACKBONES for n in THREATS]
    for group in (broken, honest):
        ordered = sorted(group, key=lambda c: hashlib.sha256(c.name.encode()).hexdigest())
        dealt["fixing"] += ordered[0::2]
        dealt["held-out"] += ordered[1::2]
    return dealt


def install(folder: Path) -> Any:
    """Make the gallery's entry point known to this process and return the registry."""
    info = folder / "arena_gallery-0.0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: arena-gallery\nVersion: 0.0.1\n")
    (info / "entry_points.txt").write_text("[arena]\narena-gallery = arena_gallery\n")
    sys.path[:0] = [str(folder), str(GALLERY)]
    from arena.plugins import discover

    found = discover()
    if found.problems:
        raise SystemExit("\n".join(map(str, found.problems)))
    return found


def main() -> None:
    """Play and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--half", choices=("fixing", "held-out", "both"), default="fixing")
    parser.add_argument("--vs", default="autoattack,adaptive")
    parser.add_argument("-n", type=int, default=100)
    parser.add_argument("--train-seeds", default="0", help="of honest cells, such as 0,1,2")
    parser.add_argument("--only", default="", help="only cells whose name holds this")
    parser.add_argument("--audit", choices=("normal", "deep"), default="normal")
    parser.add_argument("--replay", action="store_true", help="play again although the result is stored")
    parser.add_argument("--table", type=Path, help="where the table is written; else stdout")
    given = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        registry = install(Path(folder))
        dealt = cells()
        for half in ("fixing", "held-out") if given.half == "both" else (given.half,):
            for cell in dealt[half]:
                if given.only not in cell.name:
                    continue
                for seed in map(int, given.train_seeds.split(",")) if cell.kind == "honest" else (0,):
                    rows.append(row(cell, half, seed, given, registry))
                    print(" | ".join(map(str, rows[-1].values())), file=sys.stderr, flush=True)
    text = table(rows, given)
    if given.table:
        given.table.write_text(text)
    else:
        print(text)


def row(cell: Cell, half: str, seed: int, given: argparse.Namespace, registry: Any) -> dict[str, Any]:
    """Play one cell under one train seed."""
    clock = time.monotonic()
    record = ask(cell.defense, cell, seed, given, registry)
    worst, verdict = record["worst_case"], record["audit"]["verdict"]
    fired = [i["name"] for i in record["audit"]["indicators"] if i["flag"]]
    value = worst["robust_accuracy"]
    made = {
        "half": half,
        "defense": f"{cell.defense} {cell.backbone} {cell.norm}" + (f" seed {seed}" if seed else ""),
        "natural": record["natural"]["accuracy"],
        "robust": value,
        "ci95": worst["ci95"],
        "twin": None,
        "verdict": verdict,
        "fired": ", ".join(dict.fromkeys(fired)),
        "passed": verdict == "clear",
        "kind": cell.kind,
        "seconds": round(time.monotonic() - clock, 1),
        "audit": f"{record['audit']['forwards']}+{record['audit']['backwards']} in {record['audit']['seconds']} s",
    }
    if cell.kind == "broken":
        twin = ask("rt", cell, 0, given, registry)["worst_case"]
        low = value is None or value <= twin["robust_accuracy"] + SLACK or worst["ci95"][0] <= twin["ci95"][1]
        made |= {"twin": twin["robust_accuracy"], "passed": verdict != "clear" or (value is not None and low)}
    return made


def ask(defense: str, cell: Cell, seed: int, given: argparse.Namespace, registry: Any) -> dict[str, Any]:
    """Play one match, or find it in the store."""
    from arena.entries import split
    from arena.match import play
    from arena.question import Question, Running
    from arena.watch import Silent

    question = Question(
        defense,
        tuple(split(given.vs)),
        backbone=cell.backbone,
        norm=cell.norm,
        eps=THREATS[cell.norm],
        n=given.n,
        train_seed=seed,
    )
    running = Running(device="cpu", audit=given.audit, replay=given.replay)
    return play(question, running, registry, Silent()).record


def table(rows: list[dict[str, Any]], given: argparse.Namespace) -> str:
    """Write the table as Markdown."""
    lines = [
        "# The audit's gallery",
        "",
        f"Generated by `benchmarks/audit_gallery.py --half {given.half} --vs {given.vs} -n {given.n} --train-seeds "
        f"{given.train_seeds} --audit {given.audit}` on digits, Linf 0.2 and L2 0.5. Cells are dealt to the halves by "
        "the hash of their names; thresholds were fixed on the half `fixing`.",
        "",
    ]
    for half in dict.fromkeys(r["half"] for r in rows):
        for kind, wish in (("broken", "must not be clear, or must fall with its twin"), ("honest", "must be clear")):
            some = [r for r in rows if r["half"] == half and r["kind"] == kind]
            if not some:
                continue
            bad = [r for r in some if not r["passed"]]
            what = "misses" if kind == "broken" else "false alarms"
            lines += [f"## {kind}, {half}: {wish}", "", f"{len(some)} matches, {len(bad)} {what}.", ""]
            lines += ["| defense | natural | robust (95 %) | twin | verdict | flags | as wished |"]
            lines += ["|---|---|---|---|---|---|---|"]
            for r in some:
                robust = "-" if r["robust"] is None else f"{r['robust']:.1f} ({r['ci95'][0]:.1f}-{r['ci95'][1]:.1f})"
                twin = "" if r["twin"] is None else f"{r['twin']:.1f}"
                wished = "yes" if r["passed"] else f"**no, {what[:-1] if kind == 'honest' else 'a miss'}**"
                lines.append(
                    f"| {r['defense']} | {r['natural']:.1f} | {robust} | {twin} | {r['verdict']} | {r['fired']} | "
                    f"{wished} |"
                )
            lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
