"""Recipes: how the built-in defenses are trained, as ordered stages. Each takes its defense's options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from arena.specs import Value
from arena.surface import Reading
from arena.training import Stage, Usual


@dataclass(frozen=True)
class SelfCompared(Usual):
    """MART as EWAS's published code has it: a head's adversarial distribution is compared with itself, so the head's
    divergence and its gradient are zero (papers.md 3.2)."""

    def _term(self, natural: Reading | None, adversarial: Reading | None, name: str, y: Tensor) -> Tensor:
        return super()._term(adversarial if name else natural, adversarial, name, y)


def rt(lam: Value = 0.0, labels: Value = "true", **options: Value) -> Sequence[Stage]:
    """Regular training: cross-entropy on natural images, on logits and heads."""
    return [Usual("rt", lam=float(lam), labels=str(labels))]


def sat(
    lam: Value = 0.0, inner: Value = "full", labels: Value = "true", mask: Value = "argmax", **options: Value
) -> Sequence[Stage]:
    """Standard adversarial training (Madry et al., ICLR 2018): cross-entropy on the inner attack's images."""
    return [Usual("sat", lam=float(lam), inner=str(inner), labels=str(labels), mask=str(mask))]


def trades(
    beta: Value = 6.0, lam: Value = 0.0, labels: Value = "true", mask: Value = "argmax", **options: Value
) -> Sequence[Stage]:
    """TRADES (Zhang et al., ICML 2019), on logits and heads."""
    return [Usual("trades", lam=float(lam), beta=float(beta), labels=str(labels), mask=str(mask))]


def mart(
    beta: Value = 5.0,
    lam: Value = 0.0,
    labels: Value = "true",
    mask: Value = "argmax",
    weight: Value = "main",
    aux_kl: Value = "paper",
    **options: Value,
) -> Sequence[Stage]:
    """MART (Wang et al., ICLR 2020), on logits and heads; ``aux_kl`` code: ``SelfCompared``."""
    kind = SelfCompared if aux_kl == "code" else Usual
    return [kind("mart", lam=float(lam), beta=float(beta), labels=str(labels), mask=str(mask), weight=str(weight))]
