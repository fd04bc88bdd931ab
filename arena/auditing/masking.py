"""Indicators of hidden gradients: is there one, is it in range, does it tell the truth, is doing without it better?

Sources: unavailable gradients (Pintor et al. 2022, arXiv 2106.09947), AutoAttack's flags (Croce & Hein 2020), Carlini
et al. 2019 (arXiv 1902.06705).
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from arena.auditing import thresholds as t
from arena.auditing.probing import (
    BLACK_BOX,
    LONG,
    MARGINS,
    NOISE_POINTS,
    STEPS,
    Points,
    Probe,
    direction,
    finding,
    many,
    share,
)
from arena.specs import Indicator


def zero_gradients(probe: Probe) -> Indicator:
    """Look for points at which the margin's gradient is exactly zero, at the image or on the way of a climb."""
    climb = probe.margin
    alive = (climb.lead[:-1] < 0).cumsum(0) == 0
    stuck = (climb.flat & alive).any(0)
    flag = many(stuck, t.ZERO_GRADIENT)
    return finding(
        "zero_gradients",
        flag,
        share(stuck),
        t.ZERO_GRADIENT,
        f"the gradient of the margin is exactly zero on the way of {int(stuck.sum())} of {len(stuck)} points",
        "gradient attacks stand still there; attack without gradients: " + probe.command(BLACK_BOX),
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
    return finding(
        "logit_scale",
        flag,
        spread,
        f"{t.SMALLEST_SPREAD:g} to {t.LARGEST_SPREAD:g}",
        f"the logits spread over {spread:.3g} (usual: {t.SMALLEST_SPREAD:g} to {t.LARGEST_SPREAD:g}); at "
        f"{int(lost.sum())} of {len(lost)} points the cross-entropy has no gradient in fp32, the margin has",
        "attack losses that have no scale: " + probe.command(MARGINS),
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
    return finding(
        "gradient_agreement",
        flag,
        value,
        t.AGREEMENT,
        f"finite differences of the margin and its gradient agree to {value:.2f} (cosine, median of {len(a)} points)",
        "the gradient misleads; attack without it, or a differentiable stand-in: " + probe.command(BLACK_BOX),
    )


def noise_beats_gradient(probe: Probe) -> Indicator:
    """Compare the smallest margin that gradient steps reach with that of random points of the same ball."""
    best = torch.minimum(probe.ce.lead.amin(0), probe.margin.lead.amin(0))
    better = (probe.noise_lead < best) & ~probe.by_gradient
    flag = many(better, t.NOISE)
    return finding(
        "noise_beats_gradient",
        flag,
        share(better),
        t.NOISE,
        f"on {int(better.sum())} of {len(better)} points {NOISE_POINTS} random points come closer to a mistake than "
        f"{STEPS} gradient steps",
        "gradient steps lead nowhere here; attack without them: " + probe.command(BLACK_BOX),
    )


def search_beats_gradient(probe: Probe) -> Indicator:
    """Compare short random search with gradient steps, short and then long ones, on the same points."""
    found = probe.searched
    if found is None:
        return Indicator("search_beats_gradient", False, evidence="not looked at: random search is not available here")
    only = found & ~probe.by_gradient
    rows = only.nonzero().squeeze(1)
    if len(rows):  # a short climb may just be short
        s = probe.sample
        some = Points(s.x[rows], s.y[rows], s.index[rows])
        for objective in ("margin", "ce"):
            climb = probe.climb(some, probe.threat, objective, LONG, 3.0 / LONG, probe.noise(some, 0))
            only[rows] &= ~climb.broken
    flag = many(only, t.BLACK_BOX)
    return finding(
        "search_beats_gradient",
        flag,
        share(only),
        t.BLACK_BOX,
        f"short random search breaks {int(only.sum())} of {len(only)} points that gradient steps do not",
        "gradients are hidden; attack longer without them: " + probe.command(BLACK_BOX),
    )


def boundary_jump(probe: Probe) -> Indicator:
    """Walk to a decision boundary by halving and look at the margin on both sides of it.

    A continuous model's relative margin is near zero on both; rounding, hard choices and branches make it jump, and no
    gradient sees a jump. Where the surface declares a selection or a gate and ``adaptive`` was played whole, which
    attacks them, a jump is told but no flag.
    """
    s = probe.sample
    if probe.surface.random:
        return Indicator("boundary_jump", False, evidence="not looked at: the model is random")
    guess = probe.look(s.x, s.y).logits[:, 0].argmax(1)
    differs = guess.unsqueeze(1) != guess
    if not bool(differs.any(1).all()):
        return Indicator("boundary_jump", False, evidence="not looked at: all points have one class")
    a, b, y = s.x, s.x[_next(differs)], guess
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
    text = f"{int(jumps.sum())} of {len(jumps)} decision boundaries are jumps (median {float(jump.median()):.2g} of the"
    text += " logits' spread): something is rounded or chosen on the way, and gradients do not see it"
    if found and probe.adaptive and (probe.surface.selections or probe.surface.gates):
        text += "; the surface declares hard choices and adaptive attacked them"
        return Indicator("boundary_jump", False, share(jumps), t.JUMPS, text)
    if probe.surface.selections or probe.surface.gates:
        remedy = "attack the choices that the surface declares: " + probe.command("autoattack,adaptive")
    else:
        remedy = "declare the choice (a selection or a gate, --surface FILE.toml) and play adaptive; until then: "
        remedy += probe.command(BLACK_BOX)
    return finding("boundary_jump", found, share(jumps), t.JUMPS, text, remedy)


def _next(differs: Tensor) -> Tensor:
    """Return for each point the next one, cyclically, of another class; (N, N) bool -> (N,)."""
    n = len(differs)
    here = torch.arange(n, device=differs.device)
    away = (here - here.unsqueeze(1)) % n
    return away.masked_fill(~differs, n).argmin(1)
