"""Built-in rosters: autoattack, adaptive. Functions (surface, threat, n_classes) -> [(attack, options)]."""

from __future__ import annotations

import math

from arena.errors import ArenaError
from arena.specs import Entry
from arena.surface import Surface
from arena.threat import Threat

#: The papers' sweep over the weight of the heads in the attack's loss (papers' λ_attack).
LAMBDAS = (0.0, 0.1, 1.0, 2.0, 10.0, 100.0, math.inf)


def _only(name: str, threat: Threat) -> None:
    if threat.norm not in ("Linf", "L2"):
        raise ArenaError(f"roster '{name}': not built for {threat.norm} yet, expected Linf or L2")


def autoattack(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return the standard AutoAttack ensemble (Croce & Hein 2020), version ``standard`` for Linf and L2.

    APGD-CE, targeted APGD-DLR, targeted FAB (100 iterations, 9 targets or all K - 1 wrong classes, 1 restart each) and
    Square (5000 queries), in this order, on the model's output alone.

    Raises:
        ArenaError: another norm.
    """
    _only("autoattack", threat)
    targets = min(9, n_classes - 1)
    return [
        ("apgd_ce", {"steps": 100, "restarts": 1}),
        ("apgd_t", {"steps": 100, "restarts": 1, "targets": targets}),
        ("fab_t", {"steps": 100, "restarts": 1, "targets": targets}),
        ("square", {"queries": 5000, "p_init": 0.8, "restarts": 1}),
    ]


def adaptive(surface: Surface, threat: Threat, n_classes: int) -> list[Entry]:
    """Return what a surface calls for, cheap and decisive first.

    With heads: the λ_attack sweep of 20 steps, on cross-entropy and margin, and each head attacked as if it were the
    classifier (APGD-CE, then targeted APGD), its points judged on the model's output. Always: PGD with restarts on the
    margin, APGD on the DLR, PGD with restarts on the cross-entropy. A floor, not a proof.

    Raises:
        ArenaError: a norm other than Linf and L2.
    """
    _only("adaptive", threat)
    heads = list(surface.heads)
    targets = min(9, n_classes - 1)
    entries: list[Entry] = []
    if heads:
        weights: list[dict[str, float | str]] = [{"lam": lam} for lam in LAMBDAS]
        weights += [{"lam": math.inf, "head": head} for head in heads if len(heads) > 1]
        entries += [("lambda_pgd", {"steps": 20, "loss": loss, **w}) for loss in ("ce", "margin") for w in weights]
        entries += [("apgd_ce", {"head": head}) for head in heads]
        entries += [("apgd_t", {"head": head, "targets": targets}) for head in heads]
    entries += [
        ("pgd", {"loss": "margin", "steps": 40, "restarts": 5}),
        ("apgd_dlr", {}),
        ("pgd", {"loss": "ce", "steps": 40, "restarts": 5}),
    ]
    return entries
