"""Bare recipes beyond the usual four, as specs: IAT, FAT. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from arena.specs import DefenseSpec, Option

from .evaluations import afa, fgaa
from .presets import DIGITS, PLAIN, presets


def defenses() -> Iterable[DefenseSpec]:
    """Return the defenses that are one of these recipes and nothing else."""
    in_afa, in_fgaa = afa(gates=False), fgaa(lam=0, masks=False)  # IAT is a baseline of AFA, FAT of no table
    yield DefenseSpec(
        "iat",
        "adversarial training on mixed images, half of them natural",
        build="arena_defenses.plain:build",
        recipe="arena_defenses.iat:recipe",
        paper="Lamb et al., Interpolated Adversarial Training, AISec 2019",
        options={"alpha": Option(1.0, "both parameters of mixup's Beta distribution, 0.01 to 100", low=0.01, high=100)},
        presets=presets(replace(PLAIN["sat"], steps=7), digits=replace(DIGITS, steps=7)),
        evaluation=in_afa.entries,
        evaluation_flaws=in_afa.flaws,
    )
    yield DefenseSpec(
        "fat",
        "adversarial training on images only just misclassified",
        build="arena_defenses.plain:build",
        recipe="arena_defenses.fat:recipe",
        paper="Zhang et al., Attacks Which Do Not Kill Training Make Adversarial Learning Stronger, ICML 2020",
        options={
            "tau": Option(
                3, "most steps of the inner attack after the first misclassification, 0 to 100", low=0, high=100
            ),
            "schedule": Option("rising", "tau rises from 0 over training, or is constant", ("rising", "constant")),
        },
        presets=presets(PLAIN["sat"]),
        evaluation=in_fgaa.entries,
        evaluation_flaws=in_fgaa.flaws,
    )
