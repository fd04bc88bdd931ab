"""Options that many attacks share. Imports no torch."""

from __future__ import annotations

from fractions import Fraction

from arena.specs import Option

BOTH = ("Linf", "L2")
LOSSES = ("ce", "margin", "dlr", "ce_scaled")


def steps(default: int) -> Option:
    """Make the option of gradient steps."""
    return Option(default, "gradient steps a restart, 1 to a million", low=1, high=1_000_000)


def restarts(default: int = 1) -> Option:
    """Make the option of restarts."""
    return Option(default, "runs from different start points, at least 1", low=1)


def step(default: Fraction) -> Option:
    """Make the option of a step size."""
    return Option(default, "step size as a fraction of eps, above 0", low=1e-6, high=100)


def loss(default: str, choices: tuple[str, ...] = LOSSES) -> Option:
    """Make the option of what is climbed."""
    return Option(default, f"what is climbed: {', '.join(choices)}", choices=choices)


HEAD = Option("logits", "auxiliary head to attack as if it were the classifier; logits: the model's output")
TARGETS = Option(9, "classes to aim at, the highest wrong ones first, at least 1; never more than K - 1", low=1)
