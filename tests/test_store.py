"""The store: kept for ever, shared by processes, refused when damaged, foreign or newer."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.errors import ArenaError
from arena.store import SCHEMA, Outcomes, exact, new_id, open_store


@pytest.fixture(autouse=True)
def _fresh_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ARENA_STORE", raising=False)


def record(result: str = "0123456789ab", defense: str = "sat", **asked):
    return {
        "schema": 1,
        "id": result,
        "defense": defense,
        "asked": {
            "dataset": "digits",
            "data_sha256": "d" * 64,
            "indices_sha256": "i" * 64,
            "threat": {"norm": "Linf", "eps": asked.pop("eps", "0.2"), "eps_value": 0.2},
            "n": asked.pop("n", 4),
            **asked,
        },
        "model": {"id": asked.get("model", "m" * 64)},
        "provenance": {"started": "2026-01-02T03:04:05Z"},
    }


FOUR = Outcomes.of([7, 3, 9, 1], [True, True, False, True], [False, True, True, False])


def test_outcomes_keep_broken_inside_natural():
    assert FOUR.broken == (False, True, False, False)
    assert FOUR.survived == (True, False, False, True)
    with pytest.raises(ValueError, match="2 indices, 1 natural"):
        Outcomes.of([1, 2], [True], [True])


def test_outcomes_take_tensors():
    torch = pytest.importorskip("torch")
    made = Outcomes.of(torch.tensor([7, 3]), torch.tensor([True, True]), torch.tensor([False, True]))
    assert made == Outcomes((7, 3), (True, True), (False, True))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.booleans(), st.booleans())))
def test_outcomes_survive_their_text(points):
    index, natural, broken = ([p[i] for p in points] for i in range(3))
    made = Outcomes.of(index, natural, broken)
    assert Outcomes.parse(made.dump()) == made


def test_what_is_put_comes_back():
    with open_store() as store:
        assert store.answer("q") is None
        store.put("q", record(), FOUR)
    with open_store() as store:
        assert store.answer("q") == record()
        assert store.get("0123456789ab") == record()
        assert store.get("0123") == record()
        assert store.outcomes("0123456789ab") == FOUR


def test_same_id_again_changes_nothing_and_a_replay_answers():
    with open_store() as store:
        store.put("q", record("a" * 12), FOUR)
        store.put("q", record("a" * 12), FOUR)
        assert len(store.all()) == 1
        store.put("q", record("b" * 12, eps="1/5"), FOUR)
        assert store.answer("q")["id"] == "b" * 12
        assert [r["id"] for r in store.all()] == ["a" * 12, "b" * 12]
        with pytest.raises(ArenaError, match="taken by another question"):
            store.put("other", record("a" * 12), FOUR)


def test_new_ids_are_twelve_hex_digits():
    assert len({new_id() for _ in range(100)}) == 100
    assert all(len(i) == 12 and int(i, 16) >= 0 for i in [new_id()])
    with open_store() as store, pytest.raises(ValueError, match="12 hexadecimal"):
        store.put("q", record("nonsense"), FOUR)


def test_get_names_the_nearest_and_says_ambiguous():
    with open_store() as store:
        with pytest.raises(ArenaError, match=r"unknown result 'abc'; the store is empty"):
            store.get("abc")
        store.put("q", record("abcdef012345"), FOUR)
        store.put("q", record("abcdef999999"), FOUR)
        with pytest.raises(ArenaError, match=r"'abcdef' is ambiguous: abcdef012345, abcdef999999"):
            store.get("abcdef")
        with pytest.raises(ArenaError, match=r"unknown result 'abcdef012346'; did you mean abcdef012345\?"):
            store.get("abcdef012346")
        assert store.get("ABCDEF0")["id"] == "abcdef012345"


def test_filters_compare_radii_exactly():
    with open_store() as store:
        store.put("q1", record("1" * 12, eps="0.2"), FOUR)
        store.put("q2", record("2" * 12, eps="1/5", defense="rt"), FOUR)
        store.put("q3", record("3" * 12, eps="8/255", n=100), FOUR)
        assert [r["id"][0] for r in store.all(eps="0.20")] == ["1", "2"]
        assert [r["id"][0] for r in store.all(eps="0.2", defense="rt")] == ["2"]
        assert store.latest(n=100)["id"] == "3" * 12
        assert store.latest(n=101) is None


def test_exact_radii():
    assert exact("16/510") == exact("8/255") == "8/255"
    with pytest.raises(ArenaError, match="eps 'big'"):
        exact("big")


def test_schema_is_stamped_and_wal_is_on(tmp_path):
    open_store().close()
    with sqlite3.connect(tmp_path / "home" / "arena.db") as db:
        assert db.execute("SELECT value FROM meta WHERE key = 'schema'").fetchone() == (str(SCHEMA),)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_newer_store_is_refused(tmp_path):
    open_store().close()
    with sqlite3.connect(tmp_path / "home" / "arena.db") as db:
        db.execute("UPDATE meta SET value = '99'")
    with pytest.raises(ArenaError, match=r"arena\.db has schema 99, this arena knows 1: upgrade") as caught:
        open_store()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"not a database at all", b"SQLite format 3\0" + bytes(200), b"\x89PNG\r\n" * 99])
def test_a_damaged_file_is_named_and_left_alone(tmp_path, content):
    place = tmp_path / "home" / "arena.db"
    place.parent.mkdir()
    place.write_bytes(content)
    with pytest.raises(ArenaError, match=r"arena\.db is damaged") as caught:
        open_store()
    assert "\n" not in str(caught.value)
    assert place.read_bytes() == content


def test_damage_inside_is_named_and_never_overwritten(tmp_path):
    with open_store() as store:
        for i in range(60):
            store.put("q", record(f"{i:012x}", note="x" * 3000), FOUR)
    place = tmp_path / "home" / "arena.db"
    with sqlite3.connect(place) as db:
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    good = place.read_bytes()
    noise = random.Random(0)
    place.write_bytes(good[:8192] + noise.randbytes(len(good) - 8192))
    bad = place.read_bytes()
    with pytest.raises(ArenaError, match=r"arena\.db") as caught, open_store() as store:
        store.all()
    assert "\n" not in str(caught.value)
    assert place.read_bytes() == bad


def test_another_programs_database_is_refused(tmp_path):
    place = tmp_path / "home" / "arena.db"
    place.parent.mkdir()
    with sqlite3.connect(place) as db:
        db.execute("CREATE TABLE bookmarks (url TEXT)")
    with pytest.raises(ArenaError, match="database of something else"):
        open_store()
    with sqlite3.connect(place) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("bookmarks",)]


def test_a_folder_in_place_of_the_store(tmp_path):
    (tmp_path / "home" / "arena.db").mkdir(parents=True)
    with pytest.raises(ArenaError, match="is not a file"):
        open_store()


def test_store_by_url(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_STORE", f"sqlite:///{tmp_path / 'else.db'}")
    with open_store() as store:
        store.put("q", record(), FOUR)
    assert (tmp_path / "else.db").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://someone:s3cret@127.0.0.1:1/board",
        "postgresql://someone:s3cret@127.0.0.1:1/board?password=s3cret",
        "://someone:s3cret@x",
        "mysql://someone:s3cret@x/y",
        "postgresql://someone:s3cret@127.0.0.1:port/board",
    ],
)
def test_credentials_are_never_shown(monkeypatch, url):
    monkeypatch.setenv("ARENA_STORE", url)
    with pytest.raises(ArenaError) as caught:
        open_store()
    assert "s3cret" not in str(caught.value)
    assert "someone" not in str(caught.value)
    assert "\n" not in str(caught.value)


WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_store import FOUR, record
from arena.store import open_store
start, count = int(sys.argv[1]), int(sys.argv[2])
for i in range(start, start + count):
    with open_store() as store:
        store.put(f"q{i}", record(f"{i:012x}", note="x" * 20000), FOUR)
    print(i, flush=True)
"""


def write(start: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(start), str(count), os.path.dirname(__file__)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_processes_that_begin_and_write_together_lose_nothing():
    writers = [write(1000 * k, 12) for k in range(4)]
    assert [w.wait(120) for w in writers] == [0] * 4
    with open_store() as store:
        assert {int(r["id"], 16) for r in store.all()} == {1000 * k + i for k in range(4) for i in range(12)}


def test_kill_while_writing_leaves_a_readable_store():
    told: list[int] = []
    for round_number in range(3):
        writer = write(1000 * round_number, 10**6)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.1 + 0.07 * round_number)
        writer.send_signal(signal.SIGKILL)
        told += [1000 * round_number, *(int(line) for line in writer.stdout if line.endswith("\n"))]
        writer.wait()
        with open_store() as store:
            kept = {int(r["id"], 16) for r in store.all()}
            assert set(told) <= kept
            store.put("after", record(f"{10**9 + round_number:012x}"), FOUR)
    with open_store() as store:
        assert json.dumps(store.answer("after"))
