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


def choices(setup: Setup, attack: str, scored: bool = False) -> dict[str, str]:
    """Return the selections that can be made another way, with the head that scores each (empty: not declared).

    Raises:
        Unsupported: there are none; with ``scored``, none that names its head.
    """
    found = {k: s.scores for k, s in setup.surface.selections.items() if s.path and (s.scores or not scored)}
    if not found:
        of = " scored by a head" if scored else ""
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


def forced(setup: Setup, *, targets: int = 9, steps: int = 100, restarts: int = 1) -> Through:
    """Make a targeted attack under choices forced to the target, whose heads have to choose it (papers.md 9.1.5).

    Under the mask of class t both the output and the heads that choose the mask are pushed towards t.

    Raises:
        Unsupported: no selection that names its head.
    """
    scored = choices(setup, "forced", scored=True)
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
