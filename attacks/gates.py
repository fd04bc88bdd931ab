"""Attacks on gates: drive a gate to one end while the logits are attacked, or hold it and make the model follow.

AFA's adaptive attack ascends a CE + b BCE(gate) (papers.md 5.3); held gates are papers.md 9.4 (i), (ii). A gate
that was trained to recognise large changes is met with small ones: starts near the image, a smaller ball (9.4 (iv),
(v)).
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from arena.attack import Answer, GateTerm, Query, Setup, State, Unsupported
from arena.surrogate import Surrogate

from .pgd import Pgd
from .steps import TINY, ascend, rows

#: How near a gate has to come to the value at which it was held.
CLOSE = 0.1
#: The push on a gate grows by this factor a step while it is further away, and shrinks by it while it is near.
FACTOR = 1.25
#: The first step from ``start=fgsm``, as a share of the radius.
SMALL = 0.25
#: Bounds of the push, as multiples of its first value.
WEAKEST, STRONGEST = 1e-2, 1e4


def pick(setup: Setup, attack: str, gate: str) -> Tensor:
    """Return which gates are meant, (G,) of 0 and 1 in the surface's order: the named one, or all.

    Raises:
        Unsupported: no gate, or not this one.
    """
    names = list(setup.surface.gates)
    if not names:
        raise Unsupported(f"{attack} needs gates; the surface declares none")
    if gate and gate not in names:
        raise Unsupported(f"no gate '{gate}' on the surface (gates: {', '.join(names)})")
    return torch.tensor([float(not gate or name == gate) for name in names])


class Near(Pgd):
    """PGD inside a smaller ball, from a start that a gate may take for clean.

    Starts other than ``ball`` are where the gate is open. ``image`` and ``fgsm`` have one such start an image, so they
    run once; ``rounded`` moves its grid of pixel values from restart to restart.
    """

    def __init__(self, setup: Setup, *, start: str, shrink: float | Fraction, restarts: int, **how: object) -> None:
        radius = setup.threat.fraction * Fraction(shrink)
        setup = replace(setup, threat=replace(setup.threat, eps=str(radius)))
        super().__init__(setup, restarts=restarts if start in ("ball", "rounded") else 1, **how)  # type: ignore[arg-type]
        self.begin = start

    def _begin(self, index: Tensor, restart: Tensor | int, x: Tensor) -> Tensor:
        if self.begin == "ball":
            return super()._begin(index, restart, x)
        if self.begin == "rounded":
            # Linf: as coarse as the ball allows to half; L2: of about half the ball's length
            radius, size = self.setup.threat.radius, x[0].numel()
            grid = max(radius * (1.0 if self.setup.threat.norm == "Linf" else (3 / size) ** 0.5), TINY)
            place = self.setup.stream.uniform(index, 2, (1, 1, 1), restart).double()
            return self.setup.threat.project(x, (((x.double() / grid + place).round() - place) * grid).to(x.dtype))
        return x.clone()

    def _move(self, state: State, point: Tensor, grad: Tensor) -> Tensor:
        moved = super()._move(state, point, grad)
        if self.begin != "fgsm":
            return moved
        threat, x = self.setup.threat, state["x"]
        first = threat.project(x, ascend(threat, point, grad, SMALL * threat.radius))
        return first.where(rows(state["step"] == 0, point), moved)


class GatePgd(Near):
    """Ascend a * loss(logits) - b * mean over gates of BCE(gate, wanted)."""

    def __init__(self, setup: Setup, *, a: float, b: float, wanted: Tensor, meant: Tensor, **how: Any) -> None:
        weights = torch.zeros(setup.terms)
        weights[0] = a
        super().__init__(setup, weights=weights, **how)
        self.wanted, self.meant = wanted, meant * (b / float(meant.sum()))

    def ask(self, state: State) -> Query:
        """Ask for the objective with the gates' term."""
        n, device = len(state["y"]), state["y"].device
        term = GateTerm(self.meant.to(device).expand(n, -1), self.wanted.to(device).expand(n, -1))
        return replace(super().ask(state), gates=term)


class GateHeld(Near):
    """Attack the model with gates held at a value, and push the gates themselves there.

    The push of a row grows while its gates are far from the value and shrinks while they are near: a hinge whose weight
    follows success. With ``push=0`` it is the held model alone that is attacked.
    """

    def __init__(self, setup: Setup, *, value: float, meant: Tensor, push: float, **how: Any) -> None:
        super().__init__(setup, **how)
        self.value, self.meant, self.push = value, meant, push
        self.names = [name for name, m in zip(setup.surface.gates, meant.tolist(), strict=True) if m]

    def start(self, index: Tensor, x: Tensor, y: Tensor, clean: Tensor) -> State:
        """Begin rows with the first push."""
        state = super().start(index, x, y, clean)
        return {**state, "push": torch.full((len(y),), self.push, device=x.device)}

    def ask(self, state: State) -> Query:
        """Ask the held model for the objective, and its gates for what they say themselves."""
        meant = self.meant.to(state["x"].device)
        weights = state["push"].unsqueeze(1) * (meant / meant.sum())
        term = GateTerm(weights, torch.full_like(weights, self.value), CLOSE)
        return replace(super().ask(state), gates=term, surrogate=Surrogate(gates=dict.fromkeys(self.names, self.value)))

    def tell(self, state: State, answer: Answer) -> State:
        """Step, and change the push."""
        assert answer.gates is not None
        far = ((answer.gates[:, 0] - self.value).abs() > CLOSE) & (self.meant.to(answer.gates.device) > 0)
        push = torch.where(far.any(1), state["push"] * FACTOR, state["push"] / FACTOR)
        new = super().tell(state, answer)
        push = push.clamp(self.push * WEAKEST, self.push * STRONGEST)
        # the next restart begins with the first push
        return {**new, "push": push.masked_fill(new["step"] == 0, self.push)}

    def passes(self) -> tuple[int, int]:
        """Return the most (forwards, backwards) one row can cost: each point is seen held and free."""
        forwards, backwards = super().passes()
        return 2 * forwards, backwards

    def surrogates(self) -> int:
        """Return how many of these forwards are the held model's."""
        return super().passes()[0]


def gate_pgd(
    setup: Setup,
    *,
    a: float = 1.0,
    b: float = 1.0,
    to: str = "clean",
    gate: str = "",
    loss: str = "ce",
    steps: int = 20,
    step: float | Fraction = Fraction(1, 10),
    restarts: int = 1,
    start: str = "ball",
    shrink: float | Fraction = 1.0,
) -> GatePgd:
    """Make one row of AFA's adaptive attack: a * loss(logits) - b * BCE(gate, wanted), the mean over gates.

    ``to=clean`` drives gates to the value they take on clean images, ``other`` to the other end.

    Raises:
        Unsupported: no gate, or not this one.
    """
    meant = pick(setup, "gate_pgd", gate)
    ends = torch.tensor([float(g.clean) for g in setup.surface.gates.values()])
    wanted = ends if to == "clean" else 1 - ends
    return GatePgd(
        setup,
        a=float(a),
        b=float(b),
        wanted=wanted,
        meant=meant,
        loss=loss,
        steps=steps,
        step=step,
        restarts=restarts,
        start=start,
        shrink=shrink,
    )


def gate_held(
    setup: Setup,
    *,
    value: float = 1.0,
    gate: str = "",
    push: float = 1.0,
    loss: str = "margin",
    steps: int = 40,
    step: float | Fraction = Fraction(1, 10),
    restarts: int = 1,
    start: str = "ball",
    shrink: float | Fraction = 1.0,
) -> GateHeld:
    """Make PGD on the model with gates held at ``value``, whose own values are pushed there too.

    ``shrink`` searches a ball of that share of eps, ``start`` begins where gates may be fooled already; steps are
    fractions of the radius that is searched.

    Raises:
        Unsupported: no gate, or not this one.
    """
    meant = pick(setup, "gate_held", gate)
    return GateHeld(
        setup,
        value=float(value),
        meant=meant,
        push=float(push),
        loss=loss,
        steps=steps,
        step=step,
        restarts=restarts,
        start=start,
        shrink=shrink,
    )
