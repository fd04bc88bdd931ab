"""Masks chosen by a class (FGAA, EWAS, CAS, SAA, CSAA; partly CIFS): who decides, and what the labels are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arena.selection import Mode
from arena.surrogate import Surrogate

from .bench import Bench, Subject, after, percent
from .judging import Criterion, Data, Finding, Series, Table, above, below, number

TRAINED = ("fgaa_sat", "ewas_sat", "cas_sat", "saa_sat", "csaa_sat")
NATURAL = ("fgaa_rt", "ewas_rt", "cas_rt")
MASKS = (*TRAINED, *NATURAL)
TWO = tuple(d for d in MASKS if not d.startswith("ewas"))
#: Selections by rank rather than by class; shown, not judged.
PARTLY = "cifs_sat"
ABLATED = ("fgaa_sat", "ewas_sat", "cas_sat")
PGD = "pgd(steps=20)"


def agreement(subject: Subject, x: Tensor, head: int = 0, other: int = -1) -> Tensor:
    """Tell at which points of ``x`` a head names the same class as the output, or as head ``other``, (N,) bool."""
    reading = subject.read(x)
    heads = list(reading.heads.values())
    compared = reading.logits if other < 0 else heads[other]
    return heads[head].argmax(1) == compared.argmax(1)


def forced(subject: Subject, names: Sequence[str], head: int = -1) -> Tensor:
    """Return the share of wrong classes t that the output names when the masks ``names`` are forced to t, (N,).

    ``head`` asks a head instead of the output.
    """
    hits = torch.zeros(len(subject.y))
    for t in range(subject.n_classes):
        classes = torch.full_like(subject.y, t)
        reading = subject.read(subject.x, Surrogate(modes=dict.fromkeys(names, Mode("forced", classes=classes))))
        scores = reading.logits if head < 0 else list(reading.heads.values())[head]
        hits += ((scores.argmax(1) == t) & (subject.y != t)).float()
    return hits / (subject.n_classes - 1)


def share(values: Tensor) -> Series:
    """Return shares (N,) as percentages."""
    return [100.0 * float(v) for v in values]


def first_head(subject: Subject) -> str:
    """Return the name of the first head."""
    return next(iter(subject.surface.heads))


# -- who decides -------------------------------------------------------------------------------------------------------


def measure_agreement(bench: Bench) -> dict[str, Series]:
    """Compare the first head with the output, on clean and attacked images; the output with itself forced."""
    series = {}
    for name in (*MASKS, PARTLY):
        s = bench.subject(name, every=True)
        series[f"{name} clean"] = percent(agreement(s, s.x))
        by_output, _ = s.attack(PGD)
        by_head, _ = s.attack(f"pgd(steps=20,head={first_head(s)})")
        series[f"{name} output"] = percent(agreement(s, by_output))
        series[f"{name} head"] = percent(agreement(s, by_head))
    return series


def _agree(where: str) -> Any:
    def criteria(data: Data) -> list[Criterion]:
        return [above(f"`{d}`", data.rows(f"{d} {where}"), 99, kind="share") for d in MASKS]

    return criteria


def agreement_attacked(data: Data) -> list[Criterion]:
    """Ask for more than 99 % under both attacks."""
    ways = {"output": "attacked at the output", "head": "attacked at head 1"}
    return [above(f"`{d}`, {w}", data.rows(f"{d} {k}"), 99, kind="share") for d in MASKS for k, w in ways.items()]


def agreement_table(data: Data) -> list[Table]:
    """Lay out agreements."""
    rows = [["defense", "clean", "PGD on the output", "PGD on head 1"]]
    rows += [[f"`{d}`", *(data.cell(f"{d} {k}") for k in ("clean", "output", "head"))] for d in (*MASKS, PARTLY)]
    return [Table(rows, f"`{PARTLY}` weighs channels by rank, not by class: shown, not judged.")]


def measure_forced(bench: Bench) -> dict[str, Series]:
    """Force masks to each wrong class, in models trained with labels and without."""
    series = {}
    for name in (*MASKS, *(f"{d}(labels=own)" for d in ABLATED)):
        s = bench.subject(name, every=True)
        names = list(s.surface.selections)
        series[f"{name} all"] = share(forced(s, names))
        series[f"{name} first"] = share(forced(s, names[:1]))
    return series


def forced_criteria(data: Data) -> list[Criterion]:
    """Ask for nine of ten."""
    return [above(f"`{d}`, all masks forced", data.rows(f"{d} all"), 90) for d in MASKS]


def forced_table(data: Data) -> list[Table]:
    """Lay out forced masks."""
    rows = [["defense", "all masks forced to t", "only the first"]]
    names = (*MASKS, *(f"{d}(labels=own)" for d in ABLATED))
    rows += [[f"`{d}`", data.cell(f"{d} all"), data.cell(f"{d} first")] for d in names]
    note = "How often, in % of all points and wrong classes t, the output says t. Chance: at most about 11 %."
    return [Table(rows, note)]


def measure_second(bench: Bench) -> dict[str, Series]:
    """Compare head 2 with head 1, and ask head 2 under a forced first mask."""
    series = {}
    for name in TWO:
        s = bench.subject(name, every=True)
        series[f"{name} agree"] = percent(agreement(s, s.x, 1, 0))
        attacked, _ = s.attack(f"pgd(steps=20,head={first_head(s)})")
        series[f"{name} attacked"] = percent(agreement(s, attacked, 1, 0))
        series[f"{name} decodes"] = share(forced(s, list(s.surface.selections)[:1], head=1))
    return series


def second_criteria(data: Data) -> list[Criterion]:
    """Ask for more than half."""
    return [above(f"`{d}`: head 2 names the forced class", data.rows(f"{d} decodes"), 50) for d in TWO]


def second_table(data: Data) -> list[Table]:
    """Lay out second heads."""
    rows = [["defense", "agrees with head 1, clean", "head 1 attacked", "names t where mask 1 is forced to t"]]
    rows += [[f"`{d}`", *(data.cell(f"{d} {k}") for k in ("agree", "attacked", "decodes"))] for d in TWO]
    return [Table(rows)]


# -- what an attack on the head is worth -------------------------------------------------------------------------------


def measure_head(bench: Bench) -> dict[str, Series]:
    """Play the same two attacks at the output and at the first head."""
    series = {}
    for name in TRAINED:
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        series[f"{name} output"] = percent(after(s, ["apgd_ce(steps=50)", "apgd_t(steps=20)"]))
        head = first_head(s)
        series[f"{name} head"] = percent(after(s, [f"apgd_ce(steps=50,head={head})", f"apgd_t(steps=20,head={head})"]))
    return series


def head_criteria(data: Data) -> list[Criterion]:
    """Ask for a gap."""
    return [
        above(
            f"`{d}`: at the output minus at head 1",
            data.rows(f"{d} output") - data.rows(f"{d} head"),
            0,
            kind="difference",
        )
        for d in TRAINED
    ]


def head_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    rows = [["defense", "natural", "attacked at the output", "attacked at head 1"]]
    rows += [[f"`{d}`", *(data.cell(f"{d} {k}") for k in ("natural", "output", "head"))] for d in TRAINED]
    return [Table(rows)]


def measure_untrained(bench: Bench) -> dict[str, Series]:
    """Attack models that never saw an attack."""
    series = {}
    for name in (*NATURAL, "rt"):
        s = bench.subject(name, every=True)
        series[f"{name} natural"] = percent(s.right(s.x))
        series[f"{name} output"] = percent(after(s, [PGD]))
        if s.surface.heads:
            series[f"{name} head"] = percent(after(s, [f"pgd(steps=20,head={first_head(s)})"]))
    return series


def untrained_criteria(data: Data) -> list[Criterion]:
    """Ask for next to nothing at the head, and for more at the output."""
    found = [below(f"`{d}`, PGD on head 1", data.rows(f"{d} head"), 5, kind="share") for d in NATURAL]
    fgaa = data.rows("fgaa_rt output") - data.rows("fgaa_rt head")
    return [*found, above("`fgaa_rt`: PGD on the output minus PGD on head 1", fgaa, 0, kind="difference")]


def untrained_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    rows = [["defense", "natural", "PGD-20 on the output", "PGD-20 on head 1"]]
    for d in (*NATURAL, "rt"):
        head = data.cell(f"{d} head") if f"{d} head" in data.names() else "-"
        rows.append([f"`{d}`", data.cell(f"{d} natural"), data.cell(f"{d} output"), head])
    return [Table(rows)]


# -- what the labels are worth -----------------------------------------------------------------------------------------


def measure_labels(bench: Bench) -> dict[str, Series]:
    """Play both rosters on modules trained with labels, without, and on the recipe alone."""
    series = {}
    for name in ("sat", *ABLATED, *(f"{d}(labels=own)" for d in ABLATED)):
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        output = after(s, ["autoattack"])
        series[f"{name} autoattack"] = percent(output)
        series[f"{name} both"] = percent(after(s, ["adaptive"], rows=output))
    return series


def gain(data: Data, name: str, roster: str) -> np.ndarray:
    """Return how far a defense is ahead of ``sat``, (seeds, points)."""
    return data.rows(f"{name} {roster}") - data.rows(f"sat {roster}")


def labels_criteria(data: Data) -> list[Criterion]:
    """Ask that labels bring accuracy under autoattack, and that none of it is left by the worst case."""
    found = []
    for d in ABLATED:
        lost = data.rows(f"{d} autoattack") - data.rows(f"{d}(labels=own) autoattack")
        found.append(above(f"`{d}`: labels true minus own, autoattack", lost, 0, kind="difference"))
    for d in ABLATED:
        found.append(below(f"`{d}`: labels true minus `sat`, worst case", gain(data, d, "both"), 0, kind="difference"))
    return found


def labels_table(data: Data) -> list[Table]:
    """Lay out accuracies and gains."""
    columns = ("natural", "autoattack", "both")
    rows = [["defense", "natural", "autoattack", "worst case of autoattack and adaptive", "hidden from autoattack"]]
    for d in ("sat", *(x for m in ABLATED for x in (m, f"{m}(labels=own)"))):
        hidden = number((data.rows(f"{d} autoattack") - data.rows(f"{d} both")).mean())
        rows.append([f"`{d}`", *(data.cell(f"{d} {c}") for c in columns), hidden])
    return [Table(rows)]


def draw_labels(figure: Any, data: Data) -> None:
    """Draw accuracies under autoattack and in the worst case, with labels and without."""
    from .figures import BLACK, BLUE, ORANGE, dots

    names = ["sat", *(x for m in ABLATED for x in (m, f"{m}(labels=own)"))]
    shown = [n.replace("(labels=own)", "\nown argmax") for n in names]
    series = [
        ("autoattack", [data.rows(f"{n} autoattack").mean(1) for n in names], BLUE, "o"),
        ("worst case with adaptive", [data.rows(f"{n} both").mean(1) for n in names], ORANGE, "s"),
    ]
    dots(figure, shown, series, "accuracy, %").set_ylim(0, 100)
    figure.axes[0].axhline(data.mean("sat both"), color=BLACK, lw=1, ls=":", label="sat, worst case")
    figure.axes[0].legend(frameon=False, fontsize="small")


_CLAIM = (
    "In training the true label chooses the mask, so all that follows can read the label off the mask. At test "
    "time the "
    "first head's own answer chooses it. "
)

FINDINGS = (
    Finding(
        "agreement-clean",
        "Head 1 is the output: clean images",
        _CLAIM + "Then the output should be little more than an echo of the first head.",
        "The first head and the output name the same class on more than 99 % of clean images.",
        "The argmax of head 1 is compared with that of the output on the same images.",
        (*MASKS, PARTLY),
        measure_agreement,
        _agree("clean"),
        lambda data: [Table([["defense", "clean"], *([f"`{d}`", data.cell(f"{d} clean")] for d in (*MASKS, PARTLY))])],
        measured="agreement",
        why={"confirmed": "On clean images the output adds nothing to head 1's answer."},
    ),
    Finding(
        "agreement-attacked",
        "Head 1 is the output: attacked images",
        "The same, where it matters: an attack that moves the output has to move head 1, or else the two part.",
        "The first head and the output agree on more than 99 % of attacked images.",
        f"`{PGD}` on the output's cross-entropy, and on head 1's; the points are those the attack hands over.",
        (*MASKS, PARTLY),
        measure_agreement,
        agreement_attacked,
        agreement_table,
        measured="agreement",
        why={"confirmed": "Where the output fell, head 1 had fallen; where it stood, head 1 stood."},
    ),
    Finding(
        "forced-mask",
        "A mask of class t makes the output say t",
        _CLAIM + "If the output only decodes the mask, the image hardly matters.",
        "With the masks of a wrong class t the output says t, for more than 90 % of images and classes.",
        "Every mask, or the first alone, is forced to each of the nine wrong classes; the images are clean. "
        "Models trained with `labels=own`, where no label ever chose a mask, are the control.",
        (*MASKS, *(f"{d}(labels=own)" for d in ABLATED)),
        measure_forced,
        forced_criteria,
        forced_table,
        why={"confirmed": "The output follows the mask and not the image."},
    ),
    Finding(
        "second-head",
        "Head 2 mostly reads mask 1",
        "The second head sees features that the first mask has already marked.",
        "With mask 1 forced to a wrong class t, head 2 names t more often than not.",
        "As above, but only mask 1 is forced and head 2 is asked. SAA and CSAA are arena's reconstructions.",
        TWO,
        measure_second,
        second_criteria,
        second_table,
        why={"confirmed": "Head 2 is no second opinion."},
    ),
    Finding(
        "attack-the-head",
        "Attack the head, not the output",
        "FGAA's own Table 5: PGD-20 on both heads leaves 58.9 %, on head 1 alone 40.9 %, on the output alone 92.3 "
        "%. The "
        "argmax that picks a mask passes no gradient, so an attack on the output cannot see the move that matters.",
        "The same attacks at head 1 leave fewer points than at the output.",
        "`apgd_ce(steps=50)`, then `apgd_t(steps=20)` on what is left; at the output and, alone, at head 1. "
        "A point counts as broken when the whole model is wrong.",
        TRAINED,
        measure_head,
        head_criteria,
        head_table,
        why={"confirmed": "The output's gradient misses points that head 1's gradient finds."},
    ),
    Finding(
        "masked-without-training",
        "Without adversarial training nothing is left",
        "FGAA's Table 7 has FGAA without adversarial training at 57.5 % under PGD-20, where the undefended net has 0.",
        "PGD-20 on head 1 leaves less than 5 %, though PGD-20 on FGAA's output leaves more.",
        f"`{PGD}` at the output, and at head 1.",
        (*NATURAL, "rt"),
        measure_untrained,
        untrained_criteria,
        untrained_table,
        why={"confirmed": "What PGD on the output left was hidden, not robust."},
    ),
    Finding(
        "labels",
        "Without the labels the gain is gone",
        "If the gain over plain adversarial training comes from the label that leaks into the mask, then it goes when "
        "training masks by the module's own argmax, and it is not there for an attack that knows the heads.",
        "`labels=own` loses accuracy under autoattack, and in the worst case the module is behind its bare recipe.",
        "Rosters `autoattack`, which sees the output alone, and `adaptive`, made for the surface; worst case per image "
        "over both.",
        ("sat", *ABLATED, *(f"{d}(labels=own)" for d in ABLATED)),
        measure_labels,
        labels_criteria,
        labels_table,
        figure=draw_labels,
        caption="Each dot is a train seed: accuracy under autoattack and in the worst case, for adversarial training "
        "alone and three modules, trained with masks by the true label and by their own argmax.",
        why={"confirmed": "What the labels brought was hidden from attacks on the output."},
    ),
)
