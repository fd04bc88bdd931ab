"""A plugin for arena: registers the defense ``recall_rt`` and the attack ``flips``. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable

from arena.hookspecs import hookimpl
from arena.specs import AttackSpec, DefenseSpec, Exposed, Option, Preset


@hookimpl
def arena_register_defenses() -> Iterable[DefenseSpec]:
    """Offer the example defense."""
    return [
        DefenseSpec(
            "recall_rt",
            "an example: channels scaled by what an auxiliary head believes, trained on natural images",
            build="arena_example.defense:build",
            surface="arena_example.defense:surface",
            exposes=Exposed(heads=("recall",)),
            recipe="arena_example.defense:recipe",
            module="recall",
            twin="rt",
            options={"lam": Option(0.5, "weight of the auxiliary head's loss, at least 0", low=0)},
            presets={"digits": Preset(8, batch=64, lr=0.1)},
        )
    ]


@hookimpl
def arena_register_attacks() -> Iterable[AttackSpec]:
    """Offer the example attack."""
    return [
        AttackSpec(
            "flips",
            "an example: random corners of the ball, kept when the margin grows",
            norms=("Linf",),
            iterate="arena_example.attack:Flips",
            knowledge="score-based",
            options={
                "queries": Option(200, "points looked at for each image", low=1),
                "share": Option(0.1, "share of the pixels that change sides in a step, 0 to 1", low=0, high=1),
            },
        )
    ]
