"""SAP, stochastic activation pruning, as a spec. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.specs import DefenseSpec, Exposed, Option, Preset

from .evaluations import ewas


def defenses() -> Iterable[DefenseSpec]:
    """Return SAP on an adversarially trained model."""
    evaluation = ewas(lam="0", masks=False)
    yield DefenseSpec(
        "sap_sat",
        "random pruning behind every ReLU at test time, on the weights of sat",
        build="arena_defenses.sap:build",
        surface="arena_defenses.sap:surface",
        exposes=Exposed(knobs=("frac", "draws", "on"), random=True),
        recipe="arena_defenses.sap:sat",
        apply="arena_defenses.sap:apply",
        paper="Dhillon et al., Stochastic Activation Pruning for Robust Adversarial Defense, ICLR 2018",
        module="sap",
        twin="sat",
        eval_options={
            "frac": Option(1.0, "units drawn, as a share of a map's units, 0.001 to 100", low=1e-3, high=100),
            "draws": Option(1, "passes whose logits a forward averages, 1 to 1000", low=1, high=1000),
        },
        presets={"digits": Preset(0), "*": Preset(0)},
        published={"natural": 79.13, "fgsm": 59.04, "pgd20": 46.35, "cw_linf": 46.65},
        published_on="CIFAR-10, ResNet-18, in EWAS's paper",
        evaluation=evaluation.entries,
        evaluation_flaws=(*evaluation.flaws, "each gradient is one draw of a random model"),
    )
