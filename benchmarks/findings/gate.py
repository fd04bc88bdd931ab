"""AFA: does its gate know an attacked image, and is it worth more than a constant?"""

from __future__ import annotations

from typing import Any

import numpy as np

from .bench import Bench, after, percent
from .judging import Criterion, Data, Finding, Series, Table, above, below
from .knobs import PLAIN

GATED = ("afa_sat", "afa_trades", "afa_mart")
CONSTANTS = ("0", "0.25", "0.5", "0.75", "1")
#: Attacks on any of the networks, cheap first; the gated one meets held gates beside.
COMMON = (*PLAIN, "pgd(loss=margin,steps=40,restarts=3)")
HELD = tuple(f"gate_held(value={v},steps=20)" for v in CONSTANTS)
#: Strengths of attack, as shares of the training's eps 0.2.
STRENGTHS = ("0", "0.025", "0.05", "0.1", "0.15", "0.2", "0.3")
#: Points of accuracy within which two networks count as level.
LEVEL = 3.0


def measure_constant(bench: Bench) -> dict[str, Series]:
    """Find the worst case of the gated network and of each constant gate."""
    series = {}
    for name in GATED:
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        standing = after(s, COMMON)
        series[f"{name} output"] = percent(standing)
        series[f"{name} gate"] = percent(standing & after(s, HELD))
        for value in CONSTANTS:
            held = bench.subject(f"{name}(w0={value})")
            series[f"{name} w0={value} natural"] = percent(held.right(held.x))
            series[f"{name} w0={value}"] = percent(after(held, COMMON))
    return series


def best(data: Data, name: str) -> str:
    """Return the constant with the highest mean accuracy; ties go to the smaller one."""
    return max(CONSTANTS, key=lambda v: data.mean(f"{name} w0={v}"))


def lead(data: Data, name: str) -> np.ndarray:
    """Return how far the gate is ahead of the best constant, (seeds, points)."""
    return data.rows(f"{name} gate") - data.rows(f"{name} w0={best(data, name)}")


def constant_criteria(data: Data) -> list[Criterion]:
    """Ask that the gate is not ahead of the best constant."""
    return [
        below(f"`{d}`: gate minus W_0 = {best(data, d)}, worst case", lead(data, d), LEVEL, kind="difference")
        for d in GATED
    ]


def constant_table(data: Data) -> list[Table]:
    """Lay out worst cases and natural accuracies."""
    tables = []
    for what, end, note in (("worst case", "", ""), ("natural", " natural", "Natural accuracy of the same networks.")):
        rows = [["defense", "gate", *(f"W_0 = {v}" for v in CONSTANTS)]]
        for d in GATED:
            own = data.cell(f"{d} natural" if end else f"{d} gate")
            rows.append([f"`{d}`", own, *(data.cell(f"{d} w0={v}{end}") for v in CONSTANTS)])
        rows[0][0] = f"defense, {what}"
        tables.append(Table(rows, note))
    return tables


def measure_curve(bench: Bench) -> dict[str, Series]:
    """Read the gate under attacks of growing strength."""
    series = {}
    for name in GATED:
        s = bench.subject(name)
        for eps in STRENGTHS:
            x_adv = s.x if eps == "0" else s.attack("pgd(steps=20)", eps)[0]
            (weight,) = s.read(x_adv).gates.values()
            series[f"{name} {eps}"] = [float(w) for w in weight]
    return series


def curve_criteria(data: Data) -> list[Criterion]:
    """Ask for a gate that tells attacked from clean."""
    found = []
    for d in GATED:
        found.append(above(f"`{d}`: mean W_0, clean", data.rows(f"{d} 0"), 0.5, digits=2))
        found.append(below(f"`{d}`: mean W_0, PGD at eps 0.2", data.rows(f"{d} 0.2"), 0.5, digits=2))
    return found


def curve_table(data: Data) -> list[Table]:
    """Lay out mean weights."""
    rows = [["mean W_0", *(f"eps {e}" for e in STRENGTHS)]]
    return [Table([*rows, *([f"`{d}`", *(data.cell(f"{d} {e}", 2) for e in STRENGTHS)] for d in GATED)])]


def draw_curve(figure: Any, data: Data) -> None:
    """Draw the mean gate over the strength of attack."""
    from .figures import BLUE, GREEN, ORANGE, axis, lines

    made = axis(
        figure,
        "eps of the PGD-20 that the image comes from (training used up to 0.2)",
        "mean W_0, weight of the clean norm",
    )
    looks = ((BLUE, "o"), (ORANGE, "s"), (GREEN, "D"))
    for d, (color, marker) in zip(GATED, looks, strict=True):
        lines(made, [float(e) for e in STRENGTHS], [data.rows(f"{d} {e}").mean(1) for e in STRENGTHS], d, color, marker)
    made.set_ylim(-0.02, 1.02)
    made.legend(frameon=False, fontsize="small")


def measure_clean(bench: Bench) -> dict[str, Series]:
    """Attack the network whose gate is held at the clean norm."""
    series = {}
    for name in GATED:
        for label, text in (("w0=1", f"{name}(w0=1)"), ("w0=0", f"{name}(w0=0)"), ("gate", name)):
            s = bench.subject(text, every=True)
            series[f"{name} {label} pgd"] = percent(s.attack("pgd(steps=20)")[1])
            series[f"{name} {label} natural"] = percent(s.right(s.x))
    return series


def clean_criteria(data: Data) -> list[Criterion]:
    """Ask for next to nothing."""
    return [below(f"`{d}`, W_0 = 1, PGD-20", data.rows(f"{d} w0=1 pgd"), 5, kind="share") for d in GATED]


def clean_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    rows = [["defense", *(f"{k}, {w}" for k in ("W_0 = 1", "W_0 = 0", "gate") for w in ("natural", "PGD-20"))]]
    for d in GATED:
        cells = [data.cell(f"{d} {k} {w}") for k in ("w0=1", "w0=0", "gate") for w in ("natural", "pgd")]
        rows.append([f"`{d}`", *cells])
    return [Table(rows)]


FINDINGS = (
    Finding(
        "gate-constant",
        "AFA's gate against a constant",
        "AFA mixes a batch norm for clean images and one for attacked ones by a gate, W_0. It should beat every "
        "constant "
        "weight in the worst case, or the gate adds nothing.",
        f"In the worst case the gate is less than {LEVEL:g} points ahead of the best constant W_0.",
        f"Worst case per image over {', '.join(f'`{e}`' for e in COMMON)}, each on what the ones before left; for "
        f"the gate "
        "also over `gate_held` at 0, 0.25, 0.5, 0.75 and 1. The best constant is chosen on the same points, which "
        "favors "
        "it a little.",
        GATED,
        measure_constant,
        constant_criteria,
        constant_table,
        why={"confirmed": "A constant does as well."},
    ),
    Finding(
        "gate-curve",
        "AFA's gate as a detector",
        "AFA's accuracies, natural above the standard net and robust at once, look like a detector in front of two "
        "models: "
        "W_0 near 1 on clean images and near 0 on attacked ones.",
        "Mean W_0 is above 0.5 on clean images and below 0.5 under PGD at the training's eps.",
        "`pgd(steps=20)` end to end through the gate at each eps; W_0 is read on the points that it hands over.",
        GATED,
        measure_curve,
        curve_criteria,
        curve_table,
        figure=draw_curve,
        caption="Mean weight of the clean norm as the attack grows stronger, means over train seeds with bands from "
        "lowest to highest.",
        why={
            "confirmed": "The gate tells attacked images from clean ones.",
            "refuted": "The gate does not tell attacked images from clean ones this way.",
        },
    ),
    Finding(
        "clean-branch",
        "AFA's clean branch alone",
        "With W_0 = 1 the network is the one with clean batch norms, which saw no attacked image through them.",
        "Held at W_0 = 1, PGD leaves less than 5 %.",
        "`pgd(steps=20)` on the network with the gate held, `w0=1`.",
        GATED,
        measure_clean,
        clean_criteria,
        clean_table,
        why={
            "confirmed": "All robustness is in the other branch.",
            "refuted": "All weights but the norms' are shared with branches that were trained on attacked images.",
        },
    ),
)
