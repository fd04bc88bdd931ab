"""What a match would be: its line-up, the most it can cost, how long that may take. Nothing is attacked or trained.

A model that is not trained yet is built with its first weights: it has the same surface and costs the same passes. How
many points it will classify correctly nobody knows, so all count.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from arena.arrangement import arrange
from arena.contender import Contender
from arena.cost import Bill
from arena.datasets import describe
from arena.home import home
from arena.journal import Journal
from arena.lineup import Group
from arena.pace import Pace
from arena.playing import Playing
from arena.plugins import Registry
from arena.question import Question, Running
from arena.store import open_store
from arena.threads import one_thread, small
from arena.trained import TrainedPlan
from arena.watch import Silent


@dataclass(frozen=True)
class Foreseen:
    """What a match would be."""

    name: str
    """Canonical name of the defense."""
    words: tuple[str, ...]
    """Data set, backbone, threat model, points."""
    groups: tuple[Group, ...]
    bill: Bill
    pace: Pace | None
    remarks: tuple[str, ...]
    """What else is known, and what is not."""


def foresee(question: Question, running: Running, registry: Registry) -> Foreseen:
    """Line up a match and bound its cost. Writes nothing.

    Raises:
        ArenaError: the question is wrong, or the model can be neither had nor built.
    """
    arranged = arrange(question, running, registry)
    plan, remarks = arranged.plan, list(arranged.notes)
    trained = not (isinstance(plan, TrainedPlan) and plan.checkpoint is None and not plan.cached())
    contender: Contender
    if isinstance(plan, TrainedPlan) and not trained:
        contender = plan.untrained()
        how = "the match trains it first" if describe(question.dataset, registry).cpu else "train it first"
        remarks.append(f"the model is not trained yet, {how}: {plan.command}")
        remarks.append(f"natural accuracy is not known: all {len(arranged.index)} points count as classified correctly")
    else:
        contender = plan.obtain(train=False, retrain=False, device=running.device, watch=Silent())
    journal = Journal(home() / "journal" / arranged.key[:16])
    if running.compile:
        remarks.append("the time told is that of passes that are not compiled")
    match = Playing(arranged, replace(running, compile=False), registry, contender, journal, Silent())
    with one_thread(small(running.device, contender.parameters, arranged.images.shape)):
        groups, bill, findings = match.prepare(trained)
        void = trained and any(i.flag and i.fatal for i in findings)
        pace = None if void else match.attacker.search.pace
    if void:
        remarks += [f"no attack would be played: {i.evidence}" for i in findings if i.flag and i.fatal]
    known = None if running.replay or running.retrain else _stored(arranged.key)
    if known is not None:
        remarks.append(f"the store has the answer, result {known['id']}: nothing is played without --replay")
    elif journal.folder.exists() and trained:
        remarks.append("an unfinished match is kept: what it has done is not done again")
    threat = arranged.threat
    words = (question.dataset, contender.backbone or "", f"{threat.norm} eps {threat.eps}", f"n {len(arranged.index)}")
    return Foreseen(contender.name, words, tuple(groups), bill, pace, tuple(remarks))


def _stored(key: str) -> dict[str, Any] | None:
    """Look into the store if there is one: opening would make it."""
    if not os.environ.get("ARENA_STORE") and not (home() / "arena.db").exists():
        return None
    with open_store() as store:
        return store.answer(key)
