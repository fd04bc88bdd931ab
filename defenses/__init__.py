"""Built-in defenses and backbones. Registration only: nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from arena.hookspecs import hookimpl
from arena.specs import BackboneSpec, DefenseSpec, Option, Preset

#: CIFAR-style settings of the baselines (papers.md 7); ``*`` serves data sets that have no table of their own.
_PLAIN = {
    "rt": Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip"),
    "sat": Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip"),
    "trades": Preset(76, lr=0.1, weight_decay=2e-4, milestones=(75,), augment="crop_flip"),
    "mart": Preset(120, lr=0.01, weight_decay=3.5e-3, milestones=(75, 90, 100), augment="crop_flip"),
}
_FGAA = Preset(200, lr=0.01, weight_decay=2e-4, milestones=(75, 90), augment="crop_flip")
_EWAS = Preset(120, lr=0.1, weight_decay=2e-4, milestones=(60, 90), augment="crop_flip")
_EWAS_SVHN = Preset(120, lr=0.01, weight_decay=5e-4, milestones=(75, 90))
#: For 8x8 scans on two CPU cores; one cycle, chosen on held-out training images.
_DIGITS = Preset(30, batch=64, lr=0.1, weight_decay=5e-4)
#: EWAS weighs its classifier at a hundredth, which then learns slowly: twice the epochs and the rate.
_DIGITS_EWAS = Preset(60, batch=64, lr=0.2, weight_decay=5e-4)


def _presets(fallback: Preset, **more: Preset) -> Mapping[str, Preset]:
    return {"digits": _DIGITS, "cifar10": fallback, "*": fallback, **more}


_WIDTH = {"width": Option(16, "channels of the first convolution", low=1, high=512)}
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


def _bare(name: str, summary: str, paper: str, **options: Option) -> DefenseSpec:
    return DefenseSpec(
        name,
        summary,
        build="arena_defenses.plain:build",
        recipe=f"arena_defenses.recipes:{name}",
        paper=paper,
        options=options,
        presets=_presets(_PLAIN[name]),
    )


def _masked(
    module: str,
    recipe: str,
    presets: Mapping[str, Preset],
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
        presets=presets,
        published=published,
    )


@hookimpl
def arena_register_backbones() -> Iterable[BackboneSpec]:
    """Offer the built-in backbones."""
    layers = ((1, 2), (2, 2), (3, 2), (4, 2))
    return [
        BackboneSpec(
            "cnn",
            "four 3x3 convolutions and a linear layer, for 8x8 to 32x32 pictures",
            "arena_defenses.backbones:cnn",
            ("block1.out", "block2.out", "block3.out", "block4.out"),
            _WIDTH,
        ),
        BackboneSpec(
            "resnet_small",
            "residual network for 8x8 pictures, 76 thousand parameters",
            "arena_defenses.backbones:resnet_small",
            ("stem.out", "layer1.0.out", "layer2.0.out", "layer2.1.out"),
            _WIDTH,
        ),
        BackboneSpec(
            "resnet18",
            "ResNet-18 in its CIFAR form: 3x3 stem, no stem pool",
            "arena_defenses.backbones:resnet18",
            ("stem.out", *(f"layer{i}.{j}.out" for i, blocks in layers for j in range(blocks))),
            {"width": Option(64, "channels of the first convolution", low=1, high=512)},
            paper="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
        ),
    ]


@hookimpl
def arena_register_defenses() -> Iterable[DefenseSpec]:
    """Offer the built-in defenses."""
    yield _bare("rt", "regular training: no defense", "")
    yield _bare(
        "sat",
        "standard adversarial training on PGD images",
        "Madry et al., Towards Deep Learning Models Resistant to Adversarial Attacks, ICLR 2018",
    )
    yield _bare(
        "trades",
        "cross-entropy plus divergence between natural and adversarial outputs",
        "Zhang et al., Theoretically Principled Trade-off between Robustness and Accuracy, ICML 2019",
        beta=Option(6.0, "weight of the divergence, at least 0", low=0),
    )
    yield _bare(
        "mart",
        "boosted cross-entropy with misclassification-aware divergence",
        "Wang et al., Improving Adversarial Robustness Requires Revisiting Misclassified Examples, ICLR 2020",
        beta=Option(5.0, "weight of the divergence, at least 0 (papers: 5 for ResNet-18, 6 for WRN)", low=0),
    )
    yield _masked(
        "fgaa",
        "sat",
        _presets(_FGAA),
        {**_FGAA_OPTIONS, "inner": _INNER},
        {"natural": 86.19, "fgsm": 60.84, "pgd20": 62.18, "cw_linf": 86.62, "autoattack": 62.68},
    )
    yield _masked(
        "fgaa",
        "rt",
        _presets(_FGAA),
        _FGAA_OPTIONS,
        {"natural": 93.37, "fgsm": 69.28, "pgd20": 57.47, "cw_linf": 45.44},
    )
    yield _masked(
        "ewas",
        "sat",
        _presets(_EWAS, digits=_DIGITS_EWAS, svhn=_EWAS_SVHN),
        {**_EWAS_OPTIONS, "mask": _MASK},
        {"natural": 84.73, "fgsm": 65.78, "pgd20": 64.84, "cw_linf": 82.35, "autoattack": 55.60},
    )
    yield _masked("ewas", "rt", _presets(_EWAS, digits=_DIGITS_EWAS, svhn=_EWAS_SVHN), _EWAS_OPTIONS, {})
