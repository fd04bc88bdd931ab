"""What a match can cost is told before it starts, is never exceeded, and is reached where nothing falls."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.cost import Bill, Bound, Forecast, brief, lasting
from arena.foresight import foresee
from arena.home import home
from arena.match import play
from arena.pace import Pace
from arena.plugins import registry
from arena.question import Question, Running
from arena.watch import Silent

MODEL = """
import torch
from arena.datasets import digits, to_float

class Net(torch.nn.Module):
    "Nearest class mean, with a head, a knob, and noise if it is asked for."

    def __init__(self, noise):
        super().__init__()
        self.noise, self.temperature = noise, 1.0
        images = digits()
        x = to_float(images.x_train).flatten(1)
        means = torch.stack([x[images.y_train == k].mean(0) for k in range(10)])
        self.first = torch.nn.Linear(64, 10)
        with torch.no_grad():
            self.first.weight.copy_(2 * means)
            self.first.bias.copy_(-means.square().sum(1))

    def forward(self, x):
        x = x.flatten(1)
        return self.first(x + self.noise * torch.randn_like(x) if self.noise else x) * 2.0 / self.temperature

def calm():
    return Net(0.0)

def noisy():
    return Net(0.05)
"""
SURFACE = """
random = {random}
[heads.first]
path = "first"
[knobs.heat]
path = ""
attribute = "temperature"
kind = "temperature"
values = [2.0, 10.0]
"""
ITERATED = (
    "pgd(steps=4,restarts=2)",
    "lambda_pgd(lam=1,steps=3)",
    "lambda_pgd(lam=inf,steps=3)",
    "knob(steps=4)",
    "joint_t(steps=2)",
    "fab_t(steps=2)",
    "square(queries=9)",
)
PLAIN = "foolbox:LinfPGD(steps=3)"
GO = Running(device="cpu", audit="none")


@pytest.fixture
def ask(tmp_path, arena_home):
    def question(factory: str, vs: tuple[str, ...], eps: str, n: int = 12) -> Question:
        (tmp_path / "mine.py").write_text(MODEL)
        file = tmp_path / f"{factory}.toml"
        file.write_text(SURFACE.format(random=str(factory == "noisy").lower()))
        return Question(f"{tmp_path / 'mine.py'}:{factory}", vs, n=n, eps=eps, surface=file)

    return question


def spent(record, unknown=()):
    rows = [r for r in record["attacks"] if r["name"] not in unknown]
    return sum(r["forwards"] for r in rows), sum(r["backwards"] for r in rows)


class Listening(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.told: list[tuple[float | None, float, bool]] = []

    def say(self, text):
        self.said.append(text)

    def ahead(self, own, after, more):
        self.told.append((own, after, more))


@pytest.mark.parametrize(("factory", "matrix"), [("calm", False), ("calm", True), ("noisy", False)])
def test_what_is_spent_never_exceeds_the_bound(ask, factory, matrix):
    running = Running(device="cpu", audit="none", matrix=matrix)
    watch = Listening()
    n = 6 if factory == "noisy" else 12
    record = play(ask(factory, (*ITERATED, PLAIN), "0.1", n), running, registry(), watch).record
    assert record["worst_case"]["broken_by"]  # points leave early
    forwards, backwards = spent(record, {PLAIN})
    assert 0 < forwards < record["cost"]["forwards"]
    assert 0 < backwards < record["cost"]["backwards"]
    assert record["cost"]["unknown"] == [PLAIN]
    (line,) = [text for text in watch.said if text.startswith("at most")]
    correct = round(record["natural"]["accuracy"] * n / 100)
    assert f"passes (8 attacks, {correct} points), and what nobody knows of {PLAIN}; about" in line
    assert line.endswith("passes/s")
    assert [more for _, _, more in watch.told] == [True] * 7 + [False]
    assert watch.told[-1][:2] == (None, 0.0)


def test_the_bound_is_reached_where_nothing_falls(ask):
    record = play(ask("calm", ITERATED, "1/100000"), GO, registry(), Silent()).record
    assert not record["worst_case"]["broken_by"]
    assert spent(record) == (record["cost"]["forwards"], record["cost"]["backwards"])
    assert record["cost"]["unknown"] == []


def test_what_is_not_played_costs_nothing(ask):
    question = ask("calm", ("square(queries=5)", PLAIN), "0")
    assert play(question, GO, registry(), Silent()).record["cost"] == {"forwards": 0, "backwards": 0, "unknown": []}


def test_a_plan_is_the_bill_of_the_match_and_leaves_no_trace(ask):
    question = ask("calm", (*ITERATED, PLAIN), "0.1")
    home()
    seen = foresee(question, GO, registry())
    assert not [*home().iterdir()]
    assert seen.bill.record() == play(question, GO, registry(), Silent()).record["cost"]
    again = foresee(question, GO, registry())
    assert any("the store has the answer" in text for text in again.remarks)


def test_a_plan_trains_nothing_and_says_what_it_does_not_know(arena_home):
    home()
    seen = foresee(Question("fgaa_sat", ("adaptive",), n=30), GO, registry())
    assert not [*home().iterdir()]
    assert seen.bill.points == 30
    assert "lambda_pgd(lam=inf)" in [b.name for b in seen.bill.bounds]  # the surface is known
    text = " ".join(seen.remarks)
    assert "not trained yet, the match trains it first: arena train fgaa_sat" in text
    assert "natural accuracy is not known" in text


def test_a_plan_compiles_nothing_and_says_so(arena_home, monkeypatch):
    monkeypatch.setattr("arena.search.compile_passes", lambda *_: pytest.fail("compiled"))
    said = "the time told is that of passes that are not compiled"
    question = Question("sat", ("pgd",), n=30)
    assert said in foresee(question, dataclasses.replace(GO, compile=True), registry()).remarks
    assert said not in foresee(question, GO, registry()).remarks


def test_the_forecast_follows_what_stands_and_how_fast_it_really_goes():
    bounds = (Bound("r", "a", (10, 0), False), Bound("r", "b", (20, 0), False), Bound("s", "c", (1, 0), False))
    forecast = Forecast(Bill(bounds, 100), Pace(8, 0.01, 0.03))
    assert forecast.ahead(0, 100) == (pytest.approx(10), pytest.approx(20 + 1), False)
    forecast.took(500, 0, 10.0)  # 5 s of bare passes
    assert forecast.ahead(1, 50) == (pytest.approx(20), pytest.approx(2), False)  # another entry meets all again
    unknown = Bill((*bounds, Bound("t", "plain", None, False)), 100)
    assert forecast.ahead(2, 100)[2] is False
    assert Forecast(unknown, Pace(8, 0.01, 0.03)).ahead(2, 100) == (pytest.approx(1), 0, True)
    assert Forecast(unknown, None).ahead(0, 100) == (None, 0, True)


def test_a_line_of_known_numbers():
    bill = Bill((Bound("r", "a", (101, 101), False), Bound("r", "b", (1800, 900), False)), 493)
    assert bill.line(Pace(8, 0.0001, 0.0003)) == (
        "at most 1.5 M passes (2 attacks, 493 points); about 3 minutes at 7.5k passes/s"
    )
    assert bill.line(None) == "at most 1.5 M passes (2 attacks, 493 points)"


@given(st.integers(1, 10**13))
def test_a_bound_in_brief_is_still_one(number):
    digits, _, unit = brief(number).partition(" ")
    if digits.endswith("k"):
        digits, unit = digits[:-1], "k"
    value = float(digits) * {"": 1, "k": 1e3, "M": 1e6, "G": 1e9}[unit]
    assert number * (1 - 1e-9) <= value <= 1.11 * number


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.2, "a second at most"), (40, "40 seconds"), (119, "2 minutes"), (7300, "2 hours")]
)
def test_durations_in_words(seconds, words):
    assert lasting(seconds) == words
