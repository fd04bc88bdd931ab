"""Indicators that look at the model: is there a gradient, does it tell the truth, do more steps and room help?

Each is a pure function of a ``Probe`` (and of nothing that an attack of the match has left behind). Sources: the
indicators of attack failure of Pintor et al. 2022 (arXiv 2106.09947), AutoAttack's flags (Croce & Hein 2020), the
checks of Carlini et al. 2019 (arXiv 1902.06705). Thresholds and their reasons: ``arena.thresholds``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction

import torch
from torch import Tensor

from arena import thresholds as t
from arena.planted import planted
from arena.probing import LONG, NOISE_POINTS, STEP, STEPS, Points, Probe, direction
from arena.referee import exact
from arena.specs import Indicator
from arena.target import pad

BLACK_BOX = "square(queries=20000)"
MARGINS = "pgd(loss=margin,steps=200,restarts=10),apgd_dlr(restarts=5),apgd_t"


def share(mask: Tensor) -> float:
    """Return the share of True, 0 for an empty mask."""
    return float(mask.float().mean()) if len(mask) else 0.0


def many(mask: Tensor, threshold: float) -> bool:
    """Tell whether a share of points is beyond its threshold, and no accident of one or two points.

    In a sample too small for ``FEWEST`` points to be a tenth, all of them must agree.
    """
    return share(mask) > threshold and int(mask.sum()) >= min(t.FEWEST, max(1, len(mask)))


def zero_gradients(probe: Probe) -> Indicator:
    """Look for points at which the margin's gradient is exactly zero, at the image or on the way of a climb."""
    climb = probe.margin
    alive = torch.cat((torch.ones_like(climb.flat[:1]), (climb.lead[:-1] >= 0).cummin(0).values[1:]))
    stuck = (climb.flat & alive).any(0)
    flag = many(stuck, t.ZERO_GRADIENT)
    return Indicator(
        "zero_gradients",
        flag,
        share(stuck),
        t.ZERO_GRADIENT,
        f"the gradient of the margin is exactly zero on the way of {int(stuck.sum())} of {len(stuck)} points"
        if flag
        else "",
        "gradient attacks stand still there; attack without gradients: " + probe.command(BLACK_BOX) if flag else "",
    )


def logit_scale(probe: Probe) -> Indicator:
    """Measure the logits' spread, and how often the cross-entropy underflows where the margin does not."""
    s = probe.sample
    logits = probe.look(s.x, s.y).logits[:, 0]
    spread = float((logits.amax(1) - logits.amin(1)).median())
    none = {k: probe.gradient(s.x, s.y, k).flatten(1).abs().amax(1) == 0 for k in ("ce", "margin")}
    lost = none["ce"] & ~none["margin"]
    outside = not t.SMALLEST_SPREAD <= spread <= t.LARGEST_SPREAD
    flag = outside or many(lost, t.UNDERFLOW)
    evidence = ""
    if flag:
        evidence = f"the logits spread over {spread:.3g} (usual: {t.SMALLEST_SPREAD:g} to {t.LARGEST_SPREAD:g}); at "
        evidence += f"{int(lost.sum())} of {len(lost)} points the cross-entropy has no gradient in fp32, the margin has"
    return Indicator(
        "logit_scale",
        flag,
        spread,
        f"{t.SMALLEST_SPREAD:g} to {t.LARGEST_SPREAD:g}",
        evidence,
        "attack losses that have no scale: " + probe.command(MARGINS) if flag else "",
    )


def gradient_agreement(probe: Probe) -> Indicator:
    """Compare what the gradient predicts with finite differences of the true margin, off the image.

    Along the gradient and random directions from a random point halfway to the rim, a step of a sixteenth of the
    radius to both sides; the cosine between predicted and seen changes, a row at a time. Hard choices, rounding and
    false backward passes make them disagree.
    """
    s, ways = probe.sample, 7
    half = probe.ball(Fraction(1, 2))
    z = probe.noise(s, 100, half)
    grad = probe.gradient(z, s.y, "margin")
    size = probe.threat.radius / 16
    seen, told = [], []
    for k in range(ways + 1):
        if k == 0:
            way = direction(grad, probe.threat.norm)
        else:
            way = probe.stream.uniform(s.index, 200 + k, tuple(s.x.shape[1:]), 2) - 0.5
            way = direction(way, probe.threat.norm)
        ends = (z + size * way).clamp(0, 1), (z - size * way).clamp(0, 1)
        high, low = (probe.look(e, s.y).values[:, 0] for e in ends)
        seen.append(high - low)
        told.append((grad * (ends[0] - ends[1])).flatten(1).sum(1))
    a, b = torch.stack(seen, 1), torch.stack(told, 1)
    scale = a.abs().amax(1, keepdim=True).clamp_min(1e-37), b.abs().amax(1, keepdim=True).clamp_min(1e-37)
    a, b = a / scale[0], b / scale[1]
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-12)
    still = (a == 0).all(1) & (b == 0).all(1)  # constant here, and the gradient says so
    value = float(cosine[~still].median()) if bool((~still).any()) else 0.0
    flag = not value >= t.AGREEMENT
    return Indicator(
        "gradient_agreement",
        flag,
        value,
        t.AGREEMENT,
        f"finite differences of the margin and its gradient agree to {value:.2f} (cosine, median of {len(a)} points)"
        if flag
        else "",
        "the gradient misleads; attack without it, or a differentiable stand-in: " + probe.command(BLACK_BOX)
        if flag
        else "",
    )


def noise_beats_gradient(probe: Probe) -> Indicator:
    """Compare the smallest margin that gradient steps reach with that of random points of the same ball."""
    best = torch.minimum(probe.ce.lead.amin(0), probe.margin.lead.amin(0))
    better = (probe.noise_lead < best) & ~probe.by_gradient
    flag = many(better, t.NOISE)
    return Indicator(
        "noise_beats_gradient",
        flag,
        share(better),
        t.NOISE,
        f"on {int(better.sum())} of {len(better)} points {NOISE_POINTS} random points come closer to a mistake than "
        f"{STEPS} gradient steps"
        if flag
        else "",
        "gradient steps lead nowhere here; attack without them: " + probe.command(BLACK_BOX) if flag else "",
    )


def search_beats_gradient(probe: Probe) -> Indicator:
    """Compare short random search with gradient steps on the same points."""
    found = probe.searched
    if found is None:
        return Indicator("search_beats_gradient", False, evidence="not looked at: random search is not available here")
    only = found & ~probe.by_gradient
    flag = many(only, t.BLACK_BOX)
    return Indicator(
        "search_beats_gradient",
        flag,
        share(only),
        t.BLACK_BOX,
        f"short random search breaks {int(only.sum())} of {len(only)} points that gradient steps do not" if flag else "",
        "gradients are hidden; attack longer without them: " + probe.command(BLACK_BOX) if flag else "",
    )


def one_step_beats_many(probe: Probe) -> Indicator:
    """Compare one full step on the cross-entropy with the usual climb on it."""
    one = probe.climb(probe.sample, probe.threat, "ce", 1, 1.0).broken
    only = one & ~probe.ce.broken
    flag = many(only, t.ONE_STEP)
    return Indicator(
        "one_step_beats_many",
        flag,
        share(only),
        t.ONE_STEP,
        f"one step breaks {int(only.sum())} of {len(only)} points that {STEPS} steps on the same loss do not"
        if flag
        else "",
        "iterating hurts the attack; try other losses and many starts: " + probe.command(MARGINS) if flag else "",
    )


def last_worse_than_best(probe: Probe) -> Indicator:
    """Look for climbs that give back what they had gained: the loss does not rise along the run."""
    climb = probe.margin
    lead = climb.lead
    gained = lead[0] - lead.amin(0)
    slipped = ((lead[-1] - lead.amin(0)) > t.SLIP * gained.clamp_min(1e-6)) & ~climb.broken
    flag = many(slipped, t.SLIPPED)
    return Indicator(
        "last_worse_than_best",
        flag,
        share(slipped),
        t.SLIPPED,
        f"{int(slipped.sum())} of {len(slipped)} climbs end at a loss worse than halfway back from their best point"
        if flag
        else "",
        "smaller steps and more starts: " + probe.command("pgd(loss=margin,steps=200,step=1/20,restarts=10)")
        if flag
        else "",
    )


def budget_still_gains(probe: Probe) -> Indicator:
    """Look whether a long climb on standing points is still gaining when it ends."""
    if not len(probe.standing):
        return Indicator("budget_still_gains", False, evidence="no point stands")
    lead = probe.long.lead.cummin(0).values
    span = (lead[0] - lead[-1]).clamp_min(1e-6)
    unsettled = ((lead[-1 - LONG // 10] - lead[-1]) / span > t.UNSETTLED_GAIN) & (lead[-1] >= 0)
    flag = many(unsettled, t.UNSETTLED)
    return Indicator(
        "budget_still_gains",
        flag,
        share(unsettled),
        t.UNSETTLED,
        f"after {LONG} steps {int(unsettled.sum())} of {len(unsettled)} climbs are still gaining" if flag else "",
        "the budget was too small: " + probe.command("pgd(loss=margin,steps=1000,restarts=5),apgd_ce(steps=500)")
        if flag
        else "",
    )


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
    return Indicator(
        "large_eps",
        flag,
        share(alive),
        t.BOX,
        f"{int(alive.sum())} of {len(alive)} points stand although gradient steps may go anywhere in the box"
        if flag
        else "",
        "the attacks are blind, whatever the radius; attack without gradients: " + probe.command(BLACK_BOX)
        if flag
        else "",
    )


def eps_curve(probe: Probe) -> Indicator:
    """Look for points that fall in a small ball and stand in one that contains it."""
    fallen = [probe.climb(probe.sample, probe.ball(f), "margin", STEPS, STEP).broken for f in _FACTORS]
    fallen.insert(2, probe.margin.broken)
    odd = torch.zeros_like(fallen[0])
    for small, large in zip(fallen, fallen[1:], strict=False):
        odd |= small & ~large
    flag = many(odd, t.CURVE)
    shares = ", ".join(f"{100 * (1 - share(f)):.0f}" for f in fallen)
    return Indicator(
        "eps_curve",
        flag,
        share(odd),
        t.CURVE,
        f"{int(odd.sum())} of {len(odd)} points fall in a smaller ball and stand in a larger one (standing at eps x "
        f"1/4, 1/2, 1, 2, 4: {shares} %)"
        if flag
        else "",
        "more room must never help the defense: " + probe.command(MARGINS) if flag else "",
    )


_FACTORS = (Fraction(1, 4), Fraction(1, 2), Fraction(2), Fraction(4))


def boundary_jump(probe: Probe) -> Indicator:
    """Walk to a decision boundary by halving and look at the margin on both sides of it.

    A continuous model's relative margin is near zero on both; rounding, hard choices and branches make it jump, and no
    gradient sees a jump. Declared selections and gates are known to jump; played by a whole ``adaptive`` they raise no
    flag.
    """
    s = probe.sample
    if probe.surface.random:
        return Indicator("boundary_jump", False, evidence="not looked at: the model is random")
    guess = probe.look(s.x, s.y).logits[:, 0].argmax(1)
    other = torch.arange(len(s), device=s.x.device)
    for shift in range(1, len(s)):  # the nearest later point of another class
        partner = (torch.arange(len(s), device=s.x.device) + shift) % len(s)
        fresh = (other == torch.arange(len(s), device=s.x.device)) & (guess[partner] != guess)
        other = partner.where(fresh, other)
    pairs = (other != torch.arange(len(s), device=s.x.device)).nonzero().squeeze(1)
    if not len(pairs):
        return Indicator("boundary_jump", False, evidence="not looked at: all points have one class")
    a, b, y = s.x[pairs], s.x[other[pairs]], guess[pairs]
    low, high = a.new_zeros(len(a)), a.new_ones(len(a))
    at = {"low": probe.lead(a, y), "high": probe.lead(b, y)}
    for _ in range(t.HALVINGS):
        middle = (low + high) / 2
        w = middle.view(-1, 1, 1, 1)
        lead = probe.lead(a * (1 - w) + b * w, y)
        right = lead >= 0
        low, high = middle.where(right, low), middle.where(~right, high)
        at["low"], at["high"] = lead.where(right, at["low"]), lead.where(~right, at["high"])
    jump = at["low"] - at["high"]
    jumps = jump > t.JUMP
    found = many(jumps, t.JUMPS)
    known = bool(probe.surface.selections or probe.surface.gates)
    text = f"{int(jumps.sum())} of {len(jumps)} decision boundaries are jumps (median {float(jump.median()):.2g} of the "
    text += "logits' spread): something is rounded or chosen on the way, and gradients do not see it"
    return Indicator(
        "boundary_jump",
        found and not known,
        share(jumps),
        t.JUMPS,
        text + ("; the surface declares hard choices" if known else "") if found else "",
        "declare the choice (a selection or a gate, --surface FILE.toml) and play adaptive; until then: "
        + probe.command(BLACK_BOX)
        if found and not known
        else "",
    )


def memory(probe: Probe) -> Indicator:
    """Ask two fresh copies about attacked points: one sees the images and other points first, one does not."""
    s = probe.sample
    if probe.surface.random:
        return Indicator("memory", False, evidence="not looked at: the model is random")
    x_adv = probe.margin.best
    device = s.x.device
    fresh, used = probe.build().to(device), probe.build().to(device)
    with exact():
        alone = fresh(pad(x_adv))[: len(s)].float()
        for seen in (s.x, probe.noise(s, 300), s.x.flip(0)):
            used(pad(seen))
        after = used(pad(x_adv))[: len(s)].float()
    spread = (alone.amax(1) - alone.amin(1)).clamp_min(1e-12)
    gap = ((alone - after).abs().amax(1) / spread).nan_to_num(torch.inf)
    flag = bool((gap > 1e-3).any())
    return Indicator(
        "memory",
        flag,
        float(gap.max()),
        1e-3,
        f"{int((gap > 1e-3).sum())} of {len(gap)} points get other logits from a copy that has seen images before"
        if flag
        else "",
        "an answer may depend on the image alone; make forward forget earlier calls, then play again" if flag else "",
        fatal=flag,
    )


def optimizes_inside(probe: Probe) -> Indicator:
    """See whether ``forward`` calls autograd itself: an optimisation loop at inference."""
    s = probe.sample
    with _counting() as calls, exact():
        probe.target.model(pad(s.x[:8]))
    flag = calls[0] > 0
    return Indicator(
        "optimizes_inside",
        flag,
        float(calls[0]),
        0.0,
        f"one forward calls autograd {calls[0]} times: the model optimises at inference, and a gradient through it is "
        "rarely the true one"
        if flag
        else "",
        "attack the model under the loop, and without gradients: " + probe.command(BLACK_BOX) if flag else "",
    )


@contextmanager
def _counting() -> Iterator[list[int]]:
    """Count calls of autograd's two entries."""
    calls = [0]
    names = ("grad", "backward")
    real = {k: getattr(torch.autograd, k) for k in names}

    def counted(function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **more: object) -> object:
            calls[0] += 1
            return function(*args, **more)

        return call

    for k in names:
        setattr(torch.autograd, k, counted(real[k]))
    try:
        yield calls
    finally:
        for k in names:
            setattr(torch.autograd, k, real[k])


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
    flag = many(fallen, t.STILL_BREAKS)
    text = ", ".join(f"{k}: {v}" for k, v in by.items() if v)
    return Indicator(
        "still_breaks",
        flag,
        share(fallen),
        t.STILL_BREAKS,
        f"of {len(s)} standing points short attempts break {int(fallen.sum())} ({text}): the match's attacks missed them"
        if flag
        else "",
        "attack longer: " + probe.command(f"{MARGINS},{BLACK_BOX}") if flag else "",
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
        memory,
        optimizes_inside,
        planted,
        search_beats_gradient,
        budget_still_gains,
        still_breaks,
    )
}
