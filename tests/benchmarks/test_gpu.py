"""The benchmark of a GPU, on a CPU and a tiny net: what it measures, keeps and writes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import as_module

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def script():
    return as_module(SCRIPT)


@pytest.fixture
def pictures(tmp_path):
    made = np.random.default_rng(0)
    y = np.arange(64) % 4
    x = np.clip(made.normal(40 + 50 * y[:, None, None, None], 10, (64, 8, 8, 3)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "tiny.npz", x_train=x, y_train=y, x_test=x[:32], y_test=y[:32])
    return tmp_path / "tiny.npz"


def test_what_is_measured_is_kept_and_told(script, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(script, "NETS", {"cnn": script.net("cnn", 2)})
    monkeypatch.setattr(script, "SIZES", (16, 32))
    monkeypatch.setattr(script, "card", lambda device: {"name": "made up", "fp32": 1.0, "bf16": 2.0})
    asked = ["--cifar", str(pictures), "--device", "cpu", "-n", "32", "--ways", "fp32;bf16", "--vs", "pgd(steps=2)"]
    kept = tmp_path / "kept.json"
    assert script.main([*asked, "-o", str(kept)]) == 0
    told = capsys.readouterr().out
    found = json.loads(kept.read_text())
    assert [r["way"] for r in found["matches"]] == ["fp32", "bf16"]
    assert [[at["batch"] for at in r["rows"]] for r in found["ceilings"]] == [[16, 32]] * 2
    first = found["matches"][0]
    passes = first["forwards"] - first["backwards"], first["backwards"]
    best = [max(at[key] for at in found["ceilings"][0]["rows"]) for key in ("forward", "both")]
    share = (passes[0] / best[0] + passes[1] / best[1]) / first["seconds"]
    assert f"| {share:.0%} | {first['seconds']:.1f} |" in told
    assert "`pgd(steps=2)`, bf16 | `pgd(steps=2)`, fp32 |" in told

    monkeypatch.setattr(script, "match", pytest.fail)  # nothing is measured twice
    assert script.main([*asked, "-o", str(kept)]) == 0
    assert script.main(["--page", str(kept)]) == 0
    assert capsys.readouterr().out == told * 2


def test_the_pages_that_are_kept_are_of_what_was_measured(script):
    kept = sorted((SCRIPT.parent / "results").glob("*.json"))
    assert kept
    for path in kept:
        assert path.with_suffix(".md").read_text() == script.page(json.loads(path.read_text())) + "\n"


def test_a_net_that_is_not_there_is_named(script, capsys):
    assert script.main(["--cifar", "x.npz", "--nets", "resnet8"]) == 2
    assert capsys.readouterr().err == "unknown --nets 'resnet8'; did you mean 'resnet18'?\n"
