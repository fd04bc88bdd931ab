"""From a defense's text to a plan of how to get its model, with a key of everything that decides it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from arena import entries
from arena.contender import digest
from arena.datasets import Images, describe
from arena.errors import ArenaError, PluginError
from arena.plugins import Registry
from arena.schedule import Schedule
from arena.specs import (
    DefenseSpec,
    canonical,
    complete,
    load,
    on_dataset,
    text,
)
from arena.surface import surface_from_toml
from arena.threat import Threat
from arena.trained import TrainedPlan
from arena.training import supports
from arena.usermodels import OwnPlan, hash_file, is_own, plan_own

__all__ = ["Plan", "TrainedPlan", "plan"]

Plan = TrainedPlan | OwnPlan


def plan(
    defense_text: str,
    *,
    dataset: str,
    images: Images,
    backbone: str | None,
    train_seed: int,
    threat: Threat,
    checkpoint: Path | None,
    surface: Path | None,
    registry: Registry,
    schedule: Schedule | None = None,
) -> Plan:
    """Check a defense's text and work out its key; trains nothing and reads no weights.

    Args:
        defense_text: registered name with options, or ``file.py:factory`` / ``package.module:factory``.
        dataset: name as asked for; ``images`` is what it loaded to.
        backbone: name with options; None: the data set's default.
        train_seed: any integer.
        threat: what adversarial training trains against; part of the key of recipes that do.
        checkpoint: weights to use instead of training.
        surface: TOML file that adds to the declared surface.
        registry: where defenses and backbones are found.
        schedule: how to train, where not as the preset says; part of the key.

    Raises:
        ArenaError: unknown defense, backbone or option, bad value, a norm the recipe cannot train under, a missing
            checkpoint or surface file; one line each.
    """
    if is_own(defense_text):
        if backbone is not None:
            raise ArenaError(f"'{defense_text}': a model of your own takes no --backbone, got '{backbone}'")
        return plan_own(defense_text, train_seed=train_seed, checkpoint=checkpoint, surface=surface)
    name, given = entries.parse(defense_text)
    data = describe(dataset, registry)
    defense = registry.get("defense", name)
    defense = replace(defense, spec=on_dataset(defense.spec, data.name))
    spec: DefenseSpec = defense.spec
    owner = f"defense '{name}'"
    known = {**spec.options, **spec.eval_options}
    completed = complete(owner, known, given)
    options = {k: completed[k] for k in spec.options}
    eval_options = {k: completed[k] for k in spec.eval_options}
    base, base_given = entries.parse(backbone or data.backbone)
    found = registry.get("backbone", base)
    base_options = complete(f"backbone '{base}'", found.spec.options, base_given)
    stages = list(load(spec.recipe)(**options))
    if checkpoint is None:
        supports(owner, stages, threat)
    schedule = schedule or Schedule()
    preset = schedule.choose(owner, spec, data.name, found.spec.name)
    starts: dict[str, TrainedPlan] = {}
    for text_ in dict.fromkeys(s.start_from for s in stages if s.start_from):
        other = plan(
            text_,
            dataset=dataset,
            images=images,
            backbone=backbone,
            train_seed=train_seed,
            threat=threat,
            checkpoint=None,
            surface=None,
            registry=registry,
            schedule=schedule,
        )
        if isinstance(other, OwnPlan):
            raise PluginError(f"{owner}: a stage starts from '{text_}', expected a registered defense")
        starts[text_] = other
    adversarial = any(s.adversarial for s in stages)
    training_key = digest(
        {
            "defense": f"{defense.distribution}/{spec.name}",
            "training_version": spec.training_version,
            "options": {k: text(v) for k, v in options.items()},
            "backbone": f"{found.distribution}/{found.spec.name}",
            "backbone_options": {k: text(v) for k, v in base_options.items()},
            "data": images.sha256,
            **schedule.key(preset),
            "train_seed": train_seed,
            "threat": [threat.norm, str(threat.fraction)] if adversarial else None,
            "starts": {k: p.training_key for k, p in starts.items()},
        }
    )
    shape = [training_key] if checkpoint is None else [spec.name, defense.distribution, hash_file(checkpoint)]
    key = digest(
        {
            "weights": shape,
            "options": {k: text(v) for k, v in options.items()},
            "backbone": [found.distribution, canonical(found.spec.name, base_options)],
            "eval_options": {k: text(v) for k, v in eval_options.items()},
            "surface": None if surface is None else hash_file(surface),
        }
    )
    return TrainedPlan(
        key=key,
        training_key=training_key,
        defense=defense,
        options=options,
        eval_options=eval_options,
        backbone=found,
        backbone_options=base_options,
        dataset=dataset,
        spec=data,
        images=images,
        train_seed=train_seed,
        threat=threat,
        schedule=schedule,
        preset=preset,
        stages=stages,
        checkpoint=checkpoint,
        surface=None if surface is None else surface_from_toml(surface, whole=False),
        starts=starts,
    )
