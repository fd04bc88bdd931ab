"""Matches of the planted models, as several test files ask for them."""

from __future__ import annotations

from arena.match import play
from arena.question import Question, Running
from arena.watch import Silent

GO = Running(device="cpu", audit="none")


def ask(registry, factory="honest", vs=("pgd",), running=GO, **changes):
    """Play a planted model on 32 points of digits."""
    usual = {"n": 32, "eps": "0.05"}
    question = Question(f"arena_cheats:{factory}", vs, **{**usual, **changes})
    return play(question, running, registry, Silent())


def flags(record):
    """Return the names of the indicators that speak against a record."""
    return {i["name"] for i in record["audit"]["indicators"] if i["flag"]}
