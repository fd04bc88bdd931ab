"""The head of a record: what was asked, of which model, and how it does on clean images."""

from __future__ import annotations

from typing import Any

from arena.arrangement import Arrangement, indices_hash
from arena.contender import Contender
from arena.results import SCHEMA
from arena.specs import text
from arena.store import new_id


def heading(arranged: Arrangement, contender: Contender, natural: float, interval: list[float]) -> dict[str, Any]:
    """Begin a record; ``natural`` is a percentage, ``interval`` its 95 % interval."""
    question = arranged.question
    return {
        "schema": SCHEMA,
        "id": new_id(),
        "defense": contender.name,
        "protocol": question.protocol,
        "asked": {
            "vs": list(arranged.entries),
            "dataset": question.dataset,
            "backbone": contender.backbone,
            "threat": {
                "norm": arranged.threat.norm,
                "eps": arranged.threat.eps,
                "eps_value": arranged.threat.radius,
            },
            "n": len(arranged.index),
            "seed": question.seed,
            "train_seed": question.train_seed,
            "train_norm": question.train_norm,
            "train_eps": question.train_eps,
            "budget": question.budget,
            "checkpoint": None if question.checkpoint is None else str(question.checkpoint),
            "surface": None if question.surface is None else str(question.surface),
            "indices_sha256": indices_hash(arranged.index),
            "data_sha256": arranged.images.sha256,
            "subset_rule": arranged.images.subset_rule,
            "card": question.card,
        },
        "model": {
            "id": contender.id,
            "parameters": contender.parameters,
            "options": {k: text(v) for k, v in contender.options.items()},
            "eval_options": {k: text(v) for k, v in contender.eval_options.items()},
            "trained": contender.trained,
            "twin": contender.twin,
            "origin": contender.origin,
            "surface": contender.surface.describe(),
        },
        "natural": {"accuracy": natural, "ci95": interval},
    }
