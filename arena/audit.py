"""Doubt beside the number: indicators and the verdict they add up to.

Until the audit of attacks is built, the verdict comes from the defense check and the attacks' statuses alone, and a
match against which nothing speaks is ``not_audited``, never ``clear``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from arena.specs import Indicator

VERDICTS = ("clear", "suspect", "void", "not_audited")


@dataclass(frozen=True)
class AuditContext:
    """What indicators may look at."""

    record: dict[str, Any]
    """The result so far: attacks, rosters, worst case."""
    check: tuple[Indicator, ...]
    """Findings of the defense check."""


def statuses(record: dict[str, Any], problems: Sequence[str] = ()) -> list[Indicator]:
    """Flag every attack that was asked for and is not ``ok``: failure is not robustness.

    ``problems`` say which parts of a roster could not be made.
    """
    rows = record["attacks"]
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
        if row["status"] != "ok"
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


_REMEDY = {
    "partial": "run the same command again: it goes on where it stopped",
    "failed": "mend it or leave it out of --vs; 'arena show RESULT --json' has all that is known",
    "unsupported": "leave it out of --vs, or change the threat model",
    "no_effect": "it never moved a pixel: check its options",
}


def verdict(indicators: list[Indicator]) -> str:
    """Sum up: ``void`` if a fatal flag stands, ``suspect`` if any does, else ``not_audited``."""
    flagged = [i for i in indicators if i.flag]
    if any(i.fatal for i in flagged):
        return "void"
    return "suspect" if flagged else "not_audited"
