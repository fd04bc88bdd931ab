"""Match cards: grids, overrides, and all errors at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from arena.cards import name_question, read_card
from arena.errors import ArenaError


@pytest.fixture
def card(tmp_path):
    def make(text: str) -> Path:
        path = tmp_path / "card.toml"
        path.write_text(text)
        return path

    return make


def test_the_card_that_ships():
    made = read_card(Path(__file__).parent.parent / "matches" / "digits.toml")
    assert [q.defense for q in made.questions] == ["rt", "sat", "fgaa_sat", "ewas_sat"]
    assert {(q.vs, q.dataset, q.n, q.card) for q in made.questions} == {
        (("autoattack", "adaptive"), "digits", 500, "digits.toml")
    }


def test_a_minimal_card(card):
    (question,) = read_card(card('[match]\ndefense = "sat"')).questions
    assert (question.defense, question.vs, question.dataset) == ("sat", ("autoattack", "adaptive"), "digits")


def test_a_grid_is_every_combination_the_first_key_slowest(card):
    made = read_card(
        card(
            '[grid]\ndefenses = ["a", "b"]\neps = ["8/255", 0.1]\ntrain_seeds = [0, 1]\n'
            '[match]\nvs = "pgd,fgsm(loss=ce)"'
        )
    )
    assert [(q.defense, q.eps, q.train_seed) for q in made.questions] == [
        (d, e, s) for d in "ab" for e in ("8/255", "0.1") for s in (0, 1)
    ]
    assert {q.vs for q in made.questions} == {("pgd", "fgsm(loss=ce)")}


def test_doubles_are_played_once(card):
    assert len(read_card(card('[grid]\ndefenses = ["a", "a"]')).questions) == 1


def test_entries_in_a_list_may_hold_several(card):
    (question,) = read_card(card('[match]\ndefense = "a"\nvs = ["pgd(steps=3,restarts=2)", "fgsm,square"]')).questions
    assert question.vs == ("pgd(steps=3,restarts=2)", "fgsm", "square")


def test_overrides_replace_keys_and_axes(card):
    made = read_card(
        card('[match]\nn = 5\n[grid]\ndefenses = ["a", "b"]\nseeds = [1, 2]\n[run]\nreplay = true\nbatch_size = 3'),
        {"seed": 7, "n": 9, "batch_size": 64},
    )
    assert [(q.defense, q.seed, q.n) for q in made.questions] == [("a", 7, 9), ("b", 7, 9)]
    assert (made.running.replay, made.running.batch_size) == (True, 64)


def test_paths_are_relative_to_the_card(card, tmp_path):
    (question,) = read_card(card('[match]\ndefense = "a"\ncheckpoint = "w.safetensors"')).questions
    assert question.checkpoint == tmp_path / "w.safetensors"


def test_a_card_says_who_plays_and_the_command_line_wins(card):
    made = read_card(card('[match]\ndefense = "a"\n[run]\ndevices = "cpu,cpu"'))
    assert (made.running.devices, made.running.engine) == (("cpu", "cpu"), "local")
    text = '[match]\ndefense = "a"\n[run]\nengine = "ray"\nray_address = "auto"\nworkers = 4'
    running = read_card(card(text), {"workers": 2}).running
    assert (running.engine, running.ray_address, running.workers) == ("ray", "auto", 2)
    with pytest.raises(ArenaError, match=r"run.engine: expected local or ray, got 'dask'; run.workers: exp"):
        read_card(card('[match]\ndefense = "a"\n[run]\nengine = "dask"\nworkers = 0'))


BAD = """
defences = ["x"]
[match]
vs = 3
datset = "digits"
eps = true
n = 0
seed = "a"
defenses = ["sat"]
train_seed = 1.0
[grid]
train_seeds = [0.5]
eps = ["0.1", []]
datasets = []
[run]
replay = "yes"
[runn]
device = "cpu"
"""


def test_all_errors_at_once_with_key_paths_and_nearest_keys(card):
    with pytest.raises(ArenaError) as caught:
        read_card(card(BAD))
    text = str(caught.value)
    assert "\n" not in text
    for part in (
        "defences: unknown key; did you mean 'grid.defenses'?",
        "match.vs: expected a text or a list of texts, at least one, got 3",
        "match.datset: unknown key; did you mean 'dataset'?",
        "match.eps: expected a text or a number, got True",
        "match.n: expected a whole number of at least 1, got 0",
        "match.seed: expected a whole number, got 'a'",
        "match.defenses: unknown key; did you mean 'defense'?",
        "match.train_seed: expected a whole number, got 1.0",
        "grid.train_seeds[0]: expected a list of whole numbers, at least one, got 0.5",
        "grid.eps[1]: expected a list of texts or numbers, at least one, got []",
        "grid.datasets: expected a list of texts, at least one, got []",
        "run.replay: expected true or false, got 'yes'",
        "runn: unknown key; did you mean 'run'?",
        "match.eps and grid.eps are both given",
        "match.train_seed and grid.train_seeds are both given",
        "grid.defenses: missing",
    ):
        assert part in text, part
    assert ": 16 errors: " in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = [", "no TOML"),
        ("match = 3", "match: expected a table \\[match\\], got 3"),
        ('[match]\ndefense = "a"\nbatch_size = 3', "match.batch_size: unknown key; did you mean 'run.batch_size'\\?"),
        ('[match]\ndefense = "a"\nvs = "pgd("', r"'\(' is never closed"),
    ],
)
def test_other_refusals(card, text, message):
    with pytest.raises(ArenaError, match=message):
        read_card(card(text))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ArenaError, match="No such file"):
        read_card(tmp_path / "none.toml")
    with pytest.raises(ArenaError, match=r"card .*: "):
        read_card(tmp_path)


def test_questions_are_named_by_what_tells_them_apart(card):
    made = read_card(card('[grid]\ndefenses = ["sat"]\ntrain_seeds = [0, 1]\neps = ["0.1"]'))
    assert [name_question(q) for q in made.questions] == [
        "sat · digits · eps 0.1",
        "sat · digits · eps 0.1 · train seed 1",
    ]


def test_a_card_says_how_much_is_audited(card):
    deep = card('[match]\ndefense = "sat"\n[run]\naudit = "deep"')
    assert read_card(deep).running.audit == "deep"
    assert read_card(deep, {"audit": "none"}).running.audit == "none"
    assert read_card(card('[match]\ndefense = "sat"')).running.audit == "normal"
    with pytest.raises(ArenaError, match=r"run.audit: expected normal, deep or none, got 'depe'"):
        read_card(card('[match]\ndefense = "sat"\n[run]\naudit = "depe"'))


@pytest.mark.parametrize(("text", "seconds"), [('"10m"', 600), ("90", 90), ("0.5", 0.5)])
def test_a_time_limit_of_each_match(card, text, seconds):
    made = read_card(card(f'[match]\ndefense = "a"\n[run]\ntime_limit = {text}'))
    assert made.running.time_limit == seconds
    assert read_card(card('[match]\ndefense = "a"')).running.time_limit is None


@pytest.mark.parametrize("text", ['"soon"', "0", "true", '"0s"', "[1]"])
def test_a_time_limit_that_is_none_is_named(card, text):
    with pytest.raises(ArenaError, match=r"card .*: run\.time_limit: expected "):
        read_card(card(f'[match]\ndefense = "a"\n[run]\ntime_limit = {text}'))
