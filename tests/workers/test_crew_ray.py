"""Actors of a Ray cluster give the outcomes of one process, and one of them may be lost."""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arena import attacker
from arena.errors import ArenaError
from arena.workers import actors
from arena.workers.messages import Kept

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "cheats"))
sys.path.insert(0, str(Path(__file__).parent))
from asking import GO, ask
from records import same

pytestmark = pytest.mark.ray
TWO = dataclasses.replace(GO, engine="ray", workers=2)
VS = ("square(queries=400)", "pgd", "foolbox:LinfPGD(steps=5)", "crashes_midway")


@pytest.fixture(scope="module")
def cluster():
    """A cluster of two CPUs on this machine."""
    ray = pytest.importorskip("ray")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(address="local", num_cpus=2, num_gpus=0, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


def test_two_actors_give_the_record_of_one_process(registry, cluster):
    alone = ask(registry, vs=VS, n=150).record
    shared = ask(registry, vs=VS, n=150, running=dataclasses.replace(TWO, replay=True)).record
    assert same(shared) == same(alone)
    crew = shared["provenance"]["crew"]
    assert (crew["engine"], crew["lost"]) == ("ray", 0)
    assert 1 <= len(crew["workers"]) <= 2  # the second may come when all is done


def test_an_actor_killed_in_the_middle_changes_nothing(registry, cluster, monkeypatch):
    alone = ask(registry, vs=VS, n=150).record
    monkeypatch.setattr(attacker, "EVERY", 0.05)
    kept, killed, real = [], [], actors.Actors.receive

    def receive(self, timeout):
        said = real(self, timeout)
        for worker, message in said:
            if isinstance(message, bytes) and isinstance(pickle.loads(message), Kept):
                kept.append(worker)
        if len(kept) > 1 and not killed:
            killed.append(self.processes()[kept[-1] - 1])
            os.kill(killed[0], signal.SIGKILL)
        return said

    monkeypatch.setattr(actors.Actors, "receive", receive)
    shared = ask(registry, vs=VS, n=150, running=dataclasses.replace(TWO, replay=True)).record
    assert killed
    assert same(shared) == same(alone)
    assert shared["provenance"]["crew"]["lost"] == 1


def test_what_the_cluster_lacks_is_refused_before_anything_is_done(registry, cluster):
    with pytest.raises(ArenaError, match="3 workers need a CPU each, the cluster has 0 GPUs and 2 CPUs"):
        ask(registry, running=dataclasses.replace(TWO, workers=3))
    with pytest.raises(ArenaError, match="--engine ray --device cuda: the cluster has 0 GPUs"):
        ask(registry, running=dataclasses.replace(TWO, devices=("cuda",)))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_match_that_is_ended_leaves_no_process(tmp_path, number):
    """On a cluster of its own, which ends with it."""
    once = {"ARENA_HOME": str(tmp_path / "home"), "ARENA_SNAPSHOT_SECONDS": "0.1", "MARK": str(tmp_path)}
    command = [sys.executable, "-m", "arena", "match", "arena_cheats:honest", "--vs", "pgd(steps=20000)", "-q"]
    cheats = Path(__file__).parents[1] / "packages" / "cheats"
    path = os.pathsep.join(filter(None, [str(cheats), os.environ.get("PYTHONPATH", "")]))
    process = subprocess.Popen(
        [*command, "--eps", "0.05", "-n", "150", "--engine", "ray"],
        env={**os.environ, **once, "PYTHONPATH": path},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while process.poll() is None and not [*tmp_path.glob("home/journal/*/*.npz")] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert process.poll() is None
    assert mine(tmp_path)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
        assert process.wait(90) == 3
        assert process.stderr.read().endswith("arena: interrupted; the same command continues\n")
    else:
        process.send_signal(number)
        process.wait(60)
    while mine(tmp_path) and time.monotonic() < deadline + 60:
        time.sleep(0.2)
    assert mine(tmp_path) == []


def mine(folder: Path) -> list[int]:
    """Return the living processes that have this mark in their environment."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            inside = f"MARK={folder}\0".encode() in (place / "environ").read_bytes()
            if inside and (place / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(place.name))
        except OSError:
            continue
    return found
