"""Workers as real processes: killed, interrupted and left alone they lose nothing and leave nothing behind."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from arena import attacker
from arena.workers import processes
from arena.workers.messages import Kept

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "cheats"))
sys.path.insert(0, str(Path(__file__).parent))
from asking import ask
from records import TWO, same


def test_a_process_killed_in_the_middle_changes_nothing(registry, monkeypatch):
    vs = ("square(queries=400)", "pgd", "foolbox:LinfPGD(steps=5)")
    alone = ask(registry, vs=vs, n=150).record
    monkeypatch.setattr(attacker, "EVERY", 0.05)
    kept, killed, real = [], [], processes.Processes.receive

    def receive(self, timeout):
        said = real(self, timeout)
        messages = [pickle.loads(message) for _, message in said if isinstance(message, bytes)]
        kept.extend(m for m in messages if isinstance(m, Kept))
        if len(kept) > 1 and not killed:
            killed.append(self)
            os.kill(self.processes()[0], signal.SIGKILL)
        return said

    monkeypatch.setattr(processes.Processes, "receive", receive)
    shared = ask(registry, vs=vs, n=150, running=dataclasses.replace(TWO, replay=True)).record
    assert same(shared) == same(alone)
    assert shared["provenance"]["crew"]["engine"] == "local"
    assert shared["provenance"]["crew"]["lost"] == 1
    assert killed[0].processes() == []


MODEL = (Path(__file__).parents[1] / "means.py").read_text()


@pytest.fixture
def arena(tmp_path):
    """Return a function that starts a match of a model of the user's own as a process."""
    (tmp_path / "mine.py").write_text(MODEL)

    def start(home: str, *more: str, vs: str = "pgd(steps=1500)") -> subprocess.Popen:
        command = [sys.executable, "-m", "arena", "match", f"{tmp_path / 'mine.py'}:factory", "--vs", vs, "-q"]
        command += ["--eps", "0.06", "-n", "150", "--no-audit", "--json", str(tmp_path / f"{home}.json"), *more]
        once = {"ARENA_HOME": str(tmp_path / home), "ARENA_SNAPSHOT_SECONDS": "0.1", "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command,
            env={**os.environ, **once},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def children(process: subprocess.Popen) -> list[int]:
    """Return the process ids of what a process started."""
    found = []
    for task in Path(f"/proc/{process.pid}/task").glob("*/children"):
        found += [int(word) for word in task.read_text().split()]
    return found


def begun(home: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    """Wait until the journal of a match holds a snapshot."""
    deadline = time.monotonic() + seconds
    while process.poll() is None and not [*home.glob("journal/*/*.state.npz")] and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None


def gone(numbers: list[int], seconds: float = 30) -> bool:
    """Wait until no process of these is left, dead ones that nobody has asked for aside."""

    def alive(number: int) -> bool:
        try:
            return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    deadline = time.monotonic() + seconds
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(map(alive, numbers))


needs_proc = pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks into /proc")


@needs_proc
def test_a_killed_match_leaves_no_process_and_goes_on_without_workers(arena, tmp_path):
    whole = arena("whole")
    assert whole.wait(300) == 0, whole.stderr.read()
    process = arena("killed", "--devices", "cpu,cpu")
    begun(tmp_path / "killed", process)
    workers = children(process)
    assert len(workers) >= 2
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert gone(workers)
    assert process.stderr.read() == ""
    again = arena("killed")
    assert again.wait(300) == 0, again.stderr.read()
    records = [json.loads((tmp_path / f"{home}.json").read_text()) for home in ("whole", "killed")]
    assert same(records[0]) == same(records[1])


DEAF = """
import re
from pathlib import Path
from arena.workers.processes import Processes

if __name__ == "__main__":
    staff = Processes(["cpu", "cpu"])
    staff.begin(b"")
    staff.hire(), staff.hire()
    for number in staff.processes():
        blocked = re.search(r"SigBlk:\\s*(\\w+)", Path(f"/proc/{number}/status").read_text())[1]
        print(int(blocked, 16) >> 1 & 1)
    staff.close()
"""


@needs_proc
def test_no_worker_hears_an_interrupt_from_its_first_moment_on(tmp_path):
    """In a process of its own: the first worker ever is the one that once did."""
    (tmp_path / "deaf.py").write_text(DEAF)
    done = subprocess.run([sys.executable, tmp_path / "deaf.py"], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["1", "1"], done.stderr


@needs_proc
def test_an_interrupt_ends_workers_after_a_snapshot(arena, tmp_path):
    process = arena("stopped", "--devices", "cpu,cpu", vs="pgd(steps=20000)")
    begun(tmp_path / "stopped", process)
    workers = children(process)
    (snapshot,) = (tmp_path / "stopped").glob("journal/*/*.state.npz")
    before = snapshot.stat().st_mtime_ns
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does it: all of them
    assert process.wait(60) == 3, process.stderr.read()
    assert gone(workers)
    assert process.stderr.read() == "arena: interrupted; the same command continues\n"
    assert snapshot.stat().st_mtime_ns > before


def test_a_worker_leaves_no_semaphore_of_a_progress_bar(monkeypatch):
    tqdm = pytest.importorskip("tqdm").tqdm
    monkeypatch.delattr(tqdm, "_lock", raising=False)
    monkeypatch.setattr("multiprocessing.RLock", lambda: pytest.fail("a semaphore"))
    processes._lock_by_thread()
    assert list(tqdm(range(2), disable=True)) == [0, 1]
    assert isinstance(tqdm.get_lock(), type(threading.RLock()))
    monkeypatch.delattr(tqdm, "_lock")
