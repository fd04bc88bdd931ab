"""Protocol ``paper``: all points, final iterates, never robust accuracy; breaks that are breaks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from arena.arrangement import arrange
from arena.cards import read_card
from arena.cli import run
from arena.errors import ArenaError
from arena.leaderboard import standings
from arena.lineup import check_evaluation, describe, line_up
from arena.match import play
from arena.plugins import registry
from arena.question import Question, Running
from arena.specs import canonical, complete
from arena.store import open_store
from arena.surface import Surface
from arena.threat import Threat
from arena.verify import verify
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent / "packages" / "papers"))
import papers_models  # noqa: F401

GO = Running(device="cpu", audit="none")
BUILT_IN = [r for r in registry().all("defense") if r.distribution == "adversarial-arena"]
#: One step over the hill of ``papers_models.Hill``, and the way back.
OVER, BACK = ("paper_pgd(start=none,step=0.4,steps=1)", "paper_pgd(start=none,step=0.4,steps=2)")


@pytest.fixture
def pictures(tmp_path, arena_home):
    """Make a data set of (pixel one, pixel two, label) and return its name."""

    def make(points):
        x = np.zeros((len(points), 4, 4, 1), dtype=np.uint8)
        x[:, 0, 0, 0], x[:, 0, 1, 0] = [round(255 * a) for a, _, _ in points], [round(255 * b) for _, b, _ in points]
        y = np.array([label for *_, label in points])
        np.savez(tmp_path / "points.npz", x_train=x, y_train=y, x_test=x, y_test=y)
        return f"npz:{tmp_path / 'points.npz'}"

    return make


@pytest.fixture
def hill(pictures):
    """One naturally correct point before the hill, three on it, misclassified: the label is 0 everywhere."""
    return pictures([(0.5, 0, 0), (0.58, 0, 0), (0.58, 0, 0), (0.58, 0, 0), (0.0, 0, 0), (0.0, 0, 1)])


def ask(dataset, *vs, protocol="paper", model="hill", **more):
    question = Question(f"papers_models:{model}", vs, dataset=dataset, norm="Linf", **{"eps": "0.2", **more})
    return play(Question(**{**vars(question), "protocol": protocol}), GO, registry(), Silent()).record


def flagged(record):
    return [i for i in record["audit"]["indicators"] if i["flag"]]


def test_the_final_iterate_is_final(hill):
    """After one step the point is broken, after two it has come back: only the first is a break."""
    record = ask(hill, OVER, BACK, "pgd(random_start=false,step=0.4,steps=2)")
    over, back, best = record["attacks"]
    assert (over["broken"], back["broken"], best["broken"]) == (1, 0, 1)
    standard = ask(hill, BACK, protocol="standard")
    assert standard["attacks"][0]["broken"] == 0
    assert standard["worst_case"]["robust_accuracy"] == standard["natural"]["accuracy"]


def test_repaired_points_raise_accuracy_above_natural_and_are_flagged(hill):
    record = ask(hill, OVER)
    (row,) = record["attacks"]
    assert record["natural"]["accuracy"] == pytest.approx(100 * 2 / 6)
    assert (row["attempted"], row["broken"], row["repaired"]) == (6, 1, 3)
    assert row["paper_accuracy"] == pytest.approx(100 * 4 / 6)
    (found,) = flagged(record)
    assert found["name"] == "natural_below_attacked"
    assert found["value"] == pytest.approx(100 * 2 / 6)
    assert "repaired 3 points and broke 1" in found["evidence"]
    assert "arena match papers_models:hill --vs autoattack,adaptive --dataset npz:" in found["remedy"]
    assert record["audit"]["verdict"] == "suspect"


def test_what_to_run_next_is_asked_under_the_protocol_that_is_meant(hill):
    found = {i["name"]: i["remedy"] for i in flagged(ask(hill, OVER, "adaptive", budget=10))}
    assert "--protocol paper" in found["roster_incomplete"]
    assert "--vs adaptive" in found["roster_incomplete"]
    assert "--protocol" not in found["natural_below_attacked"]


def test_nothing_in_the_record_is_called_robust(hill):
    record = ask(hill, BACK, "gate_pgd", "apgd_ce(steps=3)")
    assert record["protocol"] == "paper"
    assert record["worst_case"]["robust_accuracy"] is record["worst_case"]["ci95"] is None
    for row in (*record["attacks"], *record["rosters"]):
        assert row["robust_accuracy"] is row["ci95"] is None
    assert all(row["cumulative_accuracy"] is None for row in record["attacks"])
    assert record["sweeps"] == []
    assert record["paper"]["accuracy"] == {a["name"]: a["paper_accuracy"] for a in record["attacks"]}
    assert record["attacks"][1]["status"] == "unsupported"
    assert record["attacks"][1]["paper_accuracy"] is None


def test_without_a_flag_it_is_not_audited(hill):
    record = ask(hill, "paper_pgd(start=none,step=0.001,steps=1)")
    assert flagged(record) == []
    assert record["audit"]["verdict"] == "not_audited"
    (row,) = record["attacks"]
    assert row["paper_accuracy"] == record["natural"]["accuracy"]


def test_at_eps_0_natural_accuracy_is_the_answer(hill):
    (row,) = ask(hill, OVER, eps="0")["attacks"]
    assert (row["status"], row["repaired"], row["paper_accuracy"]) == ("ok", 0, pytest.approx(100 * 2 / 6))


def test_two_hundred_points_share_one_gate(pictures):
    """One point falls far at the first step and stops the other 149, also those after the 128th."""
    data = pictures([(0.52, 0, 0)] + 149 * [(0, 0.55, 2)])
    gated, own = ask(
        data,
        "paper_cw(start=none,step=0.25)",
        "paper_cw(gate=clamp,start=none,step=0.25)",
        model="steep",
        eps="0.1",
        n=150,
    )["attacks"]
    assert (gated["broken"], own["broken"]) == (1, 150)
    assert (gated["paper_accuracy"], own["paper_accuracy"]) == (pytest.approx(100 * 149 / 150), 0)


def test_breaks_merge_into_the_board_that_never_lists_the_result(hill):
    paper = ask(hill, OVER)
    assert sum(paper["worst_case"]["broken_by"].values()) == 1
    with open_store() as store:
        assert standings(store) == []
        ask(hill, BACK, protocol="standard")  # breaks nothing itself
        (table,) = standings(store)
        (row,) = table.unranked
        assert row.result != paper["id"]
        assert (row.natural, row.worst_case) == (pytest.approx(100 * 2 / 6), pytest.approx(100 / 6))
        assert table.results == 1


def test_verify_confirms_the_breaks_and_refuses_a_worst_case(hill, tmp_path):
    record = ask(hill, OVER)
    found = verify(record["id"], registry(), Silent(), against="papers_models:hill")
    assert (found.agrees, found.confirmed, found.robust_accuracy) == (True, 1, None)
    record["worst_case"]["robust_accuracy"] = 100 * 2 / 6
    file = tmp_path / "r.json"
    file.write_text(json.dumps(record))
    found = verify(str(file), registry(), Silent(), against="papers_models:hill")
    assert not found.agrees
    assert "a paper's own evaluation has none" in found.lines[0]
    record["worst_case"]["robust_accuracy"], record["rosters"][0]["robust_accuracy"] = None, 100 * 2 / 6
    file.write_text(json.dumps(record))
    found = verify(str(file), registry(), Silent(), against="papers_models:hill")
    assert found.lines[0].startswith(f"entry {record['rosters'][0]['name']}: the result says 33.33 %")


# -- the roster ``papers`` ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("known", BUILT_IN, ids=lambda r: r.name)
def test_each_built_in_defense_declares_an_evaluation_that_fits_its_surface(known):
    spec = known.spec
    check_evaluation(known.name, spec.evaluation, ("papers",), registry())
    (group,) = line_up(("papers",), registry(), Surface(), Threat.parse("Linf", "0.1"), 10, spec.evaluation)
    assert [a.name for a in group.attacks]
    assert len(group.attacks) == len(set(spec.evaluation))
    for planned in group.attacks:
        assert not planned.options.get("lam") or spec.exposed.heads
        assert planned.spec.name != "gate_pgd" or spec.exposed.gates
    assert spec.evaluation_flaws


def test_published_settings():
    def made(name):
        spec = registry().get("defense", name).spec
        (group,) = line_up(("papers",), registry(), Surface(), Threat.parse("Linf", "0.1"), 10, spec.evaluation)
        return [a.name for a in group.attacks]

    assert made("cas_sat") == ["paper_pgd(lam=2,step=1,steps=1)", "paper_pgd(lam=2)", "paper_cw(lam=2)"]
    assert made("fgaa_sat") == [*made("cas_sat"), "paper_avg_pgd(lam=2)"]
    assert made("ewas_sat")[2] == "paper_cw(gate=clamp,lam=0.01,step=1/4,steps=30)"
    assert made("fsr_sat")[1] == "paper_pgd(start=none,step=1/10)"
    assert sum(name.startswith("gate_pgd") for name in made("afa_sat")) == 7
    assert "paper_cw" in made("rt")


def test_a_defense_without_an_evaluation_is_refused_in_one_line(arena_home):
    for protocol in ("paper", "standard"):
        question = Question("papers_models:hill", ("papers",), protocol=protocol)
        with pytest.raises(ArenaError, match=r"roster 'papers': 'papers_models:hill' declares no evaluation") as caught:
            arrange(question, GO, registry())
        assert "\n" not in str(caught.value)
    with pytest.raises(ArenaError, match="unknown protocol 'papers'; did you mean 'paper'"):
        arrange(Question("rt", ("papers",), protocol="papers"), GO, registry())


def test_a_bad_entry_of_a_plugins_evaluation_is_named_before_anything_is_trained():
    with pytest.raises(ArenaError, match=r"attack 'paper_pgd': unknown option 'stps'; did you mean 'steps'"):
        check_evaluation("mine", ("paper_pgd(stps=3)",), ("papers",), registry())
    check_evaluation("mine", ("nonsense",), ("autoattack",), registry())  # nobody asked for it


def test_the_question_knows_the_evaluation_it_was_made_of():
    keys = [describe(("papers",), registry(), e) for e in (("fgsm",), ("fgsm(random_start=true)",))]
    assert keys[0] != keys[1]
    assert describe(("autoattack",), registry(), ("fgsm",)) == describe(("autoattack",), registry())


def test_options_of_the_papers_attacks_have_ranges():
    for name, bad in (
        ("paper_pgd", {"lam": -1}),
        ("paper_cw", {"gate": "sum"}),
        ("paper_cw", {"confidence": -1}),
        ("paper_avg_pgd", {"m": 0}),
        ("paper_avg_pgd", {"near": 2}),
    ):
        with pytest.raises(ArenaError, match=name):
            complete(canonical(name, {}), registry().get("attack", name).spec.options, bad)


# -- the command line ---------------------------------------------------------------------------------------------


def test_on_the_screen(hill, capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    line = ["match", "papers_models:hill", "--vs", OVER, "--dataset", hill, "--norm", "Linf", "--eps", "0.2"]
    assert run([*line, "--protocol", "paper", "-q"]) == 0
    out = capfd.readouterr().out
    assert "the paper's own protocol: not robust accuracy   natural 33.3 %" in out
    assert "worst case" not in out
    assert "! natural_below_attacked" in out
    assert "flaw: the point an attack ends at counts" in out
    (row,) = [words for words in map(str.split, out.splitlines()) if words and words[0].startswith("paper_pgd")]
    assert row[3:8] == ["ok", "6", "66.7", "3", "1"]
    assert run(["show"]) == 0
    assert "not robust accuracy" in capfd.readouterr().out
    assert run([*line, "--protocol", "paper", "--fail-under", "10"]) == 2
    assert "protocol paper has no worst case" in capfd.readouterr().err
    (result,) = [i for t in [open_store()] for i in t.all()]
    assert run(["verify", result["id"], "--against", "papers_models:hill"]) == 0
    assert "confirmed: 1 of 1 examples" in capfd.readouterr().out
    assert run(["leaderboard"]) == 0
    assert "66.7" not in capfd.readouterr().out


def test_the_card_that_ships_asks_the_papers_own_question():
    card = read_card(Path(__file__).parent.parent / "matches" / "papers.toml")
    assert {(q.protocol, q.vs) for q in card.questions} == {("paper", ("papers",))}
    assert {"rt", "fgaa_sat"} <= {q.defense for q in card.questions}


def test_a_card_may_name_the_protocol(tmp_path, hill, capfd):
    card = tmp_path / "card.toml"
    card.write_text(
        f'[match]\ndefense = "papers_models:hill"\nprotocol = "paper"\nvs = "{OVER}"\ndataset = "{hill}"\n'
        'norm = "Linf"\neps = 0.2\n'
    )
    assert run(["match", str(card), "-q"]) == 0
    assert "66.7 to 66.7 % (paper's own protocol, not robust accuracy)" in capfd.readouterr().out
    assert run(["match", str(card), "-q", "--fail-under", "5"]) == 2
    assert "protocol paper has no worst case" in capfd.readouterr().err
    card.write_text('[match]\ndefense = "rt"\nprotocol = "paper"')
    assert [q.vs for q in read_card(card).questions] == [("papers",)]
    card.write_text('[match]\ndefense = "rt"\nprotocol = "papers"')
    assert run(["match", str(card), "-q"]) == 2
    assert "match.protocol: expected standard or paper, got 'papers'" in capfd.readouterr().err
