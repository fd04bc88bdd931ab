"""Writes the page: what was asked and what was found, the tables, the settings, how to renew it."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from findings.judging import Table
from findings.page import markdown
from speed import processor

from arena.home import atomic_write

from . import tables
from .frontier import figure, frontier, spots
from .measuring import PGD_TURNS, Found, Run, Settings
from .tables import Compared, compare, couples, ratio, times

#: What is asked of the fast roster and of the full one.
POOLED_GAP, CASE_GAP = 0.3, 1.0
FEWER = {"forwards": 40.0, "backwards": 10.0, "seconds": 40.0}
FULL_FASTER = 3.0
OVERHEAD = {"pgd": 1.05, "full": 1.15}


@dataclass(frozen=True)
class Ways:
    """How the evaluations are called in the cells."""

    fast: str
    full: str

    @property
    def plain(self) -> str:
        """The full roster, driven plainly."""
        return f"{self.full}, plain"

    @staticmethod
    def known(runs: Sequence[Run], way: str) -> list[str]:
        """A roster, and the same in bf16 and on several devices, as far as they were played."""
        others = dict.fromkeys(r.way for r in runs if r.way.startswith(f"{way}, ") and not r.way.endswith(", plain"))
        return [way, *sorted(others, key=len)]


def yes(holds: bool | None) -> str:
    """Write whether something holds."""
    return tables.DASH if holds is None else "**yes**" if holds else "**no**"


def asked(found: Found, ways: Ways) -> Table:
    """Set what is asked against what was measured, in fp32 and where it was played in bf16."""
    rows = [["asked", "bound", "measured", "holds"]]
    runs, full = found.runs, ways.full
    threads = runs[0].threads if runs else 0
    turn = [r for r in runs if r.threads == threads]
    for fast in ways.known(runs, ways.fast):
        rows += _worst_cases(runs, fast, full)
        for key, bound in FEWER.items():
            found_ratio = ratio(turn, ways.plain, fast, key)
            rows.append(_least(f"{key}, the plain run over `{fast}`", bound, found_ratio))
        for key in FEWER:
            rows.append(
                [f"{key}, `{full}` over `{fast}`", tables.DASH, times(ratio(turn, full, fast, key)), tables.DASH]
            )
    for name in ways.known(runs, full):
        met = couples(runs, name, ways.plain)
        rows.append(_equal(compare(met), name, "bf16" not in name, _some(runs, met)))
        cores = next((r.threads for r in runs if r.way == name), threads)
        faster = ratio([r for r in runs if r.threads == cores], ways.plain, name, "seconds")
        says = f"seconds, the plain run over `{name}`" + (f", both on {cores} cores" if cores != threads else "")
        rows.append(_least(says + _some(runs, met), FULL_FASTER, faster))
    rows += _overheads(found.overhead, full)
    moving = differing_runs([r for r in runs if r.way != "reference"])
    rows.append(["runs of one way that differ in points or passes", "0", str(moving), yes(moving == 0)])
    return Table(rows)


def _worst_cases(runs: Sequence[Run], fast: str, full: str) -> list[list[str]]:
    rows = [_gap(f"`{fast}` not above `{full}`, pooled, points", POOLED_GAP, compare(couples(runs, fast, full)))]
    each = {case: compare(couples(runs, fast, full, case)) for case in tables.cases_of(runs)}
    known = {case: w for case, w in each.items() if w is not None}
    if known:
        case = max(known, key=lambda c: known[c].gap)
        rows.append(_gap(f"`{fast}` not above `{full}` on any model, points; worst: `{case}`", CASE_GAP, known[case]))
    return rows


def _some(runs: Sequence[Run], pairs: Sequence[tuple[Run, Run]]) -> str:
    """Name the cases that a comparison with the plain run is about, where others met the plain run too."""
    met = tables.cases_of(a for a, _ in pairs)
    every = tables.cases_of(r for r in runs if r.way.endswith(", plain"))
    return f" ({', '.join(f'`{c}`' for c in met)} only)" if met and len(met) < len(every) else ""


def _equal(word: Compared | None, name: str, exact: bool, where: str) -> list[str]:
    """Write whether a roster's outcomes are the plain run's: point by point; of bf16 only how many differ."""
    says = f"points on which `{name}` and the plain run differ{where}"
    if exact:
        differing = None if word is None else word.only_a + word.only_b
        return [says, "0", _count(differing), yes(None if differing is None else differing == 0)]
    if word is None:
        return [says, tables.DASH, tables.DASH, tables.DASH]
    return [says, tables.DASH, f"{word.only_a} and {word.only_b}, p = {tables.p_value(word.p)}", tables.DASH]


def differing_runs(runs: Sequence[Run]) -> int:
    """Count runs that found or spent something else than the first of the same way on the same model."""
    before: dict[tuple[str, int, str], list[object]] = {}
    differing = 0
    for r in runs:
        now = [r.cell[k] for k in ("natural", "broken", "forwards", "backwards")]
        differing += before.setdefault((r.case, r.seed, r.way), now) != now
    return differing


def _gap(says: str, bound: float, word: Compared | None) -> list[str]:
    measured = tables.DASH if word is None else f"{word.gap:+.2f}"
    return [says, f"at most {bound:g}", measured, yes(None if word is None else word.gap <= bound)]


def _least(says: str, bound: float, measured: float | None) -> list[str]:
    return [says, f"at least {bound:g}", times(measured), yes(None if measured is None else measured >= bound)]


def _count(value: int | None) -> str:
    return tables.DASH if value is None else str(value)


def _overheads(runs: Sequence[Run], full: str) -> list[list[str]]:
    rows = []
    for label, way, key in (("pgd", "pgd, arena", "pgd"), (full, full, "full")):
        met = [r for r in runs if r.case == "cifar" and r.way == way]
        for n in sorted({r.n for r in met}) or [0]:
            value = tables.median([r for r in met if r.n == n], lambda r: r.cell["seconds"] / r.cell["bare"])
            holds = None if value is None else value <= OVERHEAD[key]
            says = f"`{label}` over its bare passes, `cifar`{f', {n:,} points' if n else ''}"
            exact = tables.DASH if value is None else f"{value:.3f}"
            rows.append([says, f"at most {OVERHEAD[key]:g}", exact, yes(holds)])
    return rows


def settings_lines(found: Found, settings: Settings, versions: Sequence[str]) -> list[str]:
    """Say on what and how it was measured."""
    cells = [r.cell for r in (*found.runs, *found.members, *found.overhead)]
    dates = sorted({c["date"] for c in cells}) or ["never"]
    loads = sorted(c["load"] for c in cells) or [0.0]
    made = sorted({f"arena {c['arena']}, torch {c['torch']}" for c in cells})
    threads = ", ".join(map(str, settings.threads))
    pictures = " and ".join(f"{n:,}" for n in settings.overhead_n)
    return [
        f"- {processor()}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}; "
        f"{'; '.join(made)}; {', '.join(versions) or 'no peer'}.",
        f"- Measured {dates[0]}{'' if dates[0] == dates[-1] else f' to {dates[-1]}'}; load of the machine when a cell "
        f"began: {loads[0]:.1f} to {loads[-1]:.1f}.",
        f"- torch's threads: {threads}. A match of a small model takes one of them, whatever it is given.",
        f"- Digits: {settings.n} points, Linf eps 0.2; CIFAR-10: the first {settings.cifar_n} test pictures, for the "
        f"overhead {pictures}, Linf eps 8/255. Train seeds {', '.join(map(str, settings.seeds))}; attack "
        "seed 0, of the members the train seed.",
        f"- Members: {settings.steps} iterations, {settings.queries:,} queries, one restart, 9 targets, Square without "
        "rescaling its schedule; torchattacks' in batches of 250, all other settings the reference's.",
        f"- Ways take turns; seconds are medians over {settings.pairs} turn{'s' * (settings.pairs != 1)}, of the "
        f"overhead's PGD over {max(settings.pairs, PGD_TURNS)}. Forwards and backwards are rows, counted exactly, and "
        "do not differ from turn to turn.",
    ]


NOTES = """\
- *plain* is arena's own four attacks with the roster's settings, driven without arena's engine: the eager model in
  fp32, batches of 250 survivors (padded to 256, as all of arena's batches are), no refill; a broken point stays in its
  batch until its run is over, and is dropped between attacks, restarts and targets, in Square at each query. Square
  asks for every proposal there, in arena's own runs only for those whose answer it does not know.
- *reference* is the authors' AutoAttack, version `standard`, in batches of 250: APGD-CE, then 9 targets of APGD-T and
  FAB-T of 100 iterations, then 5,000 queries of Square, each on what the one before left. `pyautoattack` packages the
  authors' code: settings, order and survivors are theirs; how it is called and what it logs are not. What it returns is
  judged by arena's referee. Its noise is its own: its outcomes are compared by test, not point by point.
- *bf16* is the same with `--precision bf16`; forwards that looked at a mistake once more in fp32 count.
- *compiled* is the same with `--compile`, which leaves pictures of at most 256 numbers, the digits', as they are. The
  time to compile, seconds to a minute, is in *whole*.
- *on 2* is `--devices cpu,cpu`: two processes share the points, one thread each. What it is compared with has torch's
  own two threads. Its seconds leave out the start of the processes, which is in *whole*.
- *only* counts points over all train seeds that one side alone breaks. p is McNemar's exact test in which an image
  counts once, for the side that alone breaks it on more of the models that share it.
- *gap* is the first side's robust accuracy less the second's, in points: below zero the first finds more.
- *Members* meet all naturally correct points, each alone; torchattacks' counts hold what it adds of its own, such as a
  look at the clean points; arena's Square passes over proposals whose answer it knows. *Violations* are points that
  torchattacks returned outside ball or box: these break nothing.
- *seconds* are of the attacks alone, wall; *whole* is the match with its checks, its timing and the referee; *cpu* are
  the process's, all threads, of a match the whole. *bare* is what as many forwards and backwards take with nothing
  around them, timed in the same process: of arena's own runs the search copy's, else the eager model's. It is timed
  right before and after; for arena's rows of the overhead also again and again meanwhile, half of the time of a PGD
  and a tenth of an ensemble's, so that what else the machine does meets both alike.
"""


def write(out: Path | None, found: Found, settings: Settings, ways: Ways, command: str, versions: Sequence[str]) -> str:
    """Return the page, and write it with its figure where ``out`` is given."""
    drawn = spots(found.runs, (*settings.frontier, ways.fast, ways.full), ways.full)
    fast, full = ways.known(found.runs, ways.fast), ways.known(found.runs, ways.full)
    all_ways = [*fast, *full, ways.plain, "reference"]
    others = [ways.plain, *full, "reference"]
    parts: list[tuple[str, Table]] = [
        ("What was asked", asked(found, ways)),
        ("Models", tables.models(found.runs, ways.full)),
        *((f"`{way}` against `{ways.full}`", tables.outcomes(found.runs, way, ways.full)) for way in fast),
        ("Times less", tables.savings(found.runs, fast, others)),
        ("Passes and seconds", tables.cost(found.runs, all_ways)),
        ("Attack by attack", tables.by_attack(found.runs, all_ways)),
        (f"`{ways.full}` against the plain run and the reference", tables.faithful(found.runs, full, ways.plain)),
        ("Members against torchattacks'", tables.members(found.members)),
        ("Overhead over bare passes", tables.overhead(found.overhead)),
        ("Robust accuracy against passes", frontier(drawn, ways.full)),
    ]
    body = [line for title, table in parts for line in _section(title, table)]
    if out is not None and drawn:
        atomic_write(out.parent / "figures" / f"{out.stem}.svg", figure(drawn, ways.full))
        body += [f"![Robust accuracy against passes](figures/{out.stem}.svg)", ""]
        body += ["*Blue dots: nothing cheaper finds as much. Orange crosses: something cheaper does.*", ""]
    left = [line for text in gathered(found.left_out) for line in _wrapped(text)]
    text = "\n".join(
        [
            "# The ensembles",
            "",
            *_wrapped(
                f"`{ways.fast}` against `{ways.full}`, and both against the reference and the peers. Made by "
                f"`{command}`; do not edit. The same command renews it: what lies under `--results` is not measured "
                "again, and an empty folder there measures all from scratch. What it says about speed in words stands "
                "in [speed](speed.md)."
            ),
            "",
            *body,
            "## How to read this",
            "",
            NOTES,
            "## Settings",
            "",
            *[line for s in settings_lines(found, settings, versions) for line in _wrapped(s)],
            "",
            *(["## Left out", "", *left, ""] if left else []),
        ]
    )
    if out is not None:
        atomic_write(out, text.encode())
    return text


def gathered(left_out: Mapping[str, str]) -> list[str]:
    """Write what is left out, a line for each part, way and reason; cells are ``part: case, train seed N, way``."""
    lines: dict[tuple[str, str], list[str]] = {}
    for what, why in left_out.items():
        part, _, cell = what.partition(": ")
        case, seed, way = [*cell.split(", ", 2), "", ""][:3]
        known = seed.startswith("train seed ") and bool(way)
        key, one = (f"{part}, {way}", f"{case} {seed.rpartition(' ')[2]}") if known else (what, "")
        lines.setdefault((key, why), []).append(one)
    return [f"- {key}: {why}{' (' + ', '.join(ones) + ')' if ones[0] else ''}" for (key, why), ones in lines.items()]


def _section(title: str, table: Table) -> list[str]:
    lines = markdown(table) if len(table.rows) > 1 else ["Not measured.", ""]
    return [f"## {title}", "", *lines]


def _wrapped(text: str) -> list[str]:
    hang = "  " if text.startswith("- ") else ""
    return textwrap.wrap(text, 120, subsequent_indent=hang, break_long_words=False, break_on_hyphens=False)
