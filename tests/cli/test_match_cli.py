"""The command ``match``: options to question, exit codes, refusals; the playing itself is replaced."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arena.errors import ArenaError


def test_defaults(arena, played):
    done = arena("match", "sat")
    assert done.code == 0
    ((question, running),) = played.asked
    assert (question.defense, question.vs, question.dataset) == ("sat", ("autoattack", "adaptive"), "digits")
    assert (question.n, question.seed, question.train_seed, question.eps) == (None, 0, 0, None)
    assert (running.batch_size, running.replay, running.retrain, running.matrix) == (None, False, False, False)
    assert running.audit == "normal"


def test_a_protocol_brings_its_own_line_up(arena, played):
    assert arena("match", "sat", "--protocol", "paper").code == 0
    assert arena("match", "sat", "--protocol", "paper", "--vs", "pgd").code == 0
    assert [(q.protocol, q.vs) for q, _ in played.asked] == [("paper", ("papers",)), ("paper", ("pgd",))]


def test_every_option_arrives(arena, played):
    line = (
        "match fgaa_sat(lam=1) --vs pgd(steps=100,restarts=5),autoattack --dataset npz:x.npz --backbone cnn --norm l2"
    )
    line += " --eps 8/255 -n 7 --seed 3 --train-seed 4 --device cpu --batch-size 9 --checkpoint w --surface s.toml"
    line += " --replay --retrain --matrix"
    assert arena(*line.split()).code == 0
    ((q, r),) = played.asked
    assert q.vs == ("pgd(steps=100,restarts=5)", "autoattack")
    assert (q.dataset, q.backbone, q.norm, q.eps, q.n, q.seed, q.train_seed) == (
        "npz:x.npz",
        "cnn",
        "l2",
        "8/255",
        7,
        3,
        4,
    )
    assert (q.checkpoint, q.surface) == (Path("w"), Path("s.toml"))
    assert (r.device, r.batch_size, r.replay, r.retrain, r.matrix) == ("cpu", 9, True, True, True)


def test_a_stored_result_says_so(arena, played):
    assert "stored result" not in arena("match", "sat").out
    played.stored = True
    out = arena("match", "sat").out
    assert out.startswith("stored result of 2026-11-20 10:00; --replay attacks again")
    assert "worst case 34.5 %" in out


def test_json(arena, played, record, tmp_path):
    done = arena("match", "sat", "--json", "-")
    assert json.loads(done.out) == record
    done = arena("match", "sat", "--json", str(tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text()) == record
    assert "worst case 34.5 %" in done.out


def test_a_json_destination_is_refused_at_the_start(arena, played, tmp_path):
    (tmp_path / "file").write_text("")
    assert "no such folder" in arena("match", "sat", "--json", str(tmp_path / "deep" / "r.json")).refusal
    assert "no such folder" in arena("match", "sat", "--json", str(tmp_path / "file" / "r.json")).refusal
    assert "expected a file, got a folder" in arena("match", "sat", "--json", str(tmp_path)).refusal
    assert not played.asked
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_what_plugins_print_stays_out_of_the_record(arena, played, record):
    def talk(question, running):
        print("a plugin says hello")
        return record

    played.answer = talk
    done = arena("match", "sat", "--json", "-")
    assert json.loads(done.out) == record
    assert "a plugin says hello" in done.err


@pytest.mark.parametrize(
    ("args", "level"), [("--audit deep", "deep"), ("--no-audit", "none"), ("--audit normal", "normal")]
)
def test_how_much_is_audited(arena, played, args, level):
    arena("match", "sat", *args.split())
    ((_, running),) = played.asked
    assert running.audit == level


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ("", ("local", (), None, None)),
        ("--devices cpu,cpu", ("local", ("cpu", "cpu"), None, None)),
        ("--engine ray", ("ray", (), None, None)),
        ("--engine ray --device cpu --workers 3", ("ray", ("cpu",), None, 3)),
        ("--engine ray --ray-address auto", ("ray", (), "auto", None)),
    ],
)
def test_who_plays(arena, played, args, expected):
    arena("match", "sat", *args.split())
    ((_, running),) = played.asked
    assert (running.engine, running.devices, running.ray_address, running.workers) == expected
    assert running.device in ("cpu", "cuda")


def test_an_audit_and_none(arena, played):
    assert (
        arena("match", "sat", "--audit", "deep", "--no-audit").refusal
        == "--audit deep and --no-audit: give one of them"
    )


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ("--fail-under 34.5", 0),
        ("--fail-under 34.6", 1),
        ("--fail-under 30 --fail-on lower-ci", 0),
        ("--fail-under 30.1 --fail-on lower-ci", 1),
        ("--fail-under 30.1 --fail-on point", 0),
    ],
)
def test_thresholds(arena, played, args, code):
    done = arena("match", "sat", *args.split())
    assert done.code == code
    assert ("is under --fail-under" in done.err) == bool(code)


def test_void_fails_and_a_missing_number_is_under_any_threshold(arena, played, record):
    record["audit"]["verdict"] = "void"
    played.answer = lambda question, running: record
    assert arena("match", "sat").code == 1
    record["audit"]["verdict"] = "suspect"
    assert arena("match", "sat").code == 0
    record["worst_case"] = {"robust_accuracy": None, "ci95": None}
    for on in ("point", "lower-ci"):
        done = arena("match", "sat", "--fail-under", "0", "--fail-on", on)
        assert (done.code, "missing" in done.err) == (1, True)


def test_interruption(arena, played):
    def stop(question, running):
        raise KeyboardInterrupt

    played.answer = stop
    done = arena("match", "sat")
    assert (done.code, done.err) == (3, "arena: interrupted; the same command continues\n")


def test_what_the_user_can_fix_is_one_line(arena, played):
    def refuse(question, running):
        raise ArenaError("something\nover two lines.")

    played.answer = refuse
    assert arena("match", "sat").refusal == "something over two lines"


def test_a_held_lock_is_told_in_words(arena, played):
    def held(question, running):
        raise ArenaError("match-0a1b2c is in use by another arena process; wait for it to end or stop it")

    played.answer = held
    assert arena("match", "sat").refusal.startswith("this match is being played by another arena process; wait")


def test_bugs_keep_their_traceback(arena, played):
    def bug(question, running):
        raise ZeroDivisionError

    played.answer = bug
    with pytest.raises(ZeroDivisionError):
        arena("match", "sat")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mtch sat", "unknown command 'mtch'; did you mean 'match'?"),
        ("match sat --bacth-size 3", "unknown option '--bacth-size'; did you mean '--batch-size'?"),
        ("match sat --qqqqqq 3", "unknown option '--qqqqqq'; see --help"),
        ("match", "Missing argument 'DEFENSE|CARD.toml'"),
        ("match sat more", "Got unexpected extra argument (more)"),
        ("match sat --precision fp16", "Invalid value for '--precision': 'fp16' is not one of 'fp32', 'bf16'"),
        ("match sat --batch-size 0", "--batch-size '0': expected auto or a whole number of at least 1"),
        ("match sat --batch-size many", "--batch-size 'many': expected auto or a whole number of at least 1"),
        ("match sat --device gpu", "--device 'gpu': expected auto, cpu, cuda, cuda:N or mps"),
        ("match sat --device cuda:99", "--device 'cuda:99': this machine has"),
        ("match sat --devices 0,x", "--devices '0,x': expected numbers of CUDA devices"),
        ("match sat --devices 98,99", "--devices '98,99': this machine has"),
        ("match sat --devices cpu,0", "--devices 'cpu,0': expected numbers of CUDA devices"),
        ("match sat --devices cpu,cpu --device cpu", "--devices cpu,cpu and --device cpu: give one of them"),
        ("match sat --devices cpu,cpu --engine ray", "--devices names devices of this machine: with --engine ray"),
        ("match sat --ray-address auto", "--ray-address auto: only with --engine ray"),
        ("match sat --engine local --workers 2", "--workers 2: only with --engine ray"),
        ("match sat --engine ray --device mps", "--engine ray --device mps: expected auto, cpu or cuda"),
        ("match sat --engine dask", "Invalid value for '--engine': 'dask' is not one of 'local', 'ray'"),
        ("match sat -n many", "Invalid value for '-n': 'many' is not a valid integer"),
        ("match sat --vs pgd(steps=3", "'pgd(steps=3': '(' is never closed (brackets need quotes in a shell)"),
        ("match sat --vs pgd,,fgsm", "'pgd,,fgsm': an entry is empty"),
        ("match sat --fail-under 101", "Invalid value for '--fail-under': 101.0 is not in the range 0<=x<=100"),
        ("match sat --fail-on luck", "Invalid value for '--fail-on': 'luck' is not one of 'point', 'lower-ci'"),
        ("match nothing.toml", "card nothing.toml: no such file"),
        ("match my.py", "unknown defense 'my.py'; for a model of your own: my.py:FACTORY"),
        ("match sat --dataset data.npz", "unknown dataset 'data.npz'; did you mean npz:data.npz?"),
    ],
)
def test_refusals(arena, played, line, message):
    assert arena(*line.split()).refusal.startswith(message)
    assert not played.asked


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("fgaa_satt --vs pgd", "unknown defense 'fgaa_satt'; did you mean 'fgaa_sat'?"),
        ("sat --vs pdg", "unknown attack 'pdg'; did you mean 'pgd'?"),
        ("sat --vs pgd(stps=3)", "attack 'pgd': unknown option 'stps'; did you mean 'steps'?"),
        ("sat --vs pgd(steps=many)", "attack 'pgd': option 'steps': expected a number, got 'many'"),
        ("fgaa_sat(lamb=1) --vs pgd", "defense 'fgaa_sat': unknown option 'lamb'; did you mean 'lam'?"),
        ("sat --vs pgd --dataset digit", "unknown dataset 'digit'; did you mean 'digits'?"),
        ("sat --vs pgd --backbone cn", "unknown backbone 'cn'; did you mean 'cnn'?"),
        ("sat --vs pgd --norm Lif", "unknown norm 'Lif'; did you mean 'Linf'?"),
        ("sat --vs pgd --eps huge", "eps 'huge': expected a number or a fraction such as 8/255 or 0.03"),
        ("sat --vs pgd --eps 8", "eps '8': larger than the box [0, 1]; images are in [0, 1], did you mean 8/255?"),
        ("sat --vs pgd -n 601", "-n 601: expected 1 to 600"),
        ("sat --vs pgd --fail-under nan", "--fail-under nan: expected a percentage from 0 to 100"),
        ("sat --vs pgd --dataset npz:none.npz", "data set 'npz:none.npz': no such file"),
    ],
)
def test_refusals_by_the_core_in_this_installation(arena, line, message):
    assert arena("match", *line.split()).refusal.startswith(message)


def test_corrupt_store_and_home_in_the_way(arena, tmp_path, monkeypatch):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "arena.db").write_bytes(b"garbage" * 100)
    for line in ("match sat --vs pgd", "leaderboard", "show abc", "verify abc"):
        assert "arena.db is damaged" in arena(*line.split()).refusal
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ARENA_HOME", str(tmp_path / "file"))
    for line in ("match sat --vs pgd", "leaderboard", "show abc", "verify abc"):
        assert "is not a folder" in arena(*line.split()).refusal


@pytest.mark.parametrize(("text", "seconds"), [("90", 90), ("10m", 600), ("1h30m", 5400)])
def test_a_time_limit_arrives(arena, played, text, seconds):
    assert arena("match", "sat", "--time-limit", text).code == 0
    assert [running.time_limit for _, running in played.asked] == [seconds]


def test_a_time_limit_that_is_none_is_refused(arena, played):
    assert arena("match", "sat", "--time-limit", "soon").refusal == (
        "--time-limit 'soon': expected a time such as 90, 90s, 10m or 1h30m"
    )
    assert not played.asked


@pytest.mark.parametrize(("threshold", "code"), [((), 3), (("--fail-under", "30"), 3), (("--fail-under", "40"), 1)])
def test_a_stopped_match_says_so_and_can_only_sink(arena, played, record, threshold, code):
    record["stopped"] = True
    played.answer = lambda question, running: record
    done = arena("match", "sat", "--time-limit", "1s", *threshold)
    assert done.code == code
    assert "stopped by the time limit; the same command goes on" in done.err
    assert "this is the worst case so far" in done.out
    assert "not stored" in done.out
    assert "re-score" not in done.out


def test_a_plan_plays_nothing(arena, played, tmp_path):
    done = arena("match", "fgaa_sat", "--vs", "pgd(steps=10,restarts=2),foolbox:LinfPGD", "-n", "20", "--plan")
    assert done.code == 0, done.err
    assert not played.asked
    assert "at most 840 passes (2 attacks, 20 points), and what nobody knows of foolbox:LinfPGD; about" in done.out
    assert "not trained yet, the match trains it first: arena train fgaa_sat" in done.out
    assert "pgd(restarts=2, steps=10)" in done.out
    assert not [*(tmp_path / "home").iterdir()]


@pytest.mark.parametrize("more", [("--json", "-"), ("--fail-under", "3")])
def test_a_plan_has_no_result(arena, played, more):
    assert f"no result for {more[0]}" in arena("match", "sat", "--plan", *more).refusal
