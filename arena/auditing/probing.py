"""What the audit looks with: a few points, a search copy of its own, and short climbs whose whole way is kept.

The climbs are no attacks of the match: they serve to see how the model answers. Their passes are counted apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor, nn

from arena.attack import Answer, Query, Setup
from arena.auditing.thresholds import DRAWS, FEWEST
from arena.engine import run_iterated
from arena.plugins import Registry
from arena.points import Points
from arena.referee import Referee, relative_margin
from arena.rng import Stream
from arena.specs import Indicator, load
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat

#: Steps of a usual climb, and its step as a share of the radius.
STEPS, STEP = 20, 0.125
#: Steps of a long climb.
LONG = 80
#: Random points a look at noise takes.
NOISE_POINTS = 16
#: Queries of random search.
QUERIES, QUERIES_DEEP = 250, 1500
#: What to run next: without gradients; with losses that have no scale.
BLACK_BOX = "square(queries=20000)"
MARGINS = "pgd(loss=margin,steps=200,restarts=10),apgd_dlr(restarts=5),apgd_t"


@dataclass(frozen=True)
class Climb:
    """One run of gradient steps, all rows in step."""

    value: Tensor
    """(T + 1, N) objective."""
    lead: Tensor
    """(T + 1, N) relative margin of the true class; below zero is broken."""
    flat: Tensor
    """(T, N) bool: the gradient was exactly zero."""
    best: Tensor
    """(N, C, H, W) point of the smallest lead."""

    @property
    def broken(self) -> Tensor:
        """(N,) bool; logits that are not finite are broken, as the referee has it."""
        return (~(self.lead >= 0)).any(0)


@dataclass
class Probe:
    """The audit's view of one defense."""

    target: Target
    """A search copy of the audit's own, with its own meter."""
    referee: Referee
    build: Callable[[], nn.Module]
    """Makes a fresh copy."""
    threat: Threat
    sample: Points
    standing: Points
    """Of the points that no attack of the match broke."""
    stream: Stream
    registry: Registry
    command: Callable[..., str]
    """Writes the ``arena match`` line that asks this defense again: (entries, further words)."""
    deep: bool = False
    adaptive: bool = False
    """Whether the match played the whole roster ``adaptive``."""

    @property
    def surface(self) -> Surface:
        """What is declared."""
        return self.target.surface

    @property
    def draws(self) -> int:
        """Passes a look averages over."""
        return DRAWS if self.surface.random else 1

    def look(self, x: Tensor, y: Tensor, objective: str = "margin", grad: bool = False) -> Answer:
        """Show points (N, C, H, W) to the model; logits, values and gradients are means over draws."""
        return self.target.answer(Query(x.unsqueeze(1), objective, grad=grad, draws=self.draws), y)

    def lead(self, x: Tensor, y: Tensor) -> Tensor:
        """Return relative margins (N,)."""
        return relative_margin(self.look(x, y).logits[:, 0], y)

    def gradient(self, x: Tensor, y: Tensor, objective: str) -> Tensor:
        """Return the gradient of an objective, (N, C, H, W)."""
        grad = self.look(x, y, objective, grad=True).grad
        assert grad is not None
        return torch.nan_to_num(grad[:, 0], nan=0.0, posinf=0.0, neginf=0.0)

    def climb(
        self, points: Points, threat: Threat, objective: str, steps: int, step: float, start: Tensor | None = None
    ) -> Climb:
        """Take ``steps`` gradient steps of ``step`` times the radius from the images, or from ``start``."""
        x, y = points.x, points.y
        point = x if start is None else start
        best, smallest = point, torch.full((len(y),), torch.inf, device=x.device)
        values, leads, flats = [], [], []
        for k in range(steps + 1):
            answer = self.look(point, y, objective, grad=k < steps)
            lead = relative_margin(answer.logits[:, 0], y)
            values.append(answer.values[:, 0])
            leads.append(lead)
            lower = lead < smallest
            smallest = lead.where(lower, smallest)
            best = point.where(lower.view(-1, 1, 1, 1), best)
            if k == steps:
                break
            assert answer.grad is not None
            grad = torch.nan_to_num(answer.grad[:, 0], nan=0.0, posinf=0.0, neginf=0.0)
            flats.append(grad.flatten(1).abs().amax(1) == 0)
            point = threat.project(x, point + direction(grad, threat.norm) * (step * threat.radius))
        return Climb(torch.stack(values), torch.stack(leads), torch.stack(flats), best)

    @cached_property
    def ce(self) -> Climb:
        """The usual climb on the cross-entropy."""
        return self.climb(self.sample, self.threat, "ce", STEPS, STEP)

    @cached_property
    def margin(self) -> Climb:
        """The usual climb on the margin."""
        return self.climb(self.sample, self.threat, "margin", STEPS, STEP)

    @cached_property
    def long(self) -> Climb:
        """A long climb of small steps on the margin, from a random start, on standing points."""
        start = self.noise(self.standing, 0)
        return self.climb(self.standing, self.threat, "margin", LONG, 3.0 / LONG, start)

    @cached_property
    def by_gradient(self) -> Tensor:
        """(N,) bool: points of the sample that either usual climb breaks."""
        return self.ce.broken | self.margin.broken

    def noise(self, points: Points, draw: int, threat: Threat | None = None) -> Tensor:
        """Return random points at the ball's rim, cut to the box: signs (Linf), or a direction of length eps."""
        threat = threat or self.threat
        if threat.norm == "Linf":
            bits = self.stream.uniform(points.index, draw, tuple(points.x.shape[1:]), 1) > 0.5
            return threat.project(points.x, points.x + torch.where(bits, threat.radius, -threat.radius))
        normal = self.stream.normal(points.index, draw, tuple(points.x.shape[1:]), 1)
        return threat.project(points.x, points.x + direction(normal, threat.norm) * threat.radius)

    @cached_property
    def noise_lead(self) -> Tensor:
        """(N,) smallest relative margin of ``NOISE_POINTS`` random points around each point of the sample."""
        s = self.sample
        return torch.stack([self.lead(self.noise(s, 1 + k), s.y) for k in range(NOISE_POINTS)]).amin(0)

    def random_search(self, points: Points) -> Tensor | None:
        """Return what short random search (``square``) finds, (N, C, H, W); None where it cannot be played."""
        if not self.registry.has("attack", "square") or not len(points):
            return None
        spec = self.registry.get("attack", "square").spec
        if self.threat.norm not in spec.norms:
            return None
        shape = tuple(points.x.shape[1:])
        setup = Setup(self.threat, self.target.n_classes, self.surface, shape, self.stream)  # type: ignore[arg-type]
        options = {k: o.default for k, o in spec.options.items()}
        attack = load(spec.iterate)(setup, **{**options, "queries": QUERIES_DEEP if self.deep else QUERIES})
        draws = self.draws
        return run_iterated(attack, self.target, points.x, points.y, points.index, draws=draws).x_adv

    @cached_property
    def searched(self) -> Tensor | None:
        """(N,) bool: points of the sample that random search breaks; None where it cannot be played."""
        found = self.random_search(self.sample)
        return None if found is None else self.lead(found, self.sample.y) < 0

    def confirmed(self, points: Points, x_adv: Tensor) -> Tensor:
        """(N,) bool: the referee's word on found points."""
        return self.referee.judge(points.x, x_adv, points.y, points.index).broken

    def ball(self, factor: Fraction) -> Threat:
        """Return the threat model with the radius times ``factor``, at most the whole box."""
        return Threat(self.threat.norm, str(min(self.threat.fraction * factor, self.box.fraction)))

    @cached_property
    def box(self) -> Threat:
        """The threat model whose ball holds the whole box."""
        d = self.sample.x[0].numel()
        widest = {"Linf": Fraction(1), "L2": Fraction(int(d**0.5) + 1)}.get(self.threat.norm, Fraction(d))
        return Threat(self.threat.norm, str(widest))


def direction(grad: Tensor, norm: str) -> Tensor:
    """Return the steepest step of unit size: signs for Linf, a unit vector of length 1 otherwise."""
    if norm == "Linf":
        return grad.sign()
    flat = grad.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp_min(1e-37)  # squares of tiny numbers vanish in float32
    return (flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(grad)


def share(mask: Tensor) -> float:
    """Return the share of True, 0 for an empty mask."""
    return float(mask.float().mean()) if len(mask) else 0.0


def many(mask: Tensor, threshold: float) -> bool:
    """Tell whether a share of points is beyond its threshold, and no accident of one or two points.

    In a sample of fewer than ``FEWEST`` points all must agree.
    """
    return share(mask) > threshold and int(mask.sum()) >= min(FEWEST, max(1, len(mask)))


def finding(
    name: str,
    flag: bool,
    value: float | None,
    threshold: float | str | None,
    evidence: str,
    remedy: str,
    fatal: bool = False,
) -> Indicator:
    """Return an indicator that speaks only where it is flagged."""
    return Indicator(name, flag, value, threshold, evidence if flag else "", remedy if flag else "", fatal and flag)
