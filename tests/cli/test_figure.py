"""``arena figure``: curves from logs, by path or by result; what is no log is refused and nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from arena import figures
from arena.cli import run
from arena.trace import LOG, Log, read


def a_log(folder: Path, stages: tuple[int, ...] = (3, 2)) -> Path:
    lines = [
        {"stage": s, "epoch": e + 1, "loss": 2.0 - 0.1 * e, "natural": 50.0 + e, "pgd": 20.0 + e}
        for s, epochs in enumerate(stages)
        for e in range(epochs)
    ]
    folder.mkdir()
    Log(folder, lines).write()
    (folder / "model.json").write_text(json.dumps({"defense": "fgaa_sat"}))
    return folder / LOG


@pytest.mark.parametrize(("suffix", "head"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_curves_are_drawn_from_a_log_or_its_folder(tmp_path, capsys, suffix, head):
    log = a_log(tmp_path / "model")
    for source in (log, log.parent):
        target = tmp_path / f"curves.{suffix}"
        assert run(["figure", "training", str(source), "-o", str(target)]) == 0
        assert target.read_bytes().startswith(head)
        assert str(target) in capsys.readouterr().out
        target.unlink()


def test_what_is_drawn_is_what_was_logged(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "_write", lambda figure, path: drawn.append(figure))
    figures.training({"fgaa_sat": read(a_log(tmp_path / "a"))}, tmp_path / "x.png")
    above, below = drawn[0].axes
    natural, pgd = above.get_lines()[:2]
    assert list(natural.get_ydata()) == [50.0, 51.0, 52.0, 50.0, 51.0]
    assert list(pgd.get_xdata()) == [1, 2, 3, 4, 5]
    assert [t.get_text() for t in above.get_legend().get_texts()] == ["fgaa_sat, natural", "fgaa_sat, PGD"]
    border = [line for line in below.get_lines() if line.get_linestyle() == ":"]
    assert [line.get_xdata()[0] for line in border] == [3.5]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trainin", "LOG", "-o", "x.png"], "unknown figure 'trainin'; did you mean 'training'"),
        (["training", "LOG", "-o", "x.jpeg"], "expected a name that ends in .png, .svg, .pdf"),
        (["training", "no.jsonl", "-o", "x.png"], "no.jsonl: cannot be read"),
        (["training", "3f9a", "-o", "x.png"], "unknown result '3f9a'"),
        (["training", "BAD", "-o", "x.png"], "not a training log"),
    ],
)
def test_bad_input_costs_one_line_and_no_file(tmp_path, arena_home, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"stage": 0}\n')
    log = a_log(tmp_path / "model")
    given = [{"LOG": str(log), "BAD": str(bad)}.get(word, word) for word in arguments]
    assert run(["figure", *given]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


@pytest.mark.filterwarnings("error")
def test_a_training_that_was_not_looked_at_yet_has_a_loss_to_draw(tmp_path):
    lines = [{"stage": s, "epoch": 1, "loss": 2.0} for s in range(2)]
    Log(tmp_path, lines).write()
    assert run(["figure", "training", str(tmp_path), "-o", str(tmp_path / "loss.png")]) == 0
