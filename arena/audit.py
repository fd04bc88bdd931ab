"""Doubt beside the number: indicators and the verdict they add up to.

Three kinds: what the defense check found, what the attacks' rows say, what the audit sees for itself
(``arena.auditing``). Plugins add theirs through ``arena_audit``. No flag is ``clear``, which is no proof; a match whose
audit was left out, or that had nothing to attack, is ``not_audited``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from arena.auditing import thresholds as t
from arena.specs import Indicator

if TYPE_CHECKING:
    from arena.auditing.probing import Probe
    from arena.results import Played

VERDICTS = ("clear", "suspect", "void", "not_audited")
#: How much is looked at.
LEVELS = ("normal", "deep", "none")
#: Raise it when indicators or thresholds change: a stored result is then asked again.
VERSION = 2


@dataclass(frozen=True)
class AuditContext:
    """What indicators may look at."""

    record: dict[str, Any]
    """The result so far: attacks, rosters, worst case."""
    check: tuple[Indicator, ...]
    """Findings of the defense check."""
    played: tuple[Played, ...] = ()
    """The attacks, with the points that each met and broke."""
    probe: Probe | None = None
    """Points, a search copy and the referee, to look for oneself; None where nothing can be attacked."""


@dataclass(frozen=True)
class Audited:
    """What an audit found, and its own cost: counted apart from the attacks'."""

    indicators: tuple[Indicator, ...]
    forwards: int
    backwards: int
    seconds: float


def audit(context: AuditContext, watch: Callable[[int, str], None] = lambda done, name: None) -> tuple[Indicator, ...]:
    """Compute the built-in indicators. A crash in one is contained, named, and speaks against the number.

    ``watch`` is told how many are done, and the name of the next.
    """
    from arena.auditing.indicators import BUILT_IN

    probe = context.probe
    looks: dict[str, Callable[[], Indicator]] = {k: partial(f, context) for k, f in FROM_ROWS.items()}
    if probe is not None:
        looks |= {k: partial(f, probe) for k, f in BUILT_IN.items()}
    found: list[Indicator] = []
    for name, look in looks.items():
        watch(len(found), name)
        try:
            found.append(look())
        except Exception as e:  # a defense's code runs here too
            said = " ".join(str(e).split())[:200]
            remedy = "make the model answer everywhere in the box, with a gradient or without one, then play again"
            evidence = f"could not be computed: {type(e).__name__}: {said}"
            found.append(Indicator(name, True, "crashed", None, evidence, remedy))
    return tuple(found)


def again(record: Mapping[str, Any], vs: str, *more: str) -> str:
    """Write the ``arena match`` line that asks the same defense about other attacks."""
    asked, threat = record["asked"], record["asked"]["threat"]
    words = ["arena", "match", record["defense"], "--vs", vs, "--dataset", asked["dataset"]]
    words += ["--backbone", asked["backbone"]] if asked.get("backbone") else []
    words += ["--norm", threat["norm"], "--eps", threat["eps"], "-n", str(asked["n"])]
    protocol = record.get("protocol", "standard")
    words += ["--protocol", protocol] if protocol != "standard" else []
    for key in ("seed", "train_seed", "train_norm", "train_eps", "checkpoint", "surface", "budget"):
        if asked.get(key):
            words += [f"--{key.replace('_', '-')}", str(asked[key])]
    return shlex.join([*words, *more])


# -- what the attacks' rows say ------------------------------------------------------------------------------------


def gradient_free_beats_gradients(context: AuditContext) -> Indicator:
    """Count points that only attacks without gradients broke: searches, decisions, transfers."""
    white = [p for p in context.played if p.planned.spec.spec.knowledge == "white-box"]
    other = [p for p in context.played if p.planned.spec.spec.knowledge != "white-box"]
    only, n = _only(other, white)
    flag = only >= t.FEWEST and only > t.GRADIENT_FREE * n and bool(white)
    names = ", ".join(dict.fromkeys(p.planned.name for p in other if bool(p.broken.any())))
    return Indicator(
        "gradient_free_beats_gradients",
        flag,
        only / n if n else 0.0,
        t.GRADIENT_FREE,
        f"{only} of {n} points fall to {names} alone; no gradient attack broke them" if flag else "",
        "gradients are hidden: search longer, more may fall: "
        + again(context.record, "square(queries=20000,restarts=3)")
        if flag
        else "",
    )


def adaptive_beats_standard(context: AuditContext) -> Indicator:
    """Count points that only the roster ``adaptive`` broke where ``autoattack`` was played too."""
    groups = {name: [p for p in context.played if p.group == name] for name in ("autoattack", "adaptive")}
    only, n = _only(groups["adaptive"], groups["autoattack"])
    flag = all(groups.values()) and only >= t.FEWEST and only > t.ADAPTIVE * n
    return Indicator(
        "adaptive_beats_standard",
        flag,
        only / n if n else 0.0,
        t.ADAPTIVE,
        f"{only} of {n} points fall to adaptive and not to autoattack: the model's output hides what decides"
        if flag
        else "",
        "count on adaptive alone, which is a floor, and give it more: "
        + again(context.record, "adaptive,pgd(loss=margin,steps=200,restarts=20)", "--audit", "deep")
        if flag
        else "",
    )


def silent_success(context: AuditContext) -> Indicator:
    """Count points that an attack saw broken on its way and handed over unbroken."""
    rows = [p for p in context.played if p.silent]
    lost = sum(p.silent for p in rows)
    return Indicator(
        "silent_success",
        lost >= t.FEWEST,
        lost,
        t.FEWEST,
        f"{lost} points were seen broken inside the ball and handed over unbroken by "
        + ", ".join(dict.fromkeys(p.planned.name for p in rows))
        if lost
        else "",
        "the attack forgets its best point, mend it; until then: " + again(context.record, "pgd,autoattack")
        if lost >= t.FEWEST
        else "",
    )


def heads_and_output(context: AuditContext) -> Indicator:
    """Say how far heads and output agree at broken points: information, no flag."""
    heads = (context.record.get("diagnosis") or {}).get("heads") or {}
    known = {k: v["agreement_broken"] for k, v in heads.items() if v["agreement_broken"] is not None}
    return Indicator(
        "heads_and_output",
        False,
        min(known.values()) if known else None,
        None,
        "at broken points the output agrees with " + ", ".join(f"{k} on {v:.0f} %" for k, v in known.items())
        if known
        else "",
    )


def _only(some: Sequence[Played], others: Sequence[Played]) -> tuple[int, int]:
    """Return how many points some attacks broke and none of the others, and the number of points they met."""
    if not some:
        return 0, 0
    broken = some[0].broken.clone()
    met = some[0].met.clone()
    for p in some:
        broken |= p.broken
    for p in (*some, *others):
        met |= p.met
    for p in others:
        broken &= ~p.broken
    return int(broken.sum()), int(met.sum())


FROM_ROWS: dict[str, Callable[[AuditContext], Indicator]] = {
    f.__name__: f for f in (gradient_free_beats_gradients, adaptive_beats_standard, silent_success, heads_and_output)
}


def statuses(record: dict[str, Any], problems: Sequence[str] = ()) -> list[Indicator]:
    """Flag every attack that was asked for and is not ``ok``: failure is not robustness.

    ``problems`` say which parts of a roster could not be made.
    """
    rows, stopped = record["attacks"], bool(record.get("stopped"))
    found = [
        Indicator(
            "attack_not_ok",
            True,
            row["status"],
            "ok",
            f"{row['name']}: {row['error'] or row['status']}",
            _REMEDY[row["status"]],
        )
        for row in rows
        if row["status"] != "ok" and not (stopped and row["status"] == "partial")
    ]
    found += [_stopped(record)] if stopped else []
    found += [
        Indicator(
            "roster_incomplete",
            True,
            row["budget"],
            None,
            f"{row['name']}: no room in {row['budget']} passes an example for {', '.join(row['left_out'])}",
            f"play it whole: {again({**record, 'asked': {**record['asked'], 'budget': None}}, row['name'])}",
        )
        for row in record["rosters"]
        if row.get("cut")
    ]
    found += [
        Indicator("roster_incomplete", True, evidence=text, remedy="see 'arena plugins doctor'") for text in problems
    ]
    nonfinite = sum(row["nonfinite"] for row in rows)
    if nonfinite:
        found.append(
            Indicator(
                "nonfinite_logits",
                True,
                nonfinite,
                0,
                f"at {nonfinite} attacked points the logits are not finite; they count as broken",
                "make forward finite on the whole box [0, 1]: attacks stop at such points and find no others",
            )
        )
    none_ok = bool(rows) and all(row["status"] != "ok" for row in rows)
    if stopped:  # the points that the attack at work has finished are known
        none_ok = all(row["status"] not in ("ok", "partial") or not row["attempted"] for row in rows)
    if none_ok or not rows:
        found.append(
            Indicator(
                "no_attack_ok",
                True,
                0,
                1,
                "no attack worked" if rows else "no attack was played",
                "name attacks that support this threat model",
                fatal=True,
            )
        )
    return found


def _stopped(record: dict[str, Any]) -> Indicator:
    """Say what a match that its time limit stopped has left undone."""
    undone = [row for row in record["attacks"] if row["status"] == "partial"]
    names = [row["name"] + (f" (after {row['attempted']} points)" if row["attempted"] else "") for row in undone]
    return Indicator(
        "time_limit",
        True,
        record["provenance"]["time_limit"],
        None,
        f"stopped before the end, and nothing else was looked at; {len(undone)} of {len(record['attacks'])} attacks "
        f"are not done: {', '.join(names)}",
        "run the same command again: it goes on where it stopped",
    )


_REMEDY = {
    "partial": "run the same command again: it goes on where it stopped",
    "failed": "mend it or leave it out of --vs; 'arena show RESULT --json' has all that is known",
    "unsupported": "leave it out of --vs, or change the threat model",
    "no_effect": "it never moved a pixel: check its options",
}


def verdict(indicators: Sequence[Indicator], audited: bool) -> str:
    """Sum up: ``void`` if a fatal flag stands, ``suspect`` if any does; else ``clear``, if there was an audit."""
    flagged = [i for i in indicators if i.flag]
    if any(i.fatal for i in flagged):
        return "void"
    if flagged:
        return "suspect"
    return "clear" if audited else "not_audited"
