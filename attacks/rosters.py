"""Built-in rosters: autoattack, adaptive, quick, papers.

Functions (surface, threat, n_classes) -> [(attack, options)].
"""

from __future__ import annotations

import math
from fractions import Fraction

from arena.errors import ArenaError
from arena.specs import Entry, text
from arena.surface import Surface
from arena.threat import Threat

#: The papers' sweep over the weight of the heads in the attack's loss (papers' λ_attack).
LAMBDAS = (0.0, 0.1, 1.0, 2.0, 10.0, 100.0, math.inf)
#: AFA's ratios of the logits' loss to the gate's.
RATIOS = ((10.0, 1.0), (5.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, 2.0), (1.0, 5.0), (1.0, 10.0))
#: Values at which gates are held.
HELD = (0.0, 0.25, 0.5, 0.75, 1.0)
#: Radii, as shares of eps, at which a gate is held where clean images have it.
SHARES = (Fraction(1, 8), Fraction(1, 4), Fraction(1, 2), 1.0)


def _only(name: str, threat: Threat) -> None:
    if threat.norm not in ("Linf", "L2"):
        raise ArenaError(f"roster '{name}': not built for {threat.norm} yet, expected Linf or L2")


def autoattack(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return the standard AutoAttack ensemble (Croce & Hein 2020), version ``standard`` for Linf and L2.

    APGD-CE, targeted APGD-DLR, targeted FAB (100 iterations, 9 targets or all K - 1 wrong classes, 1 restart each) and
    Square (5000 queries), in this order, on the model's output alone.

    Raises:
        ArenaError: another norm.
    """
    _only("autoattack", threat)
    targets = min(9, n_classes - 1)
    return [
        ("apgd_ce", {"steps": 100, "restarts": 1}),
        ("apgd_t", {"steps": 100, "restarts": 1, "targets": targets}),
        ("fab_t", {"steps": 100, "restarts": 1, "targets": targets}),
        ("square", {"queries": 5000, "p_init": 0.8, "restarts": 1}),
    ]


def adaptive(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return what a surface calls for, cheap and decisive first, each attack meeting what the ones before left.

    First a look (APGD-CE, 20 steps) and, with heads, the first one flipped for every target. Then what else the surface
    declares: choices relaxed and forced, knobs turned, gates held, heads and logits together. Then the output itself:
    targeted APGD, restarts, other losses. Last the rows that meet all points and stand for themselves (the papers'
    sweeps over the weights of heads and gates) and each head attacked as if it were the classifier.

    A random model costs twenty passes where another costs one: it gets short runs, three targets, gates held at their
    ends, the last value of each knob and no sweeps. What is generated is a floor, not a proof.

    Raises:
        ArenaError: a norm other than Linf and L2.
    """
    _only("adaptive", threat)
    targets = min(9, n_classes - 1)
    if surface.random:
        return _random(surface, min(3, targets))
    short = {"steps": 20, "targets": targets}
    heads = list(surface.heads)
    entries: list[Entry] = [("apgd_ce", {"steps": 20})]
    if heads:
        entries += [("joint_t", {**short, "weights": "first"})]
    entries += _selections(surface, targets, n_classes)
    entries += _knobs(surface, targets)
    if heads:
        entries += [("joint_t", short)]
    entries += [("gate_held", {"value": v, "steps": 20}) for v in HELD if surface.gates]
    entries += _near(surface)
    entries += [
        ("apgd_t", short),
        ("pgd", {"loss": "margin", "steps": 40, "restarts": 5}),
        ("apgd_dlr", {}),
        ("pgd", {"loss": "ce", "steps": 40, "restarts": 5}),
    ]
    if not heads and not surface.gates:
        entries += [("pgd", {"loss": "ce_scaled", "way": way, "steps": 40}) for way in ("tangent", "tanh")]
    entries += _sweeps(surface)
    if heads and surface.selections:
        entries += [("joint_t", {"targets": targets, "weights": "first"})]
    entries += [("apgd_ce", {"head": head, "steps": 50}) for head in heads]
    return entries


def quick(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return arena's own ensemble: a small share of AutoAttack's passes, and no higher robust accuracy where measured.

    A look (APGD-CE, 10 steps); with heads, the first one attacked as if it were the classifier and flipped for three
    targets; choices relaxed; then ``staged``, which spends most passes on the few points that may still fall. Last two
    sentinels that share no weakness with it: random search from scratch, which needs no gradient, and FAB, which
    starts at the image and minimises the distance, each in a few passes. What they break alone says that the gradients
    mislead: count on ``autoattack`` and ``adaptive`` then. A random model, which costs twenty passes for one, gets four
    rounds at most.

    Raises:
        ArenaError: a norm other than Linf and L2.
    """
    _only("quick", threat)
    few = {"steps": 10}
    if surface.random:
        return [("apgd_ce", few), ("staged", {"rounds": 4}), ("square", {"queries": 25})]
    entries: list[Entry] = [("apgd_ce", few)]
    if surface.heads:
        entries += [("apgd_ce", {**few, "head": next(iter(surface.heads))})]
        entries += [("joint_t", {**few, "targets": min(3, n_classes - 1), "weights": "first"})]
    if any(s.path for s in surface.selections.values()) and not surface.heads:
        entries += [("relaxed", {**few, "restarts": 1})]
    return [*entries, ("staged", {}), ("square", {"queries": 25}), ("fab_t", {"steps": 5, "targets": 1})]


def papers(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return nothing beyond the defense's own evaluation (``arena.specs.DefenseSpec.evaluation``)."""
    return []


def _random(surface: Surface, targets: int) -> list[Entry]:
    """Attack all that a random model declares, in short runs."""
    few = {"steps": 10, "targets": targets}
    found = [s for s in surface.selections.values() if s.path]
    entries: list[Entry] = [("joint_t", {**few, "weights": "first"}), ("joint_t", few)] if surface.heads else []
    entries += [("relaxed", {"steps": 10, "restarts": 1})] if found else []
    entries += [("forced", few)] if any(s.scores and s.rank == 1 for s in found) else []
    entries += [("gate_held", {"value": v, "steps": 10}) for v in (0.0, 1.0) if surface.gates]
    return [*_knobs(surface, targets), *entries, ("apgd_ce", {"steps": 10}), ("pgd", {"loss": "margin", "steps": 10})]


def _near(surface: Surface) -> list[Entry]:
    """Stay where a gate that was trained to recognise attacks may still say clean: small radii, starts by the image."""
    values = sorted({float(gate.clean) for gate in surface.gates.values() if gate.shape == "example"})
    entries: list[Entry] = []
    for value in values:
        held = {"value": value, "steps": 20}
        entries += [("gate_held", {**held, "start": "fgsm", "shrink": share}) for share in SHARES]
        entries += [("gate_held", {**held, "start": "rounded"})]
    return entries


def _selections(surface: Surface, targets: int, n_classes: int) -> list[Entry]:
    """Relax every choice; force those that a head scores, and pairs where a choice takes its second class."""
    found = [s for s in surface.selections.values() if s.path]
    entries: list[Entry] = []
    if found:
        entries += [("relaxed", {"steps": 20})]
    if any(s.scores and s.rank == 1 for s in found):
        entries += [("forced", {"steps": 20, "targets": targets})]
    if any(s.scores and s.rank == 2 for s in found):
        places = ("first", "second", "behind") if n_classes > 2 else ("behind",)
        entries += [("forced", {"place": place, "steps": 20, "targets": targets}) for place in places]
    return entries


def _knobs(surface: Surface, targets: int) -> list[Entry]:
    """Turn each knob to each of its values, and those that are no constants all at once for every target.

    A constant in the place of a gate is left out: gates are held.
    """
    gates = {gate.path for gate in surface.gates.values()}
    meant = {k: v for k, v in surface.knobs.items() if (v.values and v.path not in gates) or v.kind != "constant"}
    entries: list[Entry] = []
    for name, knob in meant.items():
        values, steps = (knob.values[-1:], 10) if surface.random else (knob.values, 20)
        entries += [("knob", {"knob": name, "value": text(v), "steps": steps}) for v in values]
    if not surface.random and any(v.values and v.kind != "constant" for v in meant.values()):
        entries += [("knob", {"loss": "dlr_targeted", "steps": 20, "targets": targets})]
    return entries


def _sweeps(surface: Surface) -> list[Entry]:
    """Return the rows of the papers' sweeps: weights of the heads, and for gates of one number a row, of the gates."""
    heads = list(surface.heads)
    entries: list[Entry] = []
    if heads:
        weights: list[dict[str, float | str]] = [{"lam": lam} for lam in LAMBDAS]
        weights += [{"lam": math.inf, "head": head} for head in heads if len(heads) > 1]
        entries += [("lambda_pgd", {"steps": 20, "loss": loss, **w}) for loss in ("ce", "margin") for w in weights]
    if any(gate.shape == "example" for gate in surface.gates.values()):
        entries += [("gate_pgd", {"a": a, "b": b, "to": to}) for to in ("clean", "other") for a, b in RATIOS]
    elif surface.gates:
        entries += [("gate_pgd", {"to": to}) for to in ("clean", "other")]
    return entries
