"""The findings: laws of what is measured, on nets whose answers are known, and how verdicts come about."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arena.plugins import registry
from arena.selection import Select
from arena.surface import Gate, Head, Selection, Surface
from arena.threat import Threat

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parents[1]))
from findings import alignment, bench, judging, masks, oddities, page
from loading import as_module

K, SIDE = 4, 3


class Decoder(nn.Module):
    """Head 1 is linear; the output names the class whose mask was applied and sees nothing else."""

    def __init__(self, decode: bool = True):
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.head = nn.Linear(SIDE * SIDE, K)
        self.head.weight.data = torch.randn(K, SIDE * SIDE, generator=generator)
        self.head.bias.data = torch.zeros(K)
        self.select = Select()
        self.decode = decode

    def forward(self, x):
        scores = self.head(x.flatten(1))
        mask = self.select(scores, torch.eye(K))
        return 5 * mask if self.decode else scores + 0 * mask


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.fc = nn.Identity(), nn.Linear(SIDE * SIDE, K)

    def forward(self, x):
        self.gate(x.flatten(1).mean(1))
        return self.fc(x.flatten(1))


SURFACE = Surface(heads={"head1": Head("head")}, selections={"mask1": Selection("select", scores="head1")})


def subject(model, surface=SURFACE, n=24, eps="0.3"):
    generator = torch.Generator().manual_seed(7)
    x = torch.rand(n, 1, SIDE, SIDE, generator=generator)
    model = model.eval().requires_grad_(False)
    y = model(x).argmax(1)
    threat = Threat.parse("Linf", eps)
    return bench.Subject("planted", model, surface, x, y, torch.arange(n), threat, K, registry())


def test_a_net_that_only_decodes_the_mask_is_told_so():
    s = subject(Decoder())
    assert masks.forced(s, ["mask1"]).tolist() == [1.0] * len(s.y)
    assert masks.agreement(s, torch.rand(50, 1, SIDE, SIDE)).all()


def test_a_net_that_ignores_its_mask_is_not():
    s = subject(Decoder(decode=False))
    assert masks.forced(s, ["mask1"]).tolist() == [0.0] * len(s.y)


def test_only_an_attack_on_the_head_breaks_a_net_that_decodes_its_mask():
    # the output is flat between two masks: its gradient is exactly zero, the head's is not
    s = subject(Decoder())
    x_adv, standing = s.attack("pgd(steps=10,random_start=false)")
    assert standing.all()
    assert torch.equal(x_adv, s.x)
    x_adv, standing = s.attack("pgd(steps=10,loss=margin,head=head1,random_start=false)")
    assert not standing.any()
    assert s.threat.inside(s.x, x_adv).all()
    assert torch.equal(s.right(x_adv), standing)


def test_entries_meet_what_the_ones_before_left_and_only_right_points():
    s = subject(Decoder())
    s.y[:3] = (s.y[:3] + 1) % K  # three natural mistakes
    rows = torch.arange(len(s.y)) % 2 == 0
    assert bench.after(s, ["fgsm(random_start=false)"], rows=rows).tolist() == (rows & s.right(s.x)).tolist()
    assert not bench.after(s, ["fgsm", "pgd(steps=10,loss=margin,head=head1)"]).any()
    _, standing = s.attack("fgsm(random_start=false)", everyone=True)
    assert standing.tolist() == s.right(s.x).tolist()  # the zero gradient of a mistake leaves it a mistake


def test_finite_differences_find_a_known_gradient_without_asking_for_one():
    s = subject(Decoder())
    real = torch.zeros_like(s.x)
    for i, (row, y) in enumerate(zip(s.x, s.y, strict=True)):
        scores = s.model.head(row.flatten())
        other = scores.index_fill(0, y, -torch.inf).argmax()
        real[i] = (s.model.head.weight[other] - s.model.head.weight[y]).view_as(row)
    found = oddities.differences(s, 1, reach=1e-3)
    assert bench.cosine(found, real).median() > 0.999
    assert torch.allclose(found, real, atol=2e-2)
    assert not oddities.differences(s, 0).any()  # the output does not move until the mask does


def test_the_clipped_share_of_a_known_gradient():
    x = torch.tensor([[0.0, 0.0, 1.0, 0.5], [0.9, 0.5, 0.5, 0.5]]).view(2, 1, 2, 2)
    outward = torch.tensor([[-1.0, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]]).view_as(x)
    # of four moves two are lost whole; of the one move of the second image half is
    assert alignment.clipped(x, outward, 0.2).tolist() == pytest.approx([0.5, 0.5])
    assert alignment.clipped(x, -(2 * x - 1), 0.2).tolist() == pytest.approx([0.0, 0.0], abs=1e-6)
    moved = (x + 0.2 * outward.sign()).clamp(0, 1)
    assert alignment.energy(x, moved, 0.2).tolist() == pytest.approx([0.5, 1 / 16])


def test_alignment_with_the_image_loses_every_saturated_pixel():
    x = (torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    assert alignment.clipped(x, 2 * x - 1, 0.1).tolist() == [1.0] * 5


def test_gates_are_read_of_the_points_given():
    s = subject(Gated(), Surface(gates={"g": Gate("gate")}))
    (weight,) = s.read(s.x * 0 + 0.25).gates.values()
    assert weight.tolist() == pytest.approx([0.25] * len(s.y))


# -- verdicts ----------------------------------------------------------------------------------------------------------


def rows(*means, n=200):
    return np.array([[100.0] * round(n * m / 100) + [0.0] * (n - round(n * m / 100)) for m in means])


def test_a_verdict_needs_every_seed_and_the_interval():
    share = {"kind": "share"}
    clear, other, torn = rows(80, 82, 84), rows(20, 22, 24), rows(70, 45, 75)
    assert judging.above("x", clear, 50, **share).state() == "holds"
    assert judging.below("x", clear, 50, **share).state() == "fails"
    assert judging.above("x", other, 50, **share).state() == "fails"
    assert judging.above("x", torn, 50, **share).state() == "open"  # one seed differs
    assert judging.above("x", rows(51), 50, **share).state() == "open"  # the interval holds 50
    hold, fail, wait = (judging.above("x", r, 50) for r in (clear, other, torn))
    assert judging.verdict([hold, hold]) == "confirmed"
    assert judging.verdict([hold, wait]) == "undecided"
    assert judging.verdict([hold, wait, fail]) == "refuted"
    assert judging.verdict([]) == "not measured"


def test_no_spread_is_not_certainty():
    everything, nothing = rows(100, 100), rows(0, 0)
    low, high = judging.above("x", everything, 99, kind="share").interval()
    assert (round(low, 1), high) == (98.1, 100.0)  # Wilson's at 200 of 200
    low, high = judging.above("x", everything - everything, 0, kind="difference").interval()
    assert low == pytest.approx(-1.88, abs=0.1)
    assert high == pytest.approx(1.88, abs=0.1)
    assert judging.above("x", nothing, 0, kind="difference").state() == "open"


@given(st.floats(-99, 99), st.integers(0, 5))
def test_turning_a_criterion_around_turns_its_state(bound, shift):
    values = rows(20 + shift * 10, 30 + shift * 10) - 50
    turned = {"holds": "fails", "fails": "holds", "open": "open"}
    assert judging.below("x", values, bound).state() == turned[judging.above("x", values, bound).state()]


def test_a_gap_wider_than_the_twins_is_not_enough():
    # targeted attacks leave more than PGD does, everywhere: then nothing is hidden from the cross-entropy
    left = {"pgd": 10, "targeted": 40}
    series = {f"{d} {k}": rows(v)[0] for d in alignment.ALIGNED for k, v in left.items()}
    series |= {f"{alignment.twin(d)} {k}": rows(3 * v - 20)[0] for d in alignment.ALIGNED for k, v in left.items()}
    data = judging.Data({0: series})
    assert judging.verdict(alignment.masked_criteria(data)) == "refuted"


def finding(**changes):
    made = {
        "name": "planted",
        "title": "A title",
        "claim": "A claim.",
        "predicted": "A prediction.",
        "how": "So.",
        "subjects": (),
        "measure": lambda bench: {},
        "criteria": lambda data: [judging.above("a number", data.rows("a"), 50, kind="share")],
        "tables": lambda data: [judging.Table([["what", "how much"], ["a", data.cell("a")]])],
        "needs": ("no_such_attack",),
    }
    return judging.Finding(**{**made, **changes})


def answer(seed, mean):
    series = {"a": rows(mean)[0].tolist()}
    return {"finding": "planted", "train_seed": seed, "series": series, "models": {"rt": "ab" * 32}, "seconds": 1.0}


def test_the_page_says_what_the_numbers_say(tmp_path):
    settings = {"command": "c", "n": 200, "seeds": "0,1", "eps": "0.2"}
    more = {"arena": "0", "torch": "1"}
    out = tmp_path / "findings.md"
    for means, word in (((80, 90), "confirmed"), ((10, 20), "refuted"), ((80, 20), "undecided")):
        found = {seed: answer(seed, m) | more for seed, m in enumerate(means)}
        drawn = finding(figure=lambda figure, data: figure.add_subplot().plot([1, 2]), caption="A figure.")
        assert page.write(out, [drawn], {"planted": found}, settings) == {"planted": word}
        text = out.read_text()
        assert f"| 1. A title | A prediction. | **{word}** |" in text
        assert "| finding | predicted | verdict |\n|---|---|---|\n" in text  # words are not set to the right
        assert "| what | how much |\n|---|---:|\n" in text
        assert f"{np.mean(means):.1f} ({min(means):.1f} to {max(means):.1f})" in text
        assert (tmp_path / "figures" / "planted.svg").read_text().startswith("<?xml")
    assert page.write(out, [finding()], {}, settings) == {"planted": "not measured"}
    assert "needs the attack `no_such_attack`" in out.read_text()


def test_what_is_measured_is_not_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path))
    calls = []

    def measure(made):
        calls.append(made.train_seed)
        return {"a": [1.0, 2.0]}

    for seed in (0, 1):
        made = bench.Bench(registry(), judging_watch(), 2, seed)
        assert not made.known(finding(measure=measure)).exists()
        first = made.answer(finding(measure=measure))
        assert made.answer(finding(measure=measure)) == first
        assert made.answer(finding(measure=measure, version="2"))["series"] == first["series"]
    assert calls == [0, 0, 1, 1]
    assert made.missing(finding()) == ["no_such_attack"]


def judging_watch():
    from arena.watch import Silent

    return Silent()


@pytest.fixture(scope="module")
def command():
    return as_module(Path(__file__).parents[2] / "benchmarks" / "findings.py")


def test_every_finding_is_whole(command):
    names = [f.name for f in command.FINDINGS]
    assert len(set(names)) == len(names)
    planned = bench.Bench(registry(), judging_watch(), 8, 0)
    for f in command.FINDINGS:
        assert bool(f.figure) == bool(f.caption), f.name
        for text in f.subjects:
            assert planned.plan(text).preset is not None, (f.name, text)  # can be trained where it is missing
    shared = {}
    for f in command.FINDINGS:  # findings that share a measurement share what it needs
        assert shared.setdefault(f.measured or f.name, (f.measure, f.subjects)) == (f.measure, f.subjects), f.name
