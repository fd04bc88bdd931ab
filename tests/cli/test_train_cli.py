"""``train``: a training of seconds, and its refusals."""

from __future__ import annotations

import json
import re

import pytest


def test_training_is_reported_and_kept(arena, monkeypatch):
    import arena_defenses

    from arena.plugins import registry
    from arena.specs import Preset

    spec = registry().get("defense", "rt").spec
    assert spec in list(arena_defenses.arena_register_defenses())
    monkeypatch.setitem(spec.presets, "digits", Preset(2, batch=256))
    done = arena("train", "rt", "--device", "cpu", "--backbone", "cnn(width=4)")
    text = " ".join(done.out.split())
    assert done.code == 0
    assert re.match(r"rt · digits · cnn\(width=4\) · [\d,]+ parameters trained 2 epochs", text)
    assert re.search(r"validation natural [\d.]+ % on \d+ held-out training images", text)
    assert "train rt: 2/2 epochs" in done.err
    weights = re.search(r"weights (\S+best\.safetensors)", text)
    assert weights
    again = arena("train", "rt", "--device", "cpu", "--backbone", "cnn(width=4)")
    assert "kept already" in again.out
    assert re.search(r"model\.id +(\w+)", again.out)[1] == re.search(r"model\.id +(\w+)", done.out)[1]
    played = arena("match", "rt", "--backbone", "cnn(width=4)", "--vs", "fgsm", "-n", "20", "--json", "-", "--quiet")
    assert json.loads(played.out)["model"]["id"] == re.search(r"model\.id +(\w+)", done.out)[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("rrt", "unknown defense 'rrt'; did you mean 'rt'?"),
        ("rt(x=1)", "defense 'rt': unknown option 'x'"),
        ("rt --dataset digit", "unknown dataset 'digit'; did you mean 'digits'?"),
        ("sat --norm L2", "norm L2: give eps too; the data set's default 0.2 is for Linf"),
        ("rt --device gpu", "--device 'gpu': expected auto"),
        ("none.py:make", "'none.py:make' is a model of your own: arena trains listed defenses only"),
    ],
)
def test_refusals(arena, line, message):
    assert arena("train", *line.split()).refusal.startswith(message)


def test_own_models_are_refused_before_they_run(arena, tmp_path):
    (tmp_path / "my.py").write_text("raise SystemExit(7)")
    assert "is a model of your own" in arena("train", f"{tmp_path}/my.py:make").refusal
