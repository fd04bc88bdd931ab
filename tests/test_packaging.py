"""What is shipped is what is in the tree, light modules stay light, and setting up fails in plain words."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import tomli

import arena

ROOT = Path(__file__).parent.parent
PROJECT = tomli.loads((ROOT / "pyproject.toml").read_text())
FOLDERS = PROJECT["tool"]["setuptools"]["package-dir"]
HEAVY = {"torch", "torchvision", "numpy", "scipy", "sklearn", "art", "foolbox", "sqlalchemy"}


def test_every_package_folder_is_listed():
    """An unlisted subpackage works from a checkout and is missing from the wheel."""
    found = {
        ".".join((name, *init.parent.relative_to(ROOT / folder).parts))
        for name, folder in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_every_module_is_in_a_package():
    for folder in FOLDERS.values():
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), module


def test_versions_agree():
    assert PROJECT["project"]["version"] == arena.__version__
    assert metadata.version("adversarial-arena") == arena.__version__


def test_types_are_announced_and_shipped():
    for package, patterns in PROJECT["tool"]["setuptools"]["package-data"].items():
        for pattern in patterns:
            assert list((ROOT / FOLDERS[package]).glob(pattern)), f"{package}: {pattern}"
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["arena"]


def test_built_ins_use_the_entry_points_of_everyone():
    points = metadata.distribution("adversarial-arena").entry_points.select(group="arena")
    assert {p.name: p.value for p in points} == PROJECT["project"]["entry-points"]["arena"]


def heavy_after(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted({{m.split('.')[0] for m in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd="/")
    return HEAVY & set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "module", ["arena_defenses", "arena_attacks", "arena.datasets", "arena.plugins", "arena.entries", "arena.threat"]
)
def test_light_modules_import_nothing_heavy(module):
    assert heavy_after(f"import {module}") == set()


def test_discovery_of_the_built_ins_imports_nothing_heavy():
    code = "from arena.plugins import discover; r = discover(lambda d: d == 'adversarial-arena'); assert not r.problems"
    assert heavy_after(code) == set()


def test_heavy_modules_are_seen():
    """The check above can fail."""
    assert heavy_after("import arena.rng") >= {"torch"}


def test_folders_are_not_imported_by_their_bare_names():
    """From the repository's root ``import defenses`` works and yields a second copy of every module."""
    bare = re.compile(r"^\s*(from|import) (defenses|attacks|plugins|tests)\b", re.MULTILINE)
    sources = [p for folder in ("arena", "attacks", "defenses", "tests") for p in (ROOT / folder).rglob("*.py")]
    assert [str(p) for p in sources if bare.search(p.read_text())] == []


def test_only_the_command_line_draws_on_the_terminal():
    """Of every module, where import-linter's contract lists the ones it knows."""
    draws = re.compile(r"^\s*(from|import) (rich|click)\b", re.MULTILINE)
    found = {p.relative_to(ROOT).parts[:2] for p in (ROOT / "arena").rglob("*.py") if draws.search(p.read_text())}
    assert found == {("arena", "cli")}


def test_readme_gives_exactly_two_commands_that_set_up():
    commands = re.findall(r"^bash .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(commands) == 2
    assert all(c.startswith("bash .ci/venv && .venv/bin/") for c in commands)
    assert commands[0] == "bash .ci/venv && .venv/bin/arena match fgaa_sat --vs autoattack,adaptive"


# The set-up script, on machines that lack something. Programs are stand-ins; nothing is installed.


@pytest.fixture
def machine(tmp_path):
    """A checkout and a PATH with only what a set-up needs; add programs with ``machine.has(name, script)``."""
    return Machine(tmp_path)


class Machine:
    def __init__(self, folder: Path) -> None:
        self.checkout, self.bin, self.log = folder / "check out", folder / "bin", folder / "log"
        (self.checkout / ".ci").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(ROOT / ".ci" / "venv", self.checkout / ".ci")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        for tool in ("bash", "cat", "cut", "dirname", "sha256sum", "mkdir", "cp", "touch", "chmod"):
            path = shutil.which(tool)
            assert path
            (self.bin / tool).symlink_to(path)
        self.has("id", "echo 0")

    def has(self, name: str, script: str) -> None:
        program = self.bin / name
        program.write_text(f"#!/bin/bash\n{script}\n")
        program.chmod(0o755)

    def has_python(self, name: str, version: str, venv: bool = True) -> None:
        """A Python that knows its version, whether it has ensurepip, and makes an environment of itself."""
        marker = self.bin / f"{name}.venv"
        if venv:
            marker.touch()
        self.has(
            name,
            f"""case "$*" in
            *version_info*) echo {version};;
            *ensurepip*) [ -e '{marker}' ];;
            --version) echo Python {version}.0;;
            *venv*--clear*) mkdir -p .venv/bin; cp "$0" .venv/bin/python; echo "venv {name}" >>'{self.log}';;
            *"-m pip"*) echo pip >>'{self.log}'; [ ! -e '{self.bin}/offline' ];;
            *) exit 0;;
            esac""",
        )

    def set_up(self) -> subprocess.CompletedProcess[str]:
        script = str(self.checkout / ".ci" / "venv")
        return subprocess.run(
            [str(self.bin / "bash"), script], env={"PATH": str(self.bin)}, capture_output=True, text=True, cwd="/"
        )

    def did(self) -> list[str]:
        done = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return done


needs_bash = pytest.mark.skipif(os.name != "posix", reason="the set-up script is for Debian and Ubuntu")


@needs_bash
def test_the_newest_python_makes_the_environment_once(machine):
    machine.has_python("python3", "3.10")
    machine.has_python("python3.11", "3.11")
    machine.has_python("python3.12", "3.12")
    machine.has_python("python3.13", "3.13", venv=False)
    first = machine.set_up()
    assert (first.returncode, first.stdout) == (0, "")
    assert all(line.startswith("venv: ") for line in first.stderr.splitlines())
    assert machine.did() == ["venv python3.12", "pip"]
    again = machine.set_up()
    assert (again.returncode, again.stderr, machine.did()) == (0, "", [])
    with (machine.checkout / "pyproject.toml").open("a") as project:
        project.write("\n")
    assert machine.set_up().returncode == 0
    assert machine.did() == ["pip"]


@needs_bash
def test_a_moved_checkout_gets_a_new_environment(machine):
    machine.has_python("python3", "3.11")
    machine.set_up()
    machine.did()
    machine.checkout = machine.checkout.rename(machine.checkout.with_name("moved"))
    assert machine.set_up().returncode == 0
    assert machine.did() == ["venv python3", "pip"]


@needs_bash
def test_a_failed_installation_is_tried_again(machine):
    machine.has_python("python3", "3.11")
    (machine.bin / "offline").touch()
    failed = machine.set_up()
    assert failed.returncode == 1
    assert failed.stderr.splitlines()[-1] == "venv: pip could not install arena; its reason is above"
    (machine.bin / "offline").unlink()
    machine.did()
    assert machine.set_up().returncode == 0
    assert machine.did() == ["pip"]


@needs_bash
@pytest.mark.parametrize(
    ("pythons", "seen"),
    [({"python3": "3.10"}, "python3 is 3.10"), ({}, "there is no python3"), ({"python3": "2.7"}, "2.7")],
)
def test_an_old_python_is_refused_in_one_line(machine, pythons, seen):
    for name, version in pythons.items():
        machine.has_python(name, version)
    done = machine.set_up()
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("venv: arena needs Python 3.11 or newer (")
    assert seen in done.stderr


@needs_bash
def test_a_python_without_ensurepip_gets_it_from_apt(machine):
    machine.has_python("python3", "3.11", venv=False)
    machine.has("apt-get", f"""echo "apt-get $*" >>'{machine.log}'""")
    assert machine.set_up().returncode == 0
    assert machine.did() == ["apt-get -qq update", "apt-get -qq -y install python3.11-venv", "venv python3", "pip"]


@needs_bash
def test_without_rights_the_missing_package_is_named_in_one_line(machine):
    machine.has_python("python3", "3.12", venv=False)
    machine.has("apt-get", "exit 1")
    machine.has("id", "echo 1000")
    done = machine.set_up()
    assert done.returncode == 1
    line = "venv: python3 cannot make environments: run 'sudo apt-get install python3.12-venv' first\n"
    assert done.stderr == line
    machine.has("sudo", f"""echo "sudo $*" >>'{machine.log}'""")
    assert machine.set_up().returncode == 0
    assert "sudo -n apt-get -qq -y install python3.12-venv" in machine.did()


@needs_bash
def test_all_checks_run_the_readmes_own_test_command(tmp_path):
    (tmp_path / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", tmp_path / ".ci")
    log = tmp_path / "log"
    (tmp_path / ".ci" / "venv").write_text(f"echo venv >>'{log}'\n")
    (tmp_path / "README.md").write_text("```\nbash .ci/venv && .venv/bin/pytest -n 2 --from-readme\n```\n")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for tool in ("pytest", "ruff", "mypy", "lint-imports"):
        program = tmp_path / ".venv" / "bin" / tool
        program.write_text(
            f'#!/bin/bash\necho "{tool} $*" >>"{log}"\n[ -d "$ARENA_HOME" ] && [ ! -e "{tmp_path}/{tool}.bad" ]\n'
        )
        program.chmod(0o755)
    run = ["bash", str(tmp_path / ".ci" / "run")]
    assert subprocess.run(run, cwd="/", capture_output=True).returncode == 0
    assert log.read_text().splitlines() == [
        "venv",
        "pytest -n 2 --from-readme",
        "ruff check",
        "ruff format --check",
        "mypy arena defenses attacks",
        "lint-imports ",
    ]
    for tool in ("pytest", "ruff", "mypy", "lint-imports"):
        (tmp_path / f"{tool}.bad").touch()
        assert subprocess.run(run, cwd="/", capture_output=True).returncode != 0, tool
        (tmp_path / f"{tool}.bad").unlink()
    (tmp_path / "README.md").write_text("no command\n")
    assert subprocess.run(run, cwd="/", capture_output=True).returncode != 0


def test_the_license_is_the_one_that_is_declared():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License")
    assert PROJECT["project"]["license"] == "MIT"
