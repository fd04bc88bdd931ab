"""A match's audit: it runs by default, honest models are clear, what hides is named, plugins have their say."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

from arena.errors import ArenaError
from arena.question import Running
from arena.specs import Indicator

sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
from asking import GO, ask


def audited(registry, factory="honest", level="normal", **changes):
    return ask(registry, factory, running=dataclasses.replace(GO, audit=level), **changes).record


def test_an_audit_runs_by_default_and_an_honest_model_is_clear(registry):
    assert Running().audit == "normal"
    record = audited(registry)
    audit, plain = record["audit"], ask(registry).record
    assert (audit["verdict"], audit["level"]) == ("clear", "normal")
    assert plain["audit"] == plain["audit"] | {"verdict": "not_audited", "level": "none", "forwards": 0, "seconds": 0.0}
    assert {"zero_gradients", "large_eps", "planted", "gradient_free_beats_gradients"} <= {
        i["name"] for i in audit["indicators"]
    }
    assert all(set(i) == {"name", "flag", "value", "threshold", "evidence", "remedy"} for i in audit["indicators"])
    # its passes are its own
    assert audit["forwards"] > 0 < audit["backwards"]
    assert [r["forwards"] for r in record["attacks"]] == [r["forwards"] for r in plain["attacks"]]
    assert record["examples"]["sha256"] == plain["examples"]["sha256"]


def test_a_deep_audit_looks_at_more(registry):
    vs = ("apgd_ce", "apgd_t")  # pgd leaves points that the audit breaks
    normal, deep = (audited(registry, level=level, vs=vs, n=100) for level in ("normal", "deep"))
    assert deep["audit"]["level"] == "deep"
    assert deep["audit"]["forwards"] > 2 * normal["audit"]["forwards"]
    assert deep["audit"]["verdict"] == "clear"
    with pytest.raises(ArenaError, match="unknown audit 'deeep'; did you mean 'deep'"):
        audited(registry, level="deeep")


@pytest.mark.parametrize(("factory", "named"), [("no_gradient", "zero_gradients"), ("one_hot", "boundary_jump")])
def test_an_audit_names_hidden_gradients_and_what_to_run(registry, factory, named):
    record = audited(registry, factory)
    assert record["audit"]["verdict"] == "suspect"
    (found,) = (i for i in record["audit"]["indicators"] if i["name"] == named)
    assert found["flag"]
    assert f"arena match arena_cheats:{factory} --vs 'square(queries=20000)'" in found["remedy"]


def test_nothing_is_audited_where_nothing_can_be_attacked(registry):
    assert audited(registry, eps="0")["audit"]["verdict"] == "not_audited"
    record = audited(registry, "undeclared_randomness")
    assert (record["audit"]["verdict"], record["audit"]["forwards"]) == ("void", 0)


def test_an_attack_that_forgets_what_it_saw_is_named(registry):
    record = audited(registry, vs=("forgets", "pgd"), eps="0.5")
    row, honest = record["attacks"]
    assert (row["status"], row["broken"], honest["silent"]) == ("ok", 0, 0)
    assert row["silent"] >= 3
    (found,) = (i for i in record["audit"]["indicators"] if i["name"] == "silent_success")
    assert found["flag"]
    assert f"{row['silent']} points" in found["evidence"]
    assert "forgets" in found["evidence"]


def test_a_plugins_indicator_sees_the_probe_and_counts(registry, monkeypatch):
    seen = []

    def look(self, context):
        seen.append(context)
        lead = context.probe.lead(context.probe.sample.x, context.probe.sample.y)
        return [Indicator("mine", bool((lead > 0).all()), evidence="planted")]

    monkeypatch.setattr(type(registry), "audit", look)
    record = audited(registry)
    assert record["audit"]["verdict"] == "suspect"
    assert record["audit"]["indicators"][-1]["name"] == "mine"
    assert [p.planned.name for p in seen[0].played] == ["pgd"]


def test_a_plugins_indicator_that_crashes_is_no_clear(registry, monkeypatch):
    def look(context):
        def crash():
            yield Indicator("mine", False)
            raise ValueError("planted")

        problems = len(registry.problems)
        made = registry._listed(registry.plugins[0], "arena_audit", crash())
        assert len(registry.problems) == problems + 1
        return made

    monkeypatch.setattr(registry, "problems", [*registry.problems])
    monkeypatch.setattr(registry, "audit", look)
    audit = audited(registry)["audit"]
    found = audit["indicators"][-1]
    assert (audit["verdict"], found["name"], found["flag"]) == ("suspect", "arena_audit", True)
    assert found["evidence"].endswith("arena_audit raised ValueError: planted")
