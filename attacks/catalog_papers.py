"""The papers' own attacks, as specs. Imports no torch."""

from __future__ import annotations

import math
from fractions import Fraction

from arena.specs import AttackSpec, Option

from .options import step, steps

#: Rows whose margins CAS and FGAA sum before their ReLU.
BATCH = 200

_STEP = step(Fraction(3, 31))
_START = Option("uniform", "start at a uniform point of the ball, or at the image", choices=("uniform", "none"))
_LAM = Option(0.0, "weight of the heads' mean loss, 0 to inf; inf: heads only", low=0, high=math.inf)

PAPERS = (
    AttackSpec(
        "paper_pgd",
        "the papers' PGD, on CE(logits) + lam * mean CE(heads); the final iterate",
        ("Linf",),
        run="arena_attacks.papers:paper_pgd",
        paper="the evaluations of FGAA, CAS, EWAS and FSR",
        options={"steps": steps(20), "step": _STEP, "start": _START, "lam": _LAM},
    ),
    AttackSpec(
        "paper_cw",
        "the papers' CW: PGD on margins summed over the batch before the ReLU, or clamped for each point; the final "
        "iterate",
        ("Linf",),
        run="arena_attacks.papers:paper_cw",
        paper="the evaluations of FGAA and CAS (gate=batch), EWAS and FSR (gate=clamp)",
        options={
            "steps": steps(20),
            "step": _STEP,
            "start": _START,
            "lam": _LAM,
            "gate": Option(
                "batch",
                f"one hinge for {BATCH} points, which stops all of them once their summed lead is gone; or one a point",
                choices=("batch", "clamp"),
            ),
            "confidence": Option(50.0, "lead of the wrong class at which gate=clamp stops, at least 0", low=0),
        },
        chunk=BATCH,
    ),
    AttackSpec(
        "paper_avg_pgd",
        "Avg-PGD: paper_pgd with gradients averaged over nearby points (reconstruction); the final iterate",
        ("Linf",),
        run="arena_attacks.papers:paper_avg_pgd",
        paper="FGAA, which cites Tramer et al. 2020; no formula or code",
        options={
            "steps": steps(100),
            "step": _STEP,
            "start": _START,
            "lam": _LAM,
            "m": Option(10, "nearby points a gradient, one pass each, at least 1", low=1),
            "near": Option(
                Fraction(1, 10), "how far they are at most, as a fraction of eps, above 0", low=1e-6, high=1
            ),
        },
    ),
)
