"""Recipes: how the built-in defenses are trained, as ordered stages."""

from __future__ import annotations

from collections.abc import Sequence

from arena.specs import Value
from arena.training import Stage, Usual


def rt(lam: Value = 0.0, labels: Value = "true", **options: Value) -> Sequence[Stage]:
    """Regular training: cross-entropy on natural images, on logits and heads."""
    return [Usual("rt", lam=float(lam), labels=str(labels))]


def sat(
    lam: Value = 0.0, inner: Value = "full", labels: Value = "true", mask: Value = "argmax", **options: Value
) -> Sequence[Stage]:
    """Standard adversarial training (Madry et al., ICLR 2018): cross-entropy on the inner attack's images."""
    return [Usual("sat", lam=float(lam), inner=str(inner), labels=str(labels), mask=str(mask))]


def trades(beta: Value = 6.0, **options: Value) -> Sequence[Stage]:
    """TRADES (Zhang et al., ICML 2019)."""
    return [Usual("trades", beta=float(beta))]


def mart(beta: Value = 5.0, **options: Value) -> Sequence[Stage]:
    """MART (Wang et al., ICLR 2020)."""
    return [Usual("mart", beta=float(beta))]
