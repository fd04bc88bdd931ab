"""Attacks on what a surface declares, as specs. Imports no torch."""

from __future__ import annotations

from fractions import Fraction

from arena.specs import AttackSpec, Option

from .options import BOTH, TARGETS, loss, restarts, step, steps

_WEIGHT = "weight of the {}, at least 0"
_GATE = Option("", "the one gate to attack; empty: all of them")

_START = Option(
    "ball",
    "anywhere in the ball; at the image; a small FGSM step from it; at the image with rounded pixels",
    choices=("ball", "image", "fgsm", "rounded"),
)
_SHRINK = Option(1.0, "radius searched, as a fraction of eps: up to 1", low=1e-3, high=1)

GATES = (
    AttackSpec(
        "gate_pgd",
        "AFA's adaptive attack: PGD on a * loss(logits) and b * how near the gates come to a wanted value",
        BOTH,
        iterate="arena_attacks.gates:gate_pgd",
        paper="AFA: Adaptive Feature Alignment, table 3, PGD+Ada",
        options={
            "a": Option(1.0, _WEIGHT.format("loss on the logits"), low=0, high=1e6),
            "b": Option(1.0, _WEIGHT.format("gates"), low=0, high=1e6),
            "to": Option("clean", "the gates' value on clean images, or the other end", choices=("clean", "other")),
            "gate": _GATE,
            "loss": loss("ce"),
            "steps": steps(20),
            "step": step(Fraction(1, 10)),
            "restarts": restarts(),
            "start": _START,
            "shrink": _SHRINK,
        },
        standalone=True,
        sweep="gate_pgd",
    ),
    AttackSpec(
        "gate_held",
        "PGD on the model with its gates held at a value, while the gates are pushed there themselves",
        BOTH,
        iterate="arena_attacks.gates:gate_held",
        options={
            "value": Option(1.0, "where the gates are held, 0 to 1", low=0, high=1),
            "gate": _GATE,
            "push": Option(1.0, "first weight of the gates; it follows success. 0: no push", low=0, high=1e6),
            "loss": loss("margin"),
            "steps": steps(40),
            "step": step(Fraction(1, 10)),
            "restarts": restarts(),
            "start": _START,
            "shrink": _SHRINK,
        },
    ),
)

CHOICES = (
    AttackSpec(
        "relaxed",
        "attack through hard choices made soft, from a high to a low temperature, or straight through",
        BOTH,
        iterate="arena_attacks.through:relaxed",
        options={
            "kind": Option("soft", "soft mixture, or hard forwards and soft backwards", ("soft", "straight_through")),
            "loss": loss("ce", ("ce", "dlr", "margin", "dlr_targeted")),
            "by": Option("apgd", "Auto-PGD, cooling by restart; or PGD, cooling by step", choices=("apgd", "pgd")),
            "hot": Option(10.0, "first temperature, above 0", low=1e-3, high=1e6),
            "cold": Option(0.1, "last temperature, above 0", low=1e-3, high=1e6),
            "steps": steps(100),
            "restarts": restarts(3),
            "targets": TARGETS,
        },
    ),
    AttackSpec(
        "forced",
        "targeted attack under choices forced to the target, whose heads have to choose it",
        BOTH,
        iterate="arena_attacks.through:forced",
        options={
            "place": Option(
                "alone",
                "the target alone; or, where a mask follows two classes, the target first, second, or behind the true",
                choices=("alone", "first", "second", "behind"),
            ),
            "targets": TARGETS,
            "steps": steps(100),
            "restarts": restarts(),
        },
    ),
    AttackSpec(
        "knob",
        "Auto-PGD through the model with a knob turned: a higher temperature, an undone detach, another constant",
        BOTH,
        iterate="arena_attacks.through:knob",
        options={
            "knob": Option("", "the knob to turn; empty: all of kind temperature and detach"),
            "value": Option("", "what it is turned to; empty: its last declared value"),
            "loss": loss("ce", ("ce", "dlr", "margin", "dlr_targeted")),
            "steps": steps(100),
            "restarts": restarts(),
            "targets": TARGETS,
        },
    ),
)

SOURCES = (
    AttackSpec(
        "transfer",
        "Auto-PGD on another defense's model, such as the undefended twin's, every iterate tried on this one",
        BOTH,
        knowledge="transfer",
        iterate="arena_attacks.through:transfer",
        options={
            "source": Option("rt", "the other defense, trained on the same data set and backbone"),
            "loss": loss("ce", ("ce", "dlr", "margin", "dlr_targeted")),
            "steps": steps(100),
            "restarts": restarts(),
            "targets": TARGETS,
        },
    ),
)

JOINT = (
    AttackSpec(
        "joint_t",
        "targeted Auto-PGD on heads and logits together, each by its own scale",
        BOTH,
        iterate="arena_attacks.joint:joint_t",
        options={
            "weights": Option(
                "all", "first head alone, each half of the one before, or all alike", ("first", "order", "all")
            ),
            "targets": TARGETS,
            "steps": steps(100),
            "restarts": restarts(),
        },
    ),
    AttackSpec(
        "steer",
        "flip the first head to a target, then the next while holding it, then push the output",
        BOTH,
        iterate="arena_attacks.joint:steer",
        options={
            "targets": TARGETS,
            "steps": steps(40),
            "step": Option(0.25, "first step size as a fraction of eps, above 0", low=1e-6, high=100),
            "restarts": restarts(),
        },
    ),
)
