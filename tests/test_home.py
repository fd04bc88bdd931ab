"""The arena's folder, atomic files and locks."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arena.errors import ArenaError
from arena.home import atomic_file, atomic_write, home, lock


@pytest.fixture(autouse=True)
def _fresh_home(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "home"))


def test_home_is_made_and_absolute(tmp_path):
    assert home() == tmp_path / "home"
    assert home().is_dir()


def test_home_that_is_a_file_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    for place in ("file", "file/below"):
        monkeypatch.setenv("ARENA_HOME", str(tmp_path / place))
        with pytest.raises(ArenaError, match=r"ARENA_HOME .*file.* is not a folder") as caught:
            home()
        assert "\n" not in str(caught.value)


def test_home_without_permission_is_one_line(tmp_path, monkeypatch):
    closed = tmp_path / "closed"
    closed.mkdir()
    monkeypatch.setenv("ARENA_HOME", str(closed))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(ArenaError, match="cannot be written"):
        home()


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "deep" / "file.bin"
    atomic_write(path, b"one")
    atomic_write(path, b"two")
    assert path.read_bytes() == b"two"
    assert [p.name for p in path.parent.iterdir()] == ["file.bin"]


def test_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ArenaError, match="No space left"):
        atomic_write(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_what_need_not_be_durable_is_atomic_and_waits_for_no_disk(tmp_path, monkeypatch):
    waited = []
    monkeypatch.setattr(os, "fsync", waited.append)
    path = tmp_path / "file"
    atomic_write(path, b"old", durable=False)
    with pytest.raises(TypeError), atomic_file(path, durable=False) as file:
        file.write("no bytes")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert not waited


def test_write_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArenaError, match="cannot be written"):
        atomic_write(tmp_path / "file" / "below", b"x")


HOLDER = """
import sys, time
from arena.home import lock
with lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


def test_lock_is_refused_while_held_and_dies_with_its_process():
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, "question a/b"], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(ArenaError, match="question a/b is in use by another arena process"), lock("question a/b"):
            pass
        with lock("another"):
            pass
    finally:
        holder.kill()
        holder.wait()
    deadline = time.monotonic() + 10
    while True:
        try:
            with lock("question a/b"):
                break
        except ArenaError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_lock_is_free_after_the_block_even_after_an_error():
    with pytest.raises(ValueError, match="boom"), lock("q"):
        raise ValueError("boom")
    with lock("q"):
        assert (Path(home()) / "locks").is_dir()
