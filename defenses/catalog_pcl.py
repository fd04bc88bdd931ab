"""Prototype conformity loss, as specs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.specs import DefenseSpec, Exposed, Option, Preset

from .evaluations import ewas
from .presets import presets

#: Long and slow in the original, which starts from a trained network; batch, decay and weight decay are arena's choice.
_RT = Preset(400, lr=0.01, milestones=(300, 360), augment="crop_flip")
_SAT = Preset(500, lr=0.01, milestones=(375, 450), augment="crop_flip")
_DIGITS_RT = Preset(30, batch=64, lr=0.05, weight_decay=5e-4)
_DIGITS_SAT = Preset(30, batch=64, lr=0.1, weight_decay=5e-4)

_PROX = Option(1.0, "weight of the pull to the own class's center, at least 0", low=0)
_START = Option("rt", "weights to start from: an rt model's (original) or none", ("rt", "none"))


def _contrast(default: float) -> Option:
    return Option(default, "weight of the push from the other classes' centers, at least 0", low=0)


def defenses() -> Iterable[DefenseSpec]:
    """Return PCL on natural and on PGD images."""
    paper = "Mustafa et al., Adversarial Defense by Restricting the Hidden Space of Deep Neural Networks, ICCV 2019"
    evaluation = ewas(lam="0", masks=False)  # as EWAS evaluates it: the main logits alone
    yield DefenseSpec(
        "pcl_rt",
        "class centers at two depths pull features and push others away, trained on natural images",
        build="arena_defenses.pcl:build",
        surface="arena_defenses.pcl:surface",
        exposes=Exposed(("near1", "near2")),
        recipe="arena_defenses.pcl:rt",
        paper=paper,
        module="pcl",
        twin="rt",
        options={"prox": _PROX, "contrast": _contrast(1e-4), "start": _START},
        presets=presets(_RT, digits=_DIGITS_RT),
        published={"natural": 88.15, "fgsm": 46.47, "pgd20": 24.68, "cw_linf": 37.50},
        published_on="CIFAR-10, ResNet-18, in EWAS's paper",
        evaluation=evaluation.entries,
        evaluation_flaws=evaluation.flaws,
    )
    yield DefenseSpec(
        "pcl_sat",
        "class centers at two depths pull features and push others away, adversarially trained",
        build="arena_defenses.pcl:build",
        surface="arena_defenses.pcl:surface",
        exposes=Exposed(("near1", "near2")),
        recipe="arena_defenses.pcl:sat",
        paper=paper,
        module="pcl",
        twin="sat",
        options={
            "prox": _PROX,
            "contrast": _contrast(1e-5),
            "start": _START,
            "radius": Option(
                "fixed", "inner attack's radius: eps, or drawn for each batch from 0.64 to 1.6 eps", ("fixed", "drawn")
            ),
        },
        presets=presets(_SAT, digits=_DIGITS_SAT),
        evaluation=evaluation.entries,
        evaluation_flaws=evaluation.flaws,
    )
