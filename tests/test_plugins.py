"""Discovery: each way a package can be wrong is named, left out, and harms nobody else."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from arena import hookspecs
from arena.errors import ArenaError
from arena.plugins import BUILT_IN, Registry, discover

ATTACK = """
    from arena.hookspecs import hookimpl
    from arena.specs import AttackSpec
    @hookimpl
    def arena_register_attacks():
        return [AttackSpec("{name}", "an attack", ("Linf",), run="nowhere:run")]
"""

Install = Callable[..., str]


@pytest.fixture
def install(tmp_path, monkeypatch) -> Install:
    """Put a distribution with one module and one entry point on the path; returns the module's name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("ARENA_PLUGINS_OFF", raising=False)
    made: list[str] = []

    def install(distribution: str, code: str, entry_point: str = "", value: str = "", version: str = "1.0") -> str:
        module = f"fake_{distribution.replace('-', '_')}_{len(list(tmp_path.iterdir()))}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(code))
        info = tmp_path / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
        points = info / "entry_points.txt"
        before = points.read_text() if points.exists() else "[arena]\n"
        points.write_text(f"{before}{entry_point or distribution} = {value or module}\n")
        made.append(module)
        return module

    yield install
    for module in made:
        sys.modules.pop(module, None)


def found(*distributions: str) -> Registry:
    return discover(lambda d: d in distributions)


def problems(registry: Registry) -> list[str]:
    return [str(p) for p in registry.problems]


BAD = {
    "import_error": (
        "import no_such_module_at_all",
        "raised ModuleNotFoundError: No module named 'no_such_module_at_all'",
    ),
    "syntax_error": ("def (", "raised SyntaxError: "),
    "exit_at_import": ("import sys\nsys.exit(3)", "raised SystemExit: 3"),
    "misspelt": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_atacks():
            return []
        """,
        "did you mean 'arena_register_attacks'?",
    ),
    "unknown_argument": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_match_finished(record, mood):
            pass
        """,
        "hook refused: ",
    ),
    "unmarked": (
        "def arena_register_attacks():\n    return []",
        "arena_register_attacks is never called: mark it with @hookimpl",
    ),
    "none": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_attacks():
            pass
        """,
        "arena_register_attacks returned nothing (None), expected an iterable",
    ),
    "not_iterable": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_attacks():
            return 5
        """,
        "arena_register_attacks returned int, expected an iterable",
    ),
    "text": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_attacks():
            return "pgd"
        """,
        "arena_register_attacks returned str, expected an iterable",
    ),
    "raises": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_attacks():
            raise ValueError("two\\nlines")
        """,
        "arena_register_attacks raised ValueError: two lines",
    ),
    "exits": (
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_register_attacks():
            raise SystemExit(1)
        """,
        "arena_register_attacks raised SystemExit: 1",
    ),
    "half_a_generator": (
        """
        from arena.hookspecs import hookimpl
        from arena.specs import AttackSpec
        @hookimpl
        def arena_register_attacks():
            yield AttackSpec("half", "", ("Linf",), run="a:b")
            raise RuntimeError("half-way")
        """,
        "arena_register_attacks raised RuntimeError: half-way",
    ),
    "wrong_type": (
        """
        from arena.hookspecs import hookimpl
        from arena.specs import DatasetSpec
        @hookimpl
        def arena_register_attacks():
            return [DatasetSpec("set", "", "a:b")]
        """,
        "arena_register_attacks returned a DatasetSpec, expected AttackSpec or RosterSpec",
    ),
    "bad_name": (ATTACK.format(name="My Attack"), "attack name 'My Attack': expected lower snake_case"),
    "name_no_text": (
        """
        from arena.hookspecs import hookimpl
        from arena.specs import BackboneSpec
        @hookimpl
        def arena_register_backbones():
            return [BackboneSpec(None, "", "a:b", ())]
        """,
        "backbone name 'None': expected lower snake_case",
    ),
    "neither_run_nor_iterate": (
        """
        from arena.hookspecs import hookimpl
        from arena.specs import AttackSpec
        @hookimpl
        def arena_register_attacks():
            return [AttackSpec("lazy", "", ("Linf",))]
        """,
        "attack 'lazy': give exactly one of run and iterate",
    ),
    "twice": (
        """
        from arena.hookspecs import hookimpl
        from arena.specs import AttackSpec
        @hookimpl
        def arena_register_attacks():
            return [AttackSpec("same", "", ("Linf",), run="a:b")] * 2
        """,
        "attack 'same' is registered twice; the first is kept",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_plugin_is_named_and_the_others_go_on(install, kind):
    code, expected = BAD[kind]
    install("bad-one", code)
    install("a-good", ATTACK.format(name="early"))
    install("z-good", ATTACK.format(name="late"))
    registry = found("bad-one", "a-good", "z-good")
    assert len(registry.problems) == 1
    line = problems(registry)[0]
    assert line.startswith("plugin bad-one 1.0 (bad-one): ")
    assert expected in line
    assert "\n" not in line
    assert registry.get("attack", "early").origin == "a-good 1.0"
    assert registry.get("attack", "late").name == "z-good/late"
    expected_left = {"early", "late"} | ({"same"} if kind == "twice" else set())
    assert {r.spec.name for r in registry.all("attack")} == expected_left


def test_stopping_by_hand_stops(install):
    install("bad-one", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        found("bad-one")


def test_a_taken_entry_point_is_named_with_its_owner(install):
    install("a-first", ATTACK.format(name="one"), entry_point="shared")
    install("b-second", ATTACK.format(name="two"), entry_point="shared")
    registry = found("a-first", "b-second")
    assert problems(registry) == [
        "plugin b-second 1.0 (shared): the entry point's name is taken by a-first; name it after the distribution"
    ]
    assert registry.has("attack", "one")
    assert not registry.has("attack", "two")


def test_the_name_of_a_plugin_that_failed_is_free_and_blame_stays_right(install):
    install("a-first", "import no_such_module_at_all", entry_point="shared")
    install(
        "b-second",
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_match_finished(record):
            raise ValueError("later")
        """,
        entry_point="shared",
    )
    registry = found("a-first", "b-second")
    registry.announce("arena_match_finished", record={})
    assert [line.split(" 1.0")[0] for line in problems(registry)] == ["plugin a-first", "plugin b-second"]


def test_one_module_behind_two_entry_points_is_loaded_once(install):
    module = install("a-first", ATTACK.format(name="one"))
    install("b-second", "", value=module)
    registry = found("a-first", "b-second")
    assert len(registry.problems) == 1
    assert problems(registry)[0].startswith("plugin b-second 1.0 (b-second): hook refused: ")
    assert registry.get("attack", "one").distribution == "a-first"


def test_the_same_distribution_twice_on_the_path_counts_once(install, tmp_path, monkeypatch):
    install("a-first", ATTACK.format(name="one"))
    monkeypatch.syspath_prepend(str(tmp_path) + "/.")
    registry = found("a-first")
    assert registry.problems == []
    assert len(registry.all("attack")) == 1


def test_strangers_with_one_name_must_be_told_apart(install):
    install("a-first", ATTACK.format(name="same"))
    install("b-second", ATTACK.format(name="same"))
    registry = found("a-first", "b-second")
    with pytest.raises(ArenaError) as caught:
        registry.get("attack", "same")
    assert str(caught.value) == "attack 'same' is offered by several packages: say a-first/same or b-second/same"
    assert registry.get("attack", "b-second/same").distribution == "b-second"
    assert registry.names("attack") == ["a-first/same", "b-second/same", "same"]
    assert registry.clashes() == ["attack 'same' comes from a-first 1.0, b-second 1.0: the bare name is refused"]


def test_a_built_in_keeps_its_bare_name(install):
    install(
        "a-first",
        """
        from arena.hookspecs import hookimpl
        from arena.specs import DatasetSpec
        @hookimpl
        def arena_register_datasets():
            return [DatasetSpec("digits", "mine", "a:b")]
        """,
    )
    registry = found("a-first", BUILT_IN)
    assert registry.get("dataset", "digits").distribution == BUILT_IN
    assert registry.get("dataset", "digits").name == "digits"
    assert registry.get("dataset", "a-first/digits").name == "a-first/digits"
    assert registry.get("dataset", f"{BUILT_IN}/digits").distribution == BUILT_IN
    assert any("dataset 'digits'" in c and "the built-in keeps the bare name" in c for c in registry.clashes())
    assert next(r.distribution for r in registry.all("dataset")) == BUILT_IN


def test_strangers_can_be_left_out(install, monkeypatch):
    install("a-first", ATTACK.format(name="one"))
    monkeypatch.setenv("ARENA_PLUGINS_OFF", "1")
    registry = found("a-first", BUILT_IN)
    assert not registry.has("attack", "one")
    assert registry.has("dataset", "digits")
    monkeypatch.setenv("ARENA_PLUGINS_OFF", "0")
    assert found("a-first").has("attack", "one")


def test_unknown_names_give_the_nearest_and_point_at_problems(install):
    install("a-good", ATTACK.format(name="carlini"))
    install("bad-one", "import no_such_module_at_all")
    with pytest.raises(ArenaError) as caught:
        found("a-good").get("attack", "carlinni")
    assert str(caught.value) == "unknown attack 'carlinni'; did you mean 'carlini'?"
    with pytest.raises(ArenaError, match=r"\(1 plugin problems: see 'arena plugins doctor'\)"):
        found("a-good", "bad-one").get("attack", "carlinni")
    with pytest.raises(ArenaError, match="did you mean 'a-good/carlini'"):
        found("a-good").get("attack", "a-god/carlini")


def test_built_ins_are_found_without_problems():
    registry = found(BUILT_IN)
    assert problems(registry) == []
    assert registry.clashes() == []
    for kind in ("defense", "attack", "roster", "dataset", "backbone"):
        for registered in registry.all(kind):
            assert registered.name == registered.spec.name


def test_a_plugin_that_imports_torch_is_noticed(install, tmp_path):
    install("a-heavy", "import torch\n")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from arena.plugins import discover\n"
        "r = discover(lambda d: d in ('a-heavy', 'adversarial-arena'))\n"
        "print([p.distribution for p in r.plugins if p.imports_torch])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['a-heavy']"


# One test a hook, named after it: test_every_hook_has_its_test below checks that.


def _registers(install: Install, hook: str, spec: str, kind: str) -> None:
    install(
        "a-first",
        f"""
        from arena.hookspecs import hookimpl
        from arena.specs import *
        @hookimpl
        def {hook}():
            yield {spec}
        """,
    )
    registry = found("a-first")
    assert problems(registry) == []
    assert [r.name for r in registry.all(kind)] == ["a-first/one"]
    assert registry.plugins[0].registered == [f"{kind} one"]
    assert registry.plugins[0].hooks == [hook]


def test_arena_register_defenses(install):
    _registers(install, "arena_register_defenses", 'DefenseSpec("one", "", "a:b", "a:r")', "defense")


@pytest.mark.parametrize(
    ("spec", "kind"),
    [('AttackSpec("one", "", ("L2",), iterate="a:b")', "attack"), ('RosterSpec("one", "", "a:b")', "roster")],
)
def test_arena_register_attacks(install, spec, kind):
    _registers(install, "arena_register_attacks", spec, kind)


def test_arena_register_datasets(install):
    _registers(install, "arena_register_datasets", 'DatasetSpec("one", "", "a:b")', "dataset")


def test_arena_register_backbones(install):
    _registers(install, "arena_register_backbones", 'BackboneSpec("one", "", "a:b", ("slot",))', "backbone")


def test_arena_adaptive_attacks(install):
    install(
        "a-first",
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_adaptive_attacks(n_classes):
            yield "pgd", {"steps": n_classes}
        """,
    )
    install(
        "b-second",
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_adaptive_attacks(surface, threat):
            raise ValueError(f"{surface} {threat}")
        """,
    )
    registry = found("a-first", "b-second")
    assert registry.adaptive("S", "T", 7) == [("pgd", {"steps": 7})]
    assert problems(registry) == ["plugin b-second 1.0 (b-second): arena_adaptive_attacks raised ValueError: S T"]


def test_arena_audit(install):
    install(
        "a-first",
        """
        from arena.hookspecs import hookimpl
        from arena.specs import Indicator
        @hookimpl
        def arena_audit(context):
            return [Indicator("mine", True, evidence=context), ("mine", True)]
        """,
    )
    install(
        "b-second",
        """
        from arena.hookspecs import hookimpl
        @hookimpl
        def arena_audit():
            return None
        """,
    )
    registry = found("a-first", "b-second")
    assert [(i.name, i.evidence) for i in registry.audit("seen")] == [("mine", "seen")]
    assert problems(registry) == [
        "plugin a-first 1.0 (a-first): arena_audit returned a tuple, expected Indicators",
        "plugin b-second 1.0 (b-second): arena_audit returned nothing (None), expected an iterable",
    ]


def _announced(install: Install, hook: str, **arguments: dict) -> None:
    names = ", ".join(arguments)
    listener = f"""
        from arena.hookspecs import hookimpl
        SEEN = []
        @hookimpl
        def {hook}({names}):
            SEEN.append(dict({", ".join(f"{n}={n}" for n in arguments)}))
            {{}}
    """
    first = install("a-first", listener.format("raise SystemExit(2)"))
    second = install("b-second", listener.format("return 'ignored'"))
    registry = found("a-first", "b-second")
    registry.announce(hook, **arguments)
    assert sys.modules[first].SEEN == sys.modules[second].SEEN == [arguments]
    assert problems(registry) == [f"plugin a-first 1.0 (a-first): {hook} raised SystemExit: 2"]


def test_arena_match_started(install):
    _announced(install, "arena_match_started", record={"id": "x"})


def test_arena_attack_finished(install):
    _announced(install, "arena_attack_finished", record={"id": "x"}, attack={"name": "pgd"})


def test_arena_match_finished(install):
    _announced(install, "arena_match_finished", record={"id": "x"})


@pytest.mark.parametrize("hook", [n for n in vars(hookspecs) if n.startswith("arena_")])
def test_every_hook_has_its_test(hook):
    assert f"def test_{hook}(" in Path(__file__).read_text()
