"""Playing a card; the playing of a question is replaced."""

from __future__ import annotations

import copy
import json

import pytest

from arena.errors import ArenaError


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "three.toml"
    path.write_text(
        '[match]\nvs = "pgd"\nn = 400\n[grid]\ndefenses = ["rt", "sat", "fgaa_sat"]\n[run]\nbatch_size = 5\n'
    )
    return str(path)


@pytest.fixture
def worst(played, plant, record):
    """Answers by defense, stored as the core would."""
    cases = {"rt": 0.5, "sat": 60.0, "fgaa_sat": 34.5}

    def answer(question, running):
        made = copy.deepcopy(record)
        ids = {"rt": "1" * 12, "sat": "2" * 12, "fgaa_sat": "3" * 12}
        made |= {"id": ids[question.defense], "defense": question.defense}
        made["model"]["id"] = question.defense
        made["worst_case"]["robust_accuracy"] = cases[question.defense]
        return plant(made, question.defense)

    played.answer = answer
    return cases


def test_a_card_is_played_in_order_and_ends_in_standings(arena, played, worst, card):
    done = arena("match", card)
    assert done.code == 0
    assert [q.defense for q, _ in played.asked] == ["rt", "sat", "fgaa_sat"]
    assert {(q.vs, q.n, q.card) for q, _ in played.asked} == {(("pgd",), 400, "three.toml")}
    assert {r.batch_size for _, r in played.asked} == {5}
    assert "[2/3] sat" in done.err
    first, standings = done.out.split("\n\n", 1)
    assert "sat · digits: worst case 60.0 % (30.0 to 39.3), natural 97.5 %, result 222222222222" in first
    order = [line.split()[1] for line in standings.splitlines() if line[:1].isdigit()]
    assert order == ["sat", "fgaa_sat", "rt"]


def test_options_win_over_the_card(arena, played, worst, card):
    arena("match", card, "--vs", "fgsm,pgd(steps=3)", "-n", "9", "--batch-size", "7", "--replay", "--seed", "0")
    assert {(q.vs, q.n, r.batch_size, r.replay) for q, r in played.asked} == {(("fgsm", "pgd(steps=3)"), 9, 7, True)}


def test_a_failing_question_is_named_and_the_rest_goes_on(arena, played, worst, card):
    answer = played.answer

    def sometimes(question, running):
        if question.defense == "sat":
            raise ArenaError("no weights")
        return answer(question, running)

    played.answer = sometimes
    done = arena("match", card, "--quiet")
    assert done.code == 2
    assert done.err == "arena: error: sat · digits: no weights\n"
    assert [q.defense for q, _ in played.asked] == ["rt", "sat", "fgaa_sat"]
    assert "fgaa_sat · digits: worst case" in done.out


def test_thresholds_hold_for_each(arena, worst, card):
    done = arena("match", card, "--fail-under", "40", "--quiet")
    assert done.code == 1
    assert [line.split(":")[1].strip() for line in done.err.splitlines()] == ["rt", "fgaa_sat"]


def test_json_of_a_card_is_a_list(arena, worst, card):
    done = arena("match", card, "--json", "-", "--quiet")
    assert [r["defense"] for r in json.loads(done.out)] == ["rt", "sat", "fgaa_sat"]


def test_interruption_stops_the_card(arena, played, worst, card):
    def stop(question, running):
        raise KeyboardInterrupt

    played.answer = stop
    assert arena("match", card).code == 3
    assert len(played.asked) == 1


def test_a_match_that_its_limit_stops_is_named_and_the_rest_goes_on(arena, played, worst, plant, record, tmp_path):
    path = tmp_path / "limited.toml"
    path.write_text('[match]\nvs = "pgd"\n[grid]\ndefenses = ["rt", "sat"]\n[run]\ntime_limit = "2m"\n')
    answer = played.answer

    def sometimes(question, running):
        if question.defense != "rt":
            return answer(question, running)
        return copy.deepcopy(record) | {"defense": "rt", "id": "f" * 12, "stopped": True}

    played.answer = sometimes
    done = arena("match", str(path))
    assert done.code == 3
    assert [running.time_limit for _, running in played.asked] == [120, 120]
    assert "result ffffffffffff (stopped)" in done.out
    assert "rt: stopped by the time limit" in done.err
    assert [line.split()[1] for line in done.out.splitlines() if line[:1].isdigit()] == ["sat"]
    assert arena("match", str(path), "--time-limit", "90").code == 3
    assert {running.time_limit for _, running in played.asked[2:]} == {90}


def test_a_card_can_be_planned(arena, played, card):
    done = arena("match", card, "--plan")
    assert done.code == 0, done.err
    assert not played.asked
    assert [line.split(" · ")[0] for line in done.out.splitlines() if " · " in line] == ["rt", "sat", "fgaa_sat"]
    assert sum(line.startswith("at most") for line in done.out.splitlines()) == 3
