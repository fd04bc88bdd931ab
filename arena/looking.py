"""What an attacker sees of some images by passes that are made in one way, and whether it is what another way shows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arena.attack import Answer, GateTerm, Query
from arena.cheaper import BF16_SHARE, BF16_TOLERANCE, GRADIENT_TOLERANCE, TOLERANCE
from arena.check import PROBE
from arena.comparing import apart
from arena.counted import Meter
from arena.target import Target

#: In bf16 two roundings of one row's gradient may differ by this share of its length, on ``BF16_SHARE`` of the rows by
#: more.
BF16_GRADIENT_TOLERANCE = 0.5


@dataclass(frozen=True)
class Looks:
    """What an attacker sees of some images."""

    plain: Answer
    """Without gradient."""
    slope: Answer
    """With that of all heads and gates together."""

    def parts(self) -> list[Tensor]:
        """Return all that was seen."""
        seen = [getattr(a, key) for a in (self.plain, self.slope) for key in ("logits", "scores", "gates", "grad")]
        return [part for part in seen if part is not None]

    def finite(self) -> bool:
        """Tell whether all of it is."""
        return all(bool(part.isfinite().all()) for part in self.parts())


def looks(target: Target, x: Tensor, size: int) -> Looks:
    """Look at ``size`` rows: the first ``PROBE`` images (N, C, H, W), repeated."""
    rows = torch.arange(size, device=x.device) % PROBE % len(x)
    x, surface = x[rows], target.surface
    y = torch.zeros(size, dtype=torch.int64, device=x.device)
    every = x.new_ones(size, max(len(surface.gates), 1))
    asked = Query(
        x.unsqueeze(1),
        "ce",
        x.new_ones(size, 1 + len(surface.heads)),
        gates=GateTerm(every, every) if surface.gates else None,
        counts=y.bool(),
    )
    before, target.batch_size = target.batch_size, max(target.batch_size, size)
    try:
        return Looks(*(target.answer(replace(asked, grad=grad), y) for grad in (False, True)))
    finally:
        target.batch_size = before


def differ(eager: Looks, made: Looks, precision: str, how: str) -> str:
    """Return by what passes made ``how`` differ from eager ones, more than roundings do; empty if they do not."""
    exact = precision == "fp32"
    score, allowed = (TOLERANCE, 0.0) if exact else (BF16_TOLERANCE, BF16_SHARE)
    if eager.finite() and not made.finite():
        return f"{how} passes give numbers that are not finite"
    for one, other in ((eager.plain, made.plain), (eager.slope, made.slope)):
        gaps = apart(_scores(one), _scores(other))
        if one.gates is not None and other.gates is not None:
            gaps = torch.cat((gaps, (one.gates - other.gates).abs().flatten()))
        if float((~(gaps <= score)).float().mean()) > allowed:
            return f"{how} passes differ from the eager ones by {float(gaps.max()):.2g} of the scores' spread"
    assert eager.slope.grad is not None
    assert made.slope.grad is not None
    a, b = (grad.flatten(1).double() for grad in (eager.slope.grad, made.slope.grad))
    if exact:
        turned = float((a - b).norm() / a.norm().clamp_min(1e-30))
        off = not turned <= GRADIENT_TOLERANCE
    else:
        each = (a - b).norm(dim=1) / a.norm(dim=1).clamp_min(1e-30)
        turned, off = float(each.max()), float((~(each <= BF16_GRADIENT_TOLERANCE)).double().mean()) > BF16_SHARE
    return f"the {how} gradient differs from the eager one by {turned:.2g} of its length" if off else ""


def _scores(answer: Answer) -> Tensor:
    """Return all scores, (N * terms, K)."""
    seen = answer.logits if answer.scores is None else answer.scores[:, 0]
    return seen.flatten(0, 1)


@contextmanager
def uncounted(target: Target) -> Iterator[None]:
    """Make passes that the target's meter does not count."""
    counted, target.meter = target.meter, Meter()
    try:
        yield
    finally:
        target.meter = counted
