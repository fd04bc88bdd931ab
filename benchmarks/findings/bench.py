"""Trains what is missing, attacks it, and keeps what was measured: one JSON file a finding and train seed."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arena import __version__
from arena.arrangement import threat_model
from arena.attack import Setup
from arena.contender import Contender
from arena.datasets import Images, describe, open_images, to_float
from arena.engine import run_iterated, run_plain
from arena.entries import split
from arena.home import atomic_write, home
from arena.lineup import Planned, line_up
from arena.models import TrainedPlan, plan
from arena.objectives import objective
from arena.plugins import Registry
from arena.referee import Referee
from arena.rng import Stream
from arena.specs import load
from arena.surface import Reader, Reading, Surface
from arena.surrogate import Surrogate, posing
from arena.target import Target
from arena.threat import Threat
from arena.watch import Watch

from .judging import Finding, Series

DATASET = "digits"


@dataclass
class Subject:
    """A trained model with the points it is asked about."""

    name: str
    model: nn.Module
    """A search copy: in eval mode, without gradients of parameters."""
    surface: Surface
    x: Tensor
    """(N, C, H, W) in [0, 1]."""
    y: Tensor
    index: Tensor
    threat: Threat
    n_classes: int
    registry: Registry
    judge: nn.Module | None = None
    """The referee's copy; None: the model itself."""
    seed: int = 0
    """Of attacks."""

    def read(self, x: Tensor, surrogate: Surrogate | None = None) -> Reading:
        """Read logits, heads and gates of images, without gradient; under a surrogate, its own."""
        with torch.no_grad(), posing(self.model, self.surface, surrogate), Reader(self.model, self.surface) as reader:
            return reader(x)

    def right(self, x: Tensor) -> Tensor:
        """Tell which of the points are classified as labelled, (N,) bool."""
        return self.read(x).logits.argmax(1) == self.y

    def gradient(self, x: Tensor, loss: str = "ce") -> Tensor:
        """Return the gradient of an objective of the output by the image, shape of ``x``."""
        leaf = x.detach().clone().requires_grad_()
        (found,) = torch.autograd.grad(objective(loss)(self.model(leaf), self.y, None).sum(), leaf)
        return found

    def attack(
        self, entry: str, eps: str | None = None, rows: Tensor | None = None, everyone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Attack the naturally correct points among ``rows`` by one entry, a roster in cascade.

        ``everyone`` attacks the misclassified ones too, as papers do; the referee sees all that is handed over.

        Returns:
            The points handed over last (N, C, H, W), and (N,) bool, True where the referee says the point stands.
        """
        threat = self.threat if eps is None else Threat.parse(self.threat.norm, eps)
        referee = Referee(self.judge or self.model, threat, self.surface.random, "cpu")
        standing = referee.score(self.x, self.y, self.index).predicted == self.y
        standing = torch.ones_like(standing) if everyone else standing
        if rows is not None:
            standing = standing & rows
        target, x_adv = Target(self.model, self.surface, self.n_classes), self.x.clone()
        for group in line_up(tuple(split(entry)), self.registry, self.surface, threat, self.n_classes):
            for planned in group.attacks:
                met = standing.nonzero().squeeze(1)
                if len(met):
                    x_adv[met] = handed = self._run(planned, target, threat, met)
                    word = referee.judge(self.x[met], handed, self.y[met], self.index[met])
                    if word.violations:
                        raise SystemExit(f"{self.name} under {planned.name}: {word.violations}")
                    standing[met[word.broken]] = False
        return x_adv, standing

    def _run(self, planned: Planned, target: Target, threat: Threat, met: Tensor) -> Tensor:
        spec, stream = planned.spec.spec, Stream.of(self.seed, planned.name)
        x, y, index = self.x[met], self.y[met], self.index[met]
        if spec.iterate:
            shape = tuple(self.x.shape[1:])
            setup = Setup(threat, self.n_classes, self.surface, shape, stream)  # type: ignore[arg-type]
            outcome = run_iterated(load(spec.iterate)(setup, **planned.options), target, x, y, index)
        else:
            chunk = getattr(spec, "chunk", 0) or len(met)
            outcome = run_plain(load(spec.run), target, x, y, index, threat, stream, planned.options, chunk=chunk)
        if outcome.error:
            raise SystemExit(f"{self.name} under {planned.name}: {outcome.error}\n{outcome.trace}")
        return outcome.x_adv


@dataclass
class Bench:
    """Everything a finding's measurement needs, for one train seed."""

    registry: Registry
    watch: Watch
    n: int
    train_seed: int
    images: Images = field(init=False)
    threat: Threat = field(init=False)
    ids: dict[str, str] = field(default_factory=dict)
    """model.id of what the present measurement used, by name."""
    _made: dict[str, Contender] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.images = open_images(DATASET, self.registry)
        self.threat = threat_model(describe(DATASET, self.registry), None, None)

    def plan(self, text: str) -> TrainedPlan:
        """Plan ``defense`` or ``defense@backbone``; trains nothing."""
        defense, _, backbone = text.partition("@")
        found = plan(
            defense,
            dataset=DATASET,
            images=self.images,
            backbone=backbone or None,
            train_seed=self.train_seed,
            threat=self.threat,
            checkpoint=None,
            surface=None,
            registry=self.registry,
        )
        assert isinstance(found, TrainedPlan)
        return found

    def subject(self, text: str, every: bool = False) -> Subject:
        """Return a trained model and its points, or every test point; trains it if it is not in the cache."""
        if text not in self._made:
            planned = self.plan(text)
            if not planned.cached():
                self.watch.say(f"training {text}, train seed {self.train_seed}")
            self._made[text] = planned.obtain(train=True, retrain=False, device="cpu", watch=self.watch)
        made = self._made[text]
        self.ids[text] = made.id
        index = self.images.subset(len(self.images.y_test) if every else self.n)
        x, y = to_float(self.images.x_test[index]), self.images.y_test[index]
        return Subject(
            text,
            made.build(),
            made.surface,
            x,
            y,
            index,
            self.threat,
            self.images.n_classes,
            self.registry,
            made.build(),
        )

    def missing(self, finding: Finding) -> list[str]:
        """Return the attacks that the finding needs and that are not registered."""
        return [name for name in finding.needs if not self.registry.has("attack", name)]

    def known(self, finding: Finding) -> Path:
        """Return where a finding's answer is, or will be, kept."""
        keys = {text: self.plan(text).key for text in finding.subjects}
        name = finding.measured or finding.name
        asked = [name, finding.version, self.train_seed, self.n, self.threat.norm, self.threat.eps, keys]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        return home() / "findings" / f"{name}-{self.train_seed}-{self.n}-{digest}.json"

    def answer(self, finding: Finding, again: bool = False) -> dict[str, Any]:
        """Measure a finding, or find it in the cache: {"series": ..., "models": ..., "seconds": ..., ...}."""
        path = self.known(finding)
        if path.exists() and not again:
            return dict(json.loads(path.read_bytes()))
        for text in finding.subjects:  # trained before the clock starts
            self.subject(text)
        self.ids.clear()
        clock = time.process_time()
        series = finding.measure(self)
        made = {
            "finding": finding.measured or finding.name,
            "train_seed": self.train_seed,
            "n": self.n,
            "series": {name: [round(v, 5) for v in values] for name, values in series.items()},
            "models": dict(self.ids),
            "seconds": round(time.process_time() - clock, 1),
            "arena": __version__,
            "torch": torch.__version__,
        }
        atomic_write(path, json.dumps(made).encode())
        return made


def percent(flags: Tensor) -> Series:
    """Return a 0-100 series of flags (N,)."""
    return [100.0 * float(v) for v in flags]


def plain(values: Tensor) -> Series:
    """Return a series of numbers (N,)."""
    return [float(v) for v in values.detach()]


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Return the cosine of each row's flattened tensors, (N,); 0 where one vanishes."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp_min(1e-30)


def after(subject: Subject, entries: Sequence[str], eps: str | None = None, rows: Tensor | None = None) -> Tensor:
    """Return which points among ``rows`` stand after all entries, each from the survivors of the ones before."""
    standing = torch.ones_like(subject.y, dtype=torch.bool) if rows is None else rows
    for entry in entries:
        _, standing = subject.attack(entry, eps, standing)
    return standing
