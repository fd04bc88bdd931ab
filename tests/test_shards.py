"""Points are attacked, judged and forgotten a shard at a time: nothing holds all of them, and nothing depends on it."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import arena.ground
import arena.points
from arena.auditing.thresholds import SAMPLE
from arena.check import PROBE
from arena.datasets import Images, digits, to_float
from arena.engine import Outcome
from arena.examples import read_examples
from arena.home import home
from arena.journal import AttackKeeper
from arena.limit import Limit
from arena.match import play
from arena.plugins import registry
from arena.points import Pool, shards
from arena.question import Question, Running
from arena.referee import Referee
from arena.store import open_store
from arena.verify import verify
from arena.watch import Silent

MODEL = """
import torch
from arena.datasets import digits, to_float

class Means(torch.nn.Module):
    def __init__(self):
        super().__init__()
        images = digits()
        x = to_float(images.x_train).flatten(1)
        means = torch.stack([x[images.y_train == k].mean(0) for k in range(10)])
        self.linear = torch.nn.Linear(64, 10)
        with torch.no_grad():
            self.linear.weight.copy_(2 * means)
            self.linear.bias.copy_(-means.square().sum(1))

    def forward(self, x):
        return self.linear(x.flatten(1))

def factory():
    return Means()

class Noisy(Means):
    def forward(self, x):
        return super().forward(x) + 0.3 * torch.randn(len(x), 10)

def noisy():
    return Noisy()
"""
VS = ("pgd(steps=6)", "apgd_ce(steps=5)", "square(queries=40)", "foolbox:LinfPGD(steps=4)", "fgsm")
SHARD, N = 16, 100


@pytest.fixture
def ask(tmp_path, monkeypatch):
    """Play the question in a home of its own, with shards of so many points."""
    (tmp_path / "mine.py").write_text(MODEL)

    def answer(name, shard=SHARD, vs=VS, factory="factory", precision="fp32", audit="none", watch=None, **changes):
        monkeypatch.setenv("ARENA_HOME", str(tmp_path / name))
        monkeypatch.setattr(arena.points, "SHARD", shard)
        question = Question(f"{tmp_path / 'mine.py'}:{factory}", vs, **{"n": N, "eps": "0.12", **changes})
        running = Running("cpu", 16, precision, audit=audit, matrix="fgsm" in vs)
        return play(question, running, registry(), watch or Silent()).record

    return answer


def the_same(record, other):
    """Everything but times, ids and where examples lie."""
    rows, others = ([{k: v for k, v in r.items() if k != "seconds"} for r in x["attacks"]] for x in (record, other))
    assert rows == others
    for key in ("worst_case", "natural", "diagnosis", "cost"):
        assert record[key] == other[key]
    assert record["examples"]["sha256"] == other["examples"]["sha256"]
    search = [x["provenance"]["search"] for x in (record, other)]
    assert search[0] == search[1]


# -- the cut ----------------------------------------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 64), st.integers(1, 4))
def test_shards_are_whole_chunks_in_order(n, chunk, size, together):
    before = arena.points.SHARD
    arena.points.SHARD = size
    try:
        rows = torch.randperm(n)
        cut, alone = shards(rows, chunk, together), shards(rows, chunk)
    finally:
        arena.points.SHARD = before
    assert torch.equal(torch.cat([s.rows for s in cut]), rows)
    assert [s.number for s in cut] == [*range(0, len(alone), together)]
    assert all(len(s) % chunk == 0 for s in cut[:-1])
    assert all(len(s) <= max(size, chunk) * together for s in cut)
    assert [s.before for s in cut] == [sum(map(len, cut[:k])) for k in range(len(cut))]
    kept = [(suffix, s.rows[span].tolist()) for s in cut for suffix, span in s.parts]
    assert kept == [(suffix, s.rows[span].tolist()) for s in alone for suffix, span in s.parts]
    assert len({suffix for suffix, _ in kept}) == len(kept) == len(alone)
    assert kept[0][0] == ""  # what an earlier version left of a match goes on


def test_pictures_become_floats_only_where_they_are_asked_for():
    images = digits()
    index = images.subset(50)
    pool = Pool.of(images, index, "cpu")
    assert pool.x.stored.data_ptr() == images.x_test.data_ptr()
    whole = to_float(images.x_test[index])
    assert torch.equal(pool.x[10:20], whole[10:20])
    rows = torch.tensor([3, 40, 7])
    some = pool.take(rows)
    assert torch.equal(some.x, whole[rows])
    assert torch.equal(some.y, images.y_test[index[rows]])
    assert torch.equal(some.index, index[rows])


# -- whole matches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_match_in_shards_is_the_same_match(ask, precision):
    vs = VS if precision == "fp32" else ("pgd(steps=6)", "square(queries=40)")
    whole = ask("whole", 1024, vs, precision=precision)
    cut = ask("cut", vs=vs, precision=precision)
    assert all(r["status"] == "ok" and r["attempted"] > SHARD for r in whole["attacks"])
    assert 20 < sum(whole["worst_case"]["broken_by"].values()) < 80
    the_same(whole, cut)
    outcomes = open_store().outcomes(cut["id"])
    index = read_examples(home() / cut["examples"]["file"])[1]
    assert {i for i, b in zip(outcomes.index, outcomes.broken, strict=True) if b} == set(index.tolist())


def test_nothing_ever_holds_the_floats_of_more_than_a_shard(ask, monkeypatch):
    """Attack, referee, diagnosis and audit get no more rows at a time than a shard or a batch has."""
    most: dict[str, int] = {}

    def saw(what, x):
        most[what] = max(most.get(what, 0), len(x))

    def watched(owner, name, place):
        inner = getattr(owner, name)

        def outer(*args, **keywords):
            saw(name, args[place])
            return inner(*args, **keywords)

        monkeypatch.setattr(owner, name, outer)

    watched(arena.ground, "run_iterated", 2)
    watched(Referee, "score", 1)
    watched(Referee, "judge", 1)
    empty = Outcome.empty
    monkeypatch.setattr(Outcome, "empty", classmethod(lambda _, x: [saw("empty", x), empty(x)][1]))
    monkeypatch.setattr("arena.points.to_float", lambda x: [saw("to_float", x), to_float(x)][1])
    monkeypatch.setattr("arena.search.SIZES", (SHARD,))
    vs = ("pgd(steps=6)", "square(queries=40)")
    ask("cut", vs=vs)
    assert most.pop("to_float") == PROBE  # the first few, for the check of the defense
    assert most == {"run_iterated": SHARD, "score": SHARD, "judge": SHARD, "empty": SHARD}
    ask("audited", vs=vs, audit="normal")
    assert most.pop("to_float") == most["judge"] == SAMPLE < N  # the audit looks at the first few too


def test_verification_agrees_shard_by_shard(ask, tmp_path, monkeypatch):
    record = ask("cut", vs=("pgd(steps=6)",))
    rows = []
    judge = Referee.judge
    monkeypatch.setattr(Referee, "judge", lambda self, x, *rest: [rows.append(len(x)), judge(self, x, *rest)][1])
    found = verify(record["id"], registry(), Silent(), against=f"{tmp_path / 'mine.py'}:factory")
    assert found.agrees, found.lines
    assert found.confirmed == sum(record["worst_case"]["broken_by"].values()) == sum(rows)
    assert max(rows) == SHARD < sum(rows)


def test_a_match_killed_in_its_second_shard_goes_on_to_the_same_end(ask, monkeypatch):
    """The first shard is not attacked again, the second not from its start."""
    vs = ("pgd(steps=6)", "apgd_ce(steps=5)", "foolbox:LinfPGD(steps=4)")
    whole = ask("whole", vs=vs)

    class Killed(BaseException):
        pass

    monkeypatch.setattr("arena.journal.AttackKeeper.due", lambda _: True)
    made: list[str] = []
    snapshot = AttackKeeper.snapshot

    def kept(self, state, moved):
        snapshot(self, state, moved)
        made.append(self.name)
        if "-0001" in self.name and sum(name == self.name for name in made) == 3:
            raise Killed

    monkeypatch.setattr(AttackKeeper, "snapshot", kept)
    with pytest.raises(Killed):
        ask("killed", vs=vs)
    assert len(set(made)) == 2  # two shards of the first attack
    left = {p.name.partition(".")[0] for p in home().rglob("journal/*/*") if ".rows-" in p.name or ".state" in p.name}
    assert left == set(made)
    monkeypatch.setattr(AttackKeeper, "snapshot", snapshot)
    spent: list[int] = []
    passed = arena.ground.run_iterated

    def counted(attack, target, *rest, **keywords):
        before = target.meter.forwards
        outcome = passed(attack, target, *rest, **keywords)
        spent.append(target.meter.forwards - before)
        return outcome

    monkeypatch.setattr(arena.ground, "run_iterated", counted)
    the_same(ask("killed", vs=vs), whole)
    assert spent[0] == 0 < spent[1] < spent[2]
    assert not any((home() / "journal").iterdir())


def test_a_time_limit_stops_shard_by_shard_and_they_go_on(ask, monkeypatch):
    vs = ("pgd(steps=6)", "foolbox:LinfPGD(steps=4)")
    whole = ask("whole", vs=vs)
    # A clock that moves with each look at it.
    monkeypatch.setattr("arena.playing.Limit", lambda _: Limit(9, partial(next, itertools.count())))
    stopped = []
    while (record := ask("stopped", vs=vs))["stopped"]:
        stopped.append(record["attacks"][0]["attempted"])
        assert len(stopped) < 200
    assert stopped == sorted(stopped)
    assert any(0 < done < whole["attacks"][0]["attempted"] for done in stopped)
    the_same(record, whole)


def test_a_crash_in_a_shard_ends_the_attack_and_its_breaks_count(ask, monkeypatch):
    whole = ask("whole", vs=("pgd(steps=6)", "square(queries=40)"))
    calls = []
    run = arena.ground.run_iterated

    def crashing(*args, **keywords):
        calls.append(args)
        outcome = run(*args, **keywords)
        if len(calls) == 2:
            outcome.error, outcome.trace = "RuntimeError: planted", "planted"
        return outcome

    monkeypatch.setattr(arena.ground, "run_iterated", crashing)
    record = ask("crashed", vs=("pgd(steps=6)", "square(queries=40)"))
    pgd, square = record["attacks"]
    assert (pgd["status"], pgd["error"], pgd["attempted"]) == ("failed", "RuntimeError: planted", 2 * SHARD)
    assert 0 < pgd["broken"] < whole["attacks"][0]["broken"]
    assert record["worst_case"]["broken_by"]["pgd(steps=6)"] == pgd["broken"]
    assert square["status"] == "ok"
    assert square["attempted"] == whole["attacks"][1]["attempted"]


def test_a_random_model_plays_in_shards_and_again_the_same(ask, tmp_path):
    (tmp_path / "s.toml").write_text("random = true\n")
    asked = {"vs": ("pgd(steps=3)",), "factory": "noisy", "surface": tmp_path / "s.toml", "n": 40}
    first, second = ask("first", **asked), ask("second", **asked)
    assert first["attacks"][0]["forwards"] > 0
    the_same(first, second)


def test_progress_runs_once_over_all_shards(ask):
    told: list[tuple] = []

    class Listening(Silent):
        def phase(self, name, total, unit):
            told.append(("phase", name, total, unit))

        def advance(self, done, note=""):
            told.append(("advance", done, note))

    monkey = pytest.MonkeyPatch()
    monkey.setattr("arena.engine.TELL_EVERY", -1)
    try:
        record = ask("cut", vs=("pgd(steps=6)", "foolbox:LinfPGD(steps=4)"), watch=Listening())
    finally:
        monkey.undo()
    pgd, foolbox = record["attacks"]
    phases = [t for t in told if t[0] == "phase"]
    names = [t[1] for t in phases]
    assert names.count("pgd(steps=6)") == names.count("foolbox:LinfPGD(steps=4)") == 1
    total = next(t[2] for t in phases if t[1] == "pgd(steps=6)")
    start = told.index(next(t for t in told if t[1] == "pgd(steps=6)"))
    end = told.index(next(t for t in told if t[1] == "foolbox:LinfPGD(steps=4)"))
    done = [t[1] for t in told[start + 1 : end] if t[0] == "advance"]
    assert done == sorted(done)
    assert done[-1] == total
    assert told[end - 1][2] == f"{pgd['attempted']} of {pgd['attempted']} points done"
    assert [t[1] for t in told[end + 1 :] if t[0] == "advance"][-1] == foolbox["attempted"]


def test_the_hash_of_a_data_set_is_that_of_its_pixels():
    """It is made without a copy of them; one that came with another layout has the same."""
    images = digits()
    turned = images.x_test.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    assert not turned.is_contiguous() or turned.shape[1] == 1
    other = Images("digits", images.x_train, images.y_train, turned, images.y_test, 10)
    assert other.sha256 == images.sha256
