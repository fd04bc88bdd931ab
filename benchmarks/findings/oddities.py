"""Numbers in the papers that look odd, measured again: a gate in the CW, sweeps, large eps, gradients that mislead."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .bench import Bench, Subject, after, cosine, percent, plain
from .judging import Criterion, Data, Finding, Series, Table, above, below
from .masks import first_head

LAMBDAS = ("0", "0.1", "1", "2", "10", "100", "inf")
#: FGAA's Table 5, PGD-20: percent on CIFAR-10, ResNet-18; 2 is Table 3's row.
PUBLISHED = {
    "0": 92.34,
    "0.1": 69.05,
    "1": 62.83,
    "2": 62.18,
    "10": 60.55,
    "100": 59.48,
    "inf": 58.88,
    "inf_1": 40.92,
    "inf_2": 92.75,
}
LABELS = {"inf": "∞", "inf_1": "∞, head 1", "inf_2": "∞, head 2"}
EPS = ("0.05", "0.1", "0.2", "0.4", "0.6", "0.8", "1")
#: Defense, and at which head: the curves over eps.
CURVES = (("sat", ""), ("rt", ""), ("fgaa_sat", ""), ("fgaa_sat", "head1"), ("fgaa_rt", ""), ("fgaa_rt", "head1"))
#: Points of accuracy that count as far below; the paper's next row is 18 points higher.
FAR = 5.0
#: Half the distance between two points of a finite difference, in pixels of 1.
REACH = 0.01
DIRECTED = ("fgaa_sat", "ewas_sat", "cas_sat", "fgaa_rt", "ewas_rt", "cas_rt")
HONEST = ("rt", "sat")
TRAINED_WITH = {"0.5": "fgaa_sat(lam=0.5)", "2": "fgaa_sat", "10": "fgaa_sat(lam=10)"}


def differences(subject: Subject, head: int = 0, reach: float = REACH) -> Tensor:
    """Return the finite-difference gradient of the margin max_{k != y} z_k - z_y of a head, shape of the images.

    ``head`` 0 is the output, then heads in order. Only values are used, no gradient of the model; at the edge of the
    box the two points are as far apart as the box allows.
    """
    from arena.objectives import margin

    x = subject.x
    found = torch.zeros_like(x).flatten(1)
    for pixel in range(found.shape[1]):
        ends = []
        for sign in (1.0, -1.0):
            point = x.clone().flatten(1)
            point[:, pixel] = (point[:, pixel] + sign * reach).clamp(0, 1)
            scores = subject.read(point.view_as(x)).scores()[:, head]
            ends.append((margin(scores, subject.y), point[:, pixel]))
        (high, right), (low, left) = ends
        found[:, pixel] = (high - low) / (right - left)
    return found.view_as(x)


# -- the batch gate ----------------------------------------------------------------------------------------------------


def measure_gate(bench: Bench) -> dict[str, Series]:
    """Play the papers' CW and the corrected one on a net without any defense."""
    s = bench.subject("rt", every=True)
    series = {"natural": percent(s.right(s.x))}
    for name, entry in (("batch", "paper_cw(gate=batch)"), ("clamp", "paper_cw(gate=clamp)"), ("own", "cw_linf")):
        series[name] = percent(s.attack(entry, everyone=True)[1])
    series["pgd"] = percent(s.attack("pgd(steps=20)", everyone=True)[1])
    return series


def gate_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    names = {
        "natural": "natural",
        "batch": "papers' CW, one hinge for the batch (`paper_cw(gate=batch)`)",
        "clamp": "papers' other CW, a hinge for each point (`paper_cw(gate=clamp)`)",
        "own": "each point's own margin, best iterate (`cw_linf`)",
        "pgd": "PGD-20 on the cross-entropy",
    }
    return [Table([["attack on `rt`", "accuracy"], *([label, data.cell(k)] for k, label in names.items())])]


# -- the weight of the heads -------------------------------------------------------------------------------------------


def measure_sweep(bench: Bench) -> dict[str, Series]:
    """Play the papers' sweep over the weight of the heads."""
    s = bench.subject("fgaa_sat", every=True)
    series = {"natural": percent(s.right(s.x))}
    for lam in LAMBDAS:
        series[lam] = percent(s.attack(f"lambda_pgd(lam={lam})")[1])
    for i, head in enumerate(s.surface.heads, start=1):
        series[f"inf_{i}"] = percent(s.attack(f"lambda_pgd(lam=inf,head={head})")[1])
    return series


def sweep_criteria(data: Data) -> list[Criterion]:
    """Ask that head 1 alone is far below every other row."""
    one = data.rows("inf_1")
    return [
        above(f"λ = {LABELS.get(k, k)} minus head 1 alone", data.rows(k) - one, FAR, kind="difference")
        for k in PUBLISHED
        if k != "inf_1"
    ]


def sweep_table(data: Data) -> list[Table]:
    """Lay out the sweep beside the published one."""
    rows = [["λ_attack", "digits, `fgaa_sat`", "published, CIFAR-10"]]
    rows += [[LABELS.get(k, k), data.cell(k), f"{v:.1f}"] for k, v in PUBLISHED.items()]
    return [Table(rows, f"Natural accuracy {data.cell('natural')} here, 86.2 there.")]


def draw_sweep(figure: Any, data: Data) -> None:
    """Draw the sweep and the published one."""
    from .figures import BLUE, ORANGE, dots

    names = list(PUBLISHED)
    series = [
        (
            "digits, three train seeds" if len(data.seeds) == 3 else "digits",
            [data.rows(k).mean(1) for k in names],
            BLUE,
            "o",
        ),
        ("published, CIFAR-10", [[PUBLISHED[k]] for k in names], ORANGE, "s"),
    ]
    made = dots(figure, [LABELS.get(k, k) for k in names], series, "accuracy, %")
    made.set(xlabel="weight of the heads in the attack, λ_attack", ylim=(0, 100))


# -- training with another weight --------------------------------------------------------------------------------------


def measure_training(bench: Bench) -> dict[str, Series]:
    """Attack models trained with other weights, by the tied attack of the paper and by a fixed strong one."""
    series = {}
    for lam, name in TRAINED_WITH.items():
        s = bench.subject(name)
        series[f"{lam} natural"] = percent(s.right(s.x))
        series[f"{lam} tied"] = percent(s.attack(f"lambda_pgd(lam={lam})")[1])
        head = first_head(s)
        series[f"{lam} fixed"] = percent(after(s, [f"apgd_ce(steps=50,head={head})", f"apgd_t(steps=20,head={head})"]))
    return series


def training_criteria(data: Data) -> list[Criterion]:
    """Ask whether the advantage of a small weight under the tied attack is gone under the fixed one."""
    tied, fixed = (data.rows(f"0.5 {k}") - data.rows(f"10 {k}") for k in ("tied", "fixed"))
    return [
        above("λ 0.5 minus λ 10, tied attack", tied, 0, kind="difference"),
        above("that, minus the same under the fixed attack", tied - fixed, 0),
    ]


def training_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    rows = [["trained with λ", "natural", "PGD-20 with the same λ", "head 1, APGD"]]
    rows += [[lam, *(data.cell(f"{lam} {k}") for k in ("natural", "tied", "fixed"))] for lam in TRAINED_WITH]
    return [Table(rows)]


# -- large eps ---------------------------------------------------------------------------------------------------------


def measure_eps(bench: Bench) -> dict[str, Series]:
    """Play PGD-20 at growing eps, at the output and at head 1."""
    series = {}
    for name, head in CURVES:
        s = bench.subject(name, every=True)
        for eps in EPS:
            entry = f"pgd(steps=20,head={head})" if head else "pgd(steps=20)"
            series[f"{name} {head or 'output'} {eps}"] = percent(s.attack(entry, eps)[1])
    return series


def eps_criteria(data: Data) -> list[Criterion]:
    """Ask for points that stay at four times eps, and for none at head 1 or without the module."""
    return [
        above("`fgaa_sat`, output, eps 0.8", data.rows("fgaa_sat output 0.8"), 5, kind="share"),
        above("`fgaa_rt`, output, eps 0.8", data.rows("fgaa_rt output 0.8"), 5, kind="share"),
        below("`fgaa_sat`, head 1, eps 0.8", data.rows("fgaa_sat head1 0.8"), 5, kind="share"),
        below("`fgaa_rt`, head 1, eps 0.8", data.rows("fgaa_rt head1 0.8"), 5, kind="share"),
        below("`sat`, output, eps 0.8", data.rows("sat output 0.8"), 5, kind="share"),
    ]


def eps_table(data: Data) -> list[Table]:
    """Lay out the curves."""
    rows = [["eps", *EPS]]
    for name, head in CURVES:
        rows.append([f"`{name}`, {head or 'output'}", *(data.cell(f"{name} {head or 'output'} {e}") for e in EPS)])
    return [Table(rows)]


def draw_eps(figure: Any, data: Data) -> None:
    """Draw accuracy over eps."""
    from .figures import BLACK, BLUE, ORANGE, axis, lines

    made = axis(figure, "eps (Linf; training used 0.2)", "accuracy under PGD-20, %")
    looks = {"sat": (BLACK, "o"), "rt": (BLACK, "^"), "fgaa_sat": (BLUE, "s"), "fgaa_rt": (ORANGE, "D")}
    for name, head in CURVES:
        values = [data.rows(f"{name} {head or 'output'} {e}").mean(1) for e in EPS]
        color, marker = looks[name]
        label = name + (", attacked at head 1" if head else ", at the output" if name.startswith("fgaa") else "")
        lines(made, [float(e) for e in EPS], values, label, color, marker, "--" if head else "-")
    made.legend(frameon=False, fontsize="small")


# -- where the gradient leads ------------------------------------------------------------------------------------------


def measure_direction(bench: Bench) -> dict[str, Series]:
    """Compare the attack's gradient with the direction in which the deciding margin really falls."""
    series = {}
    for name in (*DIRECTED, *HONEST):
        s = bench.subject(name)
        real = differences(s, 1 if s.surface.heads else 0)
        series[name] = plain(cosine(s.gradient(s.x), real))
    return series


def direction_criteria(data: Data) -> list[Criterion]:
    """Ask for a cosine near zero or below."""
    return [below(f"`{d}`: mean cosine", data.rows(d), 0.1, digits=2) for d in DIRECTED]


def direction_table(data: Data) -> list[Table]:
    """Lay out cosines."""
    return [Table([["defense", "cosine"], *([f"`{d}`", data.cell(d, 2)] for d in (*DIRECTED, *HONEST))])]


FINDINGS = (
    Finding(
        "batch-gate",
        "The papers' CW stops early",
        "FGAA's Table 7 has an undefended net at 24.4 % under CW and 0.0 % under PGD. The published CW sums the "
        "margins of "
        "a batch before its hinge: once the sum is gone, every point is spared.",
        "On the undefended net the batch's hinge leaves more than 5 %, and each point's own margin less.",
        "Attacks as the papers run them: all points, 200 a batch, 20 steps, final iterate; "
        "`cw_linf` keeps the best of 30.",
        ("rt",),
        measure_gate,
        lambda data: [
            above("`rt`, hinge of the batch", data.rows("batch"), 5, kind="share"),
            below("`rt`, each point's own margin", data.rows("own"), 5, kind="share"),
        ],
        gate_table,
        needs=("paper_cw",),
        why={"confirmed": "The gate of the attack keeps the points, not the net."},
    ),
    Finding(
        "lambda-attack",
        "One row of the sweep is far below the others",
        "FGAA's Table 5 varies λ_attack, the weight of the heads in the attack; infinity leaves the output out, "
        "and its "
        "index names the one head attacked. Head 1 alone is 18 points below the next row.",
        f"PGD on head 1 alone leaves at least {FAR:g} points less than every other row.",
        "`lambda_pgd`, 20 steps of eps/10, cross-entropy, each row on all naturally correct points.",
        ("fgaa_sat",),
        measure_sweep,
        sweep_criteria,
        sweep_table,
        figure=draw_sweep,
        caption="FGAA's sweep on digits and as published: accuracy for each weight of the heads in the attack.",
        why={
            "confirmed": "No weighted sum attacks as well as the head that decides.",
            "refuted": "Some weighted sum attacks about as well as the head that decides.",
        },
    ),
    Finding(
        "lambda-train",
        "A small training weight only looks robust",
        "EWAS's Table 6 and FGAA's Table 9 find models trained with small λ more robust, but attack each with its "
        "own λ: a "
        "small weight of the heads is a weak attack.",
        "λ 0.5 is ahead of λ 10 under the attack tied to it, and by less under one fixed attack on head 1.",
        "`lambda_pgd` with the training's λ; then `apgd_ce(steps=50)` and `apgd_t(steps=20)` at head 1 for all.",
        tuple(TRAINED_WITH.values()),
        measure_training,
        training_criteria,
        training_table,
        why={"confirmed": "Part of the advantage belongs to the weak attack."},
    ),
    Finding(
        "large-eps",
        "Accuracy that no eps can remove",
        "FGAA's Table 8 keeps 36.4 % at four times the eps of training. An honest model has nothing left there.",
        "At four times eps PGD on the output leaves more than 5 %, PGD on head 1 and plain training less.",
        "`pgd(steps=20)` from a random start, steps of eps/4, at each eps. At eps 1 the whole box is allowed.",
        tuple(dict.fromkeys(name for name, _ in CURVES)),
        measure_eps,
        eps_criteria,
        eps_table,
        figure=draw_eps,
        caption="Accuracy under PGD-20 as eps grows, means over train seeds with bands from lowest to highest.",
    ),
    Finding(
        "direction",
        "The attack's gradient points elsewhere",
        "If head 1 decides and the mask hides it, then the gradient of the output's loss need not point to where "
        "head 1's "
        "margin falls.",
        "The cosine of the two is below 0.1 on average.",
        f"Gradient of the output's cross-entropy against finite differences, {REACH} to each side in every pixel, "
        f"of head "
        "1's margin; for `rt` and `sat`, without heads, the output's own margin. Clean images.",
        (*DIRECTED, *HONEST),
        measure_direction,
        direction_criteria,
        direction_table,
        why={
            "confirmed": "The attack climbs a hill that is not the decision's.",
            "refuted": "For some of them the attack's gradient still points the right way.",
        },
    ),
)
