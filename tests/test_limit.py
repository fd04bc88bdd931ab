"""A time limit stops a match cleanly, and what was stopped goes on to the outcome of a match that was not."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import arena.playing
from arena.errors import ArenaError
from arena.home import home
from arena.limit import Limit, seconds_of, written
from arena.match import play
from arena.plugins import registry
from arena.question import Question, Running
from arena.store import open_store
from arena.watch import Silent

MODEL = (Path(__file__).parent / "means.py").read_text()
VS = ("pgd(steps=6)", "apgd_t(steps=4)", "square(queries=40)", "foolbox:LinfPGD(steps=4)", "fgsm")


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("10m", 600), ("1h30m", 5400), ("1h5s", 3605), ("0.5", 0.5), (7, 7)]
)
def test_texts_that_are_times(text, seconds):
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "soon", "-1", "0", "0m", "10 m", "1h30", "30m1h", "m", "1e3", "inf", "nan", "10M", "٣m", True]
)
def test_other_texts_are_refused_in_one_line(text):
    with pytest.raises(ArenaError, match=r"^--time-limit '.*': expected [^\n]*$"):
        seconds_of(text)


@given(st.integers(1, 10**6))
def test_a_time_is_written_as_it_is_read(seconds):
    assert seconds_of(written(seconds)) == seconds


def test_a_limit_gives_the_first_step_away():
    now = iter([0.0, 5.0, 6.0])
    limit = Limit(3, lambda: next(now))
    assert not limit.up  # nothing was done yet: one step more
    assert limit.after_step()
    assert limit.up
    forever = Limit(None)
    assert not forever.after_step()


@pytest.fixture
def ask(tmp_path, arena_home):
    """Play the question, with a clock that counts how often it is read; a limit of k lets k steps or so pass."""
    (tmp_path / "mine.py").write_text(MODEL)

    def answer(limit=None, vs=VS, watch=None, **changes):
        question = Question(f"{tmp_path / 'mine.py'}:factory", vs, **{"n": 40, "eps": "0.08", **changes})
        return play(
            question,
            Running(device="cpu", batch_size=16, audit="none", time_limit=limit),
            registry(),
            watch or Silent(),
        )

    return answer


@pytest.fixture
def counted(monkeypatch):
    """A clock that moves one second each time it is read."""
    monkeypatch.setattr(arena.playing, "Limit", lambda s: Limit(s, partial(next, itertools.count())))


def without_times(record):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in record["attacks"]]


def test_stopped_again_and_again_a_match_ends_as_if_never_stopped(ask, counted, monkeypatch, tmp_path):
    stopped = []
    while (answered := ask(limit=23)).record["stopped"]:
        record = answered.record
        stopped.append(record)
        assert not answered.stored
        assert open_store().all() == []
        assert not all(r["complete"] for r in record["rosters"])
        assert record["audit"]["verdict"] in ("suspect", "void")
        assert "time_limit" in {i["name"] for i in record["audit"]["indicators"] if i["flag"]}
        assert record["provenance"]["time_limit"] == 23
        assert (home() / record["examples"]["file"]).exists()
    assert len(stopped) >= 3
    undone = [sum(r["status"] == "partial" for r in record["attacks"]) for record in stopped]
    assert undone == sorted(undone, reverse=True)
    broken = [sum(r["worst_case"]["broken_by"].values()) for r in stopped]
    assert broken == sorted(broken)  # what was found stays found
    last = answered.record
    assert not (home() / stopped[-1]["examples"]["file"]).exists()
    assert not any((home() / "journal").iterdir())

    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "another"))
    whole = ask()
    assert without_times(last) == without_times(whole.record)
    assert last["worst_case"] == whole.record["worst_case"]
    assert last["examples"]["sha256"] == whole.record["examples"]["sha256"]
    assert last["audit"] == whole.record["audit"]


def test_a_step_is_done_however_short_the_limit_is(ask, counted):
    first = ask(limit=1e-9, vs=("pgd(steps=1)",), n=16).record
    assert first["stopped"]
    for _ in range(8):
        record = ask(limit=1e-9, vs=("pgd(steps=1)",), n=16).record
        if not record["stopped"]:
            break
    assert not record["stopped"]


def test_half_a_second_stops_a_match_and_without_a_limit_it_goes_on(ask):
    vs = ("pgd(steps=100000)", "apgd_ce")
    record = ask(limit=0.5, vs=vs, eps="0.001", n=8).record
    long, apgd = record["attacks"]
    assert record["stopped"]
    assert long["status"] == apgd["status"] == "partial"
    assert long["error"].startswith("the time limit of 0.5s was up after")
    assert apgd["error"] == "not played: the time limit of 0.5s was up"
    assert apgd["attempted"] == 0
    assert record["diagnosis"] is None
    assert record["audit"]["level"] == "none"
    assert long["forwards"] < 8 * 100_001


def test_an_unfinished_match_says_that_it_goes_on(ask, counted):
    said = []

    class Listening(Silent):
        def say(self, text):
            said.append(text)

    assert ask(limit=3).record["stopped"]
    done = ask(watch=Listening())
    assert "going on with an unfinished match" in said
    assert open_store().all() == [done.record]
    assert ask(limit=3).stored  # the limit is no part of the question


def test_a_plain_attack_is_stopped_between_chunks(ask, counted):
    record = ask(limit=1, vs=("foolbox:LinfPGD(steps=1)",), n=150).record
    (row,) = record["attacks"]
    assert record["stopped"]
    assert 0 < row["attempted"] < record["asked"]["n"] - 10
    last = ask(vs=("foolbox:LinfPGD(steps=1)",), n=150).record
    assert last["attacks"][0]["status"] == "ok"
