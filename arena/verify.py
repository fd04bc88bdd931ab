"""Re-scores kept adversarial examples, with nothing of the attacks that made them.

``arena verify`` runs this in a fresh process that loads no attack plugin. It never imports a path taken from a record:
for a user's own model the user says ``--against``, and the model's identity must match.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arena.arrangement import threat_model
from arena.contender import Contender
from arena.datasets import Images, describe, open_images
from arena.errors import ArenaError
from arena.examples import examples_hash, read_examples
from arena.home import home
from arena.models import plan
from arena.plugins import Registry
from arena.points import Pool, Rows, spans
from arena.referee import BORDERLINE, Judgement, Referee
from arena.results import share
from arena.store import open_store
from arena.threat import Threat
from arena.watch import Watch


@dataclass(frozen=True)
class Claim:
    """What is claimed: breaks of one model, and where they come from."""

    defense: str
    dataset: str
    backbone: str | None
    threat: Threat
    trained_against: Threat
    train_seed: int
    file: Path
    record: dict[str, Any] | None = None
    """The result that the examples belong to."""


@dataclass(frozen=True)
class Verification:
    """What the referee found."""

    agrees: bool
    claimed: int
    """Examples handed over."""
    confirmed: int
    natural_errors: int
    """Examples of points that are misclassified without an attack: no breaks, whatever they show."""
    refuted: int
    """Inside ball and box, yet classified correctly, beyond rounding."""
    borderline: int
    """Classified correctly by a margin that rounding may flip."""
    violations: dict[str, int]
    natural: float
    """Natural accuracy, percent."""
    robust_accuracy: float | None
    """Percent standing after the confirmed breaks; None for a file whose n is unknown."""
    ci95: list[float] | None
    model: str
    """model.id."""
    lines: list[str] = field(default_factory=list)
    """Disagreements in words."""

    def record(self) -> dict[str, Any]:
        """Return the JSON form."""
        return dict(vars(self))


def verify(
    what: str,
    registry: Registry,
    watch: Watch,
    *,
    against: str | None = None,
    checkpoint: Path | None = None,
    dataset: str | None = None,
    backbone: str | None = None,
    norm: str | None = None,
    eps: str | None = None,
    train_seed: int | None = None,
    train_norm: str | None = None,
    train_eps: str | None = None,
    surface: Path | None = None,
    device: str = "cpu",
) -> Verification:
    """Re-score a stored result (id), a result's JSON file, or an ``.npz`` of adversarial examples.

    Args:
        what: result id or its beginning, path of a JSON result, or path of an npz with ``x_adv`` and ``index``.
        registry: needs no attacks.
        watch: told of progress.
        against: the defense; needed for npz files and for results about a user's own model.
        checkpoint: weights, if not those of the cache.
        dataset, backbone, norm, eps, train_seed, train_norm, train_eps: for npz files; the data set's defaults if not
            given.
        surface: TOML surface of a user's own model.
        device: where to score.

    Raises:
        ArenaError: no such result or file, corrupt examples, a model that is not the one the result is about.
    """
    claim = _claim(what, registry, against, dataset, backbone, norm, eps, train_seed, train_norm, train_eps, checkpoint)
    images = open_images(claim.dataset, registry)
    planned = plan(
        claim.defense,
        dataset=claim.dataset,
        images=images,
        backbone=claim.backbone,
        train_seed=claim.train_seed,
        threat=claim.trained_against,
        checkpoint=checkpoint,
        surface=surface,
        registry=registry,
    )
    contender = planned.obtain(train=False, retrain=False, device=device, watch=watch)
    x_adv, rows = read_examples(claim.file)
    try:
        lines = [] if claim.record is None else _matches(claim.record, contender, images, x_adv, rows)
        return _score(claim, contender, images, x_adv, rows, lines, device)
    except (KeyError, TypeError, AttributeError, IndexError) as e:
        if claim.record is None:
            raise
        raise ArenaError(f"{what}: not a result of arena ({type(e).__name__}: {e})") from None


def _claim(
    what: str,
    registry: Registry,
    against: str | None,
    dataset: str | None,
    backbone: str | None,
    norm: str | None,
    eps: str | None,
    train_seed: int | None,
    train_norm: str | None,
    train_eps: str | None,
    checkpoint: Path | None,
) -> Claim:
    path = Path(what).expanduser()
    if path.suffix == ".npz":
        if against is None:
            raise ArenaError(f"{path}: say which defense the examples break: --against DEFENSE")
        name = dataset or "digits"
        spec = describe(name, registry)
        trained_against = threat_model(spec, train_norm, train_eps)
        return Claim(against, name, backbone, threat_model(spec, norm, eps), trained_against, train_seed or 0, path)
    if path.suffix == ".json":
        try:
            record = json.loads(path.read_text())
        except FileNotFoundError:
            raise ArenaError(f"{path}: no such file") from None
        except (OSError, ValueError, TypeError) as e:
            raise ArenaError(f"{path}: not a JSON result ({e})") from None
    else:
        record = open_store().get(what)
    try:
        asked, threat = record["asked"], record["asked"]["threat"]
        given = {"norm": norm, "eps": eps, "train_seed": train_seed, "train_norm": train_norm, "train_eps": train_eps}
        odd = [f"--{k.replace('_', '-')}" for k, v in given.items() if v is not None]
        if odd:
            raise ArenaError(f"{what}: a result says its own threat model and training; leave out {', '.join(odd)}")
        own = ":" in record["defense"].partition("(")[0]
        if own and against is None:
            raise ArenaError(
                f"result {record['id']} is about '{record['defense']}', a model of your own: "
                "say where it is with --against FILE.py:FACTORY (and --checkpoint)"
            )
        if asked.get("checkpoint") and checkpoint is None:
            raise ArenaError(
                f"result {record['id']}: its weights came from the file '{asked['checkpoint']}'; "
                "say where it is with --checkpoint FILE"
            )
        file = Path(record["examples"]["file"])
        beside = path.parent / file.name
        return Claim(
            against or record["defense"],
            dataset or asked["dataset"],
            backbone or asked["backbone"],
            Threat.parse(threat["norm"], threat["eps"]),
            threat_model(describe(dataset or asked["dataset"], registry), asked["train_norm"], asked["train_eps"]),
            asked["train_seed"],
            beside if path.suffix == ".json" and beside.exists() else home() / "examples" / file.name,
            record,
        )
    except (KeyError, TypeError, AttributeError) as e:
        raise ArenaError(f"{what}: not a result of arena (lacks {e})") from None


def _matches(record: dict[str, Any], contender: Contender, images: Images, x_adv: Rows, rows: Tensor) -> list[str]:
    """Check that model, data and file are those of the record; return what is not, in words."""
    lines = []
    if contender.id != record["model"]["id"]:
        raise ArenaError(
            f"the model at hand is {contender.id[:12]}, result {record['id']} is about {record['model']['id'][:12]}; "
            "give its weights with --checkpoint"
        )
    if images.sha256 != record["asked"].get("data_sha256", images.sha256):
        raise ArenaError(f"data set '{images.name}' is not the one of result {record['id']}")
    if examples_hash(x_adv, rows.numpy()) != record["examples"]["sha256"]:
        lines.append("the examples file is not the one the result was made with (its hash differs)")
    points = images.subset(record["asked"]["n"])
    if hashlib.sha256(points.numpy().astype("<i8").tobytes()).hexdigest() != record["asked"]["indices_sha256"]:
        lines.append("the points are not those of the result")
    return lines


def _score(
    claim: Claim, contender: Contender, images: Images, x_adv: Rows, rows: Tensor, lines: list[str], device: str
) -> Verification:
    outside = (rows < 0) | (rows >= len(images.y_test))
    if bool(outside.any()):
        raise ArenaError(f"{claim.file}: index {int(rows[outside][0])} is no test point of '{images.name}'")
    if len(x_adv) and tuple(x_adv.shape[1:]) != images.shape:
        raise ArenaError(f"{claim.file}: x_adv holds {tuple(x_adv.shape[1:])} images, '{images.name}' {images.shape}")
    referee = Referee(contender.build().to(device), claim.threat, contender.surface.random, device)
    points = rows if claim.record is None else images.subset(claim.record["asked"]["n"])
    correct = Pool.of(images, points, device).correct(referee)
    kept = Pool.of(images, rows, device)
    right, word = kept.correct(referee), _judge(referee, kept, x_adv)
    broken = set(rows[word.broken & right].tolist())
    standing = correct & torch.tensor([int(i) not in broken for i in points.tolist()], dtype=torch.bool)
    standing_claim = word.valid & ~word.broken & right
    borderline = int((standing_claim & (word.margin.abs() < BORDERLINE)).sum())
    refuted = int(standing_claim.sum()) - borderline
    natural, robust, interval = share(correct)[0] if len(correct) else 0.0, None, None
    if claim.record is not None:
        robust, interval = share(standing) if claim.record.get("protocol") != "paper" else (None, None)
        lines += _differences(claim.record, natural, robust, interval, len(rows), borderline)
    if not bool(right.all()):
        lines.append(f"{int((~right).sum())} of {len(rows)} examples are of points misclassified without an attack")
    if refuted:
        lines.append(f"{refuted} of {len(rows)} examples are classified correctly")
    if word.violations:
        kinds = ", ".join(f"{count} {kind}" for kind, count in word.violations.items())
        lines.append(f"examples that break the rules: {kinds}")
    return Verification(
        not lines,
        len(rows),
        len(broken),
        int((~right).sum()),
        refuted,
        borderline,
        word.violations,
        natural,
        robust,
        interval,
        contender.id,
        lines,
    )


def _judge(referee: Referee, kept: Pool, x_adv: Rows) -> Judgement:
    """Return the referee's word on all examples, on the CPU, with no more than a shard of them in memory."""
    none = torch.zeros(0, dtype=torch.bool)
    words, violations = [(none, none, torch.zeros(0))], Counter[str]()
    for span in spans(len(kept)):
        points = kept.take(span)
        word = referee.judge(points.x, x_adv[span].to(points.x.device), points.y, points.index)
        words.append((word.broken.cpu(), word.valid.cpu(), word.margin.cpu()))
        violations.update(word.violations)
    broken, valid, margin = map(torch.cat, zip(*words, strict=True))
    return Judgement(broken, valid, margin, dict(violations), 0)


def _differences(
    record: dict[str, Any],
    natural: float,
    robust: float | None,
    interval: list[float] | None,
    kept: int,
    borderline: int,
) -> list[str]:
    """Compare what a record says with what its examples show, and with the stored record of the same id.

    ``robust`` is None for a paper's own evaluation, which says none.
    """
    n, worst = record["asked"]["n"], record["worst_case"]
    slack = 100.0 * borderline / n + 1e-9
    found = []
    low, high = interval or (None, None)
    for name, said, seen in (
        ("natural accuracy", record["natural"]["accuracy"], natural),
        ("worst case", worst["robust_accuracy"], robust),
        ("worst case's lower end", (worst["ci95"] or [None])[0], low),
        ("worst case's upper end", (worst["ci95"] or [None, None])[1], high),
    ):
        if seen is None:
            if said is not None:
                found.append(f"{name}: the result says {said:.2f} %, a paper's own evaluation has none")
        elif said is None:
            if kept:
                found.append(f"{name}: the result says none, the referee finds {seen:.2f} %")
        elif abs(said - seen) > slack:
            found.append(f"{name}: the result says {said:.2f} %, the referee finds {seen:.2f} %")
    if sum(worst["broken_by"].values()) != kept:
        found.append(f"broken_by names {sum(worst['broken_by'].values())} points, {kept} examples are kept")
    for row in record["rosters"]:
        said = row["robust_accuracy"]
        if said is not None and robust is None:
            found.append(f"entry {row['name']}: the result says {said:.2f} %, a paper's own evaluation has none")
        elif said is not None and robust is not None and said < robust - slack:
            found.append(f"entry {row['name']}: {said:.2f} % is below the worst case")
    try:
        stored = open_store().get(record["id"])
    except ArenaError:
        return found  # somebody else's result: nothing to compare it with
    odd = [k for k in record if record[k] != stored.get(k)] + [k for k in stored if k not in record]
    if odd:
        found.append(f"it differs from the stored result {record['id']} in: {', '.join(dict.fromkeys(odd))}")
    return found
