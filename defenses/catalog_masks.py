"""Class-conditional masks, as specs: FGAA, EWAS. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arena.specs import DefenseSpec, Option, Preset

from .presets import presets

_FGAA = Preset(200, lr=0.01, weight_decay=2e-4, milestones=(75, 90), augment="crop_flip")
_EWAS = Preset(120, lr=0.1, weight_decay=2e-4, milestones=(60, 90), augment="crop_flip")
_EWAS_SVHN = Preset(120, lr=0.01, weight_decay=5e-4, milestones=(75, 90))
#: EWAS weighs its classifier at a hundredth, which then learns slowly: twice the epochs and the rate.
_DIGITS_EWAS = Preset(60, batch=64, lr=0.2, weight_decay=5e-4)

_LABELS = Option("true", "training masks by the true label, or by the module's own argmax (ablation)", ("true", "own"))
_LAM = "weight of the auxiliary heads' mean loss, at least 0"
_FGAA_OPTIONS = {"lam": Option(2.0, _LAM, low=0), "labels": _LABELS}
_EWAS_OPTIONS = {
    "lam": Option(0.01, _LAM + " (papers: 0.01 on CIFAR-10, 0.05 on SVHN)", low=0),
    "labels": _LABELS,
    "slot": Option("auto", "backbone slot that holds the mask; auto: the last but one (layer4.0.out in resnet18)"),
}
_INNER = Option("full", "inner attack climbs the full loss (paper) or the heads' alone (code)", ("full", "aux"))
_MASK = Option("label", "masks in the inner attack: true label (code) or own argmax", ("label", "argmax"))


def _masked(
    module: str,
    recipe: str,
    settings: Mapping[str, Preset],
    options: Mapping[str, Option],
    published: Mapping[str, float],
) -> DefenseSpec:
    masks = {"fgaa": "two class-conditional activation masks", "ewas": "one class-conditional activation mask"}[module]
    training = {"sat": "adversarially trained", "rt": "trained on natural images"}[recipe]
    return DefenseSpec(
        f"{module}_{recipe}",
        f"{masks}, {training}",
        build=f"arena_defenses.{module}:build",
        surface=f"arena_defenses.{module}:surface",
        recipe=f"arena_defenses.recipes:{recipe}",
        paper={
            "fgaa": "FGAA: Fine-Grained Activation Alignment",
            "ewas": "EWAS: Element-Wise Activation Scaling",
        }[module],
        module=module,
        twin=recipe,
        options=options,
        presets=settings,
        published=published,
    )


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses with class-conditional masks."""
    yield _masked(
        "fgaa",
        "sat",
        presets(_FGAA),
        {**_FGAA_OPTIONS, "inner": _INNER},
        {"natural": 86.19, "fgsm": 60.84, "pgd20": 62.18, "cw_linf": 86.62, "autoattack": 62.68},
    )
    yield _masked(
        "fgaa",
        "rt",
        presets(_FGAA),
        _FGAA_OPTIONS,
        {"natural": 93.37, "fgsm": 69.28, "pgd20": 57.47, "cw_linf": 45.44},
    )
    yield _masked(
        "ewas",
        "sat",
        presets(_EWAS, digits=_DIGITS_EWAS, svhn=_EWAS_SVHN),
        {**_EWAS_OPTIONS, "mask": _MASK},
        {"natural": 84.73, "fgsm": 65.78, "pgd20": 64.84, "cw_linf": 82.35, "autoattack": 55.60},
    )
    yield _masked("ewas", "rt", presets(_EWAS, digits=_DIGITS_EWAS, svhn=_EWAS_SVHN), _EWAS_OPTIONS, {})
