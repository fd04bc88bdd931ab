"""Objectives: pure functions (scores (M, K), y (M,), target (M,) or pair (M, 2) or None) -> (M,), to be increased.

An attack names one in its query and the engine sums it over the logits and heads with the query's weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from arena.errors import unknown
from arena.specs import load

Objective = Callable[[Tensor, Tensor, Tensor | None], Tensor]

#: Spread, largest minus smallest score, that ``ce_scaled`` gives its scores.
SPREAD = 10.0
#: Share of a head's spread by which a target class has to lead to count as chosen for good.
ENOUGH = 0.1


def ce(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of the true class."""
    return F.cross_entropy(scores, y, reduction="none")


def ce_targeted(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Minus the cross-entropy of the target class."""
    return -F.cross_entropy(scores, _needed(target), reduction="none")


def margin(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Largest wrong score minus the true one, max_{k != y} z_k - z_y, per example, no clamp (papers.md 8)."""
    return best_other(scores, y) - _at(scores, y)


def margin_targeted(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Target score minus the true one, z_t - z_y."""
    return _at(scores, _needed(target)) - _at(scores, y)


def dlr(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Difference of logits ratio (Croce & Hein 2020, eq. 6); below 3 classes, where it is undefined, the margin."""
    if scores.shape[1] < 3:
        return margin(scores, y)
    top = scores.topk(3, dim=1).values
    return margin(scores, y) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Targeted DLR (Croce & Hein 2020, eq. 7); below 4 classes, where it is undefined, the targeted margin."""
    if scores.shape[1] < 4:
        return margin_targeted(scores, y, target)
    top = scores.topk(4, dim=1).values
    scale = top[:, 0] - 0.5 * (top[:, 2] + top[:, 3]) + 1e-12
    return margin_targeted(scores, y, target) / scale


def ce_scaled(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Cross-entropy of the scores brought to a spread of 10; the scale carries no gradient.

    Where logits are huge or nearly equal, the plain cross-entropy has no slope or always the same one (papers.md 9.5).
    """
    return F.cross_entropy(scores * (SPREAD / _spread(scores)), y, reduction="none")


def lead(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Target score minus the best of all others, over the scores' spread, which carries no gradient (papers.md 9.1)."""
    t = _needed(target)
    return (_at(scores, t) - best_other(scores, t)) / _spread(scores).squeeze(1)


def lead_enough(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """``lead``, of which more than ``ENOUGH`` is worth nothing more: a head that is flipped is left where it is."""
    return lead(scores, y, target).clamp_max(ENOUGH)


def lead_away(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """``margin`` over the scores' spread, which carries no gradient: comparable between heads and logits."""
    return margin(scores, y) / _spread(scores).squeeze(1)


def top_two(scores: Tensor, y: Tensor, target: Tensor | None = None) -> Tensor:
    """Leads of a pair of classes, (M, 2): the first's over the second, the second's over all others.

    Both are over the scores' spread, and more than ``ENOUGH`` of either is worth nothing more.
    """
    pair = _needed(target)
    first, second = scores.gather(1, pair).unbind(1)
    rest = scores.scatter(1, pair, -torch.inf).amax(1)
    leads = torch.stack((first - second, second - rest), 1) / _spread(scores)
    return leads.clamp_max(ENOUGH).sum(1)


def best_other(scores: Tensor, y: Tensor) -> Tensor:
    """Largest score among the wrong classes, (M,)."""
    return scores.scatter(1, y.view(-1, 1), -torch.inf).amax(1)


def _spread(scores: Tensor) -> Tensor:
    found = scores.detach()
    return (found.amax(1, keepdim=True) - found.amin(1, keepdim=True)).clamp_min(1e-12)


def _at(scores: Tensor, classes: Tensor) -> Tensor:
    return scores.gather(1, classes.view(-1, 1)).squeeze(1)


def _needed(target: Tensor | None) -> Tensor:
    if target is None:
        raise ValueError("a targeted objective needs a target")
    return target


BUILT_IN: dict[str, Objective] = {
    f.__name__: f
    for f in (
        ce,
        ce_scaled,
        ce_targeted,
        margin,
        margin_targeted,
        dlr,
        dlr_targeted,
        lead,
        lead_enough,
        lead_away,
        top_two,
    )
}


def objective(name: str) -> Objective:
    """Find an objective by name or as ``package.module:function``.

    Raises:
        ArenaError: unknown name.
    """
    if ":" in name:
        found: Objective = load(name)
        return found
    if name not in BUILT_IN:
        raise unknown("objective", name, BUILT_IN)
    return BUILT_IN[name]
