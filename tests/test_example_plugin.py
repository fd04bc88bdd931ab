"""The example package under plugins/: installed by pip, found, examined, played, all from outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "plugins" / "arena-example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Install a copy (pip writes into the source folder) and return the environment that sees it."""
    copy, target = tmp_path_factory.mktemp("source") / "arena-example", tmp_path_factory.mktemp("site")
    shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--target", str(target), str(copy)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    home = tmp_path_factory.mktemp("home")
    return {**os.environ, "PYTHONPATH": str(target), "ARENA_HOME": str(home), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}


@pytest.fixture
def ask(installed, tmp_path):
    def call(*line: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "arena", *line]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, env=installed, cwd=tmp_path)

    return call


def test_it_is_found_and_sound(ask):
    doctor = ask("plugins", "doctor")
    assert (doctor.returncode, doctor.stdout.splitlines()[-1]) == (0, "nothing is wrong")
    assert "ok      arena-example 0.1.0 (arena-example)" in doctor.stdout
    plugins = " ".join(ask("plugins", "list").stdout.split())
    assert "arena-example 0.1.0 arena-example = arena_example 1 defense, 1 attack" in plugins


def test_it_is_listed_under_its_own_name(ask):
    listed = json.loads(ask("list", "--json").stdout)
    (defense,) = (d for d in listed["defenses"] if d["name"] == "arena-example/recall_rt")
    assert (defense["origin"], defense["twin"]) == ("arena-example 0.1.0", "rt")
    assert defense["exposes"]["heads"] == ["recall"]
    assert "arena-example/flips" in [a["name"] for a in listed["attacks"]]


def test_its_defense_and_attack_play(ask):
    line = ["match", "recall_rt", "--vs", "flips(queries=20),pgd(steps=5,head=recall)", "-n", "16"]
    done = ask(*line, "--json", "-")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["defense"] == "arena-example/recall_rt"
    assert record["model"]["origin"] == "arena-example 0.1.0"
    assert record["natural"]["accuracy"] > 80
    flips, pgd = record["attacks"]
    assert (flips["plugin"], flips["status"], flips["violations"]) == ("arena-example 0.1.0", "ok", {})
    assert flips["broken"] > 0
    assert flips["forwards"] <= 20 * flips["attempted"]
    assert flips["backwards"] == 0
    assert pgd["status"] == "ok"
    verified = ask("verify", record["id"])
    assert verified.returncode == 0, verified.stdout + verified.stderr
    assert f"confirmed: {sum(record['worst_case']['broken_by'].values())} of" in verified.stdout


def test_outcomes_do_not_depend_on_the_batch(ask):
    line = ["match", "recall_rt", "--vs", "flips(queries=20)", "-n", "24", "--json", "-", "--replay", "--batch-size"]
    records = [json.loads(ask(*line, size).stdout) for size in ("8", "24")]
    assert records[0]["examples"]["sha256"] == records[1]["examples"]["sha256"]
    assert records[0]["attacks"][0]["forwards"] == records[1]["attacks"][0]["forwards"]


def test_wrong_options_are_refused(ask):
    done = ask("match", "recall_rt", "--vs", "flips(share=2)")
    assert done.returncode == 2
    assert done.stderr == "arena: error: attack 'flips': option 'share': expected 0 to 1, got '2'\n"
