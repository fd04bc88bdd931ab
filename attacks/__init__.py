"""Built-in attacks and rosters. Importing this module does not import torch."""

from __future__ import annotations

import math
from fractions import Fraction

from arena.hookspecs import hookimpl
from arena.specs import AttackSpec, Option, RosterSpec

_BOTH = ("Linf", "L2")
_LOSSES = ("ce", "margin", "dlr", "ce_scaled")


def _steps(default: int) -> Option:
    return Option(default, "gradient steps a restart, 1 to a million", low=1, high=1_000_000)


def _restarts(default: int = 1) -> Option:
    return Option(default, "runs from different start points, at least 1", low=1)


def _step(default: Fraction) -> Option:
    return Option(default, "step size as a fraction of eps, above 0", low=1e-6, high=100)


def _loss(default: str, choices: tuple[str, ...] = _LOSSES) -> Option:
    return Option(default, f"what is climbed: {', '.join(choices)}", choices=choices)


_HEAD = Option("logits", "auxiliary head to attack as if it were the classifier; logits: the model's output")

_PGD = (
    AttackSpec(
        "fgsm",
        "one step of eps along the gradient",
        _BOTH,
        iterate="arena_attacks.pgd:fgsm",
        paper="Goodfellow et al. 2015, arXiv 1412.6572",
        options={
            "loss": _loss("ce"),
            "random_start": Option(False, "start at a random point of the ball"),
            "head": _HEAD,
        },
    ),
    AttackSpec(
        "pgd",
        "projected gradient descent, best iterate kept, restarts",
        _BOTH,
        iterate="arena_attacks.pgd:pgd",
        paper="Madry et al. 2018, arXiv 1706.06083",
        options={
            "steps": _steps(20),
            "restarts": _restarts(),
            "loss": _loss("ce"),
            "step": _step(Fraction(1, 4)),
            "random_start": Option(True, "start at a random point of the ball; else at the image, once"),
            "head": _HEAD,
            "eot": Option(1, "passes to average each gradient over, for random models, at least 1", low=1),
            "way": Option(
                "plain",
                "the gradient, without entries the box stops (L2), without brightness and contrast, or in tanh space",
                choices=("plain", "box", "tangent", "tanh"),
            ),
        },
    ),
    AttackSpec(
        "cw_linf",
        "PGD on each example's own margin, no clamp (the papers' CW, corrected)",
        ("Linf",),
        iterate="arena_attacks.pgd:cw_linf",
        paper="Carlini & Wagner 2017, arXiv 1608.04644",
        options={"steps": _steps(30), "restarts": _restarts(), "step": _step(Fraction(1, 4)), "head": _HEAD},
    ),
    AttackSpec(
        "lambda_pgd",
        "one row of the lambda sweep: PGD on loss(logits) + lam * mean loss(heads)",
        _BOTH,
        iterate="arena_attacks.pgd:lambda_pgd",
        paper="lambda_attack sweep of the FGAA paper, table 5",
        options={
            "lam": Option(1.0, "weight of the heads, 0 to inf; inf: heads only", low=0, high=math.inf),
            "head": Option("", "the one head to weigh; empty: the mean over all heads"),
            "loss": _loss("ce", ("ce", "margin", "dlr")),
            "steps": _steps(20),
            "step": _step(Fraction(1, 10)),
            "restarts": _restarts(),
        },
        standalone=True,
        sweep="lambda_pgd",
    ),
)

_RHO = Option(0.75, "share of rises below which a window counts as stalling, 0 to 1", low=0, high=1)
_TARGETS = Option(9, "classes to aim at, the highest wrong ones first, at least 1; never more than K - 1", low=1)
_APGD_PAPER = "Croce & Hein 2020, arXiv 2003.01690"

_APGD = (
    AttackSpec(
        "apgd_ce",
        "Auto-PGD on the cross-entropy",
        _BOTH,
        iterate="arena_attacks.apgd:apgd_ce",
        paper=_APGD_PAPER,
        options={"steps": _steps(100), "restarts": _restarts(), "rho": _RHO, "head": _HEAD},
    ),
    AttackSpec(
        "apgd_dlr",
        "Auto-PGD on the difference of logits ratio",
        _BOTH,
        iterate="arena_attacks.apgd:apgd_dlr",
        paper=_APGD_PAPER,
        options={"steps": _steps(100), "restarts": _restarts(), "rho": _RHO, "head": _HEAD},
    ),
    AttackSpec(
        "apgd_t",
        "Auto-PGD on the targeted difference of logits ratio",
        _BOTH,
        iterate="arena_attacks.apgd:apgd_t",
        paper=_APGD_PAPER,
        options={"targets": _TARGETS, "steps": _steps(100), "restarts": _restarts(), "rho": _RHO, "head": _HEAD},
    ),
)

_WEIGHT = "weight of the {}, at least 0"
_GATE = Option("", "the one gate to attack; empty: all of them")

_GATES = (
    AttackSpec(
        "gate_pgd",
        "AFA's adaptive attack: PGD on a * loss + b * minus the cross-entropy between gate and a wanted value",
        _BOTH,
        iterate="arena_attacks.gates:gate_pgd",
        paper="AFA: Adaptive Feature Alignment, table 3, PGD+Ada",
        options={
            "a": Option(1.0, _WEIGHT.format("loss on the logits"), low=0, high=1e6),
            "b": Option(1.0, _WEIGHT.format("gates"), low=0, high=1e6),
            "to": Option("clean", "the gates' value on clean images, or the other end", choices=("clean", "other")),
            "gate": _GATE,
            "loss": _loss("ce"),
            "steps": _steps(20),
            "step": _step(Fraction(1, 10)),
            "restarts": _restarts(),
        },
        standalone=True,
        sweep="gate_pgd",
    ),
    AttackSpec(
        "gate_held",
        "PGD on the model with its gates held at a value, while the gates are pushed there themselves",
        _BOTH,
        iterate="arena_attacks.gates:gate_held",
        options={
            "value": Option(1.0, "where the gates are held, 0 to 1", low=0, high=1),
            "gate": _GATE,
            "push": Option(1.0, "first weight of the gates; it follows success. 0: no push", low=0, high=1e6),
            "loss": _loss("margin"),
            "steps": _steps(40),
            "step": _step(Fraction(1, 10)),
            "restarts": _restarts(),
        },
    ),
)

_CHOICES = (
    AttackSpec(
        "relaxed",
        "attack through hard choices made soft, from a high to a low temperature, or straight through",
        _BOTH,
        iterate="arena_attacks.through:relaxed",
        options={
            "kind": Option("soft", "soft mixture, or hard forwards and soft backwards", ("soft", "straight_through")),
            "loss": _loss("ce", ("ce", "dlr", "margin", "dlr_targeted")),
            "by": Option("apgd", "Auto-PGD, cooling by restart; or PGD, cooling by step", choices=("apgd", "pgd")),
            "hot": Option(10.0, "first temperature, above 0", low=1e-3, high=1e6),
            "cold": Option(0.1, "last temperature, above 0", low=1e-3, high=1e6),
            "steps": _steps(100),
            "restarts": _restarts(3),
            "targets": _TARGETS,
        },
    ),
    AttackSpec(
        "forced",
        "targeted attack under choices forced to the target, whose heads have to choose it",
        _BOTH,
        iterate="arena_attacks.through:forced",
        options={"targets": _TARGETS, "steps": _steps(100), "restarts": _restarts()},
    ),
    AttackSpec(
        "knob",
        "Auto-PGD through the model with a knob turned: a higher temperature, an undone detach, another constant",
        _BOTH,
        iterate="arena_attacks.through:knob",
        options={
            "knob": Option("", "the knob to turn; empty: all of kind temperature and detach"),
            "value": Option("", "what it is turned to; empty: its last declared value"),
            "loss": _loss("ce", ("ce", "dlr", "margin", "dlr_targeted")),
            "steps": _steps(100),
            "restarts": _restarts(),
            "targets": _TARGETS,
        },
    ),
)

_JOINT = (
    AttackSpec(
        "joint_t",
        "targeted Auto-PGD on heads and logits together, each by its own scale",
        _BOTH,
        iterate="arena_attacks.joint:joint_t",
        options={
            "weights": Option(
                "all", "first head alone, each half of the one before, or all alike", ("first", "order", "all")
            ),
            "targets": _TARGETS,
            "steps": _steps(100),
            "restarts": _restarts(),
        },
    ),
    AttackSpec(
        "steer",
        "flip the first head to a target, then the next while holding it, then push the output",
        _BOTH,
        iterate="arena_attacks.joint:steer",
        options={
            "targets": _TARGETS,
            "steps": _steps(40),
            "step": Option(0.25, "first step size as a fraction of eps, above 0", low=1e-6, high=100),
            "restarts": _restarts(),
        },
    ),
)

_FAB = AttackSpec(
    "fab_t",
    "targeted FAB: the nearest misclassified point, by projections onto the linearised boundary",
    _BOTH,
    iterate="arena_attacks.fab:fab_t",
    paper="Croce & Hein 2020, arXiv 1907.02044",
    kind="minimal",
    options={
        "targets": _TARGETS,
        "steps": _steps(100),
        "restarts": _restarts(),
        "alpha_max": Option(0.1, "largest pull towards the clean image, 0 to 1", low=0, high=1),
        "eta": Option(1.05, "overshoot across the boundary, 1 to 2", low=1, high=2),
        "beta": Option(0.9, "step back towards the clean image from a misclassified point, 0 to 1", low=0, high=1),
    },
)

_SQUARE = AttackSpec(
    "square",
    "square attack: random search with square patches on the margin",
    _BOTH,
    iterate="arena_attacks.square:square",
    paper="Andriushchenko et al. 2020, arXiv 1912.00049",
    knowledge="score-based",
    options={
        "queries": Option(5000, "proposals a restart, one forward each, at least 1", low=1),
        "p_init": Option(0.8, "share of pixels changed by the first proposals, above 0 to 1", low=1e-6, high=1),
        "restarts": _restarts(),
    },
)

_BLACKBOX = (
    AttackSpec(
        "nes",
        "PGD on finite differences of the margin: a check on gradients",
        _BOTH,
        iterate="arena_attacks.blackbox:nes",
        paper="Ilyas et al. 2018, arXiv 1804.08598",
        knowledge="score-based",
        options={
            "pairs": Option(32, "pairs of points an estimate, two forwards each, at least 1", low=1),
            "sigma": Option(0.01, "distance of a pair's points in each pixel, above 0", low=1e-6, high=1),
            "steps": _steps(20),
            "step": _step(Fraction(1, 4)),
            "restarts": _restarts(),
            "loss": _loss("margin"),
        },
    ),
    AttackSpec(
        "rays",
        "RayS: the nearest wrong label along directions of +-1, from labels alone",
        _BOTH,
        iterate="arena_attacks.blackbox:rays",
        paper="Chen & Gu 2020, arXiv 2006.12792",
        knowledge="decision-based",
        kind="minimal",
        options={"queries": Option(1000, "labels asked for, one forward each, at least 1", low=1)},
    ),
)

_FOREIGN = (
    AttackSpec(
        "foolbox",
        "any attack class of foolbox, foolbox:LinfPGD(steps=40); options go to the class",
        ("Linf", "L2", "L1", "L0"),
        run="arena_attacks.foreign:foolbox",
        paper="Rauber et al. 2017, arXiv 1707.04131",
        options={"cls": Option("", "name of a class in foolbox.attacks; other options go to it as they are")},
    ),
    AttackSpec(
        "art",
        "any evasion class of the Adversarial Robustness Toolbox, art:SquareAttack; options go to the class",
        ("Linf", "L2", "L1", "L0"),
        run="arena_attacks.foreign:art",
        paper="Nicolae et al. 2018, arXiv 1807.01069",
        options={"cls": Option("", "name of a class in art.attacks.evasion; other options go to it as they are")},
    ),
)

_ROSTERS = (
    RosterSpec("autoattack", "the standard AutoAttack ensemble", "arena_attacks.rosters:autoattack"),
    RosterSpec(
        "adaptive",
        "attacks made for the defense's surface: heads, hard choices, gates, knobs; restarts, other losses",
        "arena_attacks.rosters:adaptive",
        version="2",
        from_surface=True,
    ),
)


@hookimpl
def arena_register_attacks() -> list[AttackSpec | RosterSpec]:
    """Return the built-in attacks and rosters."""
    return [*_PGD, *_APGD, *_GATES, *_CHOICES, *_JOINT, _FAB, _SQUARE, *_BLACKBOX, *_FOREIGN, *_ROSTERS]
