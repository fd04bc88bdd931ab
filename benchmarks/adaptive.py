"""What ``adaptive`` finds beyond the papers' own attacks and AutoAttack, and what each of its members is worth.

    python benchmarks/adaptive.py --train-seeds 0,1,2 -n 200 --table docs/adaptive.md

Every built-in defense with heads, gates, selections, knobs or randomness, its bare recipes and the audit's gallery meet
all attacks with ``--matrix``, so that each attack's points are known. Results are kept in the arena's store: the script
goes on where it stopped, and ``--part 1/2`` plays every second match, so that several can share the work. Random
defenses do not meet ``autoattack``: with twenty draws a pass it costs 194,000 passes a point that stands.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from audit_gallery import install
from pairing import discordant

from arena.match import play
from arena.plugins import Registry
from arena.question import Question, Running
from arena.results import unpacked
from arena.watch import Silent

#: By their canonical names; ``rt`` is the default.
TRANSFERS = ("transfer", "transfer(source=sat)")
#: Points of a gallery's match: most of its members fall at once or never.
GALLERY_N = 64


@dataclass(frozen=True)
class Matrix:
    """One match in which all met all."""

    kind: str
    """``built-in``, ``bare`` or ``gallery``."""
    defense: str
    seed: int
    n: int
    natural: float
    twin: str
    broken: dict[tuple[str, str], np.ndarray]
    """By entry of ``--vs`` and attack: (n,) bool, in the order of play."""
    passes: dict[tuple[str, str], float]
    """Forwards and backwards, an example that was met."""

    def union(self, *entries: str) -> np.ndarray:
        """Points (n,) that some attack of these entries breaks."""
        made = np.zeros(self.n, bool)
        for (entry, _), points in self.broken.items():
            if entry in entries:
                made |= points
        return made

    def met(self, entry: str) -> bool:
        """Whether this entry was played."""
        return any(e == entry for e, _ in self.broken)

    def robust(self, *entries: str) -> float:
        """Accuracy in percent of n under all attacks of these entries."""
        return self.natural - 100.0 * int(self.union(*entries).sum()) / self.n


def matches(registry: Registry, n: int, seeds: Sequence[int]) -> list[tuple[str, Question]]:
    """List what is played: (kind, question)."""
    from arena_gallery import RANDOM

    built, bare, gallery = [], [], []
    random = {f"broken_{name}" for name in RANDOM}
    for found in registry.all("defense"):
        spec = found.spec
        if spec.name.startswith("broken_"):
            gallery.append(spec.name)
        elif spec.exposed and spec.exposed != type(spec.exposed)():
            built.append(spec.name)
            random |= {spec.name} if spec.exposed.random else set()
            bare += [spec.twin] if spec.twin else []
    made = []
    for seed in seeds:
        made += [
            ("bare", Question(d, ("autoattack", "adaptive"), n=n, train_seed=seed)) for d in dict.fromkeys(sorted(bare))
        ]
        made += [
            ("built-in", Question(d, _vs(("papers",), d in random, TRANSFERS), n=n, train_seed=seed)) for d in built
        ]
        made += [
            ("gallery", Question(d, _vs((), d in random, ()), n=GALLERY_N, train_seed=seed)) for d in sorted(gallery)
        ]
    return made


def _vs(before: tuple[str, ...], random: bool, after: tuple[str, ...]) -> tuple[str, ...]:
    return (*before, *(() if random else ("autoattack",)), "adaptive", *after)


def read(kind: str, record: dict[str, Any]) -> Matrix:
    """Take the points out of a record."""
    n = record["asked"]["n"]
    rows = record["attacks"]
    return Matrix(
        kind,
        record["defense"],
        int(record["asked"]["train_seed"]),
        n,
        record["natural"]["accuracy"],
        str(record["model"].get("twin") or ""),
        {(r["entry"], r["name"]): unpacked(r["broken_points"], n) for r in rows},
        {(r["entry"], r["name"]): (r["forwards"] + r["backwards"]) / max(r["attempted"], 1) for r in rows},
    )


# -- tables --------------------------------------------------------------------------------------------------------


def spread(values: Iterable[float]) -> str:
    """Write mean and range over seeds."""
    found = [*values]
    low, high = min(found), max(found)
    mean = f"{sum(found) / len(found):.1f}"
    return mean if len(found) == 1 else f"{mean} ({low:.1f}-{high:.1f})"


def beyond(found: Sequence[Matrix]) -> tuple[int, int, float]:
    """Count points that only ``adaptive`` and only ``autoattack`` breaks, over all seeds; p as in ``discordant``."""
    return discordant(("test", m.union("adaptive"), m.union("autoattack")) for m in found if m.met("autoattack"))


def credit(found: Sequence[Matrix], most: int = 3) -> str:
    """Name the attacks of ``adaptive`` that broke what ``autoattack`` leaves, each point by the first."""
    counts: Counter[str] = Counter()
    for m in found:
        left = ~m.union("autoattack")
        for (entry, name), points in m.broken.items():
            if entry == "adaptive":
                counts[name] += int((left & points).sum())
                left &= ~points
    return ", ".join(f"`{name}` {k}" for name, k in counts.most_common(most) if k)


def headline(found: Sequence[Matrix]) -> list[str]:
    """Write the table of the built-in defenses."""
    lines = [
        "| defense | natural | papers' own | autoattack | adaptive | all | twin, all | only adaptive / only autoattack "
        "| p | what did it |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    bare = {(m.defense, m.seed): m for m in found if m.kind == "bare"}
    for name in dict.fromkeys(m.defense for m in found if m.kind == "built-in"):
        mine = [m for m in found if m.kind == "built-in" and m.defense == name]
        twins = [bare[m.twin, m.seed] for m in mine if (m.twin, m.seed) in bare]
        b, c, p = beyond(mine)
        standard = [m.robust("autoattack") for m in mine if m.met("autoattack")]
        counts = f"{b} / {c} | {'<0.001' if p < 0.001 else f'{p:.3f}'}" if standard else "- | -"
        lines.append(
            f"| `{name}` | {spread(m.natural for m in mine)} | {spread(m.robust('papers') for m in mine)} "
            f"| {spread(standard) if standard else '-'} | {spread(m.robust('adaptive') for m in mine)} "
            f"| **{spread(m.robust('papers', 'autoattack', 'adaptive', *TRANSFERS) for m in mine)}** "
            f"| {spread(m.robust('autoattack', 'adaptive') for m in twins) if twins else '-'} "
            f"| {counts} | {credit(mine)} |"
        )
    return lines


def member(name: str) -> str:
    """Write a member's name without the names of heads, gates and knobs, which differ from defense to defense."""
    return re.sub(r"\b(head|gate|knob|selection)=\w+", r"\1=*", name)


def family(name: str) -> str:
    """Name what a member belongs to: its attack, with the options that make it another idea."""
    base, _, inner = name.partition("(")
    told = [o for o in inner.rstrip(")").split(",") if o.split("=")[0] in ("weights", "kind", "way", "head", "loss")]
    told = [o.split("=")[0] + "=*" if o.startswith("head=") else o for o in told]
    if base in ("lambda_pgd", "gate_pgd", "gate_held"):
        told = []
    return f"{base}({','.join(told)})" if told else base


def worth(found: Sequence[Matrix], label: Any) -> list[dict[str, Any]]:
    """Count, for each member of ``adaptive``, what would stand without it.

    ``label`` makes one of many: members with the same label are left out together.
    """
    rows: dict[str, dict[str, Any]] = {}
    for m in found:
        mine = {name: points for (entry, name), points in m.broken.items() if entry == "adaptive"}
        standard = m.union("autoattack")
        before = np.zeros(m.n, bool)
        for group in dict.fromkeys(map(label, mine)):
            inside = np.zeros(m.n, bool)
            others = np.zeros(m.n, bool)
            cost = 0.0
            for name, points in mine.items():
                if label(name) == group:
                    inside |= points
                    cost += m.passes["adaptive", name]
                else:
                    others |= points
            row = rows.setdefault(group, {"matches": 0, "alone": 0, "first": 0, "only": 0, "beyond": 0, "cost": 0.0})
            row["matches"] += 1
            row["alone"] += int(inside.sum())
            row["only"] += int((inside & ~others).sum())
            row["beyond"] += int((inside & ~others & ~standard).sum())
            row["cost"] += cost
            row["on"] = [*row.get("on", ()), m.defense] if (inside & ~others).any() else row.get("on", [])
        for name, points in mine.items():
            rows[label(name)]["first"] += int((points & ~before).sum())
            before |= points
    return [{"name": k, **v, "cost": v["cost"] / v["matches"]} for k, v in rows.items()]


def worth_table(found: Sequence[Matrix], label: Any) -> list[str]:
    """Write what each member is worth."""
    lines = [
        "| left out | matches | breaks | first | only it | only it, autoattack beside | passes | only it breaks on |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for r in sorted(worth(found, label), key=lambda r: (-r["only"], -r["first"], r["name"])):
        where = Counter(r["on"]).most_common(4)
        told = ", ".join(d for d, _ in where) + (" ..." if len(set(r["on"])) > 4 else "")
        lines.append(
            f"| `{r['name']}` | {r['matches']} | {r['alone']} | {r['first']} | {r['only']} | {r['beyond']} "
            f"| {r['cost']:.0f} | {told} |"
        )
    return lines


def transfers(found: Sequence[Matrix]) -> list[str]:
    """Write what transfer from the twins breaks."""
    lines = []
    for entry in TRANSFERS:
        some = [m for m in found if m.kind == "built-in"]
        broken = sum(int(m.union(entry).sum()) for m in some)
        only = sum(int((m.union(entry) & ~m.union("adaptive")).sum()) for m in some)
        both = sum(int((m.union(entry) & ~m.union("adaptive", "autoattack", "papers")).sum()) for m in some)
        lines.append(
            f"- `{entry}` breaks {broken} points of {len(some)} matches; {only} of them stand against `adaptive`, "
            f"{both} against everything else."
        )
    return lines


def page(found: Sequence[Matrix], n: int, seeds: Sequence[int], version: str) -> str:
    """Write the whole document; ``version`` is the roster's."""
    built, gallery = [m for m in found if m.kind == "built-in"], [m for m in found if m.kind == "gallery"]
    wish = [m for m in found if m.kind in ("built-in", "gallery")]
    never = [r["name"] for r in worth(wish, member) if not r["only"]]
    seed = ",".join(map(str, seeds))
    return "\n".join(
        [
            "# What the adaptive attacks are worth",
            "",
            f"Generated by `benchmarks/adaptive.py -n {n} --train-seeds {seed}`: digits, default backbone, Linf eps "
            f"0.2, train seeds {seed}, roster `adaptive` version {version}, every attack on every naturally correct "
            "point (`--matrix`). What follows from it stands in [attacks](attacks.md).",
            "",
            "## The papers' own attacks, AutoAttack, adaptive",
            "",
            "Accuracy in percent: mean over the train seeds (range). *papers' own* is the per-example worst case of "
            "the evaluation that the defense's paper printed (roster `papers`; final iterates). *all* is the worst "
            "case of all, with transfer from `rt` and `sat`; *twin* is the bare recipe under `autoattack` and "
            "`adaptive`. *Only adaptive / only autoattack* counts points, over all seeds, that fall to one of the two "
            "alone; p is the exact McNemar test, in which a test image counts once, for the side that alone breaks it "
            "in more of the seeds. *What did it* gives each point that `autoattack` leaves to the first attack of "
            "`adaptive` that breaks it. Random defenses did not meet `autoattack`: with twenty draws a pass it costs "
            "194,000 passes a point that stands.",
            "",
            *headline(found),
            "",
            *transfers(found),
            "",
            "## Leave one out",
            "",
            "*Breaks* counts points that it breaks, *first* those that nothing before it in the roster breaks, *only "
            "it* those that would stand if it were left out of `adaptive`; the next column, with `autoattack` played. "
            "*Passes* are forwards and backwards an example. Sums over all matches.",
            "",
            f"### Ideas, on the {len(built)} matches of built-in defenses",
            "",
            *worth_table(built, family),
            "",
            f"### Members, on the {len(built)} matches of built-in defenses",
            "",
            *worth_table(built, member),
            "",
            f"### Members, on the {len(gallery)} matches of the gallery of broken defenses ({GALLERY_N} points each)",
            "",
            *worth_table(gallery, member),
            "",
            "Never needed, here: " + (", ".join(f"`{name}`" for name in never) or "none") + ".",
            "",
        ]
    )


def main() -> None:
    """Play what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=200)
    parser.add_argument("--train-seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="only defenses whose name holds this")
    parser.add_argument("--part", default="0/1", help="K/M: play only every Mth match, from the Kth on")
    parser.add_argument("--table", type=Path, help="where the page is written")
    given = parser.parse_args()
    seeds = [int(s) for s in given.train_seeds.split(",")]
    part, parts = map(int, given.part.split("/"))
    found = []
    with tempfile.TemporaryDirectory() as folder:
        registry = install(Path(folder))
        asked = [(k, q) for k, q in matches(registry, given.n, seeds) if given.only in q.defense]
        for kind, question in asked[part::parts]:
            record = play(question, Running(device="cpu", matrix=True, audit="none"), registry, Silent()).record
            found.append(read(kind, record))
            worst = record["worst_case"]["robust_accuracy"]
            seconds = record["provenance"]["seconds"]
            print(f"{kind} {question.defense} seed {question.train_seed}: {worst} in {seconds:.0f} s", file=sys.stderr)
    text = page(found, given.n, seeds, registry.get("roster", "adaptive").spec.version)
    if given.table:
        given.table.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
