"""The screen of a result."""

from __future__ import annotations

import json

import pytest


def squeeze(text: str) -> str:
    return " ".join(text.split())


def test_parameters_that_nothing_reads_are_a_note_and_no_flag(arena, plant, record):
    said = {"name": "unread_parameters", "flag": False, "value": 7, "evidence": "7 parameters change no logits"}
    other = {"name": "depends_on_place", "flag": False, "value": 1e-7, "evidence": "the last bits"}
    record["audit"] = {"verdict": "not_audited", "indicators": [said, other]}
    plant(record)
    out = arena("show", "0123").out
    assert "note: 7 parameters change no logits" in out
    assert "! unread_parameters" not in out
    assert out.count("7 parameters change no logits") == 1


def test_the_screen(arena, plant, record):
    plant(record)
    done = arena("show", "0123")
    assert (done.code, done.err) == (0, "")
    text = squeeze(done.out)
    assert "fgaa_sat · digits · cnn · Linf eps 0.2 · n 400 · seed 0" in text
    assert "worst case 34.5 % (95 %: 30.0 to 39.3) natural 97.5 %" in text
    assert "verdict not audited" in text
    assert "λ = 0 (main logits) 91.2 % | worst case 34.5 % | sat (no module) not played here" in text
    assert "no module arena match sat -n 400" in text
    assert "apgd_t ok 390 20 - 67.5 39k 38.6k 12 s" in text
    assert "autoattack 67.5 (62.7 to 71.9) 2 yes 78k 77.2k 25 s" in text
    assert "note: no point of class 7" in text
    assert "re-score arena verify 0123456789ab" in text
    assert f"{'home'}/examples/0123456789ab.npz" in text


def test_the_passes_are_one_line(arena, plant, record):
    plant(record)
    assert "bare cost" not in arena("show", "0123").out
    seconds = sum(r["seconds"] for r in record["rosters"])
    search = {"folded": 4, "channels_last": True, "precision": "bf16", "batch_size": 504, "again": 2, "note": ""}
    record["provenance"] |= {"bare_seconds": seconds / 1.25, "search": search}
    record["id"] = "f" * 12
    plant(record)
    text = squeeze(arena("show", "ffff").out)
    assert "passes 1.25 times their bare cost of 40 s, batch 504, 4 batch norms folded, channels last, bf16" in text
    assert "2 mistakes looked at once more in fp32" in text


def test_eighty_columns_hold_everything(arena, plant, record):
    record["attacks"][0]["name"] = "art:SomeVeryLongClassName(option_one=0.123456,option_two=0.654321,steps=1000)"
    record["attacks"][1]["violations"] = {"outside_ball": 12345, "outside_box": 3}
    record["attacks"][2]["unique_broken"] = 12
    plant(record)
    lines = arena("show", "0123").out.splitlines()
    assert max(len(line) for line in lines if "examples/" not in line) <= 80
    assert "…" not in "".join(lines)


def test_a_sweep_is_folded_into_its_minimum_with_lambda_zero(arena, plant, record):
    plant(record)
    text = squeeze(arena("show", "0123").out)
    assert "lambda_pgd(lam=0) ok 390 100 91.2" in text
    assert "lambda_pgd minimum (3) ok 390 - 45.8 - 117k 116k 37 s" in text
    assert "lambda_pgd(lam=10)" not in text
    unfolded = squeeze(arena("show", "0123", "--all").out)
    assert "lambda_pgd(lam=10) ok" in unfolded
    assert "minimum" not in unfolded


def test_a_sweep_of_one_row_is_that_row(arena, plant, record):
    record["attacks"] = record["attacks"][:2] + record["attacks"][3:4]
    record["sweeps"][0]["members"] = ["lambda_pgd(lam=1)"]
    plant(record)
    text = squeeze(arena("show", "0123").out)
    assert "lambda_pgd(lam=1) ok" in text
    assert "minimum" not in text


def test_a_failed_row_of_a_sweep_is_never_hidden(arena, plant, record):
    record["attacks"][4] |= {"status": "failed", "error": "RuntimeError: boom"}
    plant(record)
    text = squeeze(arena("show", "0123").out)
    assert "lambda_pgd(lam=10) failed" in text
    assert "lambda_pgd minimum (3) failed" in text


def test_the_twin_is_shown_only_at_an_equal_question(arena, plant, record):
    def twin(result: str, worst: float, **asked):
        made = json.loads(json.dumps(record)) | {"id": result, "defense": "sat", "model": {"id": result, "twin": ""}}
        made["worst_case"]["robust_accuracy"] = worst
        made["asked"] |= asked
        return plant(made)

    plant(record)
    twin("a" * 12, 61.2)
    twin("b" * 12, 62.0, n=100)
    twin("c" * 12, 63.0, train_seed=1)
    twin("d" * 12, 64.0, backbone="resnet_small")
    twin("e" * 12, 65.0, data_sha256="f" * 64)
    twin("7" * 12, 67.0, vs=["fgsm"])  # a weaker line-up leaves more standing
    twin("8" * 12, 68.0, budget=300)
    twin("9" * 12, 69.0, train_eps="0.1")
    twin("f" * 12, 66.0, threat={"norm": "Linf", "eps": "0.1", "eps_value": 0.1})
    assert "sat (no module) 61.2 %" in squeeze(arena("show", "0123").out)
    twin("1" * 12, 60.8, threat={"norm": "Linf", "eps": "1/5", "eps_value": 0.2})
    assert "sat (no module) 60.8 %" in squeeze(arena("show", "0123456789ab").out)
    assert "(no module)" not in arena("show", "1" * 12).out


@pytest.mark.parametrize("text", ["[bold]x[/bold] [/oops]", "a\x1b[2Jb", "line\nbreak", "tab\tand\x07bell"])
def test_foreign_text_is_harmless(arena, plant, record, text):
    record["defense"] = text
    record["attacks"][0]["name"] = text
    record["attacks"][1] |= {"status": "failed", "violations": {text: 1}}
    record["audit"] = {
        "verdict": "suspect",
        "indicators": [{"name": "n", "flag": True, "evidence": text, "remedy": text}],
    }
    record["notes"] = [text]
    record["diagnosis"] = {"heads": {text: {"accuracy": 1.0, "agreement_clean": 2.0, "agreement_broken": None}}}
    plant(record)
    out = arena("show", "0123").out
    assert "\x1b" not in out
    assert "\x07" not in out
    if "[" in text and "\x1b" not in text:
        assert text in out


def test_flags_are_spelt_out(arena, plant, record):
    indicators = [
        {"name": "attack_not_ok", "flag": True, "evidence": "apgd_t: crashed", "remedy": "tell its author"},
        {"name": "silent", "flag": False, "evidence": "nothing"},
    ]
    record["audit"] = {"verdict": "suspect", "indicators": indicators}
    plant(record)
    out = squeeze(arena("show", "0123").out)
    assert "verdict suspect: the number may be too high" in out
    assert "! attack_not_ok: apgd_t: crashed (tell its author)" in out
    assert "silent: nothing" in out  # show lists the silent ones too
    assert out.index("silent: nothing") > out.index("attack_not_ok !")


def test_a_remedy_is_told_once_and_all_indicators_are_listed(arena, plant, record):
    run = "arena match fgaa_sat --vs square"
    indicators = [
        {
            "name": "one",
            "flag": True,
            "value": 0.25,
            "threshold": 0.05,
            "evidence": "first",
            "remedy": f"do this: {run}",
        },
        {
            "name": "two",
            "flag": True,
            "value": 1.0,
            "threshold": 0.05,
            "evidence": "second",
            "remedy": f"or that: {run}",
        },
        {"name": "three", "flag": False, "value": 0.012345, "threshold": 0.1, "evidence": "", "remedy": ""},
    ]
    cost = {"level": "deep", "forwards": 31000, "backwards": 9000, "seconds": 1.5}
    record["audit"] = {"verdict": "suspect", "indicators": indicators, **cost}
    plant(record)
    out = squeeze(arena("show", "0123").out)
    assert f"! one: first (do this: {run})" in out
    assert "! two: second audit (deep): 2 of 3 indicators flagged; 31k forwards, 9k backwards, 1.5 s" in out
    assert "one ! 0.25 0.05 two ! 1 0.05 three 0.0123 0.1" in out


def test_a_match_that_was_not_played(arena, plant, record):
    record |= {"attacks": [], "rosters": [], "sweeps": [], "audit": {"verdict": "void", "indicators": []}}
    record["worst_case"] = {"robust_accuracy": None, "ci95": None, "broken_by": {}}
    plant(record)
    out = squeeze(arena("show", "0123").out)
    assert "worst case: none, nothing was played natural 97.5 %" in out
    assert "verdict void: the number means nothing" in out


def test_a_void_result_has_no_number_in_its_head(arena, plant, record):
    record["audit"] = {"verdict": "void", "indicators": []}
    plant(record)
    lines = arena("show", "0123").out.splitlines()
    assert lines[1] == "verdict void: the number means nothing"
    assert " ".join(lines[2].split()) == "worst case: none, the match is void natural 97.5 %"
    assert "34.5" not in "\n".join(lines[:4])
    assert "apgd_ce" in "\n".join(lines)


def test_the_twins_command_asks_the_same_question(arena, plant, record):
    record["asked"] |= {"vs": ["pgd(steps=3,restarts=2)"], "backbone": "resnet_small", "n": 500, "train_seed": 2}
    record["asked"]["threat"] = {"norm": "L2", "eps": "1/2", "eps_value": 0.5}
    plant(record)
    line = "arena match sat --vs 'pgd(steps=3,restarts=2)' --backbone resnet_small --norm L2 --eps 1/2 --train-seed 2"
    assert line in arena("show", "0123").out


def test_a_model_of_ones_own_is_rescored_with_what_was_given(arena, plant, record):
    record |= {"defense": "my models/net.py:make"}
    plant(record)
    assert "arena verify 0123456789ab --against 'my models/net.py:make'\n" in arena("show", "0123").out
    record["asked"]["checkpoint"] = "w.safetensors"
    record["id"] = "ffff" * 3
    plant(record, "p")
    assert "make' --checkpoint w.safetensors\n" in arena("show", "ffff").out


def test_plugin_problems_are_a_pointer(arena, plant, record):
    record["notes"] += ["plugin one 1.0 (one): import of one raised a long story", "plugin two 1.0 (two): another"]
    plant(record)
    out = arena("show", "0123").out
    assert "note: 2 plugin problems: see 'arena plugins doctor'" in out
    assert "long story" not in out


def test_a_bare_record_is_enough(arena, plant, record):
    for key in ("sweeps", "notes", "audit", "examples", "provenance"):
        record.pop(key)
    record["model"] = {"id": "m"}
    plant(record)
    assert arena("show", "0123").code == 0


def test_json_is_the_record(arena, plant, record, tmp_path):
    plant(record)
    done = arena("show", "0123", "--json")
    assert json.loads(done.out) == record
    (tmp_path / "r.json").write_text(done.out)
    assert "worst case 34.5 %" in arena("show", str(tmp_path / "r.json")).out


def test_without_a_name_the_newest_is_shown(arena, plant, record):
    assert arena("show").refusal.startswith("no results yet; play a match first")
    for number in range(8):
        plant(record | {"id": f"{number}" * 12}, f"q{number}")
    out = arena("show").out
    assert "arena verify 777777777777" in out
    named = [line.split()[1] for line in out.splitlines() if line.startswith("earlier")]
    assert named == [f"{k}" * 8 for k in (6, 5, 4, 3, 2)]
    assert json.loads(arena("show", "--json").out)["id"] == "7" * 12


def test_bad_results(arena, plant, record, tmp_path):
    assert arena("show", "ffff").refusal == "unknown result 'ffff'; the store is empty"
    plant(record)
    assert arena("show", "0123456789aa").refusal == "unknown result '0123456789aa'; did you mean 0123456789ab?"
    (tmp_path / "a.json").write_text("{")
    assert "not a JSON result" in arena("show", str(tmp_path / "a.json")).refusal
    (tmp_path / "b.json").write_text("[1]")
    assert "not a result of arena" in arena("show", str(tmp_path / "b.json")).refusal
    (tmp_path / "c.json").write_text(json.dumps({**record, "asked": {}}))
    assert "not a result of arena" in arena("show", str(tmp_path / "c.json")).refusal.lower()
    assert "no such file" in arena("show", str(tmp_path / "d.json")).refusal
