"""Names with options: reading what is written gives back what was meant; every message."""

from __future__ import annotations

import string
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arena.entries import parse, split, value
from arena.errors import ArenaError
from arena.specs import canonical

WORDS = ("true", "false", "inf", "infinity", "nan")
BARE = st.text(string.ascii_letters + string.digits + "_.-", min_size=1, max_size=8).filter(
    lambda s: (s[0].isalpha() or s[0] == "_") and s.lower() not in WORDS
)
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,9}", fullmatch=True)
VALUES = st.one_of(
    st.integers(-(10**12), 10**12),
    st.floats(allow_nan=False),
    st.booleans(),
    st.fractions(max_denominator=1000),
    BARE,
)


@given(NAMES, st.dictionaries(NAMES, VALUES, max_size=5))
def test_reading_the_canonical_form_gives_the_options_back(name, options):
    text = canonical(name, options)
    found, back = parse(text)
    assert (found, back) == (name, options)
    assert {k: isinstance(v, bool) for k, v in back.items()} == {k: isinstance(v, bool) for k, v in options.items()}
    assert canonical(found, back) == text


@given(NAMES, st.dictionaries(NAMES, VALUES, min_size=2, max_size=5), st.randoms(use_true_random=False))
def test_order_and_spaces_do_not_change_the_canonical_form(name, options, shuffler):
    items = list(options.items())
    shuffler.shuffle(items)
    spaced = f" {name} ( " + " , ".join(f"{k} = {canonical('x', {'v': v})[4:-1]}" for k, v in items) + " ) "
    assert canonical(*parse(spaced)) == canonical(name, options)


@given(st.lists(st.tuples(NAMES, st.dictionaries(NAMES, VALUES, max_size=3)), min_size=1, max_size=4))
def test_splitting_undoes_joining(entries):
    texts = [canonical(*e) for e in entries]
    assert split(",".join(texts)) == texts
    assert split(" , ".join(texts)) == texts


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("5", 5),
        ("-3", -3),
        ("0.5", 0.5),
        ("1e-3", 0.001),
        ("8/255", Fraction(8, 255)),
        ("inf", float("inf")),
        ("-inf", float("-inf")),
        ("true", True),
        ("False", False),
        ("dlr", "dlr"),
        ("inf_g", "inf_g"),
        ("apgd-ce", "apgd-ce"),
    ],
)
def test_values(raw, expected):
    found = value(raw, raw)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("pgd()", "pgd"),
        ("foolbox:LinfPGD(steps=40)", "foolbox:LinfPGD"),
        ("my-package/pgd", "my-package/pgd"),
    ],
)
def test_names_of_other_places(text, name):
    assert parse(text)[0] == name


@pytest.mark.parametrize(
    ("read", "text", "message"),
    [
        (split, "a),b", "'a),b': ')' without '('"),
        (split, "pgd(steps=5", "'pgd(steps=5': '(' is never closed (brackets need quotes in a shell)"),
        (split, "pgd,,fgsm", "'pgd,,fgsm': an entry is empty"),
        (split, "", "'': an entry is empty"),
        (parse, "", "'': expected NAME or NAME(option=value,...)"),
        (parse, "(steps=5)", "'(steps=5)': expected NAME or NAME(option=value,...)"),
        (parse, "9pgd", "'9pgd': expected NAME or NAME(option=value,...)"),
        (parse, "pgd(steps=5)x", "'pgd(steps=5)x': expected ')' at the end"),
        (parse, "pgd(5)", "'pgd(5)': expected option=value, got '5'"),
        (parse, "pgd(1x=5)", "'pgd(1x=5)': expected option=value, got '1x=5'"),
        (parse, "pgd(steps=5,steps=6)", "'pgd(steps=5,steps=6)': option 'steps' is given twice"),
        (parse, "pgd(eps=1/0)", "'pgd(eps=1/0)': '1/0' is no number, fraction, true/false or bare name"),
        (parse, "pgd(eps=)", "'pgd(eps=)': '' is no number, fraction, true/false or bare name"),
        (parse, "pgd(eps=nan)", "'pgd(eps=nan)': 'nan' is no number, fraction, true/false or bare name"),
        (parse, "pgd(loss='ce')", "'pgd(loss='ce')': ''ce'' is no number, fraction, true/false or bare name"),
    ],
)
def test_messages(read, text, message):
    with pytest.raises(ArenaError) as caught:
        read(text)
    assert str(caught.value) == message


def test_minus_nothing_is_nothing():
    assert canonical("a", {"b": -0.0}) == "a(b=0)"
