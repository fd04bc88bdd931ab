"""Several workers give the outcomes of one process, whatever becomes of them."""

from __future__ import annotations

import dataclasses
import pickle
import queue
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arena import attacker, ground
from arena.compiling import Compiled
from arena.errors import ArenaError
from arena.pace import Pace
from arena.workers import crew as crews
from arena.workers import staff
from arena.workers.actors import plan
from arena.workers.messages import Done, Job, Kept, Lost, Order, Ready, versions
from arena.workers.task import FEWEST, Task, cuts
from arena.workers.worker import Desk

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "cheats"))
sys.path.insert(0, str(Path(__file__).parent))
from asking import GO, ask, flags
from records import TWO, same


class Threads:
    """Workers as threads of this process: quick to start, and lost when the test says so."""

    engine = "threads"

    def __init__(self, size: int = 2, lose=lambda worker, message: False) -> None:
        self.size, self.lose, self.count = size, lose, 0
        self.desks: dict[int, Desk] = {}
        self.said: queue.SimpleQueue = queue.SimpleQueue()
        self.sent: list[object] = []

    def begin(self, order: bytes) -> None:
        self.order = order

    def hire(self) -> int:
        self.count += 1
        number = self.count
        self.desks[number] = Desk(self.order, "cpu", lambda message: self.said.put((number, message)))
        threading.Thread(target=self.desks[number].serve, daemon=True).start()
        return number

    def send(self, worker: int, message: bytes) -> None:
        self.sent.append(pickle.loads(message))
        if worker in self.desks:
            self.desks[worker].put(message)

    def receive(self, timeout: float):
        try:
            worker, message = self.said.get(timeout=timeout)
        except queue.Empty:
            return []
        if worker not in self.desks:
            return []
        if self.lose(worker, pickle.loads(message)):
            del self.desks[worker]
            return [(worker, Lost("it fell asleep"))]
        return [(worker, message)]

    def close(self) -> None: ...


@pytest.fixture
def hired(monkeypatch):
    """Return a function that puts a staff in the place of the processes."""

    def use(made):
        monkeypatch.setattr(staff, "_staff", lambda running: made if len(running.devices) > 1 else None)
        return made

    return use


@given(st.integers(0, 3000), st.integers(1, 9), st.integers(1, 1024), st.sampled_from([1, 8, 12, 128]))
def test_cuts_cover_all_rows_once_and_all_but_the_last_are_whole_batches_and_chunks(n, workers, batch, chunk):
    spans = cuts(n, workers, batch, chunk)
    assert [k for s in spans for k in range(s.start, s.stop)] == list(range(n))
    for s in spans[:-1]:
        assert (s.stop - s.start) % 8 == (s.stop - s.start) % chunk == 0
        assert s.stop - s.start >= FEWEST
    assert len(spans) <= 4 * workers


def test_a_piece_is_not_smaller_than_a_batch_unless_workers_would_have_nothing():
    assert [s.stop - s.start for s in cuts(1024, 2, 512)] == [512, 512]
    assert [s.stop - s.start for s in cuts(1024, 2, 128)] == [128] * 8
    assert [s.stop - s.start for s in cuts(500, 2, 496)] == [256, 244]


MANY = ("pgd", "square(queries=60)", "apgd_t(steps=5)", "foolbox:LinfPGD(steps=5)", "crashes_midway", "exits")


def test_the_record_is_that_of_one_process(registry, hired, monkeypatch):
    # wrapped libraries draw from the process's generators, of which each worker has its own, but threads share one
    lock, real = threading.Lock(), ground.run_plain

    def one_by_one(*given):
        with lock:
            return real(*given)

    monkeypatch.setattr(ground, "run_plain", one_by_one)
    alone = ask(registry, vs=MANY, n=150).record
    made = hired(Threads(3))
    shared = ask(registry, vs=MANY, n=150, running=dataclasses.replace(TWO, replay=True)).record
    assert same(shared) == same(alone)
    assert [row["status"] for row in alone["attacks"]] == ["ok"] * 4 + ["failed"] * 2
    assert "planted" in shared["attacks"][4]["trace"]
    assert shared["provenance"]["crew"]["lost"] == 0
    assert len(shared["provenance"]["crew"]["workers"]) == 3
    assert ask(registry, vs=MANY, n=150, running=TWO).record["id"] == shared["id"]  # the same question
    jobs = [j for j in made.sent if isinstance(j, Job)]
    assert len({j.number for j in jobs if j.planned.name == "pgd"}) == 3


def test_a_lost_worker_s_points_go_on_from_its_snapshot(registry, hired, monkeypatch):
    alone = ask(registry, vs=("square(queries=200)", "pgd"), n=150).record
    monkeypatch.setattr(attacker, "EVERY", 0.0)  # a snapshot after each step
    kept = []

    def lose(worker, message):
        kept.append(isinstance(message, Kept))
        return kept[-1] and sum(kept) in (20, 40)

    made = hired(Threads(2, lose))
    shared = ask(
        registry, vs=("square(queries=200)", "pgd"), n=150, running=dataclasses.replace(TWO, replay=True)
    ).record
    assert same(shared) == same(alone)
    assert shared["provenance"]["crew"]["lost"] >= 2
    again = [j for j in made.sent if isinstance(j, Job) and j.number > 2 and j.planned.name.startswith("square")]
    assert any(j.state is not None and j.state["_forwards"].max() > 1 for j in again)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_workers_play_several_shards_at_a_time_and_one_process_goes_on_with_each(
    registry, hired, monkeypatch, precision
):
    monkeypatch.setattr("arena.points.SHARD", 64)
    go = dataclasses.replace(GO, precision=precision)
    vs = ("square(queries=300)", "pgd")
    alone = ask(registry, vs=vs, n=300, running=go).record
    hired(Threads(3))
    two = dataclasses.replace(go, devices=TWO.devices, replay=True)
    assert same(ask(registry, vs=vs, n=300, running=two).record) == same(alone)
    stopped = ask(registry, vs=vs, n=300, running=dataclasses.replace(two, time_limit=1e-3)).record
    assert 0 < stopped["attacks"][0]["forwards"] < alone["attacks"][0]["forwards"] or stopped["stopped"]
    record = ask(registry, vs=vs, n=300, running=dataclasses.replace(go, replay=True)).record
    assert same(record) == same(alone)


def test_work_that_workers_are_lost_over_again_and_again_fails_by_name(registry, hired):
    hired(Threads(2, lambda worker, message: isinstance(message, Done)))
    record = ask(registry, vs=("pgd", "square(queries=20)"), running=TWO).record
    assert [row["status"] for row in record["attacks"]] == ["failed", "failed"]
    assert record["attacks"][0]["error"] == "3 workers were lost at it: it fell asleep"
    assert record["provenance"]["crew"]["lost"] == 6


def test_workers_that_never_begin_end_the_match(registry, hired):
    hired(Threads(2, lambda worker, message: isinstance(message, Ready)))
    with pytest.raises(ArenaError, match=r"^\d workers in a row were lost before they began: it fell asleep"):
        ask(registry, running=TWO)


def test_workers_that_are_lost_and_cannot_be_replaced_fail_what_is_left(registry, hired):
    """The first two begin; one is lost at its first job, then the other; those after them never begin."""
    hired(Threads(2, lambda worker, message: isinstance(message, Done) or (worker > 2 and isinstance(message, Ready))))
    record = ask(registry, vs=("pgd", "square(queries=20)"), n=100, running=TWO).record
    assert [row["status"] for row in record["attacks"]] == ["failed", "failed"]
    assert "workers in a row were lost before they began: it fell asleep" in record["attacks"][1]["error"]
    assert record["audit"]["verdict"] != "clear"


def test_a_worker_of_another_version_is_refused(registry, hired, monkeypatch):
    hired(Threads(2))
    real = versions()
    monkeypatch.setattr(crews, "versions", lambda: {**real, "torch": "0.1"})
    with pytest.raises(ArenaError, match=rf"a worker runs torch {real['torch'].replace('+', '.')}, this process 0.1"):
        ask(registry, running=TWO)


def test_workers_attack_by_compiled_passes_where_the_match_could_compile(registry, hired, monkeypatch):
    rows, made, why = [], [], [""]

    class Counting(Compiled):
        def __init__(self, reader):
            self.reader, self.given_up = reader, ""

        def __call__(self, x):
            rows.append(len(x))
            return self.reader(x)

    def compile_passes(target, x):
        made.append(target)
        target.compiled = None if why[0] else Counting(target.reader)
        return why[0]

    monkeypatch.setattr("arena.search.compile_passes", compile_passes)
    monkeypatch.setattr("arena.search.uneven", lambda *_: "")
    monkeypatch.setattr("arena.search.measure", lambda *_: Pace(32, 1e-4, 2e-4))
    hired(Threads(2))
    compiling = dataclasses.replace(TWO, compile=True, replay=True)
    record = ask(registry, vs=("square(queries=50)",), running=compiling).record
    assert len(made) == 3  # the match's own copy, and one a worker
    assert record["provenance"]["search"]["compiled"]
    assert sum(rows) >= record["attacks"][0]["forwards"] > 1000  # all the attack's, padded
    rows.clear()
    assert ask(registry, vs=("foolbox:LinfPGD(steps=3)",), running=compiling).record["attacks"][0]["forwards"]
    assert rows == []  # a wrapped library's are eager
    why[0] = "it minds"
    made.clear()
    ask(registry, running=compiling)
    assert len(made) == 1  # what the match's own copy cannot, theirs are not asked to


def test_a_worker_that_cannot_compile_as_the_match_did_is_refused(registry, hired, monkeypatch):
    made = []
    monkeypatch.setattr(
        "arena.search.compile_passes", lambda target, x: "no compiler here" if made.append(target) or made[1:] else ""
    )
    monkeypatch.setattr("arena.search.uneven", lambda *_: "")
    hired(Threads(2))
    with pytest.raises(
        ArenaError, match="cannot compile its passes as this process did: not compiled: no compiler here"
    ):
        ask(registry, running=dataclasses.replace(TWO, compile=True))


def test_what_cannot_be_sent_is_said():
    model = SimpleNamespace(name="mine.py:factory", readout=lambda model, x: {})
    order = Order(model, None, None, 32, "fp32", False, None, (0, 0), 1.0, 1)
    with pytest.raises(ArenaError, match=r"^'mine.py:factory' cannot be sent to other processes: "):
        crews.Crew(Threads()).begin(order)


def test_what_changes_a_worker_s_model_is_named(registry, hired):
    hired(Threads(2))
    record = ask(registry, vs=("edits_weights", "pgd"), running=TWO).record
    row, after = record["attacks"]
    assert (row["status"], after["status"]) == ("failed", "ok")
    assert row["error"].startswith("the attack changed the model: ")
    record = ask(registry, "changes_late", vs=("square(queries=50)",), running=TWO).record
    assert "defense_changes" in flags(record)


def test_a_time_limit_stops_workers_and_the_match_goes_on_without_them(registry, hired):
    vs = ("square(queries=2000)", "pgd")
    alone = ask(registry, vs=vs, n=100).record
    hired(Threads(2))
    limited = dataclasses.replace(TWO, replay=True, time_limit=1e-3)
    stopped = ask(registry, vs=vs, n=100, running=limited).record
    assert stopped["stopped"]
    assert stopped["attacks"][0]["status"] == "partial"
    record = ask(registry, vs=vs, n=100, running=dataclasses.replace(GO, replay=True)).record
    assert same(record) == same(alone)


def test_a_random_model_is_attacked_in_one_process(registry, hired, tmp_path):
    made = hired(Threads(2))
    surface = tmp_path / "surface.toml"
    surface.write_text("random = true\n")
    record = ask(registry, surface=surface, running=TWO).record
    assert record["provenance"]["crew"] is None
    assert made.count == 0


class Kept0:
    """A keeper with a snapshot from an earlier run, of the points 100 to 299."""

    def restore(self):
        row = (torch.zeros(1, 2, 2), 1, 0, -1, 0)
        return {7: row}, {"index": torch.arange(100, 300), "z": torch.arange(200)}, True

    def snapshot(self, state, moved):
        self.state, self.moved = state, moved


def test_a_snapshot_is_parted_among_pieces_and_joined_again():
    keeper, planned = Kept0(), SimpleNamespace(spec=SimpleNamespace(spec=SimpleNamespace(run=None, chunk=128)))
    task = Task(planned, torch.zeros(400, 1, 2, 2), torch.zeros(400), torch.arange(400), keeper, 5)
    task.cut(3, 64)
    assert 7 not in torch.cat([p.places for p in task.pieces])
    assert sum(len(p.places) for p in task.pieces) == 399
    for piece in task.pieces:
        if piece.state is not None:
            assert set(piece.state["index"].tolist()) <= set(piece.places.tolist())
            assert (piece.state["z"] == piece.state["index"] - 100).all()
    task.snapshot()
    assert keeper.state["index"].tolist() == list(range(100, 300))
    assert keeper.state["z"].tolist() == list(range(200))
    assert keeper.moved
    assert task.progress == (5, 1)


@pytest.mark.parametrize(
    ("resources", "workers", "device", "found"),
    [
        ({"CPU": 8.0}, None, "auto", (False, 8)),
        ({"CPU": 8.0, "GPU": 2.0}, None, "auto", (True, 2)),
        ({"CPU": 8.0, "GPU": 2.0}, 1, "auto", (True, 1)),
        ({"CPU": 8.0, "GPU": 2.0}, 3, "cpu", (False, 3)),
        ({"CPU": 1.0, "GPU": 2.0}, None, "cuda", (True, 1)),
        ({"CPU": 8.0}, None, "cuda", "--engine ray --device cuda: the cluster has 0 GPUs and 8 CPUs"),
        ({"CPU": 2.0}, 3, "auto", "--engine ray: 3 workers need a CPU each, the cluster has 0 GPUs and 2 CPUs"),
        ({"CPU": 9.0, "GPU": 1.0}, 2, "auto", "--engine ray: 2 workers need a GPU and a CPU each, the cluster has 1 "),
        ({}, None, "auto", "--engine ray: 1 workers need a CPU each, the cluster has 0 GPUs and 0 CPUs"),
    ],
)
def test_what_a_cluster_has_decides_the_workers_and_what_it_lacks_is_said(resources, workers, device, found):
    if isinstance(found, tuple):
        assert plan(resources, workers, device) == found
    else:
        with pytest.raises(ArenaError) as error:
            plan(resources, workers, device)
        assert str(error.value).startswith(found)


def test_without_ray_one_line_says_how_to_get_it(registry, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ArenaError, match=r"pip install 'adversarial-arena\[ray\]'"):
        ask(registry, running=dataclasses.replace(GO, engine="ray"))
