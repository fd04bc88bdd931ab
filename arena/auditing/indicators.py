"""Indicators of attacks that fail on their way: do more steps, more starts and more room help, as they must?

Each is a pure function of a ``Probe`` and of nothing that an attack of the match left behind. Sources: Pintor et al.
2022 (arXiv 2106.09947), Carlini et al. 2019 (arXiv 1902.06705). Thresholds and their reasons:
``arena.auditing.thresholds``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from arena.auditing import thresholds as t
from arena.auditing.conduct import hidden_randomness, memory, optimizes_inside
from arena.auditing.masking import (
    boundary_jump,
    gradient_agreement,
    logit_scale,
    noise_beats_gradient,
    search_beats_gradient,
    zero_gradients,
)
from arena.auditing.planted import planted
from arena.auditing.probing import BLACK_BOX, LONG, MARGINS, STEP, STEPS, Points, Probe, finding, many, share
from arena.specs import Indicator


def one_step_beats_many(probe: Probe) -> Indicator:
    """Compare one full step on the cross-entropy with the usual climb on it."""
    one = probe.climb(probe.sample, probe.threat, "ce", 1, 1.0).broken
    only = one & ~probe.ce.broken
    flag = many(only, t.ONE_STEP)
    return finding(
        "one_step_beats_many",
        flag,
        share(only),
        t.ONE_STEP,
        f"one step breaks {int(only.sum())} of {len(only)} points that {STEPS} steps on the same loss do not",
        "iterating hurts the attack; try other losses and many starts: " + probe.command(MARGINS),
    )


def last_worse_than_best(probe: Probe) -> Indicator:
    """Look for climbs that give back what they had gained: the loss does not rise along the run."""
    climb = probe.margin
    lead = climb.lead
    gained = lead[0] - lead.amin(0)
    slipped = ((lead[-1] - lead.amin(0)) > t.SLIP * gained.clamp_min(1e-6)) & ~climb.broken
    flag = many(slipped, t.SLIPPED)
    return finding(
        "last_worse_than_best",
        flag,
        share(slipped),
        t.SLIPPED,
        f"{int(slipped.sum())} of {len(slipped)} climbs end at a loss worse than halfway back from their best point",
        "smaller steps and more starts: " + probe.command("pgd(loss=margin,steps=200,step=1/20,restarts=10)"),
    )


def budget_still_gains(probe: Probe) -> Indicator:
    """Look whether a long climb on standing points is still gaining when it ends."""
    if not len(probe.standing):
        return Indicator("budget_still_gains", False, evidence="no point stands")
    lead = probe.long.lead.cummin(0).values
    span = (lead[0] - lead[-1]).clamp_min(1e-6)
    unsettled = ((lead[-1 - LONG // 10] - lead[-1]) / span > t.UNSETTLED_GAIN) & (lead[-1] >= 0)
    flag = many(unsettled, t.UNSETTLED) and int(unsettled.sum()) >= t.FEWEST  # one or two survivors change no number
    return finding(
        "budget_still_gains",
        flag,
        share(unsettled),
        t.UNSETTLED,
        f"after {LONG} steps {int(unsettled.sum())} of {len(unsettled)} climbs are still gaining",
        "the budget was too small: " + probe.command("pgd(loss=margin,steps=1000,restarts=5),apgd_ce(steps=500)"),
    )


def break_point_angle(probe: Probe) -> Indicator:
    """Look whether the curves of long climbs on standing points have a knee: without one they never settled.

    Both axes are scaled to [0, 1]; the knee is the point farthest from the line between its ends. Its angle
    is 90 degrees where the climb gains at once and then settles, 180 where it gains evenly to its last step (Pintor et
    al. 2022, the angle that shows incomplete optimization).
    """
    if not len(probe.standing):
        return Indicator("break_point_angle", False, evidence="no point stands")
    angle = knee(probe.long.lead.cummin(0).values)
    open_ended = angle > t.ANGLE
    flag = many(open_ended, t.ANGLES) and int(open_ended.sum()) >= t.FEWEST
    return finding(
        "break_point_angle",
        flag,
        float(angle.median()),
        t.ANGLE,
        f"{int(open_ended.sum())} of {len(angle)} climbs of {LONG} steps gain evenly to their end: they never settle",
        "the budget was too small: " + probe.command("pgd(loss=margin,steps=1000,restarts=5),apgd_ce(steps=500)"),
    )


def knee(curve: Tensor) -> Tensor:
    """Return the angle in degrees at the knee of falling curves (T + 1, N): (N,), 90 for a curve that stays flat."""
    fallen = curve[0] - curve[-1]
    height = (curve - curve[-1]) / fallen.clamp_min(1e-12)
    time = torch.linspace(0, 1, len(curve), device=curve.device).unsqueeze(1)
    place = 1 + (1 - time - height).abs()[1:-1].argmax(0)  # the line between the ends is height = 1 - time
    x, y = time[place, 0], height.gather(0, place.unsqueeze(0)).squeeze(0)
    first, last = torch.atan2(1 - y, -x), torch.atan2(-y, 1 - x)
    turn = torch.rad2deg((first - last).abs())
    angle = torch.minimum(turn, 360 - turn)
    return torch.where(fallen > 1e-6, angle, torch.full_like(angle, 90.0))


def large_eps(probe: Probe) -> Indicator:
    """Give gradient steps the whole box: then every image is allowed and every point must fall."""
    s = probe.sample
    alive = torch.ones(len(s), dtype=torch.bool, device=s.x.device)
    for objective in ("margin", "ce"):
        rows = alive.nonzero().squeeze(1)
        if len(rows):
            some = Points(s.x[rows], s.y[rows], s.index[rows])
            alive[rows] &= ~probe.climb(some, probe.box, objective, 2 * STEPS, 0.05).broken
    flag = many(alive, t.BOX)
    return finding(
        "large_eps",
        flag,
        share(alive),
        t.BOX,
        f"{int(alive.sum())} of {len(alive)} points stand although gradient steps may go anywhere in the box",
        "the attacks are blind, whatever the radius; attack without gradients: " + probe.command(BLACK_BOX),
    )


def eps_curve(probe: Probe) -> Indicator:
    """Look for points that fall in a small ball and stand in one that contains it."""
    fallen = [probe.climb(probe.sample, probe.ball(f), "margin", STEPS, STEP).broken for f in _FACTORS]
    fallen.insert(2, probe.margin.broken)
    odd = torch.zeros_like(fallen[0])
    for small, large in itertools.pairwise(fallen):
        odd |= small & ~large
    flag = many(odd, t.CURVE)
    shares = ", ".join(f"{100 * (1 - share(f)):.0f}" for f in fallen)
    return finding(
        "eps_curve",
        flag,
        share(odd),
        t.CURVE,
        f"{int(odd.sum())} of {len(odd)} points fall in a smaller ball and stand in a larger one (standing at eps x "
        f"1/4, 1/2, 1, 2, 4: {shares} %)",
        "more room must never help the defense: " + probe.command(MARGINS),
    )


_FACTORS = (Fraction(1, 4), Fraction(1, 2), Fraction(2), Fraction(4))


def still_breaks(probe: Probe) -> Indicator:
    """Let the audit's own attempts at standing points be judged by the referee."""
    s = probe.standing
    if not len(s):
        return Indicator("still_breaks", False, evidence="no point stands")
    by: dict[str, int] = {}
    fallen = torch.zeros(len(s), dtype=torch.bool, device=s.x.device)
    tries = {f"{LONG} gradient steps": probe.long.best, "random search": probe.random_search(s)}
    for name, x_adv in tries.items():
        if x_adv is not None:
            broken = probe.confirmed(s, x_adv)
            by[name] = int(broken.sum())
            fallen |= broken
    flag = many(fallen, t.STILL_BREAKS) and int(fallen.sum()) >= t.FEWEST
    text = ", ".join(f"{k}: {v}" for k, v in by.items() if v)
    return finding(
        "still_breaks",
        flag,
        share(fallen),
        t.STILL_BREAKS,
        f"short attempts break {int(fallen.sum())} of {len(s)} standing points ({text}), which the match missed",
        "attack longer: " + probe.command(f"{MARGINS},{BLACK_BOX}"),
    )


#: Cheap ones first; all in a few thousand passes a point at most.
BUILT_IN: dict[str, Callable[[Probe], Indicator]] = {
    f.__name__: f
    for f in (
        zero_gradients,
        logit_scale,
        gradient_agreement,
        one_step_beats_many,
        last_worse_than_best,
        noise_beats_gradient,
        large_eps,
        eps_curve,
        boundary_jump,
        hidden_randomness,
        memory,
        optimizes_inside,
        planted,
        search_beats_gradient,
        budget_still_gains,
        break_point_angle,
        still_breaks,
    )
}
