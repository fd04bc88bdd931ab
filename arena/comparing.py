"""Whether two copies of a model are one to an attacker: scores, gates and gradients, in every mode of the surface."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arena.selection import Mode
from arena.surface import Reader, Reading, Surface, selects
from arena.surrogate import Surrogate, posing


def modes(model: nn.Module, surface: Surface, rows: int) -> list[Surrogate | None]:
    """Return every way of posing that the surface offers, one at a time: choices, held gates, knobs; first none."""
    found: list[Surrogate | None] = [None]
    first = torch.zeros(rows, dtype=torch.int64, device=next((p.device for p in model.parameters()), None))
    for name in selects(model, surface):
        for mode in (Mode("soft"), Mode("straight_through"), Mode("forced", classes=first)):
            found.append(Surrogate(modes={name: mode}))
    found += [Surrogate(gates={name: value}) for name in surface.gates for value in (0.0, 1.0)]
    found += [Surrogate(knobs={name: value}) for name, knob in surface.knobs.items() for value in knob.values]
    return found


@contextmanager
def looking(model: nn.Module, surface: Surface, mode: Surrogate | None) -> Iterator[Reader]:
    """Read a model in one mode."""
    with Reader(model, surface) as read, posing(model, surface, mode):
        yield read


def differences(one: nn.Module, other: nn.Module, surface: Surface, x: Tensor) -> tuple[float, float]:
    """Return the largest differences of scores and gates, as shares of their spread, and of the image's gradient, as a
    share of its length, over all modes of a surface; of the models' plain outputs too."""
    gap = slope = 0.0
    with torch.no_grad():
        gap = float(apart(one(x), other(x)).max())
    for mode in modes(one, surface, len(x)):
        (a, grad_a), (b, grad_b) = (_seen(model, surface, mode, x) for model in (one, other))
        parts = [apart(a.logits, b.logits), *(apart(a.heads[k], b.heads[k]) for k in a.heads)]
        parts += [(a.gates[k] - b.gates[k]).abs().flatten() for k in a.gates]
        gap = _worse(gap, float(torch.cat(parts).max()))
        if grad_a is not None and grad_b is not None:
            turned = (grad_a - grad_b).double().norm() / grad_a.double().norm().clamp_min(1e-30)
            slope = _worse(slope, float(turned))
    return gap, slope


def _seen(model: nn.Module, surface: Surface, mode: Surrogate | None, x: Tensor) -> tuple[Reading, Tensor | None]:
    leaf = x.detach().clone().requires_grad_(True)
    with looking(model, surface, mode) as read, torch.enable_grad():
        seen = read(leaf)
        total = seen.scores().logsumexp(2).sum()
        grad = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return (
        Reading(
            seen.logits.detach(),
            {k: v.detach() for k, v in seen.heads.items()},
            {k: v.detach() for k, v in seen.gates.items()},
        ),
        grad,
    )


def apart(a: Tensor, b: Tensor) -> Tensor:
    """Return by how much of their spread two sets of scores (N, K) differ, (N,)."""
    return (a - b).abs().amax(1) / (a.amax(1) - a.amin(1)).clamp_min(1e-12)


def _worse(a: float, b: float) -> float:
    return b if math.isnan(b) or b > a else a
