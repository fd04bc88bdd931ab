"""What is drawn while work goes on."""

from __future__ import annotations

import io
import re

from rich.console import Console

from arena.cli.progress import EVERY, Lines, Live, summary, watching

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
    assert 3 <= len(said) - 2 <= 1000 * 0.02 / EVERY
    assert said[0] == "pgd: 1000 points"
    assert re.match(r"pgd: 25\d/1000 points, 5\.0 s, about 15 s left", said[1])
    assert said[-1] == "quick / pgd: 3 of 9 broken, 66.7 % left (0.0 s)"


def test_a_phase_without_a_row_ends_with_a_line():
    watch, clock, said = lines()
    watch.phase("train sat", 4, "epochs")
    clock.now += 1
    watch.advance(4, "loss 0.1")
    watch.phase("next", 1, "points")
    assert said == ["train sat: 4 epochs", "train sat: 4/4 epochs, loss 0.1, 1.0 s", "next: 1 points"]


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
    assert "40.0 % stand" in summary(bad | {"robust_accuracy": 40.0})


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
