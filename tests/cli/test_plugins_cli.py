"""``arena plugins``: packages made on the spot, good and bad."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAD = "from arena.hookspecs import hookimpl\nfrom arena.specs import AttackSpec, DefenseSpec\n"
GOOD = (
    HEAD
    + """
@hookimpl
def arena_register_attacks():
    return [AttackSpec("mine", "one", ("Linf",), run="x:y")]
"""
)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Put a package with one plugin module on the path; ``run`` then asks a fresh process."""

    def put(name: str, source: str, entry: str | None = None) -> None:
        module = name.replace("-", "_")
        (tmp_path / f"{module}.py").write_text(source)
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[arena]\n{entry or name} = {module}\n")

    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return put


def ask(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "arena", *line], capture_output=True, text=True, timeout=120)


def test_nothing_is_wrong_here(arena):
    done = arena("plugins", "doctor")
    assert (done.code, done.out.splitlines()[-1]) == (0, "nothing is wrong")
    assert "adversarial-arena" in arena("plugins", "list").out
    assert arena("plugins", "docto").refusal == "unknown command 'plugins docto'; did you mean 'plugins doctor'?"


def test_the_doctor_names_every_trouble(install):
    install("good-one", GOOD)
    install("bad-import", "import nothing_of_that_name")
    install("bad-hook", HEAD + "@hookimpl\ndef arena_register_atacks():\n    return []\n")
    install("bad-raise", HEAD + "@hookimpl\ndef arena_register_defenses():\n    raise ValueError('oh [no]')\n")
    install("slow-one", "import torch\n" + GOOD)
    done = ask("plugins", "doctor")
    text = " ".join(done.stdout.split())
    assert (done.returncode, done.stderr) == (1, "")
    assert "ok good-one 1.0 (good-one)" in text
    assert "problem bad-import 1.0" in text
    assert "slow slow-one 1.0" in text
    assert "problem bad-import 1.0 (bad-import) ! import of bad_import raised ModuleNotFoundError" in text
    assert "arena_register_atacks" in text
    assert "arena_register_attacks" in text
    assert "arena_register_defenses raised ValueError: oh [no]" in text
    assert "slow slow-one 1.0 (slow-one) ! importing it imports torch" in text
    assert "attack 'mine' comes from good-one 1.0, slow-one 1.0: the bare name is refused" in text
    assert "5 problems" in text
    assert text.count("bad-import") == 2  # distribution and entry point, once each


def test_one_bad_plugin_stops_nothing(install):
    install("bad-import", "import nothing_of_that_name")
    install("good-one", GOOD)
    listed = ask("list", "attacks")
    assert listed.returncode == 0
    assert "good-one/mine" in listed.stdout
    assert "pgd" in listed.stdout
    assert listed.stderr == "arena: 1 plugin problem: see 'arena plugins doctor'\n"
    plugins = ask("plugins", "list")
    assert "good-one" in plugins.stdout
    assert "1 attack" in plugins.stdout


def test_plugins_can_be_left_out(install, monkeypatch):
    install("good-one", GOOD)
    monkeypatch.setenv("ARENA_PLUGINS_OFF", "1")
    assert "mine" not in ask("list", "attacks").stdout
