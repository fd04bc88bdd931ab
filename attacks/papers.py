"""The papers' own attacks, as their evaluations run them: one run, and the point where it ends is handed over.

Written from the papers' maths (FGAA, EWAS, FSR; CAS's evaluation is FGAA's). Final iterates are what the protocol
``paper`` is about; to break a model, use ``pgd``, ``cw_linf`` and the roster ``adaptive``, which keep the best one.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import torch
import torch.nn.functional as F
from torch import Tensor

from arena.attack import Unsupported
from arena.objectives import best_other
from arena.rng import Stream
from arena.surface import Reading
from arena.target import Target
from arena.threat import Threat

from .steps import ascend

#: A loss on one score vector, (N, K) -> one number for the batch.
Term = Callable[[Tensor], Tensor]
Step = float | Fraction


def paper_pgd(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    budget: object,
    rng: Stream,
    *,
    steps: int = 20,
    step: Step = Fraction(3, 31),
    start: str = "uniform",
    lam: float = 0.0,
) -> Tensor:
    """Climb CE(logits) + lam * mean over heads of CE(head); see ``arena.specs.AttackSpec.run``.

    FGAA and CAS: lam 2, steps of 0.003 in a ball of 0.031; EWAS: lam 0.01, eps/4; FSR: lam 0, eps/10, from the image.
    With one step of eps it is their FGSM.

    Raises:
        Unsupported: lam is not 0 and the surface declares no heads.
    """

    def term(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, reduction="sum")  # a sum, so that rows do not shrink each other's gradient

    return _climb(x, threat, steps, step, start, lambda point: _weighed(target.read(point), lam, term))


def paper_cw(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    budget: object,
    rng: Stream,
    *,
    steps: int = 20,
    step: Step = Fraction(3, 31),
    start: str = "uniform",
    lam: float = 0.0,
    gate: str = "batch",
    confidence: float = 50.0,
) -> Tensor:
    """Climb a hinge on the lead z_y - max_{k != y} z_k, of logits and weighted heads.

    ``gate=batch`` (CAS, FGAA): -relu(sum over the batch of leads), for each score vector. Once the sum is at most 0 the
    gradient is exactly zero for every row, those not yet flipped among them. ``gate=clamp`` (EWAS, FSR): each row's own
    -max(lead + confidence, 0).

    Raises:
        Unsupported: as ``paper_pgd``.
    """

    def term(scores: Tensor) -> Tensor:
        lead = scores.gather(1, y.view(-1, 1)).squeeze(1) - best_other(scores, y)
        return -torch.relu(lead.sum()) if gate == "batch" else -(lead + confidence).clamp_min(0).sum()

    return _climb(x, threat, steps, step, start, lambda point: _weighed(target.read(point), lam, term))


def paper_avg_pgd(
    target: Target,
    x: Tensor,
    y: Tensor,
    threat: Threat,
    budget: object,
    rng: Stream,
    *,
    steps: int = 100,
    step: Step = Fraction(3, 31),
    start: str = "uniform",
    lam: float = 0.0,
    m: int = 10,
    near: Step = Fraction(1, 10),
) -> Tensor:
    """Climb as ``paper_pgd``, each gradient the mean over ``m`` points drawn uniformly within ``near`` * eps.

    A reconstruction: FGAA reports Avg-PGD-100 and cites Tramer et al. 2020, without formula or code.

    Raises:
        Unsupported: as ``paper_pgd``.
    """

    def term(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores, y, reduction="sum")

    def loss(point: Tensor) -> Tensor:
        return _weighed(target.read(point + _noise(point, float(near) * threat.radius)), lam, term)

    return _climb(x, threat, steps, step, start, loss, m)


def _weighed(reading: Reading, lam: float, term: Term) -> Tensor:
    """Return term(logits) + lam * mean over heads of term(head); the heads alone at lam inf."""
    if lam == 0:
        return term(reading.logits)
    if not reading.heads:
        raise Unsupported(f"lam={lam:g} weighs heads; the surface declares none")
    heads = torch.stack([term(scores) for scores in reading.heads.values()]).mean()
    return heads if math.isinf(lam) else term(reading.logits) + lam * heads


def _climb(
    x: Tensor, threat: Threat, steps: int, step: Step, start: str, loss: Callable[[Tensor], Tensor], draws: int = 1
) -> Tensor:
    """Take ``steps`` steps of ``step`` * eps and return the last point, in ball and box.

    A random start is in the ball; as in FGAA's code the box is left to the first projection.
    """
    point = x + _noise(x, threat.radius) if start == "uniform" else x
    for _ in range(steps):
        total = torch.zeros_like(x)
        for _ in range(draws):
            leaf = point.detach().requires_grad_()
            value = loss(leaf)
            if value.requires_grad:
                total = total + torch.autograd.grad(value, leaf)[0]
        point = threat.project(x, ascend(threat, point, total, float(step) * threat.radius))
    return threat.project(x, point)


def _noise(like: Tensor, radius: float) -> Tensor:
    """Draw from the global generator, which the engine seeds for each chunk; on the CPU, so on any device the same."""
    return (torch.rand(like.shape) * 2 - 1).to(like.device) * radius
