import math
import subprocess
import sys

import pytest

from arena.errors import ArenaError
from arena.plugins import registry
from arena.specs import complete, expand, load
from arena.surface import Head, Surface
from arena.threat import Threat

LINF = Threat.parse("Linf", "8/255")


def entries(name, surface=None, threat=LINF, n_classes=10):
    found = registry()
    made = expand(found.get("roster", name).spec, surface or Surface(), threat, n_classes)
    return [(a, complete(a, found.get("attack", a).spec.options, o)) for a, o in made]


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_autoattack_is_the_standard_ensemble(norm):
    made = entries("autoattack", threat=Threat.parse(norm, "1/2"))
    assert [a for a, _ in made] == ["apgd_ce", "apgd_t", "fab_t", "square"]
    ce, targeted, fab, square = (o for _, o in made)
    assert ce == {"steps": 100, "restarts": 1, "rho": 0.75, "head": "logits"}
    assert targeted == {"targets": 9, "steps": 100, "restarts": 1, "rho": 0.75, "head": "logits"}
    assert fab == {"targets": 9, "steps": 100, "restarts": 1, "alpha_max": 0.1, "eta": 1.05, "beta": 0.9}
    assert square == {"queries": 5000, "p_init": 0.8, "restarts": 1}


@pytest.mark.parametrize(("classes", "targets"), [(2, 1), (3, 2), (4, 3), (10, 9), (100, 9)])
def test_autoattack_aims_at_no_more_classes_than_there_are(classes, targets):
    made = dict(entries("autoattack", n_classes=classes))
    assert made["apgd_t"]["targets"] == made["fab_t"]["targets"] == targets


@pytest.mark.parametrize("name", ["autoattack", "adaptive"])
@pytest.mark.parametrize("norm", ["L1", "L0"])
def test_other_norms_are_refused_in_one_line(name, norm):
    with pytest.raises(ArenaError, match=rf"roster '{name}': not built for {norm} yet, expected Linf or L2"):
        entries(name, threat=Threat.parse(norm, "5"))


def test_adaptive_without_heads_is_restarts_and_other_losses():
    made = entries("adaptive")
    assert [(a, o.get("loss"), o["restarts"]) for a, o in made] == [
        ("pgd", "margin", 5),
        ("apgd_dlr", None, 1),
        ("pgd", "ce", 5),
    ]


def test_adaptive_sweeps_lambda_and_attacks_every_head():
    surface = Surface(heads={"one": Head("a"), "two": Head("b")})
    made = entries("adaptive", surface)
    sweep = [o for a, o in made if a == "lambda_pgd"]
    for loss in ("ce", "margin"):
        rows = [(o["lam"], o["head"]) for o in sweep if o["loss"] == loss]
        assert rows == [
            *((lam, "") for lam in (0, 0.1, 1, 2, 10, 100, math.inf)),
            (math.inf, "one"),
            (math.inf, "two"),
        ]
    assert {o["steps"] for o in sweep} == {20}
    heads = [(a, o["head"], o["steps"]) for a, o in made if o.get("head") in surface.heads and a != "lambda_pgd"]
    assert heads == [("apgd_ce", "one", 100), ("apgd_ce", "two", 100), ("apgd_t", "one", 100), ("apgd_t", "two", 100)]
    assert made[-3:] == entries("adaptive")


def test_the_sweep_stands_alone_and_shares_a_minimum():
    spec = registry().get("attack", "lambda_pgd").spec
    assert spec.standalone
    assert spec.sweep == "lambda_pgd"


def test_every_attack_names_code_that_exists_and_options_the_code_takes():
    import inspect

    for found in registry().all("attack"):
        if found.distribution != "adversarial-arena":
            continue
        spec = found.spec
        code = load(spec.iterate or spec.run)
        taken = set(inspect.signature(code).parameters)
        assert set(spec.options) <= taken, spec.name
        if spec.iterate:
            defaults = {k: p.default for k, p in inspect.signature(code).parameters.items() if k != "setup"}
            assert defaults == {k: o.default for k, o in spec.options.items()}, spec.name


def test_registering_imports_no_torch():
    code = "import arena_attacks, sys; sys.exit(len({'torch', 'numpy', 'art', 'foolbox'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
