"""A match killed at any moment goes on with the same command to the same outcome, repeating little."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

MODEL = (
    (Path(__file__).parent / "means.py").read_text()
    + """

class Counting(Means):
    "Every row that passes is written down, so the test can count what was repeated."

    def forward(self, x):
        import os

        with open(os.environ["PASSES"], "ab") as file:
            file.write(len(x).to_bytes(4, "little"))
        return super().forward(x)


def factory():
    return Counting()
"""
)


@pytest.fixture
def arena(tmp_path):
    """Return (start, passes): start the match as a process; count the rows passed so far in a home."""
    (tmp_path / "mine.py").write_text(MODEL)

    def start(home: str) -> subprocess.Popen:
        (tmp_path / home).mkdir(exist_ok=True)
        command = [
            *(sys.executable, "-m", "arena", "match", f"{tmp_path / 'mine.py'}:factory"),
            *(
                "--vs",
                "pgd(steps=40),square(queries=1200),apgd_t,foolbox:LinfPGD(steps=20)",
                "--eps",
                "0.06",
                "-n",
                "200",
            ),
            *("--json", str(tmp_path / f"{home}.json"), "--quiet", "--batch-size", "64"),
        ]
        environment = {
            **os.environ,
            "ARENA_HOME": str(tmp_path / home),
            "PASSES": str(tmp_path / f"{home}.passes"),
            "ARENA_SNAPSHOT_SECONDS": "0.1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def passes(home: str) -> int:
        path = tmp_path / f"{home}.passes"
        return int(np.frombuffer(path.read_bytes(), dtype="<u4").sum()) if path.exists() else 0

    return start, passes


def outcome(tmp_path: Path, home: str) -> tuple[dict, dict[int, bytes]]:
    record = json.loads((tmp_path / f"{home}.json").read_text())
    with np.load(tmp_path / home / record["examples"]["file"], allow_pickle=False) as file:
        return record, {int(i): x.tobytes() for i, x in zip(file["index"], file["x_adv"], strict=True)}


def test_sigkill_at_random_moments_changes_nothing(arena, tmp_path):
    start, passes = arena
    whole = start("whole")
    assert whole.wait(300) == 0, whole.stderr.read().decode()
    expected, examples = outcome(tmp_path, "whole")
    total = passes("whole")

    generator = random.Random(7)
    moments = sorted(generator.uniform(0.05, 0.95) for _ in range(4))
    killed = 0
    for share in moments:
        process = start("killed")
        while process.poll() is None and passes("killed") < share * total:
            time.sleep(0.01)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            killed += 1
        process.wait()
        process.stderr.close()
    last = start("killed")
    assert last.wait(300) == 0, last.stderr.read().decode()
    assert killed >= 3

    got, found = outcome(tmp_path, "killed")
    assert found == examples
    assert got["worst_case"] == expected["worst_case"]
    for row, other in zip(got["attacks"], expected["attacks"], strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}
    # Each start repeats the check and the referee's scoring, and at most what came after the last snapshot. Starting
    # over each time would have cost sum(moments) of the whole again.
    repeated = passes("killed") - total
    assert repeated < 0.5 * sum(moments) * total
    assert not any((tmp_path / "killed" / "journal").iterdir())


def test_an_interrupt_ends_with_code_3_and_goes_on(arena, tmp_path):
    start, passes = arena
    process = start("stopped")
    while process.poll() is None and passes("stopped") < 20_000:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read().decode()
    assert process.wait(60) == 3, said
    assert "Traceback" not in said
    before = passes("stopped")
    again = start("stopped")
    assert again.wait(300) == 0
    assert passes("stopped") > before
    assert json.loads((tmp_path / "stopped.json").read_text())["worst_case"]["robust_accuracy"] is not None
