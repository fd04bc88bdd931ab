"""Attacks that search on a surrogate of the model: relaxed and forced choices, held gates, turned knobs.

Any ask/tell attack can be sent through a surrogate: its objective and gradients are then the surrogate's, while the
logits by which it sees a point broken stay the model's own (``arena.attack.Answer``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from arena.attack import Answer, IteratedAttack, Query, Setup, State, Unsupported
from arena.selection import Mode
from arena.specs import text
from arena.surrogate import Surrogate

from .apgd import Apgd
from .pgd import Pgd
from .steps import ranked


class Through:
    """An attack whose queries are asked of a surrogate."""

    def __init__(self, attack: IteratedAttack, pose: Callable[[State, Query], Surrogate]) -> None:
        self.attack = attack
        self.pose = pose

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows as the attack does."""
        return self.attack.start(index, x, y, clean)

    def ask(self, state: State) -> Query:
        """Ask what the attack asks, of the surrogate."""
        query = self.attack.ask(state)
        return replace(query, surrogate=self.pose(state, query))

    def tell(self, state: State, answer: Answer) -> State:
        """Pass the answer on."""
        return self.attack.tell(state, answer)

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost: each point is seen by surrogate and model."""
        forwards, backwards = self.attack.passes()
        return 2 * forwards, backwards

    def surrogates(self) -> int:
        """Return how many of these forwards are the surrogate's."""
        return self.attack.passes()[0]


class ForcedPair(Through):
    """A targeted attack under choices forced to a pair of classes, which have to become a head's first and second.

    The target is one of the pair; ``place`` says which, and what the other is.
    """

    def __init__(self, attack: Apgd, ranks: dict[str, int], place: str) -> None:
        super().__init__(attack, self._force)
        self.term, self.ranks, self.place = attack.term, ranks, place

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows, and note the two best wrong classes of the clean image."""
        return {**super().start(index, x, y, clean), "rivals": ranked(clean[:, self.term], y, 2)}

    def ask(self, state: State) -> Query:
        """Ask for the pair that the target makes."""
        query = self.attack.ask(state)
        assert query.target is not None
        target, rivals = query.target, state["rivals"]
        other = state["y"] if self.place == "behind" else rivals[:, 0].where(rivals[:, 0] != target, rivals[:, -1])
        pair = (target, other) if self.place == "first" else (other, target)
        query = replace(query, target=torch.stack(pair, 1))
        return replace(query, surrogate=self.pose(state, query))

    def _force(self, _state: State, query: Query) -> Surrogate:
        assert query.target is not None
        return Surrogate({name: Mode("forced", classes=query.target[:, rank - 1]) for name, rank in self.ranks.items()})


def choices(setup: Setup, attack: str, rank: int = 0) -> dict[str, str]:
    """Return the selections that can be made another way, with the head that scores each (empty: not declared).

    With ``rank``, only those that a head scores and that take its class of this rank.

    Raises:
        Unsupported: there are none.
    """
    declared = setup.surface.selections.items()
    found = {k: s.scores for k, s in declared if s.path and (not rank or (s.scores and s.rank == rank))}
    if not found:
        of = ["", " scored by a head", " of rank 2 scored by a head"][rank]
        raise Unsupported(f"{attack} needs a selection{of} that is a Select; the surface declares none")
    return found


def relaxed(
    setup: Setup,
    *,
    kind: str = "soft",
    loss: str = "ce",
    by: str = "apgd",
    hot: float = 10.0,
    cold: float = 0.1,
    steps: int = 100,
    restarts: int = 3,
    targets: int = 9,
) -> Through:
    """Make an attack through choices that pass gradients: a softmax mixture, or straight through (papers.md 9.1.4).

    The temperature falls from ``hot`` to ``cold`` in equal ratios: over the steps of a run for ``by=pgd``, from restart
    to restart for ``by=apgd``, whose step size needs one objective for the whole run.

    Raises:
        Unsupported: no selection to relax.
    """
    names = list(choices(setup, "relaxed"))
    places = steps + 1 if by == "pgd" else restarts
    ratio = cold / hot
    table = torch.tensor([hot * ratio ** (k / max(places - 1, 1)) for k in range(places)])

    def pose(state: State, query: Query) -> Surrogate:
        at = state["step"] if by == "pgd" else state["run"] % restarts
        mode = Mode(kind, temperature=table.to(at.device)[at.clamp_max(places - 1)])
        return Surrogate(modes=dict.fromkeys(names, mode))

    inner: IteratedAttack
    if by == "pgd":
        inner = Pgd(setup, steps=steps, step=0.1, loss=loss, restarts=restarts)
    else:
        count = targets if loss == "dlr_targeted" else 0
        inner = Apgd(setup, loss=loss, steps=steps, restarts=restarts, rho=0.75, head="logits", targets=count)
    return Through(inner, pose)


def forced(setup: Setup, *, place: str = "alone", targets: int = 9, steps: int = 100, restarts: int = 1) -> Through:
    """Make a targeted attack under choices forced to the target, whose heads have to choose it (papers.md 9.1.5).

    Under the mask of class t both the output and the heads that choose the mask are pushed towards t.

    Where a mask comes from a head's two best classes (CIFS), ``place`` steers both: t ``first`` and the best other
    wrong class second, t ``second`` and the best wrong class first, or t ``behind`` the true class. Then the output is
    pushed away from the true class, wherever to.

    Raises:
        Unsupported: no selection that names its head, or none of rank 2, or no third class to make a pair of.
    """
    if place != "alone":
        return _forced_pair(setup, place, targets, steps, restarts)
    scored = choices(setup, "forced", rank=1)
    weights = torch.zeros(setup.terms)
    weights[0] = 1.0
    for head in scored.values():
        weights[setup.term(head)] = 1.0

    def pose(state: State, query: Query) -> Surrogate:
        return Surrogate(modes=dict.fromkeys(scored, Mode("forced", classes=query.target)))

    inner = Apgd(
        setup,
        loss="lead",
        heads_loss="lead_enough",
        steps=steps,
        restarts=restarts,
        rho=0.75,
        head=next(iter(scored.values())),
        targets=targets,
        weights=weights,
    )
    return Through(inner, pose)


def _forced_pair(setup: Setup, place: str, targets: int, steps: int, restarts: int) -> ForcedPair:
    attack = f"forced(place={place})"
    heads = set(choices(setup, attack, rank=2).values())
    if place != "behind" and setup.n_classes < 3:
        raise Unsupported(f"{attack} needs two wrong classes; the data set has {setup.n_classes} classes")
    ranks = {k: s.rank for k, s in setup.surface.selections.items() if s.path and s.scores in heads}
    weights = torch.zeros(setup.terms)
    weights[0] = 1.0
    for head in heads:
        weights[setup.term(head)] = 1.0
    inner = Apgd(
        setup,
        loss="lead_away",
        heads_loss="top_two",
        steps=steps,
        restarts=restarts,
        rho=0.75,
        head=next(s.scores for s in setup.surface.selections.values() if s.scores in heads),
        targets=targets,
        weights=weights,
    )
    return ForcedPair(inner, ranks, place)


def knob(
    setup: Setup,
    *,
    knob: str = "",
    value: str = "",
    loss: str = "ce",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
) -> Through:
    """Make Auto-PGD through the model with a knob turned: ``knob(knob=tau,value=10)`` (papers.md 9.1, 9.2).

    Without a name all temperature and detach knobs are turned, each to its last declared value; without a value the
    named one is.

    Raises:
        Unsupported: no knob, not this one, or no value for it.
    """
    declared = setup.surface.knobs
    if knob and knob not in declared:
        raise Unsupported(f"no knob '{knob}' on the surface (knobs: {', '.join(declared) or 'none'})")
    names = [knob] if knob else [k for k, v in declared.items() if v.values and v.kind != "constant"]
    if not names:
        rest = f"; name one of {', '.join(declared)}" if declared else ""
        raise Unsupported(f"knob needs a temperature or detach knob with values; the surface declares none{rest}")
    settings = {}
    for name in names:
        if not value and not declared[name].values:
            raise Unsupported(f"knob '{name}' declares no values: give one")
        known = {text(v): v for v in declared[name].values}  # a declared value is taken as it is: None, a tuple
        settings[name] = declared[name].values[-1] if not value else known[value] if value in known else read(value)
    count = targets if loss == "dlr_targeted" else 0
    inner = Apgd(setup, loss=loss, steps=steps, restarts=restarts, rho=0.75, head="logits", targets=count)
    return Through(inner, lambda state, query: Surrogate(knobs=settings))


def transfer(
    setup: Setup, *, source: str = "rt", loss: str = "ce", steps: int = 100, restarts: int = 1, targets: int = 9
) -> Through:
    """Make Auto-PGD on another defense's model, the undefended or the plainly trained twin's (papers.md 8).

    Every iterate is tried on this model. The other one is trained first where the data set is meant for that.

    Raises:
        Unsupported: no such defense, or no model of it is at hand.
    """
    setup.lend(source)
    count = targets if loss == "dlr_targeted" else 0
    inner = Apgd(setup, loss=loss, steps=steps, restarts=restarts, rho=0.75, head="logits", targets=count)
    return Through(inner, lambda state, query: Surrogate(source=source))


def read(value: str) -> Any:
    """Read a knob's value: ``true``, ``false``, a whole number, a number, a fraction, else the text."""
    if value in ("true", "false"):
        return value == "true"
    for kind in (int, float, lambda t: float(Fraction(t))):
        try:
            return kind(value)
        except (ValueError, ZeroDivisionError):
            continue
    return value
