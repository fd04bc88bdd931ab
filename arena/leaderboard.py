"""The standings: which defense holds best, from the results in the store, with no more order than the points support.

Results are comparable at equal data (hash of pixels and labels, and of the points chosen), threat model and n: each
such key is a table of its own. Of each model the newest rankable result counts, else the newest. Ranked are those with
complete rosters ``autoattack`` and ``adaptive`` whose verdict is not ``void``; the others are listed with the reason.
Reads the store only: imports no torch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from arena.statistics import rank_ranges, wilson

if TYPE_CHECKING:
    from arena.store import Store

REQUIRED = ("autoattack", "adaptive")


@dataclass(frozen=True)
class Row:
    """One model in a table. Accuracies are percentages of the n points."""

    rank: tuple[int, int] | None
    """Best and worst rank; None: not ranked."""
    defense: str
    backbone: str
    train_seed: int
    trained_against: str
    """Threat model of the training where it was not the data set's default, else empty."""
    natural: float
    worst_case: float | None
    """Per-example worst case over all attacks of all results of the model at this key; None: nothing was played."""
    ci95: tuple[float, float] | None
    autoattack: float | None
    """None: the roster was not played."""
    adaptive: float | None
    verdict: str
    passes: int
    """Forwards and backwards spent by all attacks."""
    date: str
    result: str
    """Id of the result."""
    model: str
    """model.id"""
    reason: str
    """Why it is not ranked; empty when it is."""


@dataclass(frozen=True)
class Standings:
    """One table: all results at one key."""

    dataset: str
    data_sha256: str
    indices_sha256: str
    norm: str
    eps: str
    n: int
    rows: tuple[Row, ...]
    """Ranked, best first."""
    unranked: tuple[Row, ...]
    results: int
    """Models at this key, those included that a filter hides."""


def standings(
    store: Store,
    *,
    dataset: str | None = None,
    norm: str | None = None,
    eps: str | None = None,
    n: int | None = None,
    defense: str | None = None,
    results: Iterable[str] | None = None,
) -> list[Standings]:
    """Build the tables from a store.

    ``defense`` (a name with or without options) and ``results`` (ids, which win over newer ones) choose what is shown;
    ranks are always those among all results of the key.
    """
    records = store.all(dataset=dataset, norm=norm, eps=eps, n=n)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for record in records:
        groups.setdefault(_key(record), []).append(record)
    wanted = None if results is None else set(results)
    tables = []
    for key in sorted(groups, key=lambda k: (groups[k][-1]["asked"]["dataset"], k[2], k[3], -k[4], k[:2])):
        table = _table(store, groups[key], defense, wanted)
        if table.rows or table.unranked:
            tables.append(table)
    return tables


def _key(record: Mapping[str, Any]) -> tuple[Any, ...]:
    asked, threat = record["asked"], record["asked"]["threat"]
    indices = asked["indices_sha256"]
    return asked.get("data_sha256") or indices, indices, threat["norm"], Fraction(threat["eps"]), asked["n"]


def _table(store: Store, records: list[dict[str, Any]], defense: str | None, wanted: set[str] | None) -> Standings:
    chosen: dict[str, dict[str, Any]] = {}
    for record in records:  # oldest first; of equals the later one counts
        if record.get("protocol", "standard") != "standard":
            continue  # a paper's own evaluation has no place here, its breaks do
        held = chosen.get(record["model"]["id"])
        if held is None or _weight(record, wanted) >= _weight(held, wanted):
            chosen[record["model"]["id"]] = record
    standing = {model: _standing(store, [r for r in records if r["model"]["id"] == model]) for model in chosen}
    ordered = sorted(chosen.values(), key=lambda r: (-sum(standing[r["model"]["id"]]), r["defense"], r["id"]))
    ranked = [r for r in ordered if not why_unranked(r)]
    ranges = rank_ranges([standing[r["model"]["id"]] for r in ranked])
    rows = [_row(r, standing[r["model"]["id"]], span) for r, span in zip(ranked, ranges, strict=True)]
    unranked = [_row(r, standing[r["model"]["id"]], None) for r in ordered if why_unranked(r)]
    last = records[-1]["asked"]
    data, indices, norm, _, n = _key(records[-1])

    def shown(part: list[Row]) -> tuple[Row, ...]:
        return tuple(r for r in part if _asked_for(r.defense, defense) and (wanted is None or r.result in wanted))

    eps = last["threat"]["eps"]
    return Standings(last["dataset"], data, indices, norm, eps, n, shown(rows), shown(unranked), len(ordered))


def _weight(record: Mapping[str, Any], wanted: set[str] | None) -> tuple[bool, bool]:
    return wanted is not None and record["id"] in wanted, not why_unranked(record)


def _standing(store: Store, records: list[dict[str, Any]]) -> list[bool]:
    """Return which points of one model no result has broken, by ascending data-set index.

    Verified breaks of any match count: a later, kinder line-up does not make a model better.
    """
    points: list[bool] = []
    for record in records:
        outcomes = store.outcomes(record["id"])
        held = [held for _, held in sorted(zip(outcomes.index, outcomes.survived, strict=True))]
        points = [a and b for a, b in zip(points, held, strict=True)] if points else held
    return points


def _asked_for(name: str, wanted: str | None) -> bool:
    return wanted is None or wanted in (name, name.partition("(")[0])


def why_unranked(record: Mapping[str, Any]) -> str:
    """Say why a result is not ranked; an empty string when it is."""
    played = {r["name"]: r for r in record["rosters"]}
    reasons = [f"{name} not played" for name in REQUIRED if name not in played]
    for name in REQUIRED:
        if name in played and not played[name].get("complete"):
            bad = [a["status"] for a in record["attacks"] if a.get("roster") == name and a["status"] != "ok"]
            counts = ", ".join(f"{bad.count(s)} {s}" for s in dict.fromkeys(bad))
            counts = counts or (f"budget {played[name]['budget']}" if played[name].get("cut") else "")
            reasons.append(f"{name} incomplete" + (f" ({counts})" if counts else ""))
    if verdict(record) == "void":
        reasons.append("verdict void")
    return "; ".join(reasons)


def verdict(record: Mapping[str, Any]) -> str:
    """Return a record's verdict; ``not_audited`` without an audit."""
    return str((record.get("audit") or {}).get("verdict") or "not_audited")


def _row(record: Mapping[str, Any], standing: list[bool], rank: tuple[int, int] | None) -> Row:
    asked = record["asked"]
    played = record["worst_case"]["robust_accuracy"] is not None
    n, left = len(standing), sum(standing)
    rosters = {r["name"]: r["robust_accuracy"] for r in record["rosters"]}
    return Row(
        rank=rank,
        defense=record["defense"],
        backbone=str(asked.get("backbone") or ""),
        train_seed=int(asked.get("train_seed") or 0),
        trained_against=" ".join(str(asked[k]) for k in ("train_norm", "train_eps") if asked.get(k)),
        natural=record["natural"]["accuracy"],
        worst_case=100.0 * left / n if played else None,
        ci95=wilson(left, n) if played else None,
        autoattack=rosters.get("autoattack"),
        adaptive=rosters.get("adaptive"),
        verdict=verdict(record),
        passes=sum(int(a.get("forwards") or 0) + int(a.get("backwards") or 0) for a in record["attacks"]),
        date=str(record.get("provenance", {}).get("started") or "")[:10],
        result=record["id"],
        model=record["model"]["id"],
        reason="" if rank else why_unranked(record),
    )


def percent(value: float | None) -> str:
    """Write a percentage with one digit after the point, ``-`` for none."""
    return "-" if value is None else f"{value:.1f}"


def span(rank: tuple[int, int] | None) -> str:
    """Write a rank range: ``2`` or ``1-3``, ``-`` for none."""
    if rank is None:
        return "-"
    return str(rank[0]) if rank[0] == rank[1] else f"{rank[0]}-{rank[1]}"


def worst(row: Row) -> str:
    """Write the worst case with its interval."""
    if row.ci95 is None:
        return percent(row.worst_case)
    return f"{percent(row.worst_case)} ({percent(row.ci95[0])}-{percent(row.ci95[1])})"


def label(row: Row) -> str:
    """Name a row: the defense, and the training's seed and threat model where they are not the defaults."""
    more = [f"train seed {row.train_seed}"] if row.train_seed else []
    more += [f"train eps {row.trained_against}"] if row.trained_against else []
    return f"{row.defense} ({', '.join(more)})" if more else row.defense


def title(table: Standings) -> str:
    """Name a table by its key."""
    return f"{table.dataset} · {table.norm} eps {table.eps} · n {table.n}"


def as_json(tables: Iterable[Standings]) -> list[dict[str, Any]]:
    """Return the tables as plain data."""
    return [
        {
            "dataset": t.dataset,
            "data_sha256": t.data_sha256,
            "indices_sha256": t.indices_sha256,
            "threat": {"norm": t.norm, "eps": t.eps},
            "n": t.n,
            "ranked": [asdict(r) for r in t.rows],
            "unranked": [asdict(r) for r in t.unranked],
        }
        for t in tables
    ]


CSV_COLUMNS = (
    *("dataset", "norm", "eps", "n", "rank_best", "rank_worst", "defense", "backbone", "train_seed", "natural"),
    *("worst_case", "ci95_low", "ci95_high", "autoattack", "adaptive", "verdict", "passes", "date", "result", "model"),
    "reason",
)


def as_csv(tables: Iterable[Standings]) -> str:
    """Return all rows of all tables as one CSV text; absent numbers are empty."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for t in tables:
        for r in (*t.rows, *t.unranked):
            best, last = r.rank or (None, None)
            low, high = r.ci95 or (None, None)
            row = {
                **asdict(r),
                "dataset": t.dataset,
                "norm": t.norm,
                "eps": t.eps,
                "n": t.n,
                "rank_best": best,
                "rank_worst": last,
                "ci95_low": low,
                "ci95_high": high,
            }
            writer.writerow({k: "" if row[k] is None else row[k] for k in CSV_COLUMNS})
    return out.getvalue()


def as_markdown(tables: Iterable[Standings]) -> str:
    """Return the tables in Markdown."""
    head = (
        "| rank | defense | backbone | natural | worst case (95 %) | autoattack | adaptive | verdict | passes | date |"
    )
    rule = "|---:|---|---|---:|---:|---:|---:|---|---:|---|"
    blocks = []
    for t in tables:
        lines = [f"### {title(t)}", "", head, rule] if t.rows else [f"### {title(t)}", ""]
        for r in t.rows:
            cells = [span(r.rank), label(r), r.backbone, percent(r.natural), worst(r), percent(r.autoattack)]
            cells += [percent(r.adaptive), r.verdict, str(r.passes), r.date]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        if t.unranked:
            lines += [*([""] if t.rows else []), "Not ranked:", ""]
            lines += [f"- {label(r)}, worst case {worst(r)}: {r.reason}" for r in t.unranked]
        blocks.append("\n".join(lines) + "\n")
    return "\n".join(blocks)
