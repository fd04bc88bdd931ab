"""FSR, feature separation and recalibration, as specs. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arena.specs import DefenseSpec, Exposed, Option, Preset

from .evaluations import FSR
from .presets import presets

_CIFAR = Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip")
_SVHN = Preset(100, lr=0.01, weight_decay=5e-4, milestones=(75, 90), step_size="1/8")

_OPTIONS = {
    "lam_sep": Option(1.0, "weight of the separation loss, at least 0", low=0),
    "lam_rec": Option(1.0, "weight of the recalibration loss, at least 0", low=0),
    "tau": Option(0.1, "temperature of the mask, 0.001 to 100", low=1e-3, high=100),
    "hidden": Option(64, "channels inside the separation and recalibration nets, 1 to 1024", low=1, high=1024),
    "rec_last": Option(
        "code", "recalibration's last convolution: bare (code) or with BN, ReLU (paper)", ("code", "paper")
    ),
    "aux": Option("linear", "auxiliary layer on the pooled map: linear (code) or mlp (paper)", ("linear", "mlp")),
    "separation": Option(True, "false: ablation, recalibrate the whole map"),
    "recalibration": Option(True, "false: ablation, pass on the robust part alone"),
    "slot": Option("auto", "backbone slot that holds the module; auto: the last one, in vgg16 block4.2.out"),
}
_AUX_ON = Option("adversarial", "images of the auxiliary losses; the paper does not say", ("adversarial", "natural"))
_EVAL = {
    "readout": Option(
        "full",
        "features passed on: full, robust (f+), nonrobust (f-) or recalibrated (f~-)",
        ("full", "robust", "nonrobust", "recalibrated"),
    ),
    "test_tau": Option(0.0, "temperature of the mask at test, 0 to 100; 0: as in training", low=0, high=100),
}
_MORE = {
    "sat": {},
    "trades": {"beta": Option(6.0, "weight of the divergence, at least 0", low=0), "aux_on": _AUX_ON},
    "mart": {"beta": Option(5.0, "weight of the divergence, at least 0", low=0), "aux_on": _AUX_ON},
}
_COLUMNS = ("natural", "fgsm", "pgd20", "pgd100", "cw_linf", "ensemble", "autoattack")
_PUBLISHED = {
    "sat": (81.46, 58.07, 52.47, 51.02, 49.44, 48.34, 46.41),
    "trades": (84.49, 58.29, 52.27, 51.28, 49.92, 49.28, 48.45),
    "mart": (83.28, 59.55, 54.80, 53.69, 48.98, 48.36, 46.55),
}


def _fsr(recipe: str, training: str, more: Mapping[str, Option]) -> DefenseSpec:
    return DefenseSpec(
        f"fsr_{recipe}",
        f"robust and non-robust activations told apart, the latter recalibrated; {training}",
        build="arena_defenses.fsr:build",
        surface="arena_defenses.fsr:surface",
        exposes=Exposed(("robust", "nonrobust", "recalibrated"), gates=("mask",), knobs=("tau", "detach")),
        recipe=f"arena_defenses.fsr:{recipe}",
        apply="arena_defenses.fsr:apply",
        paper="Kim et al., Feature Separation and Recalibration for Adversarial Robustness, CVPR 2023",
        module="fsr",
        twin=recipe,
        options={**_OPTIONS, **more},
        eval_options=_EVAL,
        presets=presets(_CIFAR, svhn=_SVHN),
        published=dict(zip(_COLUMNS, _PUBLISHED[recipe], strict=True)),
        published_on="CIFAR-10, ResNet-18",
        evaluation=FSR.entries,
        evaluation_flaws=FSR.flaws,
    )


def defenses() -> Iterable[DefenseSpec]:
    """Return FSR under each of its recipes."""
    yield _fsr("sat", "adversarially trained", _MORE["sat"])
    yield _fsr("trades", "trained by TRADES", _MORE["trades"])
    yield _fsr("mart", "trained by MART", _MORE["mart"])
