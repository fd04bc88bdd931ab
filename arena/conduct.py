"""Indicators of what a model may not do while it answers: remember, or optimise."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from arena.probing import BLACK_BOX, Probe, finding
from arena.referee import exact
from arena.specs import Indicator
from arena.target import pad


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
    spread = (alone.amax(1) - alone.amin(1)).clamp_min(1e-12)
    gap = ((alone - after).abs().amax(1) / spread).nan_to_num(torch.inf)
    flag = bool((gap > 1e-3).any())
    return finding(
        "memory",
        flag,
        float(gap.max()),
        1e-3,
        f"{int((gap > 1e-3).sum())} of {len(gap)} points get other logits from a copy that has seen images before",
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
