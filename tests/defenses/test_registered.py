"""What the built-in defenses declare: names, twins, options, presets, and how options reach the recipe."""

from __future__ import annotations

import subprocess
import sys

import pytest

from arena.plugins import registry
from arena.specs import complete, load
from arena.stages import Usual

NAMES = ("rt", "sat", "trades", "mart", "fgaa_sat", "fgaa_rt", "ewas_sat", "ewas_rt")


def stage(name, **given) -> Usual:
    spec = registry().get("defense", name).spec
    (found,) = load(spec.recipe)(**complete(name, spec.options, given))
    return found


def test_they_are_there_and_bare():
    assert set(NAMES) <= {r.name for r in registry().all("defense")}
    assert not [p for p in registry().problems if "adversarial-arena" in p.distribution]


@pytest.mark.parametrize("name", NAMES)
def test_code_exists_presets_exist_twins_exist(name):
    spec = registry().get("defense", name).spec
    assert callable(load(spec.build))
    assert callable(load(spec.recipe))
    assert spec.surface is None or callable(load(spec.surface))
    assert {"digits", "*"} <= set(spec.presets)
    if spec.module:
        assert spec.twin == name.removeprefix(f"{spec.module}_")
        assert registry().has("defense", spec.twin)


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("rt", {}, Usual("rt")),
        ("sat", {}, Usual("sat")),
        ("trades", {"beta": 4}, Usual("trades", beta=4.0)),
        ("mart", {}, Usual("mart", beta=5.0)),
        ("fgaa_sat", {}, Usual("sat", lam=2.0, inner="full", labels="true", mask="argmax")),
        ("fgaa_sat", {"inner": "aux", "labels": "own"}, Usual("sat", lam=2.0, inner="aux", labels="own")),
        ("fgaa_rt", {"lam": 1}, Usual("rt", lam=1.0)),
        ("ewas_sat", {}, Usual("sat", lam=0.01, mask="label")),
        ("ewas_sat", {"mask": "argmax", "lam": 0.05}, Usual("sat", lam=0.05, mask="argmax")),
        ("ewas_rt", {}, Usual("rt", lam=0.01)),
    ],
)
def test_options_reach_the_stage(name, given, expected):
    assert stage(name, **given) == expected


def test_registering_imports_no_torch():
    code = (
        "import sys, arena_defenses as d; list(d.arena_register_defenses()); list(d.arena_register_backbones());"
        "print([m for m in ('torch', 'numpy', 'sklearn', 'art', 'foolbox') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
