"""Built-in attacks and rosters. Importing this module does not import torch."""

from __future__ import annotations

import math
from fractions import Fraction

from arena.hookspecs import hookimpl
from arena.specs import AttackSpec, Option, RosterSpec

from .catalog_papers import PAPERS
from .catalog_surface import CHOICES, GATES, JOINT, SOURCES
from .options import BOTH, HEAD, TARGETS, loss, restarts, step, steps

_PGD = (
    AttackSpec(
        "fgsm",
        "one step of eps along the gradient",
        BOTH,
        iterate="arena_attacks.pgd:fgsm",
        paper="Goodfellow et al. 2015, arXiv 1412.6572",
        options={
            "loss": loss("ce"),
            "random_start": Option(False, "start at a random point of the ball"),
            "head": HEAD,
        },
    ),
    AttackSpec(
        "pgd",
        "projected gradient descent, best iterate kept, restarts",
        BOTH,
        iterate="arena_attacks.pgd:pgd",
        paper="Madry et al. 2018, arXiv 1706.06083",
        options={
            "steps": steps(20),
            "restarts": restarts(),
            "loss": loss("ce"),
            "step": step(Fraction(1, 4)),
            "random_start": Option(True, "start at a random point of the ball; else at the image, once"),
            "head": HEAD,
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
        options={"steps": steps(30), "restarts": restarts(), "step": step(Fraction(1, 4)), "head": HEAD},
    ),
    AttackSpec(
        "lambda_pgd",
        "one row of the lambda sweep: PGD on loss(logits) + lam * mean loss(heads)",
        BOTH,
        iterate="arena_attacks.pgd:lambda_pgd",
        paper="lambda_attack sweep of the FGAA paper, table 5",
        options={
            "lam": Option(1.0, "weight of the heads, 0 to inf; inf: heads only", low=0, high=math.inf),
            "head": Option("", "the one head to weigh; empty: the mean over all heads"),
            "loss": loss("ce", ("ce", "margin", "dlr")),
            "steps": steps(20),
            "step": step(Fraction(1, 10)),
            "restarts": restarts(),
        },
        standalone=True,
        sweep="lambda_pgd",
    ),
)

_RHO = Option(0.75, "share of rises below which a window counts as stalling, 0 to 1", low=0, high=1)
_APGD_PAPER = "Croce & Hein 2020, arXiv 2003.01690"

_APGD = (
    AttackSpec(
        "apgd_ce",
        "Auto-PGD on the cross-entropy",
        BOTH,
        iterate="arena_attacks.apgd:apgd_ce",
        paper=_APGD_PAPER,
        options={"steps": steps(100), "restarts": restarts(), "rho": _RHO, "head": HEAD},
    ),
    AttackSpec(
        "apgd_dlr",
        "Auto-PGD on the difference of logits ratio",
        BOTH,
        iterate="arena_attacks.apgd:apgd_dlr",
        paper=_APGD_PAPER,
        options={"steps": steps(100), "restarts": restarts(), "rho": _RHO, "head": HEAD},
    ),
    AttackSpec(
        "apgd_t",
        "Auto-PGD on the targeted difference of logits ratio",
        BOTH,
        iterate="arena_attacks.apgd:apgd_t",
        paper=_APGD_PAPER,
        options={"targets": TARGETS, "steps": steps(100), "restarts": restarts(), "rho": _RHO, "head": HEAD},
    ),
    AttackSpec(
        "staged",
        "short targeted climbs, then rounds of a climb and a local random search for points that may still fall",
        BOTH,
        iterate="arena_attacks.staged:staged",
        options={
            "lanes": Option(5, "climbs and proposals side by side, at least 1", low=1),
            "look": Option(7, "steps of each first climb, at least 1, at most `steps`", low=1),
            "glance": Option(3, "random proposals after them, so many a lane, at least 1", low=1),
            "steps": steps(20),
            "search": Option(10, "random proposals a round, so many a lane, at least 1", low=1),
            "rounds": Option(5, "most rounds, at least 1", low=1),
            "hope": Option(
                0.27, "a point gets a round where the margin lacks at most this times what was won, 0 to inf", low=0
            ),
            "fade": Option(0.55, "by which hope shrinks each round, above 0 to 1", low=1e-3, high=1),
        },
        gives_up=True,
        version="3",
    ),
)

_FAB = AttackSpec(
    "fab_t",
    "targeted FAB: the nearest misclassified point, by projections onto the linearised boundary",
    BOTH,
    iterate="arena_attacks.fab:fab_t",
    paper="Croce & Hein 2020, arXiv 1907.02044",
    kind="minimal",
    options={
        "targets": TARGETS,
        "steps": steps(100),
        "restarts": restarts(),
        "alpha_max": Option(0.1, "largest pull towards the clean image, 0 to 1", low=0, high=1),
        "eta": Option(1.05, "overshoot across the boundary, 1 to 2", low=1, high=2),
        "beta": Option(0.9, "step back towards the clean image from a misclassified point, 0 to 1", low=0, high=1),
    },
)

_SQUARE = AttackSpec(
    "square",
    "square attack: random search with square patches on the margin",
    BOTH,
    iterate="arena_attacks.square:square",
    paper="Andriushchenko et al. 2020, arXiv 1912.00049",
    knowledge="score-based",
    options={
        "queries": Option(5000, "proposals a restart, at most one forward each, at least 1", low=1),
        "p_init": Option(0.8, "share of pixels changed by the first proposals, above 0 to 1", low=1e-6, high=1),
        "restarts": restarts(),
    },
)

_BLACKBOX = (
    AttackSpec(
        "nes",
        "PGD on finite differences of the margin: a check on gradients",
        BOTH,
        iterate="arena_attacks.blackbox:nes",
        paper="Ilyas et al. 2018, arXiv 1804.08598",
        knowledge="score-based",
        options={
            "pairs": Option(32, "pairs of points an estimate, two forwards each, at least 1", low=1),
            "sigma": Option(0.01, "distance of a pair's points in each pixel, above 0", low=1e-6, high=1),
            "steps": steps(20),
            "step": step(Fraction(1, 4)),
            "restarts": restarts(),
            "loss": loss("margin"),
        },
    ),
    AttackSpec(
        "rays",
        "RayS: the nearest wrong label along directions of +-1, from labels alone",
        BOTH,
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
        version="4",
        budget=9000,
        from_surface=True,
    ),
    RosterSpec(
        "quick",
        "arena's own for a small share of the passes: looks at each point, spends on those that may fall",
        "arena_attacks.rosters:quick",
        version="2",
    ),
    RosterSpec(
        "papers",
        "the defense's own evaluation, as its paper ran it; meant for --protocol paper",
        "arena_attacks.rosters:papers",
        from_evaluation=True,
    ),
)


@hookimpl
def arena_register_attacks() -> list[AttackSpec | RosterSpec]:
    """Return the built-in attacks and rosters."""
    return [*_PGD, *_APGD, *GATES, *CHOICES, *JOINT, *SOURCES, _FAB, _SQUARE, *_BLACKBOX, *PAPERS, *_FOREIGN, *_ROSTERS]
