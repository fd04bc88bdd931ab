"""Normalization that depends on a condition, as specs: AFA, OAT. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from arena.specs import DefenseSpec, Exposed, Option, Preset

from .evaluations import afa
from .presets import DIGITS, presets

_K = Option(
    5, "batch norms in the place of each one; strengths of attack from 0 to eps (paper: 2, 3, 5, 9)", low=2, high=9
)
_GATE = Option("single", "one gate after the stem convolution, or each batch norm its own", ("single", "each"))
_HIDDEN = Option(64, "channels inside a gate", low=1, high=512)
_MADE = Option("gate", "stage II attacks through the gate, or through the branch of the strength", ("gate", "branch"))
_DECAY = Option(
    0.1, "factor on the rate at each milestone, 0 to 1 (the paper prints 0.9; 0.1 is likely meant)", low=0, high=1
)
_W0 = Option(-1.0, "hold the gate at this weight of the clean norm, 0 to 1; -1: the gate decides", low=-1, high=1)

_AFA = Preset(100, lr=0.1, weight_decay=5e-4, milestones=(75, 90), augment="crop_flip")
_AFA_SVHN = replace(_AFA, lr=0.01, augment="none")
#: The loss is a sum over five branches: a smaller rate.
_AFA_DIGITS = replace(DIGITS, lr=0.03)

#: Seven steps of min(1.25 eps, eps + 4/255) / 7, which is 5/28 eps up to eps = 16/255.
_OAT = Preset(200, lr=0.1, weight_decay=5e-4, steps=7, step_size="5/28", augment="crop_flip")
_OAT_DIGITS = replace(DIGITS, steps=7, step_size="5/28")


def _afa(recipe: str, base: str, published: dict[str, float], **more: Option) -> DefenseSpec:
    return DefenseSpec(
        f"afa_{recipe}",
        f"batch norms for clean and attacked images, mixed by a gate; {base} (reconstruction)",
        build="arena_defenses.afa:build",
        surface="arena_defenses.afa:surface",
        exposes=Exposed(gates=("w0",), knobs=("w0",)),
        recipe=f"arena_defenses.afa_stages:afa_{recipe}",
        paper="AFA: Adaptive Feature Alignment",
        module="afa",
        twin=recipe,
        options={"k": _K, "gate": _GATE, "hidden": _HIDDEN, "made": _MADE, "decay": _DECAY, **more},
        eval_options={"w0": _W0},
        apply="arena_defenses.afa:apply",
        presets=presets(_AFA, digits=_AFA_DIGITS, svhn=_AFA_SVHN),
        published=published,
        published_on="CIFAR-10, WRN-28-10",
        evaluation=afa(gates=True).entries,
        evaluation_flaws=afa(gates=True).flaws,
    )


def _columns(natural: float, fgsm: float, pgd: float, cw: float, adaptive: float) -> dict[str, float]:
    return {"natural": natural, "fgsm": fgsm, "pgd": pgd, "cw_linf": cw, "pgd_adaptive": adaptive}


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses with conditional normalization."""
    yield _afa("sat", "adversarially trained", _columns(95.8, 81.1, 50.0, 48.3, 48.2))
    yield _afa(
        "trades",
        "trained with TRADES",
        _columns(95.4, 80.3, 52.6, 51.0, 52.2),
        beta=Option(6.0, "weight of the divergence, at least 0", low=0),
    )
    yield _afa(
        "mart",
        "trained with MART",
        _columns(95.9, 81.3, 56.0, 53.6, 55.6),
        beta=Option(5.0, "weight of the divergence, at least 0", low=0),
    )
    yield _afa("iat", "trained with IAT", _columns(96.1, 80.6, 46.2, 43.5, 46.1))
    yield DefenseSpec(
        "oat_sat",
        "one network for every weight of robustness, chosen at test time",
        build="arena_defenses.oat:build",
        surface="arena_defenses.oat:surface",
        exposes=Exposed(knobs=("lam",)),
        recipe="arena_defenses.oat:train",
        paper="Wang et al., Once-for-All Adversarial Training, NeurIPS 2020",
        module="oat",
        twin="sat",
        eval_options={
            "lam": Option("1", "weight of robustness asked for", choices=("0", "0.1", "0.2", "0.3", "0.4", "1"))
        },
        apply="arena_defenses.oat:apply",
        presets=presets(_OAT, digits=_OAT_DIGITS, svhn=replace(_OAT, augment="none")),
        evaluation=afa(gates=False).entries,  # as AFA's comparator; it has no gate
        evaluation_flaws=afa(gates=False).flaws,
    )
