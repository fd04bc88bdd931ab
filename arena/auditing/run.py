"""Audits a match when its attacks are done: chooses points, makes a search copy, asks every indicator."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from arena.audit import FROM_ROWS, AuditContext, Audited, again, audit
from arena.auditing import thresholds
from arena.auditing.indicators import BUILT_IN
from arena.auditing.probing import Probe
from arena.contender import seeded
from arena.points import Points
from arena.results import Played
from arena.rng import Stream
from arena.specs import Indicator
from arena.target import DEFAULT_BATCH, Target

if TYPE_CHECKING:
    from arena.playing import Playing
    from arena.plugins import Registry


def audit_match(
    match: Playing, record: dict[str, Any], rows: Sequence[Played], findings: Sequence[Indicator], standing: Tensor
) -> Audited | None:
    """Look for signs that the attacks failed.

    ``findings`` are those of the defense check and of the attacks' statuses; ``standing`` (n,) is what no attack broke.
    Returns None where the audit was left out, nothing could be attacked, or the match is void already.
    """
    running, threat = match.running, match.arranged.threat
    nothing = threat.radius == 0 or not bool(match.correct.any())
    if running.audit == "none" or nothing or any(i.flag and i.fatal for i in findings):
        return None
    clock, deep = time.monotonic(), running.audit == "deep"
    size = thresholds.SAMPLE_DEEP if deep else thresholds.SAMPLE
    batch = running.batch_size or DEFAULT_BATCH
    target = Target(match.build(), match.surface, match.attacker.n_classes, batch, running.device)
    stream = Stream.of(match.arranged.question.seed, "audit")
    probe = Probe(
        target=target,
        referee=match.referee,
        build=match.build,
        threat=threat,
        sample=_points(match, match.correct, size),
        standing=_points(match, standing, size),
        stream=stream,
        registry=match.registry,
        command=partial(again, record),
        deep=deep,
        adaptive=any(r["name"] == "adaptive" and r["complete"] for r in record["rosters"]),
    )
    context = AuditContext(record, tuple(findings), tuple(rows), probe)
    match.watch.phase("audit", len(FROM_ROWS) + len(BUILT_IN), "indicators")
    # A random model draws from the global generator: the same audit draws the same numbers.
    with seeded(int(stream.bits(match.pool.index[:1], 0, 0, 1)[0, 0])):
        found = audit(context, match.watch.advance)
        found += _of_plugins(match.registry, context)
    return Audited(found, target.meter.forwards, target.meter.backwards, round(time.monotonic() - clock, 3))


def _of_plugins(registry: Registry, context: AuditContext) -> tuple[Indicator, ...]:
    """Ask plugins; one whose indicators cannot be had speaks against the number, as a built-in that crashes does."""
    known = len(registry.problems)
    found = registry.audit(context)
    lost = [str(problem) for problem in registry.problems[known:]]
    remedy = "mend or uninstall the plugin, then play again"
    return (*found, *(Indicator("arena_audit", True, "crashed", None, text, remedy) for text in lost))


def _points(match: Playing, mask: Tensor, size: int) -> Points:
    """Return the first points of a mask (n,): a constant of the data set, as the match's own are."""
    return match.pool.take(mask.nonzero().squeeze(1)[:size])
