"""Everything a match needs before it costs anything: a checked question, its points, its key."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from arena.audit import LEVELS
from arena.audit import VERSION as AUDIT_VERSION
from arena.datasets import Images, describe, open_images
from arena.errors import ArenaError, unknown
from arena.lineup import check_entries, check_evaluation
from arena.lineup import describe as describe_entries
from arena.models import Plan, plan
from arena.plugins import Registry
from arena.question import PROTOCOLS, Question, Running
from arena.results import (
    SCHEMA,
)
from arena.schedule import PRECISIONS
from arena.specs import DatasetSpec
from arena.threat import Threat
from arena.usermodels import OwnPlan
from arena.watch import Silent

#: Points of a match unless the user says otherwise; data sets with fewer use all.
DEFAULT_N = 500

#: How each precision searches, by a name that changes whenever the search may find something else.
SEARCHES = {"fp32": "fp32", "bf16": "bf16 looked at twice"}


@dataclass
class Arrangement:
    """Everything a match needs before it costs anything."""

    question: Question
    entries: tuple[str, ...]
    images: Images
    threat: Threat
    index: Tensor
    """(n,) data-set indices."""
    plan: Plan
    key: str
    """Hash of the question: equal questions share result, journal and lock."""
    notes: list[str] = field(default_factory=list)


def arrange(question: Question, running: Running, registry: Registry) -> Arrangement:
    """Check a question and compute its key; trains nothing.

    Raises:
        ArenaError: anything wrong with the question.
    """
    if running.precision not in PRECISIONS:
        raise unknown("precision", running.precision, PRECISIONS)
    if running.batch_size is not None and running.batch_size < 1:
        raise ArenaError(f"--batch-size {running.batch_size}: expected at least 1")
    if question.budget is not None and question.budget < 1:
        raise ArenaError(f"--budget {question.budget}: expected at least 1 pass an example")
    if running.audit not in LEVELS:
        raise unknown("audit", running.audit, LEVELS)
    if question.protocol not in PROTOCOLS:
        raise unknown("protocol", question.protocol, PROTOCOLS)
    entries = check_entries(question.vs, registry)
    spec = describe(question.dataset, registry)
    threat = threat_model(spec, question.norm, question.eps)
    images = open_images(question.dataset, registry)
    threat.check_shape(images.shape)
    # What a recipe trains against belongs to the model: matches at several eps attack one and the same.
    trained_against = threat_model(spec, question.train_norm, question.train_eps)
    size = len(images.y_test)
    index = images.subset(min(DEFAULT_N, size) if question.n is None else question.n)
    planned = plan(
        question.defense,
        dataset=question.dataset,
        images=images,
        backbone=question.backbone,
        train_seed=question.train_seed,
        threat=trained_against,
        checkpoint=question.checkpoint,
        surface=question.surface,
        registry=registry,
    )
    evaluation = evaluation_of(planned)
    check_evaluation(question.defense, evaluation, entries, registry)
    notes = []
    if isinstance(planned, OwnPlan) and question.checkpoint is None:
        notes.append("no --checkpoint was given: the weights are those that the factory returns")
    missing = images.missing_classes(index)
    if missing:
        notes.append(f"no point of class {', '.join(map(str, missing))} among the {len(index)} points")
    lent = _radius(trained_against)
    key = _digest(
        {
            "schema": SCHEMA,
            "model": [planned.key, *_model_now(planned, running.device)],
            "train_seed": question.train_seed,
            "points": indices_hash(index),
            "vs": describe_entries(entries, registry, evaluation),
            "data": images.sha256,
            "norm": threat.norm,
            "eps": str(threat.fraction),
            "n": len(index),
            "seed": question.seed,
            "protocol": question.protocol,
            "precision": SEARCHES[running.precision],
            **({"compiled": True} if running.compile else {}),
            "matrix": running.matrix,
            "audit": [AUDIT_VERSION, running.audit],
            **({} if question.budget is None else {"budget": question.budget}),
            **({} if lent == _radius(threat_model(spec, None, None)) else {"lent": lent}),
        }
    )
    return Arrangement(question, entries, images, threat, index, planned, key, notes)


def evaluation_of(planned: Plan) -> tuple[str, ...]:
    """Return the attacks of the defense's own evaluation; none for a user's own model."""
    return () if isinstance(planned, OwnPlan) else planned.defense.spec.evaluation


def threat_model(spec: DatasetSpec, norm: str | None, eps: str | None) -> Threat:
    """Return a threat model whose missing parts are the data set's defaults.

    Raises:
        ArenaError: as ``Threat.parse``; or another norm without a radius.
    """
    threat = Threat.parse(norm or spec.norm, spec.eps if eps is None else eps)
    if eps is None and threat.norm != spec.norm:
        raise ArenaError(f"norm {threat.norm}: give eps too; the data set's default {spec.eps} is for {spec.norm}")
    return threat


def _radius(threat: Threat) -> list[str]:
    """Return what models lent to attacks are trained against; the key of the defense itself may not hold it."""
    return [threat.norm, str(threat.fraction)]


def _model_now(planned: Plan, device: str) -> tuple[str, ...]:
    """Return what the plan's key cannot know: the package's version, or, for a user's own model, the weights at hand.

    A factory may load its weights from anywhere, so only building the model tells which they are; that costs little.
    """
    if isinstance(planned, OwnPlan):
        return (planned.obtain(train=False, retrain=False, device=device, watch=Silent()).id,)
    return (planned.defense.origin, planned.backbone.origin)


def indices_hash(index: Tensor) -> str:
    """Hash data-set indices (n,), the points of a match."""
    return hashlib.sha256(index.numpy().astype("<i8").tobytes()).hexdigest()


def _digest(fields: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()
