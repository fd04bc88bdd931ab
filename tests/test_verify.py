"""Verification: what was kept is scored again; a tampered file, model or record is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from arena.arrangement import arrange
from arena.errors import ArenaError
from arena.examples import read_examples
from arena.match import play
from arena.plugins import discover
from arena.question import Question, Running
from arena.verify import verify
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
import arena_cheats

MODEL = "arena_cheats:honest"


@pytest.fixture
def registry():
    return discover()


@pytest.fixture
def record(registry, arena_home):
    question = Question(MODEL, ("apgd_ce",), n=60, eps="0.08")
    return play(question, Running(device="cpu"), registry, Silent()).record


def again(registry, what, **changes):
    return verify(str(what), registry, Silent(), **{"against": MODEL, **changes})


def test_a_sound_result_is_confirmed(registry, record):
    found = again(registry, record["id"])
    assert found.agrees
    assert found.lines == []
    assert found.claimed == found.confirmed == sum(record["worst_case"]["broken_by"].values()) > 5
    assert found.robust_accuracy == record["worst_case"]["robust_accuracy"]
    assert found.natural == record["natural"]["accuracy"]
    json.dumps(found.record())


def test_a_result_about_a_users_model_is_never_imported_from_the_record(registry, record):
    with pytest.raises(ArenaError, match="--against"):
        verify(record["id"], registry, Silent())


def rewrite(arena_home, record, change):
    path = arena_home / record["examples"]["file"]
    x_adv, index = read_examples(path)
    x_adv, index = change(x_adv[:].numpy(), index.numpy())
    np.savez(path, x_adv=x_adv, index=index)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x, i: (x[1:], i[1:]), "worst case: the result says"),
        (lambda x, i: (1 - x, i), "examples that break the rules"),
        (lambda x, i: (x, i[::-1].copy()), "examples that break the rules"),
    ],
)
def test_tampered_examples_are_noticed(registry, record, arena_home, change, said):
    rewrite(arena_home, record, change)
    found = again(registry, record["id"])
    assert not found.agrees
    assert any("hash differs" in line for line in found.lines)
    assert any(said in line for line in found.lines)


def test_clean_images_are_no_breaks(registry, record, arena_home, tmp_path):
    from arena.datasets import digits, to_float

    index = read_examples(arena_home / record["examples"]["file"])[1]
    clean = to_float(digits().x_test[index]).numpy()
    np.savez(tmp_path / "mine.npz", x_adv=clean, index=index.numpy())
    found = again(registry, tmp_path / "mine.npz", eps="0.08")
    assert found.confirmed == 0
    assert found.refuted + found.borderline == len(index)
    assert not found.agrees


def test_anyones_examples_can_be_handed_in(registry, record, arena_home):
    found = again(registry, arena_home / record["examples"]["file"], eps="0.08")
    assert found.agrees
    assert found.confirmed == found.claimed
    assert not again(registry, arena_home / record["examples"]["file"], eps="0.01").agrees


def test_a_json_result_can_be_verified(registry, record, arena_home, tmp_path):
    path = tmp_path / "result.json"
    path.write_text(json.dumps(record))
    assert again(registry, path).agrees
    record["worst_case"]["robust_accuracy"] += 5
    path.write_text(json.dumps(record))
    assert not again(registry, path).agrees


def test_another_model_is_refused(registry, record):
    with pytest.raises(ArenaError, match="the model at hand is"):
        again(registry, record["id"], against="arena_cheats:probabilities")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>not found</html>", "not a readable npz"),
        ({"x_adv": np.zeros((2, 1, 8, 8), np.float32)}, "lacks index; it holds x_adv"),
        ({"x_adv": np.zeros((2, 64)), "index": np.arange(2)}, r"x_adv is float64 \(2, 64\), expected float32"),
        ({"x_adv": np.zeros((2, 1, 8, 8), np.float32), "index": np.array([5, 5])}, "names a point twice"),
        ({"x_adv": np.zeros((2, 1, 8, 8), np.float32), "index": np.array([5, 9999])}, "index 9999 is no test point"),
        ({"x_adv": np.zeros((2, 1, 8, 9), np.float32), "index": np.array([5, 6])}, r"holds \(1, 8, 9\) images"),
    ],
)
def test_bad_files_get_one_line(registry, arena_home, tmp_path, content, message):
    path = tmp_path / "bad.npz"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        np.savez(path, **content)
    with pytest.raises(ArenaError, match=message) as caught:
        again(registry, path)
    assert "\n" not in str(caught.value)


def test_missing_files_and_results_get_one_line(registry, arena_home, tmp_path):
    for what in (tmp_path / "no.npz", tmp_path / "no.json", "abc"):
        with pytest.raises(ArenaError):
            again(registry, what)


def test_a_fresh_process_loads_no_attack(record):
    """The command line's own way: only what rebuilds the model is loaded."""
    code = (
        "import sys; from arena.cli import run; "
        f"code = run(['verify', {record['id']!r}, '--against', {MODEL!r}, '--quiet']); "
        "assert not [m for m in sys.modules if m.startswith(('arena_attacks', 'foolbox', 'art.'))]; sys.exit(code)"
    )
    path = str(Path(arena_cheats.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "confirmed" in done.stdout


def test_matches_at_other_radii_attack_the_same_model(registry, arena_home):
    """What a recipe trains against belongs to the model; eps and norm of the match do not change it."""
    asked = [Question("sat", ("pgd",), n=8, eps=eps, norm=norm) for norm, eps in ((None, "0.1"), ("L2", "0.5"))]
    models = {arrange(q, Running(), registry).plan.key for q in (Question("sat", ("pgd",), n=8), *asked)}
    assert len(models) == 1
    other = arrange(Question("sat", ("pgd",), n=8, train_eps="0.1"), Running(), registry)
    assert other.plan.key not in models
    assert "--eps 0.1" in other.plan.command


def test_weights_from_a_file_are_asked_for_and_never_read_from_the_record(registry, arena_home, tmp_path):
    from arena.checkpoints import write_weights

    file = tmp_path / "weights.safetensors"
    write_weights(file, arena_cheats.honest().state_dict())
    question = Question(MODEL, ("apgd_ce",), n=30, eps="0.08", checkpoint=file)
    record = play(question, Running(device="cpu"), registry, Silent()).record
    with pytest.raises(ArenaError, match=r"weights came from the file '.*weights.safetensors'; .* --checkpoint FILE"):
        again(registry, record["id"])
    assert again(registry, record["id"], checkpoint=file).agrees
