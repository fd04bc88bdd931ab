"""A match's search copy: what it was stands in the record, bf16 is judged in fp32, plain attacks search in fp32."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arena.counted import CountedModule
from arena.match import play
from arena.question import Question
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
from asking import GO, ask


def test_a_match_says_what_its_search_was_and_what_bare_passes_cost(registry):
    record = ask(registry, vs=("pgd", "square(queries=20)")).record
    provenance = record["provenance"]
    search = {k: provenance["search"][k] for k in ("folded", "channels_last", "precision", "batch_size", "note")}
    most = int(np.ceil(record["attacks"][0]["attempted"] / 8)) * 8
    assert search["batch_size"] == most  # all points fit into one batch
    assert search | {"batch_size": 0} == {
        "folded": 0,
        "channels_last": False,
        "precision": "fp32",
        "batch_size": 0,
        "note": "",
    }
    assert provenance["bare_seconds"] == pytest.approx(sum(r["bare"] for r in record["rosters"]))
    assert all(r["bare"] > 0 for r in record["rosters"])


def bf16(registry, vs, **changes):
    asked = {"n": 48, "eps": "0.05", **changes}
    question = Question("arena_cheats:honest", vs, **asked)
    return play(question, dataclasses.replace(GO, precision="bf16"), registry, Silent()).record


def test_a_search_in_bf16_is_judged_in_fp32_and_is_another_question(registry):
    vs = ("pgd", "apgd_ce(steps=20)", "square(queries=100)", "fab_t(steps=20)")
    exact = ask(registry, vs=vs, n=48).record
    found = bf16(registry, vs)
    assert found["id"] != exact["id"]
    assert found["provenance"]["precision"] == found["provenance"]["search"]["precision"] == "bf16"
    for a, b in zip(found["attacks"], exact["attacks"], strict=True):
        assert (a["status"], a["violations"], a["attempted"], a["silent"]) == ("ok", {}, b["attempted"], 0)
        assert abs(a["broken"] - b["broken"]) <= 1


def test_what_bf16_alone_saw_broken_is_looked_at_once_more_and_goes_on(registry, monkeypatch, liar):
    """Passes in bf16 that name every class wrong: no point leaves at that."""
    monkeypatch.setattr("arena.search.Target", liar)
    found = bf16(registry, ("pgd(steps=4)",), n=32, eps="1/100000")
    (row,) = found["attacks"]
    again = found["provenance"]["search"]["again"]
    assert (row["status"], row["broken"]) == ("ok", 0)
    assert again == row["attempted"] * 5 > 0
    assert row["forwards"] == 2 * again  # each is what was asked for, and once more


def test_a_plain_attack_searches_in_fp32(registry, monkeypatch):
    dtypes = set()
    real = CountedModule.forward

    def spy(self, x, *args):
        out = real(self, x, *args)
        dtypes.add((self._target.precision, out.dtype))
        return out

    monkeypatch.setattr(CountedModule, "forward", spy)
    found = bf16(registry, ("foolbox:LinfPGD(steps=3)",))
    assert found["attacks"][0]["status"] == "ok"
    assert dtypes == {("fp32", torch.float32)}


def test_points_that_an_attack_gives_up_are_counted_and_are_no_break_that_was_seen(registry):
    vs = ("staged(steps=5,rounds=2)",)
    exact = ask(registry, vs=vs, n=48, eps="0.05").record
    (row,) = exact["attacks"]
    assert row["status"] == "ok"
    assert 0 < row["given_up"] <= row["attempted"] - row["broken"]
    assert row["forwards"] < row["attempted"] * (exact["cost"]["forwards"] // row["attempted"])
    found = bf16(registry, vs)
    assert abs(found["attacks"][0]["given_up"] - row["given_up"]) <= 2  # second looks are no passes of the attack
    (other,) = ask(registry, vs=("pgd",), n=48, eps="0.05").record["attacks"]
    assert other["given_up"] == 0


def test_points_of_a_random_model_that_an_attack_gives_up_do_not_make_it_partial(registry, tmp_path):
    (tmp_path / "s.toml").write_text("random = true\n")
    vs, surface = ("staged(steps=3,rounds=1)",), tmp_path / "s.toml"
    record = ask(registry, "undeclared_randomness", vs, n=8, eps="0.01", surface=surface).record
    (row,) = record["attacks"]
    assert (row["status"], row["attempted"], row["broken"]) == ("ok", 8, 0)
    assert row["given_up"] > 0
