"""Regularized gradients, as specs: DeepDefense (FIRST, DEEP, ADV), GAIE, GNR. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from arena.specs import DefenseSpec, Option, Preset

from .evaluations import DEEP
from .presets import presets

_PAPER = "DeepDefense: gradient-feature alignment"
_ON = "CIFAR-10, DeepDefense's CNN, on points that all its models classify rightly; eps not stated"
#: The paper states no setting at all; these are untried beyond digits.
_CIFAR = Preset(100, lr=0.05, weight_decay=0.0, milestones=(75, 90))
#: Alignment grows slowly, and a rate or a beta half as large again loses the task.
_DIGITS_GFA = Preset(200, batch=32, lr=0.1, weight_decay=0.0)
_DIGITS = Preset(30, batch=64, lr=0.1, weight_decay=5e-4)

_TASKS = ("mse", "ce")
_MSE = Option("mse", "task loss: mean squared error to one-hot targets (DeepDefense), or cross-entropy", _TASKS)
_CE = Option("ce", "task loss: cross-entropy, or mean squared error to one-hot targets (DeepDefense)", _TASKS)
_NORMS = Option(
    "frozen",
    "batch norms: frozen to scale and shift, as the paper's networks have none, or batch (aligns in training alone)",
    ("frozen", "batch"),
)
_ALPHA = Option(1.0, "weight of the task loss, above 0", low=1e-6)


def _beta(default: float, of: str) -> Option:
    return Option(default, f"weight of {of}, at least 0 (0: the task loss alone)", low=0)


def _made(
    module: str,
    summary: str,
    paper: str,
    options: Mapping[str, Option],
    published: Mapping[str, float],
    recipe: str = "",
    digits: Preset = _DIGITS,
) -> DefenseSpec:
    return DefenseSpec(
        f"{module}_rt",
        summary,
        build="arena_defenses.plain:build",
        recipe=f"arena_defenses.gradients:{recipe or module}",
        paper=paper,
        module=module,
        twin="rt",
        options=options,
        presets=presets(_CIFAR, digits=digits),
        published=published,
        published_on=_ON if published else "",
        evaluation=DEEP.entries,
        evaluation_flaws=DEEP.flaws,
    )


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses that regularize gradients, and DeepDefense's mixture of clean and adversarial images."""
    yield _made(
        "gfafirst",
        "DeepDefense FIRST: the image is aligned with the loss's gradient on it",
        _PAPER,
        {"task": _MSE, "alpha": _ALPHA, "beta": _beta(0.03, "the misalignment 1 - GFA"), "norms": _NORMS},
        {"apgd": 55.41, "apgd_t": 21.53, "square": 54.34, "fgsm": 77.21, "pgd": 73.17, "fab": 98.55},
        "gfa_first",
        _DIGITS_GFA,
    )
    yield _made(
        "gfadeep",
        "DeepDefense DEEP: the inputs of the first layers are aligned with the loss's gradients on them",
        _PAPER,
        {
            "task": _MSE,
            "alpha": _ALPHA,
            "beta": _beta(0.01, "the sum of misalignments 1 - GFA"),
            "layers": Option(3, "convolutions and linear layers aligned, counted from the image", low=1, high=1000),
            "norms": _NORMS,
        },
        {"apgd": 57.82, "apgd_t": 19.35, "square": 57.25, "fgsm": 77.86, "pgd": 74.57, "fab": 98.51},
        "gfa_deep",
        replace(_DIGITS_GFA, epochs=240),
    )
    yield _made(
        "gnr",
        "penalty on the norm of the loss's gradient on the image",
        "Ross & Doshi-Velez, Improving the Adversarial Robustness and Interpretability of Deep Neural Networks by "
        "Regularizing their Input Gradients, AAAI 2018",
        {
            "task": _CE,
            "beta": _beta(0.3, "the norm"),
            "norm": Option("l2", "squared L2 norm (Ross & Doshi-Velez) or L1 norm", ("l2", "l1")),
        },
        {},
    )
    yield _made(
        "gaie",
        "the loss's gradient on the image is aligned with the image's edges (reconstruction)",
        "GAIE, as reported by DeepDefense",
        {
            "task": _MSE,
            "beta": _beta(0.1, "the misalignment with the edges"),
            "edges": Option("sobel", "edges: Sobel magnitude, or signed Laplacian", ("sobel", "signed")),
        },
        {"apgd": 33.79, "apgd_t": 15.42, "square": 45.13, "fgsm": 70.26, "pgd": 62.44, "fab": 97.91},
    )
    yield DefenseSpec(
        "advmix",
        "DeepDefense ADV: clean and PGD images mixed in every batch",
        build="arena_defenses.plain:build",
        recipe="arena_defenses.gradients:advmix",
        paper=_PAPER,
        options={
            "task": _MSE,
            "share": Option(0.5, "share of the loss on PGD images, 0 to 1 (the paper does not say)", low=0, high=1),
        },
        presets=presets(_CIFAR, digits=_DIGITS),
        published={"apgd": 42.52, "apgd_t": 28.04, "square": 27.90, "fgsm": 53.17, "pgd": 24.62, "fab": 97.10},
        published_on=_ON,
        evaluation=DEEP.entries,
        evaluation_flaws=DEEP.flaws,
    )
