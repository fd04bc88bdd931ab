"""What is drawn while work goes on."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from arena.cli.progress import EVERY, Lines, Live, Phase, moving, summary, watching

ROW = {"name": "pgd", "roster": "quick", "attempted": 9, "broken": 3, "cumulative_accuracy": 66.7, "status": "ok"}


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def lines() -> tuple[Lines, Clock, list[str]]:
    clock, said = Clock(), []
    return Lines(said.append, clock), clock, said


def test_plain_lines_are_few_and_carry_an_estimate():
    watch, clock, said = lines()
    watch.phase("pgd", 1000, "points")
    for done in range(1, 1001):
        clock.now += 0.02
        watch.advance(done)
    watch.row(ROW)
    assert 3 <= len(said) - 1 <= 1000 * 0.02 / EVERY
    assert re.match(r"pgd: 25\d/1k points, 5\.0 s, about 15 s left", said[0])
    assert said[-1] == "quick / pgd: 3 of 9 broken, 66.7 % left (0.0 s)"


def test_a_phase_without_a_row_ends_with_a_line():
    watch, clock, said = lines()
    watch.phase("train sat", 4, "epochs")
    clock.now += 1
    watch.advance(4, "loss 0.1")
    watch.phase("next", 1, "points")
    assert said == ["train sat: 4/4 epochs, loss 0.1, 1.0 s"]


def test_a_resumed_phase_is_estimated_from_its_own_steps():
    watch, clock, said = lines()
    watch.phase("train sat", 100, "epochs")
    watch.advance(50, "resumed")
    clock.now += 10
    watch.advance(60)
    assert said[-1] == "train sat: 60/100 epochs, 10 s, about 40 s left"


def test_rows_that_are_not_ok_say_why():
    bad = ROW | {"status": "failed", "error": "boom\nbang", "roster": None, "cumulative_accuracy": None, "seconds": 71}
    assert summary(bad) == "pgd: 3 of 9 broken, FAILED: boom bang (1:11)"
    assert "40.0 % alone" in summary(bad | {"robust_accuracy": 40.0})


def test_the_live_bar_leaves_finished_work_and_survives_markup():
    screen = io.StringIO()
    live = Live(Console(file=screen, force_terminal=True, width=100, highlight=False, markup=False))
    live.phase("[bold]train[/x]", 2, "epochs")
    live.advance(1, "[/odd]")
    live.advance(2, "loss [0.1]")
    live.say("kept [here]")
    live.phase("pgd", 9, "points")
    live.advance(9)
    live.row(ROW)
    live.close()
    text = screen.getvalue()
    assert "[bold]train[/x]: 2/2 epochs, loss [0.1]" in text
    assert "kept [here]" in text
    assert "quick / pgd: 3 of 9 broken" in text


def test_quiet_says_nothing(capfd):
    with watching(quiet=True) as watch:
        watch.phase("a", 1, "b")
        watch.say("c")
        watch.row(ROW)
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(capfd):
    with watching(quiet=False) as watch:
        watch.say("a long line " * 20)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == 1


def test_forwards_are_a_share_with_a_time_left_when_it_is_known():
    watch, clock, said = lines()
    watch.phase("apgd_ce", 1_200_000, "forwards")
    clock.now += 1
    watch.advance(600_000, "250 of 500 points done")  # an earlier run's
    clock.now += 5
    watch.advance(630_000, "262 of 500 points done")
    assert said == ["apgd_ce: 52 %, 262 of 500 points done, 6.0 s"]
    clock.now += 5
    watch.advance(720_000, "300 of 500 points done")
    assert said[1:] == ["apgd_ce: 60 %, 300 of 500 points done, 11 s, about 40 s left"]


def test_short_phases_say_nothing_before_their_row():
    watch, clock, said = lines()
    for _ in range(3):
        watch.phase("pgd", 1000, "forwards")
        clock.now += EVERY - 1
        watch.advance(900, "9 of 10 points done")
        watch.row(ROW)
    assert said == ["quick / pgd: 3 of 9 broken, 66.7 % left (0.0 s)"] * 3


def test_a_sweep_is_one_line_but_for_rows_that_are_not_ok():
    watch, _, said = lines()

    def swept(lam, alone, status="ok"):
        options = {"lam": str(lam), "steps": "20"}
        row = {"name": f"lambda_pgd(lam={lam})", "options": options, "robust_accuracy": alone, "status": status}
        return ROW | row | {"cumulative_accuracy": None, "roster": "adaptive", "seconds": 2.0}

    for lam, alone in ((0, 90.0), (1, 40.0), (2, 50.0)):
        watch.phase("lambda_pgd", 10, "forwards")
        watch.row(swept(lam, alone))
    assert said == []
    watch.row(swept(10, 30.0, "failed"))
    watch.row(swept(100, 20.0))
    watch.close()
    assert said[0] == "adaptive / lambda_pgd: 3 rows of a sweep, lowest 40.0 % alone (6.0 s)"
    assert said[1].startswith("adaptive / lambda_pgd(lam=10): 3 of 9 broken, 30.0 % alone, FAILED")
    assert said[2].startswith("adaptive / lambda_pgd(lam=100): 3 of 9 broken")
    assert len(said) == 3


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_bar_cuts_the_note_first_and_never_the_figures(width):
    phase = Phase("train fgaa_sat", 30, "epochs", 0.0)
    phase.advance(12, "loss 0.513, held out: natural 97.5, pgd 61.2 and a lot more to tell of it than fits", 100.0)
    text = moving(phase, 4000.0, width)
    assert len(text) <= width
    assert ("train fgaa_sat" if width >= 80 else "train fg") in text
    assert "12/30 epochs  1:06:40, 1:40:00 left" in text
    assert ("loss 0.513" in text) == (width >= 80)
    long = Phase("apgd_t(steps=100,restarts=5)" * 4, 10, "forwards", 0.0)
    assert "0 %  10 s" in moving(long, 10.0, width)
    assert len(moving(long, 10.0, width)) <= width


def test_time_left_is_that_of_the_whole_match():
    watch, clock, said = lines()
    watch.phase("apgd_ce", 1000, "forwards")
    watch.ahead(40.0, 300.0, False)
    clock.now += EVERY
    watch.advance(10, "0 of 9 points done")  # too early to tell by its own steps: as was told before
    assert said[-1] == "apgd_ce: 1 %, 0 of 9 points done, 5.0 s, about 5:40 left in the match"
    clock.now += EVERY
    watch.advance(510, "4 of 9 points done")
    assert said[-1].endswith("10 s, about 5:05 left in the match")
    watch.row(ROW)
    watch.phase("foolbox:A", 10, "points")
    watch.ahead(None, 0.0, True)
    clock.now += EVERY
    watch.advance(5)
    assert said[-1] == "foolbox:A: 5/10 points, 5.0 s, over 5.0 s left in the match"


def test_the_bar_tells_of_the_whole_match():
    phase = Phase("pgd", 10, "points", 0.0, own=None, after=60.0)
    phase.advance(5, "", 10.0)
    assert "10 s, 1:10 left" in moving(phase, 10.0, 80)
    phase.more = True
    assert "10 s, over 1:10 left" in moving(phase, 10.0, 80)
