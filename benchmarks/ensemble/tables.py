"""Tables made of cells: nothing is measured here, and a number that is not known is a dash."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from findings.judging import Table
from pairing import discordant

from arena.statistics import wilson

from .cases import named
from .measuring import MEMBERS, Run, opposing

DASH = "-"


def pick(runs: Iterable[Run], **wanted: object) -> list[Run]:
    """Return the runs whose fields are these."""
    return [r for r in runs if all(getattr(r, k) == v for k, v in wanted.items())]


def first(runs: Iterable[Run], way: str, case: str | None = None) -> list[Run]:
    """Return one run of a way for each case and train seed: what it found and counted is the same in all its runs."""
    found: dict[tuple[str, int], Run] = {}
    for r in runs:
        if r.way == way and case in (None, r.case):
            found.setdefault((r.case, r.seed), r)
    return list(found.values())


def couples(runs: Sequence[Run], a: str, b: str, case: str | None = None) -> list[tuple[Run, Run]]:
    """Return the runs of two ways on the same model and points."""
    others = {(r.case, r.seed): r for r in first(runs, b, case)}
    return [(r, others[r.case, r.seed]) for r in first(runs, a, case) if (r.case, r.seed) in others]


def cases_of(runs: Iterable[Run]) -> list[str]:
    """Return the cases in the order of their runs."""
    return list(dict.fromkeys(r.case for r in runs))


def accuracy(runs: Sequence[Run]) -> float:
    """Return the robust accuracy in percent of all points of these runs."""
    return 100.0 * sum(r.standing for r in runs) / sum(r.n for r in runs)


def spread(runs: Sequence[Run]) -> str:
    """Write a robust accuracy, and its range over train seeds."""
    if not runs:
        return DASH
    each = [100.0 * r.standing / r.n for r in runs]
    text = f"{accuracy(runs):.1f}"
    return text if len(each) == 1 else f"{text} ({min(each):.1f}-{max(each):.1f})"


def p_value(p: float) -> str:
    """Write a p-value."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


@dataclass(frozen=True)
class Compared:
    """Two ways on the same points."""

    only_a: int
    only_b: int
    p: float
    gap: float
    """Robust accuracy under the first less that under the second, in points of percent."""


def compare(pairs: Sequence[tuple[Run, Run]]) -> Compared | None:
    """Compare the breaks of two ways over all models; None without any."""
    if not pairs:
        return None
    only_a, only_b, p = discordant((a.images, a.natural & a.broken, b.natural & b.broken) for a, b in pairs)
    return Compared(only_a, only_b, p, accuracy([a for a, _ in pairs]) - accuracy([b for _, b in pairs]))


def compared_cells(found: Compared | None) -> list[str]:
    """Write a comparison: gap, the two counts, p."""
    if found is None:
        return [DASH] * 4
    return [f"{found.gap:+.2f}", str(found.only_a), str(found.only_b), p_value(found.p)]


def times(value: float | None) -> str:
    """Write a ratio."""
    return (
        DASH if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"
    )


def ratio(runs: Sequence[Run], a: str, b: str, key: str, case: str | None = None) -> float | None:
    """Return how many times more of ``key`` the first way spent, over all models that both met; None if nobody knows.

    Counts are the same in all runs. Of seconds the median of the paired runs counts: turn by turn, over pairs.
    """
    if key in ("seconds", "whole", "cpu"):
        return _slower(runs, a, b, key, case)
    pairs = couples(runs, a, b, case)
    spent = sum(y.cell[key] for _, y in pairs)
    return sum(x.cell[key] for x, _ in pairs) / spent if spent else None


def _slower(runs: Sequence[Run], a: str, b: str, key: str, case: str | None) -> float | None:
    """Median over pairs of the ratio of the sums over models."""
    turns: dict[int, tuple[float, float]] = {}
    others = {(r.case, r.seed, r.threads, r.pair): r for r in runs if r.way == b}
    for x in runs:
        y = others.get((x.case, x.seed, x.threads, x.pair))
        if x.way == a and y is not None and case in (None, x.case):
            before = turns.get(x.pair, (0.0, 0.0))
            turns[x.pair] = before[0] + x.cell[key], before[1] + y.cell[key]
    return statistics.median(v / w for v, w in turns.values()) if turns else None


def median(runs: Iterable[Run], of: Callable[[Run], float]) -> float | None:
    """Return the median over runs; None without any."""
    found = [of(r) for r in runs]
    return statistics.median(found) if found else None


def number(value: float | None, digits: int = 2) -> str:
    """Write a number."""
    return DASH if value is None else f"{value:.{digits}f}"


# -- the tables ----------------------------------------------------------------------------------------------------


def models(runs: Sequence[Run], way: str) -> Table:
    """List the models."""
    rows = [["case", "model", "points", "train seeds", "natural"]]
    for case in cases_of(runs):
        some = first(runs, way, case)
        if some:
            natural = 100.0 * sum(int(r.natural.sum()) for r in some) / sum(r.n for r in some)
            seeds = ", ".join(str(r.seed) for r in some)
            rows.append([f"`{case}`", named(case).says, str(some[0].n), seeds, f"{natural:.1f}"])
    return Table(rows)


def outcomes(runs: Sequence[Run], fast: str, full: str) -> Table:
    """Compare the fast roster with the full one, model by model and pooled."""
    rows = [["case", f"`{fast}`", f"`{full}`", "gap", f"only `{fast}`", f"only `{full}`", "p"]]
    for case in [*cases_of(couple[0] for couple in couples(runs, fast, full)), None]:
        pairs = couples(runs, fast, full, case)
        if pairs:
            sides = [spread([a for a, _ in pairs]), spread([b for _, b in pairs])]
            name = f"`{case}`" if case else "**pooled**"
            sides = sides if case else [f"{accuracy([p[k] for p in pairs]):.1f}" for k in (0, 1)]
            rows.append([name, *sides, *compared_cells(compare(pairs))])
    return Table(rows)


def cost(runs: Sequence[Run], ways: Sequence[str]) -> Table:
    """Say what each way spends on a naturally correct point, and in seconds a model."""
    head = ["case", "way", "threads", "forwards", "backwards", "seconds", "whole", "cpu", "bare", "over bare"]
    rows = [head]
    for case in cases_of(runs):
        for way in ways:
            for threads in dict.fromkeys(r.threads for r in pick(runs, case=case, way=way)):
                some = pick(runs, case=case, way=way, threads=threads)
                points = sum(int(r.natural.sum()) for r in some)
                spent = [f"{sum(r.cell[k] for r in some) / points:.1f}" for k in ("forwards", "backwards")]
                seconds = number(median(some, lambda r: r.cell["seconds"]))
                whole = number(median((r for r in some if "whole" in r.cell), lambda r: r.cell["whole"]))
                cpu = number(median(some, lambda r: r.cell["cpu"]))
                priced = [r for r in some if r.cell["bare"]]
                bare = number(median(priced, lambda r: r.cell["bare"]))
                over = number(median(priced, lambda r: r.cell["seconds"] / r.cell["bare"]))
                used = str(some[0].cell["threads"])  # a match of a small model takes one, whatever it is given
                rows.append([f"`{case}`", way, used, *spent, seconds, whole, cpu, bare, over])
    return Table(rows)


def by_attack(runs: Sequence[Run], ways: Sequence[str]) -> Table:
    """Say what each attack of a roster costs, over all models: passes a naturally correct point, share of seconds."""
    rows = [["way", "attack", "forwards", "backwards", "share of seconds"]]
    for way in ways:
        some = [r for r in first(runs, way) if r.cell.get("attacks")]
        points = sum(int(r.natural.sum()) for r in some)
        total = sum(a["seconds"] for r in some for a in r.cell["attacks"])
        for name in dict.fromkeys(a["name"] for r in some for a in r.cell["attacks"]):
            mine = [a for r in some for a in r.cell["attacks"] if a["name"] == name]
            spent = [f"{sum(a[k] for a in mine) / points:.1f}" for k in ("forwards", "backwards")]
            rows.append([way, f"`{name}`", *spent, f"{100 * sum(a['seconds'] for a in mine) / total:.0f} %"])
    return Table(rows)


def savings(runs: Sequence[Run], fast: Sequence[str], against: Sequence[str]) -> Table:
    """Say how many times less the fast ways spend."""
    head = ["case", "fast", "against", "threads", "forwards", "backwards", "seconds", "whole"]
    rows = [head]
    for case in [*cases_of(runs), None]:
        for a in fast:
            for b in against:
                for threads in sorted({r.threads for r in runs}, reverse=True):
                    some = [r for r in runs if r.threads == threads]
                    ways = [r for r in some if r.way == b]
                    keys = ["forwards", "backwards", "seconds"]
                    keys += ["whole"] if ways and all("whole" in r.cell for r in ways) else []
                    found = [ratio(some, b, a, key, case) for key in keys] + [None] * (4 - len(keys))
                    if any(f is not None for f in found):
                        name = f"`{case}`" if case else "**all**"
                        rows.append([name, a, b, str(threads), *(times(f) for f in found)])
    return Table(rows)


def faithful(runs: Sequence[Run], full: Sequence[str], plain: str) -> Table:
    """Compare the full roster, in each precision, with the same attacks driven plainly, and with the reference."""
    rows = [["case", "way", "against", "way's", "other", "gap", "only way", "only other", "p", "times faster"]]
    for way in full:
        for other in (plain, "reference"):
            for case in [*cases_of(a for a, _ in couples(runs, way, other)), None]:
                some = couples(runs, way, other, case)
                if not some:
                    continue
                threads = some[0][0].threads
                faster = ratio([r for r in runs if r.threads == threads], other, way, "seconds", case)
                sides = [f"{accuracy([p[k] for p in some]):.1f}" for k in (0, 1)]
                name = f"`{case}`" if case else "**pooled**"
                rows.append([name, way, other, *sides, *compared_cells(compare(some)), times(faster)])
    return Table(rows)


def members(runs: Sequence[Run]) -> Table:
    """Compare arena's members with torchattacks', case by case and pooled."""
    head = ["member", "case", "arena", "torchattacks", "gap", "only arena", "only torchattacks", "p"]
    rows = [[*head, "passes, arena", "passes, torchattacks", "violations"]]
    for name, variant in MEMBERS:
        a, b = f"{name}, arena", opposing(name, variant)
        for case in [*cases_of(r for r in runs if r.way in (a, b)), None]:
            pairs = couples(runs, a, b, case)
            if not pairs:
                continue
            mine, theirs = [x for x, _ in pairs], [y for _, y in pairs]
            rows.append(
                [
                    f"`{name}`" + (f", theirs {variant}" if variant else ""),
                    f"`{case}`" if case else "**pooled**",
                    f"{accuracy(mine):.1f}",
                    f"{accuracy(theirs):.1f}",
                    *compared_cells(compare(pairs)),
                    passes(mine),
                    passes(theirs),
                    str(sum(sum(r.cell["violations"].values()) for r in theirs)),
                ]
            )
    return Table(rows)


def passes(runs: Sequence[Run]) -> str:
    """Write forwards and backwards a naturally correct point."""
    points = sum(int(r.natural.sum()) for r in runs)
    return " + ".join(f"{sum(r.cell[k] for r in runs) / points:.0f}" for k in ("forwards", "backwards"))


def overhead(runs: Sequence[Run]) -> Table:
    """Set seconds against bare passes, libraries beside each other."""
    rows = [["case", "what", "points", "threads", "batch", "passes", "seconds", "bare", "over bare", "robust"]]
    for case in cases_of(runs):
        groups: dict[tuple[int, str, int], list[Run]] = {}
        for run in pick(runs, case=case):
            groups.setdefault((run.n, run.way, run.threads), []).append(run)
        for (n, way, _), some in sorted(groups.items(), key=lambda group: group[0][0]):
            rows.append(
                [
                    f"`{case}`",
                    way,
                    str(n),
                    str(some[0].cell["threads"]),
                    str(some[0].cell["batch_size"]),
                    passes(some[:1]),
                    number(median(some, lambda r: r.cell["seconds"])),
                    number(median(some, lambda r: r.cell["bare"])),
                    number(median(some, lambda r: r.cell["seconds"] / r.cell["bare"])),
                    f"{accuracy(some[:1]):.1f}",
                ]
            )
    return Table(rows)


def interval(runs: Sequence[Run]) -> str:
    """Write Wilson's 95 % interval of a pooled robust accuracy, the points taken for independent."""
    low, high = wilson(sum(r.standing for r in runs), sum(r.n for r in runs))
    return f"{low:.1f} to {high:.1f}"
