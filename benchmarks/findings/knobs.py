"""FSR and CIFS: what an attacker gains by a softer mask, an undone detach, and the heads."""

from __future__ import annotations

from .bench import Bench, after, percent
from .judging import Criterion, Data, Finding, Series, Table, above, below

TAUS = ("0.3", "1", "3", "10")
FSR = ("fsr_sat", "fsr_trades", "fsr_mart")
#: The attacks that know of no knob or head.
PLAIN = ("apgd_ce(steps=50)", "apgd_t(steps=20)")
FSR_HEADS = ("robust", "nonrobust", "recalibrated")
CIFS = ("cifs_sat", "cifs_rt")


def measure_fsr(bench: Bench) -> dict[str, Series]:
    """Attack FSR plainly, with its mask softened or held, and at its heads."""
    series = {}
    for name in FSR:
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        series[f"{name} apgd"] = percent(s.attack("apgd_ce(steps=50)")[1])
        found = standing = after(s, PLAIN)
        series[f"{name} plain"] = percent(standing)
        for tau in TAUS:
            _, held = s.attack(f"knob(knob=tau,value={tau},steps=50)")
            series[f"{name} tau {tau}"] = percent(held)
            found = found & held
        _, held = s.attack("knob(knob=detach,value=true,steps=50)")
        series[f"{name} detach"] = percent(held)
        found = found & held & after(s, ["knob(loss=dlr_targeted,steps=20)"])
        for head in FSR_HEADS:
            _, held = s.attack(f"apgd_ce(steps=50,head={head})")
            series[f"{name} {head}"] = percent(held)
            found = found & held
        series[f"{name} all"] = percent(found)
    return series


def fsr_criteria(data: Data) -> list[Criterion]:
    """Ask that knobs and heads are worth little beyond the output."""
    return [
        below(
            f"`{d}`: output's attacks minus all", data.rows(f"{d} plain") - data.rows(f"{d} all"), 5, kind="difference"
        )
        for d in FSR
    ]


def fsr_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    names = {
        "natural": "natural",
        "apgd": "APGD on the output",
        "plain": "and targeted APGD on what is left",
        **{f"tau {t}": f"APGD, τ = {t} in the search" for t in TAUS},
        "detach": "APGD, mask held still in the search",
        **{h: f"APGD on head {h}" for h in FSR_HEADS},
        "all": "worst case of all, and targeted with both knobs",
    }
    rows = [["attack", *(f"`{d}`" for d in FSR)]]
    rows += [[label, *(data.cell(f"{d} {k}") for d in FSR)] for k, label in names.items()]
    return [Table(rows, "The trained τ is 0.1. Every broken point is broken on the model as it is.")]


def measure_cifs(bench: Bench) -> dict[str, Series]:
    """Attack CIFS plainly, through its masks, and at its probes."""
    series = {}
    for name in CIFS:
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        series[f"{name} apgd"] = percent(s.attack("apgd_ce(steps=50)")[1])
        standing = after(s, PLAIN)
        series[f"{name} plain"] = percent(standing)
        series[f"{name} knob"] = percent(s.attack("knob(steps=50)")[1])
        undone = after(s, ["knob(steps=50)", "knob(loss=dlr_targeted,steps=20)"])
        series[f"{name} undone"] = percent(undone)
        series[f"{name} more"] = percent(undone & standing)
        for head in s.surface.heads:
            series[f"{name} {head}"] = percent(s.attack(f"apgd_ce(steps=50,head={head})")[1])
    return series


def cifs_criteria(data: Data) -> list[Criterion]:
    """Ask that the gradient through the mask breaks more."""
    return [
        above(
            "`cifs_sat`: APGD minus APGD, detach undone",
            data.rows("cifs_sat apgd") - data.rows("cifs_sat knob"),
            0,
            kind="difference",
        ),
        above(
            "`cifs_sat`: output's two minus the same, undone",
            data.rows("cifs_sat plain") - data.rows("cifs_sat undone"),
            0,
            kind="difference",
        ),
    ]


def cifs_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    names = {
        "natural": "natural",
        "apgd": "APGD on the output",
        "knob": "APGD, detach undone",
        "plain": "APGD and targeted APGD on the output",
        "undone": "the same two, detach undone",
        "more": "worst case of the last two rows",
        "probe1": "APGD on probe 1",
        "probe2": "APGD on probe 2",
    }
    rows = [["attack", *(f"`{d}`" for d in CIFS)]]
    rows += [[label, *(data.cell(f"{d} {k}") for d in CIFS)] for k, label in names.items()]
    return [Table(rows)]


FINDINGS = (
    Finding(
        "fsr",
        "FSR hides little",
        "FSR's mask is a sigmoid of 10 r, almost binary, which could flatten gradients. But its paper's PGD-100 and "
        "AutoAttack move together: the cleanest evaluation of the five.",
        "Raised temperature, a mask held still and its heads take less than 5 points more than attacks on the output.",
        "APGD with 50 steps; targeted APGD with 20 steps for each of nine targets.",
        FSR,
        measure_fsr,
        fsr_criteria,
        fsr_table,
        why={"confirmed": "Attacks that know the mask and the heads add next to nothing."},
    ),
    Finding(
        "cifs",
        "CIFS: the gradient through the mask",
        "CIFS computes its mask from a detached copy, so the output's gradient misses how the mask moves. FSR's "
        "paper finds "
        "no gain of CIFS under AutoAttack.",
        "With the detach undone on the search copy, the same attacks leave fewer points.",
        "APGD with 50 steps; targeted APGD with 20 steps for each of nine targets; knobs `detach1` and `detach2`.",
        CIFS,
        measure_cifs,
        cifs_criteria,
        cifs_table,
        why={"confirmed": "The detached copy hides part of the way."},
    ),
)
