"""Matches end to end: honest ones give honest numbers, every planted cheat is caught by name, nothing is lost."""

from __future__ import annotations

import dataclasses
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arena.arrangement import arrange
from arena.datasets import digits, to_float
from arena.errors import ArenaError
from arena.examples import examples_hash
from arena.match import play
from arena.question import Question, Running
from arena.referee import DRAWS
from arena.results import unpacked
from arena.store import open_store
from arena.verify import verify
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
import arena_cheats
from asking import GO, ask, flags


@pytest.mark.parametrize(
    ("attack", "status", "said"),
    [
        ("outside_ball", "failed", "ball"),
        ("outside_box", "failed", "box"),
        ("gives_nan", "failed", "nan"),
        ("wrong_shape", "failed", "1, 7, 8), expected float ("),
        ("edits_weights", "failed", "the attack changed the model: linear.bias"),
        ("hooks_model", "failed", "the attack changed the model: what it returns for the same images"),
        ("claims_success", "failed", "false_claim"),
        ("claims_success_iterated", "failed", "false_claim"),
        ("crashes", "failed", "ZeroDivisionError: division by a planted zero"),
        ("crashes_midway", "failed", "RuntimeError: planted"),
        ("exits", "failed", "SystemExit: 0"),
        ("short_claims", "failed", "returned 1 claims for"),
        ("unloadable", "failed", "has no attribute 'not_there'"),
        ("returns_input", "no_effect", "no query and no returned point differed"),
        ("looks_only", "no_effect", "no query and no returned point differed"),
    ],
)
def test_a_bad_attack_is_caught_by_name(registry, attack, status, said):
    """Beside an honest attack: the match is suspect, the cheat breaks nothing, the honest number stands."""
    correct = round(ask(registry).record["natural"]["accuracy"] * 32 / 100)
    record = ask(registry, vs=(attack, "pgd")).record
    row = next(r for r in record["attacks"] if r["name"] == attack)
    assert row["status"] == status
    assert said in row["error"]
    assert row["broken"] == 0
    assert row["robust_accuracy"] is None
    assert row["plugin"] == "arena-cheats 0.0.1"
    assert record["audit"]["verdict"] == "suspect"
    assert any(attack in i["evidence"] for i in record["audit"]["indicators"])
    honest = next(r for r in record["attacks"] if r["name"] == "pgd")
    assert honest["status"] == "ok"
    assert honest["attempted"] == correct
    assert record["worst_case"]["robust_accuracy"] == honest["robust_accuracy"]


def test_a_crash_keeps_its_traceback_for_the_author(registry):
    (row,) = ask(registry, vs=("crashes",)).record["attacks"]
    assert "planted zero" in row["trace"]
    assert "arena_cheats.py" in row["trace"]


def test_only_bad_attacks_void_the_match(registry):
    record = ask(registry, vs=("crashes", "returns_input")).record
    assert record["audit"]["verdict"] == "void"
    assert record["attacks"][0]["robust_accuracy"] is None


@pytest.mark.parametrize(
    ("factory", "indicator", "verdict"),
    [
        ("undeclared_randomness", "undeclared_randomness", "void"),
        ("depends_on_neighbours", "depends_on_neighbours", "void"),
        ("changes_when_called", "defense_changes", "void"),
        ("changes_late", "defense_changes", "void"),
        ("remembers_late", "defense_changes", "void"),
        ("probabilities", "probabilities", "suspect"),
        ("no_gradient", "no_gradient", "suspect"),
    ],
)
def test_a_bad_defense_is_caught_by_name(registry, factory, indicator, verdict):
    record = ask(registry, factory, vs=("pgd(steps=60)",)).record
    assert indicator in flags(record)
    assert record["audit"]["verdict"] == verdict


def test_the_record_adds_up(registry):
    record = ask(registry, vs=("fgsm", "pgd", "autoattack")).record
    n, natural = record["asked"]["n"], record["natural"]["accuracy"]
    worst = record["worst_case"]
    correct, standing = round(natural * n / 100), round(worst["robust_accuracy"] * n / 100)
    assert sum(worst["broken_by"].values()) == correct - standing
    assert worst["robust_accuracy"] <= min(r["robust_accuracy"] for r in record["rosters"])
    assert [r["name"] for r in record["rosters"]] == ["fgsm", "pgd", "autoattack"]
    cascade = [r for r in record["attacks"] if r["entry"] == "autoattack"]
    for before, after in itertools.pairwise(cascade):
        assert after["attempted"] == before["attempted"] - before["broken"]
    assert record["attacks"][0]["attempted"] == correct
    assert cascade[0]["attempted"] == correct
    assert record["rosters"][2]["complete"]
    json.dumps(record)
    low, high = worst["ci95"]
    assert low <= worst["robust_accuracy"] <= high


def test_kept_examples_are_what_they_say(registry, arena_home):
    record = ask(registry).record
    with np.load(arena_home / record["examples"]["file"], allow_pickle=False) as file:
        x_adv, index = file["x_adv"], file["index"]
    assert len(index) == sum(record["worst_case"]["broken_by"].values()) > 0
    assert examples_hash(x_adv, index) == record["examples"]["sha256"]
    assert x_adv.dtype == np.float32
    outcomes = open_store().outcomes(record["id"])
    assert {i for i, b in zip(outcomes.index, outcomes.broken, strict=True) if b} == set(index.tolist())


def test_the_same_question_is_answered_from_the_store_and_a_replay_agrees(registry):
    first = ask(registry)
    again = ask(registry)
    assert (first.stored, again.stored) == (False, True)
    assert again.record == first.record
    replay = play(
        Question("arena_cheats:honest", ("pgd",), n=32, eps="1/20"),
        dataclasses.replace(GO, replay=True),
        registry,
        Silent(),
    )
    assert not replay.stored
    assert replay.record["id"] != first.record["id"]
    assert replay.record["examples"]["sha256"] == first.record["examples"]["sha256"]


@pytest.mark.parametrize("batch", [7, 64, 500])
def test_batch_size_changes_nothing(registry, batch):
    expected = ask(registry, vs=("apgd_ce", "square(queries=50)"), n=100).record
    got = play(
        Question("arena_cheats:honest", ("apgd_ce", "square(queries=50)"), n=100, eps="0.05"),
        Running(device="cpu", batch_size=batch, replay=True),
        registry,
        Silent(),
    ).record
    assert got["examples"]["sha256"] == expected["examples"]["sha256"]
    assert [r["forwards"] for r in got["attacks"]] == [r["forwards"] for r in expected["attacks"]]


def test_a_model_near_chance_is_noted(registry):
    assert not any("near chance" in note for note in ask(registry).record["notes"])
    record = ask(registry, "constant", vs=("square(queries=5)",)).record
    assert any("near chance" in note for note in record["notes"])


def test_another_seed_is_another_question_on_the_same_points(registry):
    one, two = ask(registry).record, ask(registry, seed=1).record
    assert one["asked"]["indices_sha256"] == two["asked"]["indices_sha256"]
    assert one["model"]["id"] == two["model"]["id"]
    assert one["id"] != two["id"]


def test_eps_0_leaves_natural_accuracy_exactly(registry):
    record = ask(registry, vs=("autoattack", "adaptive", "fgsm"), eps="0").record
    assert record["worst_case"]["robust_accuracy"] == record["natural"]["accuracy"]
    assert {r["status"] for r in record["attacks"]} == {"ok"}
    assert record["audit"]["verdict"] == "not_audited"


def test_one_point_works(registry):
    record = ask(registry, vs=("autoattack",), n=1).record
    assert record["asked"]["n"] == 1
    assert record["worst_case"]["robust_accuracy"] in (0.0, 100.0)


def test_a_norm_an_attack_does_not_know_is_unsupported_and_named(registry):
    record = ask(registry, vs=("crashes", "pgd"), norm="L2", eps="0.5").record
    assert record["attacks"][1]["status"] == "ok"
    record = ask(registry, vs=("lambda_pgd", "pgd")).record
    row = record["attacks"][0]
    assert row["status"] == "unsupported"
    assert "head" in row["error"]
    assert record["audit"]["verdict"] == "suspect"


def test_matrix_fills_what_only_each_attack_broke(registry):
    question = Question("arena_cheats:honest", ("fgsm", "autoattack"), n=48, eps="0.05")
    record = play(question, dataclasses.replace(GO, matrix=True), registry, Silent()).record
    assert all(isinstance(r["unique_broken"], int) for r in record["attacks"])
    assert all(r["robust_accuracy"] is not None for r in record["attacks"])
    assert all(unpacked(r["broken_points"], 48).sum() == r["broken"] for r in record["attacks"])
    plain = play(question, GO, registry, Silent()).record
    assert all(r["unique_broken"] is None for r in plain["attacks"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vs": ("autoatack",)}, "unknown attack 'autoatack'; did you mean 'autoattack'"),
        ({"vs": ("pgd(restart=3)",)}, "unknown option 'restart'; did you mean 'restarts'"),
        ({"vs": ("pgd(steps=a)",)}, "option 'steps': expected a number, got 'a'"),
        ({"vs": ("foolbox",)}, "attack 'foolbox' needs a class of the library, such as foolbox:LinfPGD"),
        ({"vs": ("pgd", "pgd")}, "'pgd' is given twice"),
        ({"vs": ("autoattack(steps=3)",)}, "roster 'autoattack' takes no options"),
        ({"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
        ({"eps": "8//255"}, "eps '8//255': expected a number or a fraction"),
        ({"eps": "8"}, "larger than the box"),
        ({"norm": "L2", "eps": "9"}, "larger than the box"),
        ({"norm": "Linfinity"}, "unknown norm 'Linfinity'; did you mean 'Linf'"),
        ({"n": 0}, "-n 0: expected 1 to 600, the test points of data set 'digits'"),
        ({"n": 601}, "1 to 600"),
    ],
)
def test_bad_questions_get_one_line(registry, changes, message):
    with pytest.raises(ArenaError) as caught:
        ask(registry, **changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (1, 4, 12)])
@pytest.mark.parametrize("classes", [2, 3, 4, 10])
def test_shapes_and_class_counts(registry, tmp_path, monkeypatch, shape, classes):
    generator = torch.Generator().manual_seed(classes)
    n, d = 24, int(np.prod(shape))
    x = torch.rand(n, *shape, generator=generator).numpy()
    weight = torch.randn(classes, d, generator=generator).numpy()
    y = (x.reshape(n, -1) @ weight.T).argmax(1)
    y[:classes] = np.arange(classes)
    np.savez(tmp_path / "data.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    np.save(tmp_path / "weight.npy", weight)
    (tmp_path / "mine.py").write_text(
        "import numpy as np, torch\n"
        f"weight = torch.from_numpy(np.load({str(tmp_path / 'weight.npy')!r}))\n"
        "class Mine(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        return x.flatten(1) @ weight.T\n"
        "def factory():\n"
        "    return Mine()\n"
    )
    question = Question(
        f"{tmp_path / 'mine.py'}:factory",
        ("autoattack", "adaptive"),
        dataset=f"npz:{tmp_path / 'data.npz'}",
        norm="Linf",
        eps="0.02",
        n=n,
    )
    record = play(question, GO, registry, Silent()).record
    assert {r["status"] for r in record["attacks"]} == {"ok"}
    assert record["audit"]["verdict"] == "not_audited"
    assert record["worst_case"]["robust_accuracy"] <= record["natural"]["accuracy"]
    assert record["asked"]["subset_rule"] == "file-order"


def test_a_factory_that_loads_other_weights_is_another_question(registry, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = arena_cheats.honest()
    torch.save(model.state_dict(), "own_weights.pt")
    first = ask(registry, "own_weights")
    assert ask(registry, "own_weights").stored
    with torch.no_grad():
        model.linear.weight.neg_()
    torch.save(model.state_dict(), "own_weights.pt")
    second = ask(registry, "own_weights")
    assert not second.stored
    assert second.record["model"]["id"] != first.record["model"]["id"]
    assert second.record["natural"]["accuracy"] < first.record["natural"]["accuracy"]


def test_a_declared_random_model_is_judged_by_majorities_and_verifies(registry, tmp_path):
    """Attacks average their passes; a point that leaves at lucky draws is not attempted, and the row says so."""
    (tmp_path / "s.toml").write_text("random = true\n")
    record = ask(registry, "undeclared_randomness", n=24, surface=tmp_path / "s.toml", vs=("pgd(steps=5)",)).record
    (row,) = record["attacks"]
    assert row["forwards"] % DRAWS == 0
    assert row["status"] in ("ok", "partial")
    assert (row["status"] == "ok") == record["rosters"][0]["complete"]
    found = verify(
        record["id"], registry, Silent(), against="arena_cheats:undeclared_randomness", surface=tmp_path / "s.toml"
    )
    assert found.agrees, found.lines


def test_a_failing_adaptive_hook_makes_the_roster_incomplete(registry, monkeypatch):
    monkeypatch.setattr(type(registry), "adaptive", lambda *a: [("no_such_attack", {}), "pgd"])
    record = ask(registry, vs=("adaptive",)).record
    assert not record["rosters"][0]["complete"]
    assert record["audit"]["verdict"] == "suspect"
    assert sum(i["name"] == "roster_incomplete" for i in record["audit"]["indicators"]) == 2


def test_targets_are_as_many_as_the_model_has_classes_not_the_data(registry, tmp_path):
    images = digits()
    few = images.y_test < 2
    x, y = to_float(images.x_test)[few].numpy(), images.y_test[few].numpy()
    np.savez(tmp_path / "two.npz", x_train=x, y_train=y, x_test=x, y_test=y)
    record = ask(registry, dataset=f"npz:{tmp_path / 'two.npz'}", vs=("apgd_t",), n=8, eps="0.01").record
    row = record["attacks"][0]
    assert row["broken"] == 0
    assert row["forwards"] == row["attempted"] * 9 * 101 > 0


def test_a_surface_file_hides_nothing_of_what_a_defense_declares(registry, tmp_path):
    (tmp_path / "empty.toml").write_text("")
    arranged = arrange(Question("fgaa_sat", ("pgd",), surface=tmp_path / "empty.toml"), GO, registry)
    bare = arrange(Question("fgaa_sat", ("pgd",)), GO, registry)
    model = bare.plan.make()
    assert arranged.plan.declared(model).heads == bare.plan.declared(model).heads != {}


# -- the audit ---------------------------------------------------------------------------------------------------


def test_transfer_trains_its_source_and_says_what_it_cannot_have(registry, arena_home):
    """A model that hides its gradient falls to the undefended twin; an unknown source is named with the nearest."""
    question = Question("arena_cheats:honest", ("transfer(steps=5)", "transfer(source=sats)"), n=30, eps="0.2")
    record = play(question, GO, registry, Silent()).record
    first, second = record["attacks"]
    assert (first["status"], second["status"]) == ("ok", "unsupported")
    assert first["forwards"] > 0
    assert "unknown defense 'sats'; did you mean 'sat'" in second["error"]


def test_what_a_lent_model_was_trained_against_is_part_of_the_question(registry):
    """Neither a user's model nor an undefended one is trained against anything, but the model lent to transfer is."""
    for defense in ("arena_cheats:honest", "rt"):
        question = Question(defense, ("transfer(source=sat)",), n=10)
        keys = [arrange(dataclasses.replace(question, train_eps=eps), GO, registry).key for eps in (None, "1/5", "0.1")]
        assert keys[0] == keys[1] != keys[2]
