"""Help, listing and standings: fast, complete, without torch; the exit codes of the program itself."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
from click.testing import CliRunner

from arena.cli import COMMANDS
from arena.cli import arena as group

HEAVY = ["torch", "torchvision", "numpy", "sklearn", "scipy", "art", "foolbox"]
PROBE = f"""
import sys
from arena.cli import run
code = run(sys.argv[1:])
heavy = [m for m in {HEAVY!r} if m in sys.modules]
print(heavy, file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "line",
    [
        "--help",
        *(f"{c} --help" for c in COMMANDS),
        "--version",
        "list",
        "list --json",
        "data list",
        "plugins list",
        "plugins doctor",
        "leaderboard",
        "leaderboard --format json",
        "show 0123",
        "mtch",
        "match --vs",
        "match sat --precision fp16",
    ],
)
def test_light_commands_import_nothing_heavy(plant, record, line):
    plant(record)
    done = subprocess.run([sys.executable, "-c", PROBE, *line.split()], capture_output=True, text=True, timeout=60)
    assert done.returncode in (0, 2), done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself(name):
    done = CliRunner().invoke(group, [name, "--help"])
    assert done.exit_code == 0
    assert max(len(line) for line in done.output.splitlines()) <= 80
    assert "Examples:" in done.output
    for example in re.findall(r"arena (\w+)", done.output.split("Examples:")[1].split("Options:")[0]):
        assert example in COMMANDS


def test_help_shows_the_overview_and_the_exit_codes():
    text = CliRunner().invoke(group, ["--help"]).output
    assert all(f"  {name} " in text for name in COMMANDS)
    assert "Exit codes: 0 done; 1 a threshold failed" in text


def test_the_program_exits_with_the_code(tmp_path):
    done = subprocess.run([sys.executable, "-m", "arena", "show", "abc"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "arena: error: unknown result 'abc'; the store is empty\n"


def test_ctrl_c_exits_with_three_and_one_line():
    code = "import time, arena.cli.show as s\nfrom arena.cli import main\nimport arena.store\n"
    code += "def slow(): print('here', flush=True); time.sleep(60)\narena.store.open_store = slow\nmain()"
    running = subprocess.Popen(
        [sys.executable, "-c", code, "show", "abc"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert running.stdout is not None
    assert running.stdout.readline() == "here\n"
    running.send_signal(signal.SIGINT)
    _, err = running.communicate(timeout=30)
    assert (running.returncode, err) == (3, "arena: interrupted; the same command continues\n")


def test_a_closed_pipe_is_no_bug(plant, record):
    plant(record)
    code = f"{sys.executable} -m arena list --json | head -c 10"
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True, env=os.environ)
    assert "Traceback" not in done.stderr


def test_the_reader_may_go_early(plant, record):
    plant(record)
    for line in ("list --json", "list", "show 0123"):
        code = "set -o pipefail; "
        code += f"{sys.executable} -c 'import time; from arena.cli import main; time.sleep(1); main()'"
        done = subprocess.run(["bash", "-c", f"{code} {line} | true"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("line", [(), ("plugins",)])
def test_a_group_alone_prints_its_help(arena, line):
    done = arena(*line)
    assert done.code == 2
    assert done.err.startswith("Usage: arena")
    assert len(done.err.splitlines()) > 10
    assert "error" not in done.err


def test_a_second_ctrl_c_is_ignored():
    code = "import atexit, os, signal, sys\nimport arena.cli as c\n"
    code += "def again():\n    os.kill(os.getpid(), signal.SIGINT)\n    print('ended')\n"
    code += "atexit.register(again)\nc.arena.main = lambda **k: (_ for _ in ()).throw(KeyboardInterrupt)\nc.main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stdout) == (3, "ended\n")
    assert done.stderr == "arena: interrupted; the same command continues\n"


def test_piped_tables_are_wide_and_have_no_trailing_blanks(arena, monkeypatch):
    monkeypatch.delenv("COLUMNS")
    lines = arena("list").out.splitlines()
    assert 100 < max(map(len, lines)) <= 120
    assert not [line for line in lines if line != line.rstrip()]


def test_leaderboard_without_results(arena):
    done = arena("leaderboard")
    assert done.code == 0
    assert "No results yet in" in done.out
    assert arena("leaderboard", "--format", "json").out == "[]\n"


def test_leaderboard_table(arena, plant, record):
    plant(record)
    other = json.loads(json.dumps(record)) | {"id": "f" * 12, "defense": "sat"}
    other["model"]["id"] = "other"
    other["worst_case"] = {"robust_accuracy": 61.25, "ci95": [56.4, 65.9]}
    plant(other)
    third = json.loads(json.dumps(other)) | {"id": "e" * 12, "defense": "[red]x", "rosters": []}
    third["model"]["id"] = "third"
    plant(third)
    short = arena("leaderboard").out
    assert "1 result without complete rosters: --unranked shows it" in short
    assert "autoattack not played" not in short
    text = arena("leaderboard", "--unranked").out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "digits · Linf eps 0.2 · n 400 · cnn"
    assert lines[1] == "rank defense nat. worst (95 %) auto adapt verdict passes date"
    assert lines[3] == "1 sat 97.5 61.2 (56.4-65.9) 67.5 35.0 not audited 466k 2026-11-20"
    assert lines[4] == "2 fgaa_sat 97.5 34.5 (30.0-39.3) 67.5 35.0 not audited 466k 2026-11-20"
    assert lines[5] == "ids: sat ffffffff, fgaa_sat 01234567"
    rest = " ".join(lines[6:])
    assert (
        rest == "not ranked: [red]x (eeeeeeee): worst case 61.2 (56.4-65.9); autoattack not played; adaptive not played"
    )
    assert "ranks are among all 3 results" in arena("leaderboard", "--defense", "sat").out
    shown = arena("leaderboard", "--defense", "fgaa_sat", "--format", "csv").out
    assert [r["rank_best"] for r in csv.DictReader(io.StringIO(shown))] == ["2"]


def test_leaderboard_filters_and_formats(arena, plant, record):
    plant(record)
    for line, found in (
        ("--eps 1/5", 1),
        ("--norm linf", 1),
        ("-n 400", 1),
        ("--dataset digits", 1),
        ("-n 3", 0),
        ("--eps 0.3", 0),
        ("--dataset mnist", 0),
    ):
        assert len(json.loads(arena("leaderboard", "--format", "json", *line.split()).out)) == found
    for line, message in (
        ("-n 3", "No result of n '3' (400 exist)"),
        ("--dataset mnist", "No result of data set 'mnist' (digits exist)"),
        ("--norm L2", "No result of norm 'L2' (Linf exist)"),
        ("--defense sat", "No result of defense 'sat' (fgaa_sat exist)"),
        ("--eps 0.3", "No result fits all filters in"),
    ):
        assert arena("leaderboard", *line.split()).out.startswith(message)
    assert "| 1 | fgaa_sat |" in arena("leaderboard", "--format", "md").out
    assert arena("leaderboard", "--eps", "q").refusal.startswith("eps 'q': expected a number")
    assert arena("leaderboard", "--norm", "L7").refusal == "unknown norm 'L7'; did you mean 'L2'?"
    assert "'html' is not one of" in arena("leaderboard", "--format", "html").refusal


def test_the_leaderboard_of_own_models_has_ids_and_no_dangling_separator(arena, plant, record, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    record["asked"]["backbone"] = None
    plant(record)
    lines = arena("leaderboard").out.splitlines()
    assert lines[0] == "digits · Linf eps 0.2 · n 400"
    assert lines[3].split()[-2:] == ["2026-11-20", "01234567"]


def test_lists(arena):
    text = arena("list").out
    assert re.match(r"\d+ defenses, \d+ attacks, \d+ rosters, \d+ datasets, \d+ backbones\n", text)
    assert all(name in text for name in ("fgaa_sat", "pgd", "digits", "cnn"))
    data = json.loads(arena("list", "--json").out)
    assert sorted(data) == ["attacks", "backbones", "datasets", "defenses", "rosters"]
    (digits,) = (d for d in json.loads(arena("list", "datasets", "--json").out) if d["name"] == "digits")
    assert (digits["name"], digits["eps"], digits["origin"].split()[0]) == ("digits", "0.2", "adversarial-arena")
    sat = next(d for d in data["defenses"] if d["name"] == "fgaa_sat")
    assert sat["options"]["lam"]["default"] == 2
    assert sat["twin"] == "sat"
    assert max(map(len, arena("list", "attacks").out.splitlines())) <= 80
    assert arena("list", "defence").refusal == "unknown kind or name 'defence'; did you mean 'defenses'?"
    assert "a module's result is shown beside that of its recipe alone" in " ".join(text.split())
    assert sat["recipe_name"] == "sat"
    assert sat["exposes"]["heads"] == ["head1", "head2"]


@pytest.mark.parametrize("width", [80, 120])
def test_the_list_of_defenses_shows_module_recipe_heads_gates_and_paper(arena, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    lines = arena("list", "defenses").out.splitlines()
    heads = lines[0].split()
    assert heads == ["defenses", "module", "recipe", "heads", "gates", *(["paper"] if width == 120 else []), "about"]
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line for line in lines if line[:1].strip()}
    assert rows["fsr_trades"].split()[:5] == ["fsr_trades", "fsr", "trades", "3", "1"]
    assert rows["advmix"].split()[:5] == ["advmix", "-", "advmix", "0", "0"]
    text = " ".join(" ".join(lines).split())
    assert ("Kim et al., CVPR 2023" in rows["fsr_sat"]) if width == 120 else ("[Madry et al., ICLR 2018]" in text)
    assert "random]" in text


def test_what_an_author_does_not_say_is_a_question_mark(monkeypatch, capsys):
    from arena.cli import listing
    from arena.cli.console import out
    from arena.plugins import Registered
    from arena.specs import DefenseSpec

    monkeypatch.setenv("COLUMNS", "80")
    entry = Registered(DefenseSpec("odd", "a thing", "m:b", "m:r", surface="m:s"), "mine", "1")
    listing._draw_defenses(out(), [entry])
    shown = capsys.readouterr().out
    row = next(line for line in shown.splitlines() if "odd" in line)
    assert row.split()[:5] == ["mine/odd", "-", "odd", "?", "?"]
    assert "?: its author does not say" in shown


def test_papers_are_shortened():
    from arena.cli.listing import short

    assert short("A et al., On X, Y and Z, ICLR 2018") == "A et al., ICLR 2018"
    assert short("EWAS: Element-Wise Activation Scaling") == "EWAS"
    assert short("GAIE, as reported by DeepDefense") == "GAIE"
    assert short("") == ""


def test_one_item_is_described_in_full(arena):
    out = arena("list", "fgaa_sat").out
    text = " ".join(out.split())
    assert out.startswith("fgaa_sat · defense · adversarial-arena")
    assert "beside: sat, the same recipe without the module" in text
    assert "lam 2" in text
    assert "paper: " in text
    assert "module: fgaa; recipe: sat" in text
    assert "heads head1, head2; selections mask1, mask2" in text
    assert "published (CIFAR-10, ResNet-18): natural 86.19 %" in text
    assert "exposed to attacks: the logits alone" in arena("list", "sat").out
    random = " ".join(arena("list", "sap_sat").out.split())
    assert "knobs frac, draws, on; random at test time" in random
    assert "arena match 'fgaa_sat(lam=2)' --vs autoattack,adaptive" in text
    assert max(map(len, out.splitlines())) <= 80
    assert "steps 100" in " ".join(arena("list", "apgd_ce").out.split())
    assert "at most 9000 passes an example, unless --budget says otherwise" in " ".join(
        arena("list", "adaptive").out.split()
    )
    assert "passes an example" not in arena("list", "autoattack").out
    assert "default threat model: Linf eps 0.2; default backbone: cnn" in arena("list", "digits").out
    one = json.loads(arena("list", "autoattack", "--json").out)
    assert (one["kind"], one["name"]) == ("roster", "autoattack")
    assert arena("list", "fgaa_st").refusal == "unknown kind or name 'fgaa_st'; did you mean 'fgaa_sat'?"


def test_every_item_can_be_described(arena):
    for entries in json.loads(arena("list", "--json").out).values():
        for entry in entries:
            assert "example: arena match" in arena("list", entry["name"]).out
