"""Class-conditional masks, as specs: FGAA, EWAS, CAS, SAA, CSAA, CIFS. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from arena.specs import DefenseSpec, Exposed, Option, Preset

from .evaluations import FSR, Evaluation, ewas, fgaa
from .presets import presets

_CROPS = "crop_flip"
#: The official TRADES and MART files step 0.007 in a ball of 0.031.
_STEP = "7/31"


def _fgaa(recipe: str) -> Mapping[str, Preset]:
    """FGAA's Tables 2 and 13. SVHN and Fashion-MNIST code is unpublished: no augmentation there."""
    base = {
        "sat": Preset(200, lr=0.01, weight_decay=2e-4, milestones=(75, 90), augment=_CROPS),
        "trades": Preset(100, lr=0.01, weight_decay=2e-4, milestones=(75, 90, 100), augment=_CROPS, step_size=_STEP),
        "mart": Preset(120, lr=0.01, weight_decay=2e-4, milestones=(75, 90, 100), augment=_CROPS, step_size=_STEP),
    }["sat" if recipe == "rt" else recipe]
    plain = replace(base, augment="none")
    fashion = replace(plain, lr=0.2, weight_decay=5e-4) if recipe == "trades" else replace(plain, lr=0.1)
    return presets(base, svhn=plain, fashion_mnist=fashion)


def _ewas(recipe: str) -> Mapping[str, Preset]:
    """EWAS's settings; milestones of TRADES and MART as in the paper, where the code has 60 and 90 for all."""
    epochs, milestones = {"trades": (85, (75,)), "mart": (90, (60,))}.get(recipe, (120, (60, 90)))
    base = Preset(epochs, lr=0.1, weight_decay=2e-4, milestones=milestones, augment=_CROPS)
    svhn = Preset(120, lr=0.01, weight_decay=5e-4, milestones=(75, 90))
    # EWAS weighs its classifier at a hundredth, which then learns slowly: twice the epochs and the rate.
    digits = Preset(60, batch=64, lr=0.2, weight_decay=5e-4)
    return presets(base, digits=digits, svhn=svhn)


def _cas(recipe: str) -> Mapping[str, Preset]:
    """CAS's published defaults, which are not FGAA's."""
    base = {
        "sat": Preset(200, lr=0.1, weight_decay=1e-4, milestones=(75, 90), augment=_CROPS),
        "trades": Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90, 100), augment=_CROPS, step_size=_STEP),
        "mart": Preset(120, lr=0.1, weight_decay=2e-4, milestones=(75, 90, 100), augment=_CROPS, step_size=_STEP),
    }["sat" if recipe == "rt" else recipe]
    return presets(base, svhn=replace(base, augment="none"))


_LABELS = Option("true", "training masks by the true label, or by the module's own argmax (ablation)", ("true", "own"))
_LAM = "weight of the auxiliary heads' mean loss, at least 0"
_LAM_2 = Option(2.0, _LAM, low=0)
_LAM_TRADES = Option(2.0, _LAM + " (paper: 2; official code: 0.5)", low=0)
_LAM_EWAS = Option(0.01, _LAM + " (0.05 on SVHN, as in the paper)", low=0)
_BETA = "weight of the divergence, at least 0"
_INNER = Option("full", "inner attack climbs the full loss (paper) or the heads' alone (code)", ("full", "aux"))
_MASK = Option("label", "masks in the inner attack: true label (code) or own argmax", ("label", "argmax"))
_INDEX = Option(
    "own",
    "masks at test time by each module's own argmax (code), or the main logits' (the paper's Algorithm 1, read as a "
    "second pass)",
    ("own", "main"),
)
_SLOTS = Option(
    "auto",
    "slots that hold masks, joined by '-'; auto: the papers' places "
    "(resnet18 layer4.0.out-layer4.1.out, vgg16 block5, wrn the last branch and out)",
)
_SLOT = Option(
    "auto",
    "slot that holds the mask, by name or EWAS's layer number; auto: 15 in resnet18 (11, 13, 15, 17 are layer3.0.out, "
    "layer3.1.out, layer4.0.out, layer4.1.out), 25 in wrn32_10 (21 to 31 are block2.4.out to block3.4.out)",
)
_WEIGHT = Option(
    "own", "confidence in MART's divergence of the head: its own (paper) or the main logits' (code)", ("own", "main")
)
_AUX_KL = Option(
    "paper", "MART's divergence of the head: as in the paper, or zero, as the code has it by mistake", ("paper", "code")
)


@dataclass(frozen=True)
class _Module:
    """One feature module: what all its recipes share."""

    name: str
    what: str
    paper: str
    code: str
    surface: str
    exposes: Exposed
    on: str
    """Where the published numbers are from."""
    evaluation: Evaluation
    """Of that paper."""


def _masks(n: int) -> Exposed:
    return Exposed(tuple(f"head{i}" for i in range(1, n + 1)), selections=tuple(f"mask{i}" for i in range(1, n + 1)))


_ON = "CIFAR-10, ResNet-18"
_IN_FGAA = f"{_ON}, in FGAA's paper"

_FGAA = _Module(
    "fgaa",
    "two or three class-conditional masks over activations",
    "FGAA: Fine-Grained Activation Alignment",
    "fgaa:build",
    "masks:surface",
    _masks(2),
    _ON,
    fgaa(averaged=True),
)
_EWAS = _Module(
    "ewas",
    "one class-conditional mask over activations",
    "EWAS: Element-Wise Activation Scaling",
    "ewas:build",
    "masks:surface",
    _masks(1),
    f"{_ON}; its AutoAttack is APGD and Square only",
    ewas(),
)
_CAS = _Module(
    "cas",
    "two or three class-conditional masks over channels",
    "Bai et al., Improving Adversarial Robustness via Channel-wise Activation Suppressing, ICLR 2021",
    "cas:build_cas",
    "masks:surface",
    _masks(2),
    _IN_FGAA,
    fgaa(),
)
_SAA = _Module(
    "saa",
    "class-conditional masks over positions (reconstruction)",
    "FGAA: Fine-Grained Activation Alignment, Table 6, which names it without defining it",
    "cas:build_saa",
    "masks:surface",
    _masks(2),
    _IN_FGAA,
    fgaa(),
)
_CSAA = _Module(
    "csaa",
    "class-conditional masks over channels, then positions (reconstruction)",
    "FGAA: Fine-Grained Activation Alignment, Table 6, which names it without defining it",
    "cas:build_csaa",
    "masks:surface",
    _masks(4),
    _IN_FGAA,
    fgaa(),
)
_CIFS = _Module(
    "cifs",
    "channels weighed by their importance to the two top classes of a probe",
    "Yan et al., CIFS: Channel-wise Importance-based Feature Selection, ICML 2021",
    "cifs:build",
    "cifs:surface",
    Exposed(
        ("probe1", "probe2"),
        selections=("first1", "second1", "first2", "second2"),
        knobs=("detach1", "detach2"),
    ),
    f"{_ON}, in FSR's paper",
    FSR,
)
_TRAINED = {
    "rt": "trained on natural images",
    "sat": "adversarially trained",
    "trades": "trained by TRADES",
    "mart": "trained by MART",
}


def _spec(
    module: _Module,
    recipe: str,
    settings: Mapping[str, Preset],
    options: Mapping[str, Option],
    published: Mapping[str, float],
    recipes: str = "recipes",
) -> DefenseSpec:
    return DefenseSpec(
        f"{module.name}_{recipe}",
        f"{module.what}, {_TRAINED[recipe]}",
        build=f"arena_defenses.{module.code}",
        surface=f"arena_defenses.{module.surface}",
        exposes=module.exposes,
        recipe=f"arena_defenses.{recipes}:{recipe}",
        paper=module.paper,
        module=module.name,
        twin=recipe,
        options=options,
        eval_options={"index": _INDEX} if module is _FGAA else {},
        apply="arena_defenses.masks:follow" if module is _FGAA else None,
        defaults={"svhn": {"lam": 0.05}} if module is _EWAS else {},
        presets=settings,
        published=published,
        published_on=module.on if published else "",
        evaluation=module.evaluation.entries,
        evaluation_flaws=module.evaluation.flaws,
    )


def _numbers(
    natural: float, fgsm: float, pgd20: float, cw_linf: float, autoattack: float | None = None
) -> dict[str, float]:
    found = {"natural": natural, "fgsm": fgsm, "pgd20": pgd20, "cw_linf": cw_linf}
    return found if autoattack is None else {**found, "autoattack": autoattack}


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses with class-conditional masks; published: ResNet-18 on CIFAR-10, last epoch."""
    late = {"lam": _LAM_2, "labels": _LABELS, "slots": _SLOTS}
    # FGAA, Tables 3, 4, 7.
    yield _spec(_FGAA, "sat", _fgaa("sat"), {**late, "inner": _INNER}, _numbers(86.19, 60.84, 62.18, 86.62, 62.68))
    yield _spec(_FGAA, "rt", _fgaa("rt"), late, _numbers(93.37, 69.28, 57.47, 45.44))
    yield _spec(
        _FGAA,
        "trades",
        _fgaa("trades"),
        {**late, "lam": _LAM_TRADES, "beta": Option(4.0, _BETA, low=0)},
        _numbers(82.06, 60.79, 57.45, 75.45, 62.41),
    )
    yield _spec(
        _FGAA,
        "mart",
        _fgaa("mart"),
        {**late, "beta": Option(5.0, _BETA, low=0)},
        _numbers(85.83, 60.61, 58.16, 83.59, 63.61),
    )
    # EWAS, Tables 3 and 5; its AutoAttack is APGD and Square only.
    one = {"lam": _LAM_EWAS, "labels": _LABELS, "slot": _SLOT}
    yield _spec(_EWAS, "sat", _ewas("sat"), {**one, "mask": _MASK}, _numbers(84.73, 65.78, 64.84, 82.35, 55.60))
    yield _spec(_EWAS, "rt", _ewas("rt"), one, {})
    beta = Option(6.0, _BETA, low=0)
    yield _spec(
        _EWAS,
        "trades",
        _ewas("trades"),
        {**one, "mask": _MASK, "beta": beta},
        _numbers(80.35, 61.85, 61.29, 74.92),
    )
    yield _spec(
        _EWAS,
        "mart",
        _ewas("mart"),
        {**one, "mask": _MASK, "beta": beta, "weight": _WEIGHT, "aux_kl": _AUX_KL},
        _numbers(81.80, 65.31, 64.01, 79.67),
    )
    # CAS, SAA, CSAA as FGAA's Tables 3, 4, 6, 7 report them.
    yield _spec(_CAS, "rt", _cas("rt"), late, _numbers(94.25, 38.59, 13.57, 33.01))
    yield _spec(_CAS, "sat", _cas("sat"), late, _numbers(86.24, 59.27, 46.56, 51.70, 59.34))
    yield _spec(
        _CAS,
        "trades",
        _cas("trades"),
        {**late, "beta": Option(4.0, _BETA, low=0)},
        _numbers(85.50, 65.23, 53.02, 56.18, 60.94),
    )
    yield _spec(
        _CAS,
        "mart",
        _cas("mart"),
        {**late, "beta": Option(5.0, _BETA, low=0)},
        _numbers(87.07, 63.80, 55.52, 65.16, 57.31),
    )
    yield _spec(_SAA, "sat", _fgaa("sat"), late, _numbers(64.31, 42.89, 41.40, 45.53))
    yield _spec(_CSAA, "sat", _fgaa("sat"), late, _numbers(86.50, 63.04, 59.94, 83.00))
    # CIFS as FSR's Table 4 reports it.
    cifs = presets(Preset(120, lr=0.1, weight_decay=2e-4, milestones=(75, 90), augment=_CROPS))
    joint = {**late, "scale": Option(1.0, "factor on the softmax mask (one version of the code: 2)", low=0)}
    warm = Option(False, "start from cifs_rt with the same options, as the published run does")
    yield _spec(_CIFS, "rt", cifs, joint, {}, recipes="cifs")
    yield _spec(
        _CIFS, "sat", cifs, {**joint, "warm": warm}, _numbers(79.87, 56.53, 49.80, 49.89, 43.94), recipes="cifs"
    )
