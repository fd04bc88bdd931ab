"""Feature denoising, as specs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arena.specs import DefenseSpec, Option, Preset

from .evaluations import DEEP, FSR, Evaluation
from .presets import PLAIN, presets

_KIND = Option("gaussian", "weights: gaussian (softmax) or dot (product over positions)", ("gaussian", "dot"))
_AT = ("stages", "first")
_PAPER = "Xie et al., Feature Denoising for Improving Adversarial Robustness, CVPR 2019"


def _denoise(
    name: str,
    summary: str,
    recipe: str,
    options: Mapping[str, Option],
    settings: Mapping[str, Preset],
    published: Mapping[str, float],
    on: str,
    evaluation: Evaluation,
) -> DefenseSpec:
    module, _, twin = name.partition("_")
    return DefenseSpec(
        name,
        summary,
        build="arena_defenses.denoise:build",
        recipe=recipe,
        paper=_PAPER,
        module=module,
        twin=twin,
        options={"kind": _KIND, **options},
        presets=settings,
        published=published,
        published_on=on,
        evaluation=evaluation.entries,
        evaluation_flaws=evaluation.flaws,
    )


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses with denoising blocks."""
    yield _denoise(
        "fd_sat",
        "non-local denoising blocks at the ends of the stages, adversarially trained",
        "arena_defenses.recipes:sat",
        {"at": Option("stages", "blocks at the stages' ends, or in the first two slots", _AT)},
        presets(PLAIN["sat"]),
        {
            "natural": 85.14,
            "fgsm": 56.81,
            "pgd20": 48.54,
            "pgd100": 46.70,
            "cw_linf": 47.72,
            "ensemble": 45.82,
            "autoattack": 44.57,
        },
        "CIFAR-10, ResNet-18, in FSR's paper",
        FSR,
    )
    yield _denoise(
        "denoise_rt",
        "non-local denoising blocks in the first two slots, trained on natural images (reconstruction)",
        "arena_defenses.denoise:rt",
        {
            "at": Option("first", "blocks at the stages' ends, or in the first two slots", _AT),
            "loss": Option("mse", "squared error to one-hot targets (DeepDefense) or cross-entropy", ("mse", "ce")),
        },
        presets(PLAIN["rt"]),
        {"apgd": 43.03, "apgd_t": 29.34, "square": 28.20, "fgsm": 62.57, "pgd": 16.55},
        "CIFAR-10, DeepDefense's CNN, in its paper, on points that all its models classify rightly; eps not stated",
        DEEP,
    )
