"""Lends an attack the model of another defense: ``transfer`` climbs on it."""

from __future__ import annotations

from arena.arrangement import Arrangement, threat_model
from arena.attack import Unsupported
from arena.contender import Contender
from arena.datasets import describe
from arena.errors import ArenaError
from arena.models import plan
from arena.plugins import Registry
from arena.usermodels import OwnPlan
from arena.watch import Watch


def lend(name: str, arranged: Arrangement, registry: Registry, device: str, watch: Watch) -> Contender:
    """Return another defense's model, trained as this match's question says; trained now where that is cheap.

    Raises:
        Unsupported: it cannot be had, with the reason.
    """
    question, images = arranged.question, arranged.images
    spec = describe(question.dataset, registry)
    try:
        planned = plan(
            name,
            dataset=question.dataset,
            images=images,
            backbone=None if isinstance(arranged.plan, OwnPlan) else question.backbone,
            train_seed=question.train_seed,
            threat=threat_model(spec, question.train_norm, question.train_eps),
            checkpoint=None,
            surface=None,
            registry=registry,
        )
        if isinstance(planned, OwnPlan):
            raise Unsupported(f"'{name}': expected a registered defense")
        other = planned.obtain(train=spec.cpu, retrain=False, device=device, watch=watch)
    except ArenaError as error:
        raise Unsupported(str(error)) from None
    return other
