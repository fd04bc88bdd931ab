"""The models and their points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor, nn

from arena.contender import Contender
from arena.datasets import Images, describe, open_images, to_float
from arena.errors import ArenaError, unknown
from arena.models import TrainedPlan, plan
from arena.plugins import Registry
from arena.referee import Referee
from arena.schedule import Schedule
from arena.threat import Threat
from arena.watch import Watch

#: Radius on CIFAR-10, in training and in the attacks.
CIFAR_EPS = "8/255"


#: Trained as the defense's own preset says.
PRESET = Schedule()


@dataclass(frozen=True)
class Case:
    """A model to be attacked, for any train seed."""

    name: str
    says: str
    """What it is, for the page."""
    defense: str = "sat"
    backbone: str | None = None
    schedule: Schedule = PRESET
    scale: float = 1.0
    """The logits are multiplied by this."""
    cifar: bool = False
    """On the pictures of ``--cifar``, else on ``digits``."""


CASES = (
    Case("cnn", "`sat` on `cnn`"),
    Case("resnet_small", "`sat` on `resnet_small`", backbone="resnet_small"),
    Case("fgaa_sat", "`fgaa_sat` on `cnn`", "fgaa_sat"),
    Case("trades", "`trades` on `cnn`", "trades"),
    Case("fsr_sat", "`fsr_sat` on `cnn`: Square finds what gradients miss", "fsr_sat"),
    Case("long", "`sat` on `cnn`, trained for 200 epochs", schedule=Schedule(epochs=200)),
    Case("sharp", "`sat` on `cnn`, its logits times 1,000: the softmax is saturated", scale=1000.0),
    Case(
        "cifar",
        "`sat` on `resnet18(width=16)`, CIFAR-10 pictures, 5 epochs",
        backbone="resnet18(width=16)",
        schedule=Schedule(preset="cifar10", epochs=5, precision="bf16"),
        cifar=True,
    ),
)


def named(name: str) -> Case:
    """Return a case.

    Raises:
        ArenaError: there is none of this name; the nearest is told.
    """
    found = {case.name: case for case in CASES}
    if name not in found:
        raise unknown("case", name, found)
    return found[name]


class Scaled(nn.Module):
    """A model whose logits are multiplied by a number."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model = model
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.model(x) * self.scale
        return scores


@dataclass(frozen=True)
class Subject:
    """A case of one train seed with its points."""

    case: Case
    seed: int
    plan: TrainedPlan
    images: Images
    threat: Threat
    index: Tensor
    """(n,) data-set indices."""
    obtain: Callable[[], Contender]
    """Takes the model from the cache, or trains it."""

    @property
    def x(self) -> Tensor:
        """(n, C, H, W) in [0, 1]."""
        return to_float(self.images.x_test[self.index])

    @property
    def y(self) -> Tensor:
        """(n,)."""
        return self.images.y_test[self.index]

    @property
    def asked(self) -> dict[str, object]:
        """Everything that decides which model and which points these are."""
        return {
            "case": self.case.name,
            "train_seed": self.seed,
            "model": self.plan.key,
            "scale": self.case.scale,
            "n": len(self.index),
            "threat": [self.threat.norm, self.threat.eps],
        }

    def right(self) -> Tensor:
        """Return which points are naturally correct, (n,) bool."""
        word = Referee(self.obtain().build(), self.threat).score(self.x, self.y, self.index)
        return word.predicted == self.y


def subject(
    case: Case,
    seed: int,
    n: int,
    cifar: Path | None,
    registry: Registry,
    watch: Watch,
    train: bool = True,
    device: str = "cpu",
) -> Subject:
    """Plan a case and open its pictures; nothing is trained before ``obtain`` is called.

    Args:
        case: which.
        seed: of the training.
        n: points.
        cifar: ``npz`` file of the pictures of the CIFAR-10 case.
        registry: where the defense is found.
        watch: told of a training.
        train: a model that is not in the cache is trained; else it is an error.
        device: to train on.

    Raises:
        ArenaError: no file for the CIFAR-10 case.
    """
    if case.cifar and cifar is None:
        raise ArenaError(f"case '{case.name}': expected --cifar FILE with x_train, y_train, x_test, y_test")
    dataset = f"npz:{cifar}" if case.cifar else "digits"
    images, spec = open_images(dataset, registry), describe(dataset, registry)
    threat = Threat.parse("Linf", CIFAR_EPS) if case.cifar else Threat.parse(spec.norm, spec.eps)
    planned = plan(
        case.defense,
        dataset=dataset,
        images=images,
        backbone=case.backbone,
        train_seed=seed,
        threat=threat,
        checkpoint=None,
        surface=None,
        registry=registry,
        schedule=case.schedule,
    )
    assert isinstance(planned, TrainedPlan)
    made: list[Contender] = []

    def obtain() -> Contender:
        if not made:
            if train and not planned.cached():
                watch.say(f"training {case.name}, train seed {seed}")
            made.append(scaled(planned.obtain(train=train, retrain=False, device=device, watch=watch), case.scale))
        return made[0]

    return Subject(case, seed, planned, images, threat, images.subset(min(n, len(images.y_test))), obtain)


def scaled(contender: Contender, scale: float) -> Contender:
    """Multiply a contender's logits; its weights are the same."""
    if scale == 1.0:
        return contender
    finish = contender.finish

    def finished(model: nn.Module) -> None:
        assert finish is not None
        assert isinstance(model, Scaled)
        finish(model.model)

    return replace(
        contender,
        name=f"{contender.name} x {scale:g}",
        id=f"{contender.id}x{scale:g}",
        factory=lambda: Scaled(contender.factory(), scale),
        weights={f"model.{k}": v for k, v in contender.weights.items()},
        finish=None if finish is None else finished,
    )
