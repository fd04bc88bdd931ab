"""From a question to its answer: checked, keyed, locked, played or found in the store."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch

from arena.arrangement import arrange
from arena.datasets import describe
from arena.examples import drop_examples
from arena.home import home, lock
from arena.journal import Journal
from arena.playing import Playing
from arena.plugins import Registry
from arena.question import Question, Running
from arena.store import open_store
from arena.tf32 import without_tf32
from arena.threads import one_thread, small
from arena.watch import Watch
from arena.workers.staff import engaged


@dataclass(frozen=True)
class Answered:
    """A result, and whether it was already there."""

    record: dict[str, Any]
    stored: bool


def play(question: Question, running: Running, registry: Registry, watch: Watch) -> Answered:
    """Answer a question: from the store, by going on with an unfinished match, or by playing it.

    Raises:
        ArenaError: the question is wrong, the model cannot be had, or another process is answering it.
    """
    arranged = arrange(question, running, registry)
    store = open_store()
    with lock(f"match-{arranged.key[:16]}"):
        if not running.replay and not running.retrain:
            record = store.answer(arranged.key)
            if record is not None:
                return Answered(record, True)
        journal = Journal(home() / "journal" / arranged.key[:16])
        again = running.replay or running.retrain
        if again and not journal.marked("replay"):
            journal.clear()  # a replay that was killed goes on; a fresh one starts over
        device = running.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        running, spec = replace(running, device=device), describe(question.dataset, registry)
        with engaged(running) as staff:
            contender = arranged.plan.obtain(train=spec.cpu, retrain=running.retrain, device=device, watch=watch)
            if journal.open(contender.id):
                watch.say("going on with an unfinished match")
            if again:
                journal.mark("replay")
            match = Playing(arranged, running, registry, contender, journal, watch)
            alone = small(device, contender.parameters, arranged.images.shape)
            with one_thread(alone), without_tf32():  # the first changes no outcome
                record, outcomes = match.run(staff)
        if record["stopped"]:  # no answer yet: the journal stays, and the same question goes on from it
            return Answered(record, False)
        store.put(arranged.key, record, outcomes)
        journal.clear()
        drop_examples(journal.stopped)
    registry.announce("arena_match_finished", record=copy.deepcopy(record))
    return Answered(record, False)
