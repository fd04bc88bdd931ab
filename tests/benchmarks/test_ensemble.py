"""The ensembles' benchmark: the plain driver's law, cells that survive a stop, peers."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from arena.attack import Setup
from arena.checkpoints import snapshot
from arena.contender import Contender
from arena.datasets import to_float
from arena.engine import run_iterated
from arena.entries import parse
from arena.errors import ArenaError
from arena.plugins import registry
from arena.referee import Referee
from arena.results import packed
from arena.rng import Stream
from arena.specs import load
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1]))
from ensemble import bare, cases, games, measuring, page, peers, plain
from ensemble.cells import Cells
from ensemble.peer import Counted
from loading import as_module
from made_up import SETTINGS, cell
from pretended_gpu import pretended_gpu

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ensemble.py"
K = 6


@pytest.fixture(scope="module")
def script():
    return as_module(SCRIPT)


# -- the plain driver --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    with torch.random.fork_rng():
        torch.manual_seed(3)
        made = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, K))
    return made.eval().requires_grad_(False)


def points(model, n=29):
    x = torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, model(x).argmax(1), torch.arange(n) * 3


def made(entry, threat):
    name, options = parse(entry)
    setup = Setup(threat, K, Surface(), (1, 8, 8), Stream.of(0, entry))
    return load(registry().get("attack", name).spec.iterate)(setup, **options), name


#: With an eps at which some points fall and some stand.
ATTACKS = (
    ("apgd_ce(steps=12,restarts=2)", "0.08"),
    ("apgd_t(steps=10,targets=3)", "0.08"),
    ("fab_t(steps=5,targets=3)", "0.08"),
    ("square(queries=80)", "0.08"),
    ("square(queries=300)", "0.08"),
)


@pytest.mark.parametrize(("entry", "eps"), ATTACKS)
@pytest.mark.parametrize("batch", [8, 250])
def test_driven_plainly_an_attack_finds_what_the_engine_finds(model, entry, eps, batch, monkeypatch):
    monkeypatch.setattr(plain, "BATCH", batch)
    threat = Threat.parse("Linf", eps)
    x, y, index = points(model)
    attack, name = made(entry, threat)
    outcome = run_iterated(attack, Target(model, Surface(), K, 16), x, y, index)
    assert not outcome.error
    target = Target(model, Surface(), K, 250)
    driven = plain.drive(plain.asking_all(attack), name, target, x, y, index)
    assert driven.finished.all()
    assert torch.equal(driven.x_adv, outcome.x_adv)
    broken, expected = (Referee(model, threat).judge(x, o.x_adv, y, index).broken for o in (driven, outcome))
    assert torch.equal(broken, expected)
    assert 0 < broken.sum() < len(y)  # else nothing was tried
    assert (driven.forwards, driven.backwards) == (target.meter.forwards, target.meter.backwards)
    # a broken point pays until the run that broke it is over; Square lets it go at once
    _, length = plain.shape(attack, name)
    steps = 1 if name == "square" else length
    asked = run_iterated(attack, Target(model, Surface(), K, 16), x, y, index)  # of all proposals
    assert torch.equal(asked.x_adv, outcome.x_adv)
    paid = (asked.forwards + steps - 1) // steps * steps
    assert driven.forwards == int(paid.sum())
    assert driven.forwards >= int(outcome.forwards.sum())
    assert driven.backwards >= int(outcome.backwards.sum())


@pytest.mark.parametrize(("entry", "_eps"), ATTACKS)
def test_without_a_break_the_plain_driver_costs_the_bound(model, entry, _eps):
    x, y, index = points(model)
    attack, name = made(entry, Threat.parse("Linf", "1e-7"))
    driven = plain.drive(plain.asking_all(attack), name, Target(model, Surface(), K), x, y, index)
    assert (driven.forwards, driven.backwards) == tuple(len(y) * most for most in attack.passes())
    assert driven.finished.all()


def test_an_attack_without_runs_is_refused():
    class Other:
        def passes(self):
            return 1, 1

    with pytest.raises(ArenaError, match="attack 'other': the plain driver knows attacks made of runs"):
        plain.shape(Other(), "other")


def test_rows_of_forwards_and_gradients_are_counted(model):
    counted = Counted(model)
    x = torch.rand(5, 1, 8, 8, requires_grad=True)
    torch.autograd.grad(counted(x).sum(), x)
    counted(x)
    with torch.no_grad():
        counted(x[:2])[0] = 0.0  # Square writes into what it was given
    assert (counted.forwards, counted.backwards) == (12, 5)


def test_a_scaled_contender_is_the_same_net_with_larger_logits(model):
    first = Contender(
        *("a", "b", "c", None, {}, {}, {}, 1, "", ""), Surface(), lambda: copy.deepcopy(model), snapshot(model)
    )
    scaled = cases.scaled(first, 1000.0)
    x, _, _ = points(model)
    assert torch.equal(scaled.build()(x), 1000 * first.build()(x))
    assert scaled.id != first.id
    assert cases.scaled(first, 1.0) is first


@pytest.fixture
def means(arena_home):
    """The nearest class mean on digits, as a subject: no training, and some points fall."""
    on = cases.subject(cases.named("cnn"), 0, 40, None, registry(), measuring.Watching())
    x, y = to_float(on.images.x_train).flatten(1), on.images.y_train
    centers = torch.stack([x[y == k].mean(0) for k in range(10)])
    layer = nn.Linear(64, 10)
    layer.weight.data, layer.bias.data = 2 * centers, -centers.square().sum(1)
    model = nn.Sequential(nn.Flatten(), layer)
    contender = Contender(
        *("means", "id", "key", None, {}, {}, {}, 650, "", ""), Surface(), lambda: copy.deepcopy(model), snapshot(model)
    )
    return replace(on, threat=Threat.parse("Linf", "0.1"), obtain=lambda: contender)


def test_a_match_and_the_plain_driver_give_cells_of_one_form(means, monkeypatch, arena_home):
    monkeypatch.setattr(bare, "A_LOOK", 0.0)
    entry = "apgd_t(steps=4,targets=2)"
    played = games.play(means, entry, games.EAGERLY, 0, 1, registry())
    turned = games.play_in_turn(means, entry, 0, 1, registry())
    driven = games.play_plainly(means, entry, 0, 1, registry())
    looked = games.play_among_looks(means, entry, 0, 1, registry())
    runs = [measuring.Run("cnn", 0, "x", 1, 0, c) for c in (played, turned, driven, looked)]
    assert 0 < runs[0].standing < int(runs[0].natural.sum())
    assert [(r.cell["natural"], r.cell["broken"]) for r in runs] == [(played["natural"], played["broken"])] * 4
    assert turned["forwards"] == played["forwards"] == looked["forwards"] <= driven["forwards"]
    assert driven["forwards"] % 5 == 0  # whole runs of 5 passes
    assert all(c["bare"] > 0 and c["seconds"] > 0 for c in (played, turned, driven, looked))
    assert [a["attempted"] for a in driven["attacks"]] == [int(runs[0].natural.sum())]
    assert json.loads(json.dumps([played, turned, driven, looked]))
    assert not list((arena_home / "examples").glob("*"))  # nothing is left behind


@pytest.mark.parametrize("entry", ["apgd_t(steps=4,targets=2)", "square(queries=200)"])
def test_the_plain_driver_finds_on_a_gpu_what_it_finds_on_a_cpu(means, monkeypatch, arena_home, entry):
    monkeypatch.setattr(bare, "A_LOOK", 0.0)
    here = games.play_plainly(means, entry, 0, 1, registry())
    with pretended_gpu():
        there = games.play_plainly(means, entry, 0, 1, registry(), "cuda")
    assert here["attacks"][0]["broken"]
    assert all(there[k] == here[k] for k in ("natural", "broken", "forwards", "backwards"))


def test_the_batch_of_bare_passes_is_chosen_for_the_points_that_attacks_meet(means, monkeypatch, arena_home):
    monkeypatch.setattr(bare, "A_LOOK", 0.0)
    met, search = [], games.Search
    monkeypatch.setattr(games, "Search", lambda *given: met.append(given[4]) or search(*given))
    right = means.right()
    assert not right.all()
    for play in (games.play_in_turn, games.play_among_looks):
        play(means, "apgd_ce(steps=3)", 0, 1, registry())
        assert torch.equal(met.pop(), right)


@pytest.mark.parametrize(
    ("share", "least", "most"),
    [(bare.SHARE, 0.08, 0.12), (bare.HALF, 0.37, 0.5)],  # of 0.24 s each; the run asks every 0.2 s, so the next waits
)
def test_looks_inside_a_run_take_their_share_of_it_and_are_told_apart(monkeypatch, share, least, most):
    now, passes = [0.0], []

    def one_pass(target, rows, grad):
        passes.append(grad)
        now[0] += 0.03 if grad else 0.01

    monkeypatch.setattr(bare.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bare, "bare_pass", one_pass)
    looking = bare.Looking(bare.Bare(None, torch.zeros(8, 1)), share)
    own = 0.0
    for done in range(500):
        now[0], own = now[0] + 0.2, own + 0.2
        looking.advance(done)
    assert now[0] - looking.took == pytest.approx(own)
    assert looking.took == pytest.approx(sum(0.03 if grad else 0.01 for grad in passes))
    assert least < looking.took / now[0] < most
    assert looking.bare.seconds(100, 40) == pytest.approx((60 * 0.01 + 40 * 0.03) / 8)


# -- cells -------------------------------------------------------------------------------------------------------------


def test_a_cell_is_measured_once_and_again_only_where_that_is_asked(tmp_path):
    asked, calls = {"case": "cnn", "way": "quick", "pair": 0}, []

    def work():
        calls.append(1)
        return {"seconds": len(calls)}

    cells = Cells(tmp_path)
    assert cells.measure("runs", asked, work)["seconds"] == 1
    assert cells.measure("runs", asked, work)["seconds"] == 1
    assert Cells(tmp_path, again=("quick",)).measure("runs", asked, work)["seconds"] == 2
    assert cells.measure("runs", {**asked, "pair": 1}, work)["seconds"] == 3
    assert cells.measure("members", asked, work)["seconds"] == 4
    assert Cells(tmp_path, known=True).measure("runs", {**asked, "pair": 2}, work) is None
    cells.path("runs", asked).write_text('{"seconds": ')  # half a file
    assert cells.measure("runs", asked, work)["seconds"] == 5


def bench(tmp_path, monkeypatch, played, limit=10**9, **changes):
    """Make a bench whose games are made up; the one after ``limit`` games is stopped."""

    def answer(kind):
        def play(subject, entry, *_):
            if len(played) == limit:
                raise KeyboardInterrupt
            if entry != "pgd(steps=1)":  # the warm-up
                played.append((kind, subject.case.name, subject.seed, entry))
            return {k: v for k, v in cell().items() if k not in ("load", "date", "arena", "torch")}

        return play

    for kind in ("play", "play_plainly", "play_in_turn", "play_among_looks"):
        monkeypatch.setattr(games, kind, answer(kind))
    settings = measuring.Settings(**{**SETTINGS, **changes})
    there = peers.Environment(missing={"pyautoattack": "offline", "torchattacks": "offline"})
    monkeypatch.setattr(peers.Environment, "has", lambda self, library: False)
    said = []
    return measuring.Bench(settings, Cells(tmp_path), registry(), there, said.append), said


def test_a_benchmark_that_was_stopped_goes_on(tmp_path, monkeypatch):
    whole, parts = [], []
    bench(tmp_path / "whole", monkeypatch, whole)[0].run()
    assert len(set(whole)) > 10
    for limit in (3, 9):
        with pytest.raises(KeyboardInterrupt):
            bench(tmp_path / "parts", monkeypatch, parts, limit)[0].run()
    found = bench(tmp_path / "parts", monkeypatch, parts)[0].run()
    assert sorted(map(str, parts)) == sorted(map(str, whole))  # nothing twice, nothing missing
    assert found.left_out["torchattacks"] == "offline"
    members, _ = bench(tmp_path / "parts", monkeypatch, [], 0, threads=(2,), parts=("members",))
    assert len(members.run().members) == len(found.members)  # threads change no outcome
    again, said = bench(tmp_path / "parts", monkeypatch, [], 0)
    assert len(again.run().runs) == len(found.runs)
    assert said == []


def test_a_cell_that_fails_is_told_and_the_others_go_on(tmp_path, monkeypatch):
    made, said = bench(tmp_path, monkeypatch, [], seeds=(0,), parts=("runs",))

    def fail(subject, *_):
        raise ArenaError(f"{subject.case.name} is out of order")

    monkeypatch.setattr(games, "play_plainly", fail)
    found = made.run()
    assert found.left_out["runs: cnn, train seed 0, autoattack, plain"] == "cnn is out of order"
    assert {r.way for r in found.runs} == {"staged", "autoattack"}
    assert any("sharp is out of order" in line for line in said)


def test_ways_take_turns_and_a_case_without_its_file_is_told(tmp_path, monkeypatch):
    played = []
    made, _ = bench(tmp_path, monkeypatch, played, cases=("cnn", "cifar"), seeds=(0,), parts=("runs",))
    found = made.run()
    turn = [("play_in_turn", "staged"), ("play_in_turn", "autoattack"), ("play_plainly", "autoattack")]
    assert [(kind, entry) for kind, _, _, entry in played] == turn + turn[::-1]
    assert found.left_out["case cifar"] == "no --cifar FILE was given"
    with pytest.raises(ArenaError, match="case 'cifar': expected --cifar FILE"):
        cases.subject(cases.named("cifar"), 0, 4, None, registry(), measuring.Watching())


def test_the_overhead_has_its_own_number_of_pictures(tmp_path, monkeypatch):
    asked = []
    changes = {"cases": ("cifar",), "overhead": ("cifar",), "cifar": tmp_path, "parts": ("runs", "overhead")}
    made, _ = bench(tmp_path, monkeypatch, [], seeds=(0,), **changes)
    monkeypatch.setattr(measuring, "subject", lambda case, seed, n, *_: asked.append(n) or digits_case)
    digits_case = cases.subject(cases.named("cnn"), 0, 4, None, registry(), measuring.Watching())
    made.run()
    assert asked == [4, 6, 7]


def test_devices_share_the_full_roster_beside_the_plain_run_on_as_many_threads(tmp_path, monkeypatch):
    given = []
    made, _ = bench(tmp_path, monkeypatch, [], seeds=(0,), cases=("cnn",), parts=("runs",), bf16=True, pairs=1)
    made.settings = dataclasses.replace(made.settings, devices=("cpu", "cpu"))
    answer = games.play_in_turn

    def noted(subject, entry, seed, threads, registry, style):
        given.append((entry, threads, style.precision, style.devices))
        return answer(subject, entry)

    monkeypatch.setattr(games, "play_in_turn", noted)
    found = made.run()
    assert [r.way for r in found.runs if r.threads == 2] == [
        "autoattack, on 2",
        "autoattack, bf16, on 2",
        "autoattack, plain",
    ]
    both = ("cpu", "cpu")
    assert given[-2:] == [("autoattack", 2, "fp32", both), ("autoattack", 2, "bf16", both)]
    assert all(devices == () for *_, devices in given[:-2])
    assert page.Ways.known(found.runs, "autoattack") == [
        "autoattack",
        "autoattack, bf16",
        "autoattack, on 2",
        "autoattack, bf16, on 2",
    ]


def test_another_model_or_number_of_points_is_another_cell(tmp_path):
    cells = Cells(tmp_path)
    paths = set()
    for name in ("cnn", "long", "sharp"):
        for seed in (0, 1):
            for n in (8, 16):
                on = cases.subject(cases.named(name), seed, n, None, registry(), measuring.Watching())
                paths.add(cells.path("runs", {**on.asked, "way": "quick", "pair": 0}))
    assert len(paths) == 12


# -- peers -------------------------------------------------------------------------------------------------------------


def test_a_peer_that_cannot_be_had_is_named(tmp_path, monkeypatch):
    def pip(words, **_):
        good = words[-1].startswith("torchattacks")
        return subprocess.CompletedProcess(words, int(not good), "" if good else "ERROR: no network\nmore")

    monkeypatch.setattr(peers.subprocess, "run", pip)
    monkeypatch.setattr(peers, "NEEDS", {"torchattacks": (), "pyautoattack": ()})
    there = peers.provide(tmp_path / "peers")
    assert there.missing == {"pyautoattack": "ERROR: no network"}
    assert there.has("torchattacks")
    assert not there.has("pyautoattack")
    assert [p.name for p in (tmp_path / "peers").iterdir()] == ["torchattacks-3.5.1"]  # nothing half-made is left


def test_a_peer_that_fails_is_told_in_one_line():
    there = peers.Environment(folders={"torchattacks": Path()})
    job = {"what": "pgd", "library": "torchattacks", "case": "nothing", "threads": 1, "cifar": ""}
    with pytest.raises(ArenaError, match=r"peer 'torchattacks', pgd on nothing: .*unknown case 'nothing'"):
        there.ask(job)


def test_the_command_line_names_what_it_does_not_know(script, tmp_path, capsys):
    for words, said in (
        (["--cases", "cnm"], "unknown case 'cnm'; did you mean 'cnn'?"),
        (["--parts", "run"], "unknown part 'run'; did you mean 'runs'?"),
        (["--seeds", "x"], "--seeds: expected whole numbers joined by commas, got 'x'"),
        (["--fast", "autoatack"], "unknown attack 'autoatack'"),
        (["--cifar", str(tmp_path / "no.npz")], "--cifar: no such file"),
    ):
        assert script.main([*words, "--no-peers"]) == 2
        assert said in capsys.readouterr().err


def test_what_is_known_is_printed_and_nothing_is_measured(script, tmp_path, capsys):
    words = ["--known", "--cases", "cnn", "--seeds", "0", "-n", "8", "--fast", "staged", "--results", str(tmp_path)]
    assert script.main(words) == 0
    text = capsys.readouterr().out
    assert "- runs, autoattack: not measured (cnn 0)" in text
    assert not list(tmp_path.iterdir())


def test_packed_masks_come_back():
    mask = torch.arange(13) % 3 == 0
    made = measuring.Run("cnn", 0, "x", 1, 0, json.loads(json.dumps({"n": 13, "natural": packed(mask)})))
    assert made.natural.tolist() == mask.tolist()
