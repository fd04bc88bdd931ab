"""Options and references: what is accepted, in which type it arrives, and each message."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.errors import ArenaError, PluginError, nearest, unknown
from arena.specs import (
    DefenseSpec,
    Indicator,
    Option,
    RosterSpec,
    canonical,
    chosen,
    complete,
    expand,
    load,
    on_dataset,
    text,
)

DECLARED = {
    "steps": Option(10, "steps", low=1, high=1000),
    "step_size": Option(0.25, "step", low=0),
    "loss": Option("ce", "loss", choices=("ce", "dlr", "margin")),
    "eot": Option(False, "average"),
    "note": Option("none", "free name"),
}


@pytest.mark.parametrize(
    ("name", "given_value", "expected"),
    [
        ("steps", 5, 5),
        ("steps", 5.0, 5),
        ("step_size", 1, 1.0),
        ("step_size", math.inf, math.inf),
        ("step_size", Fraction(8, 255), Fraction(8, 255)),
        ("step_size", Fraction(2, 1), 2.0),
        ("loss", "dlr", "dlr"),
        ("eot", True, True),
        ("note", 5, "5"),
        ("note", True, "true"),
    ],
)
def test_values_arrive_in_the_options_type(name, given_value, expected):
    found = complete("pgd", DECLARED, {name: given_value})[name]
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("given_options", "message"),
    [
        ({"stps": 5}, "pgd: unknown option 'stps'; did you mean 'steps'?"),
        ({"zzz": 5}, "pgd: unknown option 'zzz'; it takes: eot, loss, note, step_size, steps"),
        ({"steps": 2.5}, "pgd: option 'steps': expected a whole number, got '2.5'"),
        ({"steps": math.inf}, "pgd: option 'steps': expected a whole number, got 'inf'"),
        ({"steps": math.nan}, "pgd: option 'steps': expected a whole number, got 'nan'"),
        ({"steps": Fraction(8, 255)}, "pgd: option 'steps': expected a whole number, got '8/255'"),
        ({"steps": 0}, "pgd: option 'steps': expected 1 to 1000, got '0'"),
        ({"steps": True}, "pgd: option 'steps': expected a number, got 'true'"),
        ({"step_size": "big"}, "pgd: option 'step_size': expected a number, got 'big'"),
        ({"step_size": -0.5}, "pgd: option 'step_size': expected 0 to inf, got '-0.5'"),
        ({"step_size": math.nan}, "pgd: option 'step_size': expected 0 to inf, got 'nan'"),
        ({"eot": 1}, "pgd: option 'eot': expected true or false, got '1'"),
        ({"loss": "drl"}, "pgd: option 'loss': expected ce or dlr or margin, got 'drl'; did you mean 'dlr'?"),
    ],
)
def test_messages(given_options, message):
    with pytest.raises(ArenaError) as caught:
        complete("pgd", DECLARED, given_options)
    assert str(caught.value) == message


def test_an_owner_without_options_says_so():
    with pytest.raises(ArenaError, match="it takes: none"):
        complete("fgsm", {}, {"a": 1})


def test_defaults_are_filled_in_and_not_shown():
    full = complete("pgd", DECLARED, {"steps": 10, "loss": "dlr"})
    assert full == {"steps": 10, "step_size": 0.25, "loss": "dlr", "eot": False, "note": "none"}
    assert canonical("pgd", chosen(DECLARED, full)) == "pgd(loss=dlr)"
    assert canonical("pgd", chosen(DECLARED, complete("pgd", DECLARED, {}))) == "pgd"


def test_the_same_value_written_differently_is_one_name():
    names = {
        canonical("pgd", chosen(DECLARED, complete("pgd", DECLARED, {"step_size": v})))
        for v in (1, 1.0, Fraction(1), Fraction(2, 2))
    }
    assert names == {"pgd(step_size=1)"}


@given(st.floats(allow_nan=False))
def test_text_of_a_float_is_exact(number):
    assert float(text(number)) == number


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("math", "'math': expected package.module:attribute"),
        (":pi", "':pi': expected package.module:attribute"),
        ("math:", "'math:': expected package.module:attribute"),
        ("math:tau2", "'math:tau2': math has no attribute 'tau2'"),
    ],
)
def test_bad_references(reference, message):
    with pytest.raises(PluginError) as caught:
        load(reference)
    assert str(caught.value) == message


def test_load_follows_dots_and_lets_import_errors_through():
    assert load("fractions:Fraction.limit_denominator") is Fraction.limit_denominator
    with pytest.raises(ModuleNotFoundError):
        load("no_such_module_here:thing")


def _roster(surface, threat, n_classes):
    yield from (("pgd", {"steps": n_classes}), ("fgsm", {}))


def test_expand_makes_a_list_of_a_generator(monkeypatch):
    import sys
    import types

    module = types.ModuleType("roster_for_a_test")
    module.roster = _roster
    monkeypatch.setitem(sys.modules, "roster_for_a_test", module)
    made = expand(RosterSpec("r", "", "roster_for_a_test:roster"), None, None, 7)
    assert made == [("pgd", {"steps": 7}), ("fgsm", {})]


def test_indicator_record_has_the_keys_of_the_result():
    record = Indicator("zero_gradient", True, value=0.5, threshold=0.1, evidence="e", remedy="r", fatal=True).record()
    assert record == {
        "name": "zero_gradient",
        "flag": True,
        "value": 0.5,
        "threshold": 0.1,
        "evidence": "e",
        "remedy": "r",
    }


def test_nearest_ignores_case_and_gives_nothing_when_nothing_is_close():
    assert nearest("APGD_CE", ["apgd_ce", "fab_t"]) == "; did you mean 'apgd_ce'?"
    assert nearest("xyz", ["apgd_ce"]) == ""


def test_unknown_lists_a_few_names_when_none_is_close():
    assert str(unknown("attack", "zzz", [])) == "unknown attack 'zzz'; known: none"
    listed = str(unknown("attack", "0", [f"attack_{c}" for c in "abcdefghijklmnop"]))
    assert listed.endswith("attack_l, ...")


def test_defaults_of_a_data_set_take_the_place_of_the_options_own():
    spec = DefenseSpec("d", "", "m:b", "m:r", options=DECLARED, defaults={"svhn": {"steps": 20.0}, "odd": {"stops": 1}})
    assert on_dataset(spec, "svhn").options["steps"] == Option(20, "steps", low=1, high=1000)
    assert on_dataset(spec, "svhn").options["loss"] == DECLARED["loss"]
    assert on_dataset(spec, "digits") == spec
    with pytest.raises(PluginError, match="defense 'd': defaults of 'odd': no option 'stops'"):
        on_dataset(spec, "odd")


def test_an_indicators_numbers_may_come_from_torch_or_numpy():
    import json

    import numpy as np
    import torch

    found = Indicator("own", True, value=torch.tensor(0.5), threshold=np.float32(0.25)).record()  # type: ignore[arg-type]
    assert (found["value"], found["threshold"]) == (0.5, 0.25)
    json.dumps(Indicator("own", True, value=torch.ones(2), threshold=np.inf).record())  # type: ignore[arg-type]
