"""Indicators of what a model may not do while it answers: draw numbers in secret, remember, or optimise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from arena.auditing import thresholds as t
from arena.auditing.probing import BLACK_BOX, Probe, finding
from arena.batches import pad
from arena.referee import exact
from arena.specs import Indicator


def hidden_randomness(probe: Probe) -> Indicator:
    """Ask one copy three times about points near the images; the defense check asked about the images alone."""
    s = probe.sample
    if probe.surface.random:
        return Indicator("hidden_randomness", False, evidence="not looked at: the model says that it is random")
    points = probe.noise(s, 302)
    model = probe.build().to(s.x.device)
    with exact():
        first, *others = (model(pad(points))[: len(s)].float() for _ in range(3))
    gap = torch.stack([_gap(first, z) for z in others]).amax(0)
    return finding(
        "hidden_randomness",
        bool((gap > t.SAME).any()),
        float(gap.max()),
        t.SAME,
        f"{int((gap > t.SAME).sum())} of {len(gap)} points near images get other logits each time they are asked for",
        "declare random = true on the surface, or make forward free of side effects, then play again",
        fatal=True,
    )


def _gap(a: Tensor, b: Tensor) -> Tensor:
    """Return the largest change of each row's logits, as a share of their spread; infinite where not finite."""
    spread = (a.amax(1) - a.amin(1)).clamp_min(1e-12)
    return ((a - b).abs().amax(1) / spread).nan_to_num(torch.inf)


def memory(probe: Probe) -> Indicator:
    """Ask two fresh copies about points near the images: one has seen the images before, one has not."""
    s = probe.sample
    if probe.surface.random:
        return Indicator("memory", False, evidence="not looked at: the model is random")
    points = probe.noise(s, 300)
    device = s.x.device
    fresh, used = probe.build().to(device), probe.build().to(device)
    with exact():
        alone = fresh(pad(points))[: len(s)].float()
        for seen in (s.x, probe.noise(s, 301), s.x.flip(0)):
            used(pad(seen))
        after = used(pad(points))[: len(s)].float()
    gap = _gap(alone, after)
    return finding(
        "memory",
        bool((gap > t.SAME).any()),
        float(gap.max()),
        t.SAME,
        f"{int((gap > t.SAME).sum())} of {len(gap)} points get other logits from a copy that has seen images before",
        "an answer may depend on the image alone; make forward forget earlier calls, then play again",
        fatal=True,
    )


def optimizes_inside(probe: Probe) -> Indicator:
    """See whether ``forward`` calls autograd itself: an optimisation loop at inference."""
    s = probe.sample
    with _counting() as calls, exact():
        probe.target.model(pad(s.x[:8]))
    flag = calls[0] > 0
    return finding(
        "optimizes_inside",
        flag,
        float(calls[0]),
        0.0,
        f"one forward calls autograd {calls[0]} times: the model optimises at inference, and a gradient through it is "
        "rarely the true one",
        "attack the model under the loop, and without gradients: " + probe.command(BLACK_BOX),
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
