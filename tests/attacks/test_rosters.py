import math
import subprocess
import sys
from dataclasses import replace

import pytest

from arena.attack import Setup
from arena.errors import ArenaError
from arena.plugins import registry
from arena.rng import Stream
from arena.specs import complete, expand, load
from arena.surface import Gate, Head, Knob, Selection, Surface
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


def names(made):
    return [a for a, _ in made]


def test_adaptive_without_a_surface_is_a_look_targets_restarts_and_other_losses_and_ways():
    made = entries("adaptive")
    assert [(a, o.get("loss"), o.get("way"), o.get("restarts")) for a, o in made] == [
        ("apgd_ce", None, None, 1),
        ("apgd_t", None, None, 1),
        ("pgd", "margin", "plain", 5),
        ("apgd_dlr", None, None, 1),
        ("pgd", "ce", "plain", 5),
        ("pgd", "ce_scaled", "tangent", 1),
        ("pgd", "ce_scaled", "tanh", 1),
    ]


HEADS = {"one": Head("a"), "two": Head("b")}
FULL = Surface(
    heads=HEADS,
    gates={"gate": Gate("g")},
    selections={"mask": Selection("m", scores="one")},
    knobs={
        "tau": Knob("k", "tau", values=(0.5, 2.0)),
        "held": Knob("g", "constant", "constant", (0.0, 1.0)),
        "silent": Knob("k", "other"),
    },
)


def test_adaptive_flips_the_first_head_early_and_ends_with_heads_as_classifiers():
    made = entries("adaptive", Surface(heads=HEADS))
    assert names(made)[:2] == ["apgd_ce", "joint_t"]
    assert made[1][1]["weights"] == "first"
    assert [(a, o["head"]) for a, o in made[-2:]] == [("apgd_ce", "one"), ("apgd_ce", "two")]


def test_adaptive_sweeps_lambda():
    sweep = [o for a, o in entries("adaptive", Surface(heads=HEADS)) if a == "lambda_pgd"]
    for loss in ("ce", "margin"):
        rows = [(o["lam"], o["head"]) for o in sweep if o["loss"] == loss]
        assert rows == [
            *((lam, "") for lam in (0, 0.1, 1, 2, 10, 100, math.inf)),
            (math.inf, "one"),
            (math.inf, "two"),
        ]
    assert {o["steps"] for o in sweep} == {20}


def test_adaptive_holds_gates_and_sweeps_afas_ratios_to_both_ends():
    made = entries("adaptive", Surface(gates={"gate": Gate("g")}))
    held = [o for a, o in made if a == "gate_held"]
    assert [o["value"] for o in held if o["start"] == "ball"] == [0, 0.25, 0.5, 0.75, 1]
    assert [(o["value"], o["shrink"]) for o in held if o["start"] == "fgsm"] == [
        (1, 1 / 8),
        (1, 1 / 4),
        (1, 1 / 2),
        (1, 1),
    ]
    assert [(o["value"], o["shrink"]) for o in held if o["start"] == "rounded"] == [(1, 1)]
    ratios = [(10, 1), (5, 1), (2, 1), (1, 1), (1, 2), (1, 5), (1, 10)]
    assert [(o["a"], o["b"], o["to"]) for a, o in made if a == "gate_pgd"] == [
        (a, b, to) for to in ("clean", "other") for a, b in ratios
    ]
    assert registry().get("attack", "gate_pgd").spec.standalone
    mask = entries("adaptive", Surface(gates={"mask": Gate("g", shape="element")}))
    assert [o["to"] for a, o in mask if a == "gate_pgd"] == ["clean", "other"]
    assert {o["start"] for a, o in mask if a == "gate_held"} == {"ball"}
    turned = entries("adaptive", Surface(gates={"gate": Gate("g", clean=0)}))
    assert {o["value"] for a, o in turned if a == "gate_held" and o["start"] == "fgsm"} == {0}


def test_adaptive_relaxes_choices_and_forces_those_a_head_scores():
    made = entries("adaptive", Surface(heads=HEADS, selections={"mask": Selection("m")}))
    assert [o["kind"] for a, o in made if a == "relaxed"] == ["soft"]
    assert "forced" not in names(made)
    full = entries("adaptive", FULL)
    assert "forced" in names(full)
    assert [o["steps"] for a, o in full if a == "joint_t" and o["weights"] == "first"] == [20, 100]
    foreign = entries("adaptive", Surface(heads=HEADS, selections={"mask": Selection(scores="one")}))
    assert not {"relaxed", "forced"} & set(names(foreign))


def test_adaptive_steers_pairs_where_a_choice_takes_its_second_class():
    pair = {"first": Selection("f", scores="one"), "second": Selection("s", scores="one", rank=2)}
    made = entries("adaptive", Surface(heads=HEADS, selections=pair))
    assert [o["place"] for a, o in made if a == "forced"] == ["alone", "first", "second", "behind"]
    two = entries("adaptive", Surface(heads=HEADS, selections=pair), n_classes=2)
    assert [o["place"] for a, o in two if a == "forced"] == ["alone", "behind"]
    alone = entries("adaptive", Surface(heads=HEADS, selections={"second": pair["second"]}))
    assert [o["place"] for a, o in alone if a == "forced"] == ["first", "second", "behind"]


def test_adaptive_turns_each_knob_but_those_that_hold_a_gate():
    made = entries("adaptive", FULL)
    assert [(o["knob"], o["value"], o["loss"]) for a, o in made if a == "knob"] == [
        ("tau", "0.5", "ce"),
        ("tau", "2", "ce"),
        ("", "", "dlr_targeted"),
    ]


def test_adaptive_on_a_random_model_is_short():
    surface = Surface(knobs={"on": Knob("", "on", "constant", (False, True))}, random=True)
    made = entries("adaptive", surface)
    assert [(a, o.get("value")) for a, o in made] == [("knob", "true"), ("apgd_ce", None), ("pgd", None)]


def test_adaptive_leaves_out_nothing_that_a_random_model_declares():
    made = entries("adaptive", replace(FULL, random=True))
    assert [(a, o.get("value"), o.get("weights")) for a, o in made] == [
        ("knob", "2", None),
        ("joint_t", None, "first"),
        ("joint_t", None, "all"),
        ("relaxed", None, None),
        ("forced", None, None),
        ("gate_held", 0, None),
        ("gate_held", 1, None),
        ("apgd_ce", None, None),
        ("pgd", None, None),
    ]
    assert {o.get("targets", 3) for a, o in made if a in ("joint_t", "forced")} == {3}
    assert {o["steps"] for _, o in made} == {10}


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_all_that_adaptive_names_can_be_made(norm, classes):
    """No attack of the roster refuses the surface it was generated from."""
    threat = Threat.parse(norm, "0.1")
    bare = Surface(knobs={"silent": FULL.knobs["silent"]})  # declared without a value
    pair = {"first": Selection("f", scores="one"), "second": Selection("s", scores="one", rank=2)}
    for surface in (
        FULL,
        replace(FULL, selections=pair),
        replace(FULL, random=True),
        Surface(),
        Surface(heads=HEADS),
        Surface(gates=FULL.gates),
        Surface(knobs=FULL.knobs),
        bare,
    ):
        for name, options in entries("adaptive", surface, threat, classes):
            setup = Setup(threat, classes, surface, (1, 4, 4), Stream.of(0, name))
            attack = load(registry().get("attack", name).spec.iterate)(setup, **options)
            assert attack.passes()[0] > 0


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
