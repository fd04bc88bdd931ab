"""How the papers evaluated their defenses, as attacks by name (papers' own settings, as fractions of eps).

Attacks that the papers ran without code or settings, AutoAttack above all, are left out: ``autoattack`` is a roster.
Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    """One paper's evaluation."""

    entries: tuple[str, ...]
    flaws: tuple[str, ...]


_START = "FGSM starts at a random point"
_HARD = "no gradient reaches the hard choice of a mask"


def fgaa(lam: int = 2, averaged: bool = False, masks: bool = True) -> Evaluation:
    """FGAA's evaluation, which is CAS's: steps of 0.003 in 0.031, heads weighed by ``lam``."""
    heads = f",lam={lam}" if lam else ""
    entries = (
        f"paper_pgd(steps=1,step=1{heads})",
        f"paper_pgd(steps=20,step=3/31{heads})",
        f"paper_cw(gate=batch,steps=20,step=3/31{heads})",
    )
    gated = "CW sums the margins of a batch before its ReLU: once the sum is gone, no point of the batch moves"
    averaging = (f"paper_avg_pgd(steps=100,step=3/31{heads})",) if averaged else ()
    again = ("Avg-PGD is a reconstruction",) if averaged else ()
    return Evaluation((*entries, *averaging), (gated, _START, *((_HARD,) if masks else ()), *again))


def ewas(lam: str = "0.01", masks: bool = True) -> Evaluation:
    """EWAS's evaluation: steps of eps/4, the head weighed by the training's ``lam``; its CIFAR-10 value on all data."""
    heads = f",lam={lam}" if lam != "0" else ""
    faint = f"the head that chooses the mask is weighed by {lam}, as the paper trained: it is hardly attacked"
    return Evaluation(
        (
            f"paper_pgd(steps=1,step=1{heads})",
            f"paper_pgd(steps=20,step=1/4{heads})",
            f"paper_cw(gate=clamp,steps=30,step=1/4{heads})",
        ),
        (_START, *((faint, _HARD) if masks else ())),
    )


#: FSR's evaluation: main logits, one run from the image.
FSR = Evaluation(
    (
        "paper_pgd(steps=1,step=1,start=none)",
        "paper_pgd(steps=20,step=1/10,start=none)",
        "paper_pgd(steps=100,step=1/10,start=none)",
        "paper_cw(gate=clamp,steps=30,step=1/10,start=none)",
    ),
    ("one run from the image, no random start", "the main logits alone are attacked"),
)

#: AFA's Table 3. It states neither steps nor step sizes.
_AFA = (
    "paper_pgd(steps=1,step=1,start=none)",
    "paper_pgd(steps=20,step=1/4)",
    "paper_cw(gate=clamp,steps=30,step=1/4)",
)
_UNSTATED = "steps and step sizes are not stated: they are arena's choice"


def afa(gates: bool) -> Evaluation:
    """AFA's evaluation; with gates, PGD+Ada at its seven ratios too."""
    ratios = ((10, 1), (5, 1), (2, 1), (1, 1), (1, 2), (1, 5), (1, 10)) if gates else ()
    ada = tuple(f"gate_pgd(a={a},b={b},steps=20,step=1/4)" for a, b in ratios)
    worst = ("PGD+Ada is the lowest accuracy over the ratios, not the minimum point by point",) if gates else ()
    best = ("PGD+Ada is played by gate_pgd, which keeps its best iterate",) if gates else ()
    return Evaluation((*_AFA, *ada), (_UNSTATED, *worst, *best))


#: DeepDefense's: a library's defaults, ten iterations. Its FAB is untargeted, arena's is not.
DEEP = Evaluation(
    (
        "paper_pgd(steps=1,step=1,start=none)",
        "paper_pgd(steps=10,step=1/4)",
        "apgd_ce(steps=10)",
        "apgd_t(steps=10)",
        "fab_t(steps=10)",
        "square",
    ),
    (
        "APGD and FAB run for ten iterations",
        "each attack has an eps of its own there, not stated; here all have one",
        "only points that all of its models classify correctly are attacked there; here all are",
        "FAB is targeted here, and APGD, FAB and Square keep their best iterate",
    ),
)
