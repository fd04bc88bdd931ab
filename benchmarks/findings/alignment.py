"""DeepDefense: gradients aligned with the image, and the budget that a sign step then loses at the box."""

from __future__ import annotations

from typing import Any

import torch
from arena_defenses.gradients import task_losses
from torch import Tensor

from .bench import Bench, Subject, after, cosine, percent, plain
from .judging import Criterion, Data, Finding, Series, Table, above

PLAIN = "gfafirst_rt(beta=0)"
CNN = ("rt", PLAIN, "gfafirst_rt", "gfadeep_rt")
MLP = tuple(f"{d}@mlp" for d in CNN)
ALIGNED = ("gfafirst_rt", "gfadeep_rt", "gfafirst_rt@mlp", "gfadeep_rt@mlp")
TARGETED = ("apgd_t(steps=20)", "pgd(loss=margin,steps=40,restarts=3)")
#: The loss that DeepDefense trains and aligns, and the one that attacks usually climb.
LOSSES = {"mse": "squared error", "ce": "cross-entropy"}


def twin(name: str) -> str:
    """Return the net trained alike on the same backbone, without the alignment."""
    return f"{PLAIN}@mlp" if name.endswith("@mlp") else PLAIN


def slope(subject: Subject, task: str) -> Tensor:
    """Return the gradient of the task loss ``mse`` or ``ce`` by the image, shape of the images."""
    leaf = subject.x.detach().clone().requires_grad_()
    (found,) = torch.autograd.grad(task_losses(subject.model(leaf), subject.y, task).sum(), leaf)
    return found


def clipped(x: Tensor, gradient: Tensor, eps: float) -> Tensor:
    """Return the share of an Linf budget that one sign step of ``eps`` loses at the box [0, 1], (N,) in [0, 1].

    The step moves each pixel by eps where its gradient is not zero; what of that leaves the box is cut away.
    """
    step = eps * gradient.sign()
    moved = ((x + step).clamp(0, 1) - x).abs().flatten(1).sum(1)
    return 1 - moved / step.abs().flatten(1).sum(1).clamp_min(1e-12)


def energy(x: Tensor, x_adv: Tensor, eps: float) -> Tensor:
    """Return each row's mean squared change as a share of eps^2, (N,): the papers' noise MSE, without its unit."""
    return (x_adv - x).square().flatten(1).mean(1) / eps**2


def measure_box(bench: Bench) -> dict[str, Series]:
    """Take one sign step on each loss, see what the box leaves of it, and where its gradient points."""
    series, eps = {}, bench.threat.radius
    for name in (*CNN, *MLP):
        s = bench.subject(name, every=True)
        for task in LOSSES:
            gradient = slope(s, task)
            stepped = s.threat.project(s.x, s.x + eps * gradient.sign())
            series[f"{name} {task} lost"] = [100 * v for v in plain(clipped(s.x, gradient, eps))]
            series[f"{name} {task} noise"] = plain(energy(s.x, stepped, eps))
            series[f"{name} {task} step"] = percent(s.right(s.x) & s.right(stepped))
            # all of arena's small networks scale pixels to [-1, 1] before their first layer
            series[f"{name} {task} cosine"] = plain(cosine(gradient, 2 * s.x - 1))
    return series


def _lost(task: str) -> Any:
    def criteria(data: Data) -> list[Criterion]:
        rows = {d: data.rows(f"{d} {task} lost") for d in (*CNN, *MLP)}
        found = [above(f"`{d}` minus its twin: budget lost", rows[d] - rows[twin(d)], 0) for d in ALIGNED]
        return found + [above(f"`{d}`: budget lost", rows[d], 45) for d in ALIGNED]

    return criteria


def _box_table(task: str) -> Any:
    def table(data: Data) -> list[Table]:
        rows = [["defense", "budget lost at the box, %", "noise MSE / eps²", "accuracy after the step"]]
        for d in (*CNN, *MLP):
            cells = (data.cell(f"{d} {task} lost"), data.cell(f"{d} {task} noise", 2), data.cell(f"{d} {task} step"))
            rows.append([f"`{d}`", *cells])
        note = "`beta=0` is the twin: trained alike, without alignment. After `@` the backbone, where it is not `cnn`."
        return [Table(rows, note)]

    return table


def draw_box(figure: Any, data: Data) -> None:
    """Draw the budget lost under both losses."""
    from .figures import BLUE, ORANGE, dots

    names = [*CNN, *MLP]
    looks = {"mse": (BLUE, "o"), "ce": (ORANGE, "s")}
    dots(
        figure,
        [
            n.replace("@mlp", "").replace("gfa", "").replace("first_rt(beta=0)", "no GFA").replace("_rt", "")
            for n in names
        ],
        [(f"step on the {LOSSES[t]}", [data.rows(f"{n} {t} lost").mean(1) for n in names], *looks[t]) for t in LOSSES],
        "budget lost at the box, %",
    ).set(
        ylim=(0, 100), xlabel="left: cnn, right: mlp; rt is trained on the cross-entropy, all others on squared error"
    )
    figure.axes[0].axvline(len(CNN) - 0.5, color="0.7", lw=1)


def aligned_criteria(data: Data) -> list[Criterion]:
    """Ask for a positive cosine, well above the twin's."""
    found = []
    for d in ALIGNED:
        rows = data.rows(f"{d} mse cosine")
        found.append(above(f"`{d}`: cosine", rows, 0.3, digits=2))
        found.append(above(f"`{d}` minus its twin", rows - data.rows(f"{twin(d)} mse cosine"), 0, digits=2))
    return found


def aligned_ce(data: Data) -> list[Criterion]:
    """Ask for a positive cosine under the other loss too."""
    return [above(f"`{d}`: cosine", data.rows(f"{d} ce cosine"), 0, digits=2) for d in ALIGNED]


def aligned_table(data: Data) -> list[Table]:
    """Lay out cosines."""
    rows = [["defense", *(f"gradient of the {t}" for t in LOSSES.values())]]
    return [Table([*rows, *([f"`{d}`", *(data.cell(f"{d} {t} cosine", 2) for t in LOSSES)] for d in (*CNN, *MLP))])]


def measure_flip(bench: Bench) -> dict[str, Series]:
    """Play attacks from weak to strong on the networks that DeepDefense compares."""
    series = {}
    for name in (*CNN, "advmix", *MLP):
        s = bench.subject(name)
        series[f"{name} natural"] = percent(s.right(s.x))
        series[f"{name} fgsm"] = percent(s.attack("fgsm")[1])
        _, standing = s.attack("pgd(steps=20)")
        series[f"{name} pgd"] = percent(standing)
        series[f"{name} targeted"] = percent(after(s, TARGETED))
        series[f"{name} worst"] = percent(standing & after(s, TARGETED))
    return series


def masked_criteria(data: Data) -> list[Criterion]:
    """Ask for a gap between the cross-entropy and targets, wider than the twin's."""
    found = []
    for d in ALIGNED:
        gap, usual = (data.rows(f"{n} pgd") - data.rows(f"{n} targeted") for n in (d, twin(d)))
        found.append(above(f"`{d}`: PGD minus targeted", gap, 0, kind="difference"))
        found.append(above(f"`{d}` minus its twin: PGD minus targeted", gap - usual, 0))
    return found


def flip_criteria(data: Data) -> list[Criterion]:
    """Ask that the order by the worst case is not that by FGSM."""
    found = []
    for d in ("gfafirst_rt", "gfadeep_rt"):
        found.append(
            above(
                f"FGSM: `{d}` minus `advmix`", data.rows(f"{d} fgsm") - data.rows("advmix fgsm"), 0, kind="difference"
            )
        )
        found.append(
            above(
                f"worst case: `advmix` minus `{d}`",
                data.rows("advmix worst") - data.rows(f"{d} worst"),
                0,
                kind="difference",
            )
        )
    return found


def flip_table(data: Data) -> list[Table]:
    """Lay out accuracies."""
    rows = [["defense", "natural", "FGSM", "PGD-20, cross-entropy", "targeted and margin", "worst case"]]
    for d in (*CNN, "advmix", *MLP):
        rows.append([f"`{d}`", *(data.cell(f"{d} {k}") for k in ("natural", "fgsm", "pgd", "targeted", "worst"))])
    return [Table(rows)]


_AGAIN = (
    "DeepDefense trains the loss's gradient to point along the image (GFA). A step along the image pushes white "
    "pixels above "
    "1 and, in the paper's inputs from -1 to 1, black ones below -1, where they are cut. "
)

_ALL = (*CNN, *MLP)
_STEP = (
    "One step of eps 0.2 along the sign of the {}'s gradient. Lost is what the box cuts from the sum of all "
    "pixels' moves."
)

FINDINGS = (
    Finding(
        "aligned",
        "DeepDefense: the gradient of the trained loss points along the image",
        "The paper reports a cosine of 0.47 to 0.54 between image and gradient on test images, 0.00 for the plain net.",
        "The cosine of the squared error's gradient and the image is above 0.3, and above that of the twin without "
        "alignment.",
        "Clean images, scaled to [-1, 1] as the networks see them; the loss is the squared error that training aligns.",
        _ALL,
        measure_box,
        aligned_criteria,
        aligned_table,
        measured="box",
        why={"confirmed": "The alignment carries over to test images."},
    ),
    Finding(
        "aligned-ce",
        "DeepDefense: the gradient of the cross-entropy points the same way",
        "The paper's attacks seem to be a library's, which climb the cross-entropy of a softmax, not the trained loss.",
        "The cosine of the cross-entropy's gradient and the image is positive, too.",
        "The same images and networks; the numbers are in the table above.",
        _ALL,
        measure_box,
        aligned_ce,
        lambda data: [],
        measured="box",
        why={"refuted": "At outputs near one-hot vectors the two losses have different gradients."},
    ),
    Finding(
        "box",
        "DeepDefense: half of a step on the trained loss is cut away",
        _AGAIN + "Its Table 6 shows a noise MSE of FGSM of .057 for FIRST and DEEP where plain has .108.",
        "One sign step on the squared error loses more of its budget than on the twin without alignment, and at "
        "least 45 %.",
        _STEP.format(LOSSES["mse"]),
        _ALL,
        measure_box,
        _lost("mse"),
        _box_table("mse"),
        figure=draw_box,
        caption="Share of a sign step's budget that the box cuts away, by the loss that the step climbs; each dot is a "
        "train seed.",
        measured="box",
        why={"confirmed": "A step along the image is lost wherever a pixel is black or white already."},
    ),
    Finding(
        "box-ce",
        "DeepDefense: half of a step on the cross-entropy is cut away",
        "The same for the loss that attacks usually climb.",
        "One sign step on the cross-entropy loses more of its budget than on the twin, and at least 45 %.",
        _STEP.format(LOSSES["ce"]),
        _ALL,
        measure_box,
        _lost("ce"),
        _box_table("ce"),
        measured="box",
        why={"refuted": "A step on the cross-entropy does not run along the image."},
    ),
    Finding(
        "cross-entropy",
        "DeepDefense: masked along the loss",
        "Its outputs lie near one-hot vectors, so the cross-entropy's direction is a fixed mix of all logits: "
        "attacks on it "
        "mislead. Its CIFAR table has PGD at 73 % and targeted APGD at 22 % for FIRST.",
        "PGD on the cross-entropy leaves more than targeted attacks do, and the gap is wider than the twin's.",
        f"`pgd(steps=20)`, against {' and '.join(f'`{e}`' for e in TARGETED)} in cascade.",
        (*CNN, "advmix", *MLP),
        measure_flip,
        masked_criteria,
        flip_table,
        measured="flip",
        why={"confirmed": "The cross-entropy hides what targets find."},
    ),
    Finding(
        "ranking",
        "DeepDefense: the ranking flips in the worst case",
        "By FGSM and PGD the paper has FIRST and DEEP far ahead of ADV, a mixture of clean and attacked images; by "
        "the worst "
        "of its 15 attacks ADV is level or ahead. Every attack there has another eps.",
        "FIRST and DEEP are ahead of `advmix` by FGSM and behind it in the worst case.",
        "All attacks at one eps, 0.2; worst case over PGD and the targeted ones. The numbers are those of the "
        "table above.",
        (*CNN, "advmix", *MLP),
        measure_flip,
        flip_criteria,
        lambda data: [],
        measured="flip",
        why={
            "confirmed": "The order depends on the attack.",
            "refuted": "At one eps for all attacks the order is not the paper's.",
        },
    ),
)
