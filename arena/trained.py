"""A registered defense as a model: from the cache, from a checkpoint, or by training.

The cache is ``models/<key>/`` in the arena's home: ``best.safetensors``, ``last.safetensors`` and, written last, the
mark of a finished training, ``model.json``. The best epoch on held-out images is the one that is used.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arena import trace
from arena.backbones import DatasetInfo
from arena.checkpoints import load_weights, model_id, read_weights, snapshot
from arena.contender import Contender, count, seeded
from arena.datasets import Images
from arena.distributed import World
from arena.errors import ArenaError, PluginError
from arena.home import atomic_write, home, lock
from arena.plugins import Registered
from arena.schedule import Schedule
from arena.specs import (
    BackboneSpec,
    DatasetSpec,
    DefenseSpec,
    Preset,
    Value,
    canonical,
    chosen,
    load,
)
from arena.surface import Surface
from arena.threat import Threat
from arena.training import Fitted, Stage, fit, seed_of
from arena.usermodels import hash_file
from arena.watch import Watch


@dataclass(frozen=True)
class TrainedPlan:
    """How to get a registered defense: from the cache, from a checkpoint, or by training."""

    key: str
    """Names model and use: training key, or checkpoint, with eval options and a surface file."""
    training_key: str
    """Names the weights: defense and training version, options, backbone, data, preset, precision, seed, threat."""
    defense: Registered[DefenseSpec]
    options: Mapping[str, Value]
    eval_options: Mapping[str, Value]
    backbone: Registered[BackboneSpec]
    backbone_options: Mapping[str, Value]
    dataset: str
    """As asked for, ``npz:FILE`` included."""
    spec: DatasetSpec
    images: Images
    train_seed: int
    threat: Threat
    schedule: Schedule
    """What was asked for beyond the preset; part of the training key."""
    preset: Preset | None
    """The settings that result, or None: there are none for this data set."""
    stages: Sequence[Stage]
    checkpoint: Path | None
    surface: Surface | None
    """From a file: adds to the defense's own, hides nothing of it."""
    starts: Mapping[str, TrainedPlan]
    """Plans of the defenses that stages start from."""

    @property
    def name(self) -> str:
        """Canonical name: options that differ from their defaults are shown."""
        spec = self.defense.spec
        shown = {**chosen(spec.options, self.options), **chosen(spec.eval_options, self.eval_options)}
        return canonical(self.defense.name, shown)

    @property
    def backbone_name(self) -> str:
        """Canonical name of the backbone."""
        return canonical(self.backbone.name, chosen(self.backbone.spec.options, self.backbone_options))

    @property
    def folder(self) -> Path:
        """Where the trained model is, or will be, kept."""
        return home() / "models" / self.training_key[:16]

    @property
    def command(self) -> str:
        """The ``arena train`` line that makes this model."""
        words = ["arena", "train", canonical(self.defense.name, chosen(self.defense.spec.options, self.options))]
        words += ["--dataset", self.dataset]
        if self.backbone_name != self.spec.backbone:
            words += ["--backbone", self.backbone_name]
        if any(s.adversarial for s in self.stages) and (self.threat.norm, self.threat.fraction) != (
            self.spec.norm,
            Threat.parse(self.spec.norm, self.spec.eps).fraction,
        ):
            words += ["--norm", self.threat.norm, "--eps", self.threat.eps]
        if self.train_seed:
            words += ["--train-seed", str(self.train_seed)]
        return shlex.join(words + self.schedule.flags())

    def cached(self) -> bool:
        """Tell whether a finished training is in the cache."""
        return (self.folder / "model.json").exists()

    def obtain(
        self,
        *,
        train: bool,
        retrain: bool,
        device: str,
        watch: Watch,
        world: World | None = None,
    ) -> Contender:
        """Return the model: the checkpoint's, the cached one, or a newly trained one where ``train`` allows it.

        Of the processes of a ``world``, which train together, the first writes.

        Raises:
            ArenaError: no trained model and ``train`` is false (the message holds the ``arena train`` line), another
                process is training it, training diverged, or a checkpoint is missing, corrupt or does not fit.
        """
        if self.checkpoint is not None:
            weights = read_weights(self.checkpoint)
            sha256 = hash_file(self.checkpoint)
            trained = {"weights": "checkpoint", "checkpoint": self.checkpoint.name, "sha256": sha256}
            trained |= _beside(self.checkpoint, sha256)
            return self._contender(weights, trained, f"checkpoint '{self.checkpoint}' for '{self.name}'")
        if retrain or not self.cached():
            if not train:
                raise ArenaError(
                    f"no trained model of '{self.name}' for data set '{self.dataset}'; train it with: {self.command}"
                )
            world = world or World()
            with lock(f"model-{self.training_key[:16]}") if world.first else nullcontext():
                if world.first and retrain and self.cached():  # else an earlier retraining was stopped, and goes on
                    for name in ("model.json", trace.STATE):
                        (self.folder / name).unlink(missing_ok=True)
                world.wait()
                if not self.cached():
                    self._train(train=train, device=device, watch=watch, world=world)
                world.wait()
        record = self._record()
        return self._contender(self._stored(record), record["trained"], f"model '{self.name}' in {self.folder}")

    def _train(self, *, train: bool, device: str, watch: Watch, world: World) -> None:
        if self.preset is None:
            known = ", ".join(sorted(self.defense.spec.presets)) or "none"
            raise ArenaError(
                f"defense '{self.name}' has no training preset for data set '{self.spec.name}' (it has: {known}); "
                "train it by another's with 'arena train --preset', or give weights with --checkpoint"
            )

        def start(text: str) -> Mapping[str, Tensor]:
            other = self.starts[text]
            return other.obtain(train=train, retrain=False, device=device, watch=watch, world=world).weights

        for other in self.starts:
            start(other)
        where = device if device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
        model = self.make()
        fitted = fit(
            model,
            self.stages,
            self.images,
            self.preset,
            self.threat,
            name=self.name,
            surface=self.declared(model),
            train_seed=self.train_seed,
            folder=self.folder,
            device=torch.device(where),
            watch=watch,
            start=start,
            schedule=self.schedule,
            world=world,
        )
        if not world.first:
            return
        natural = fitted.best.get("natural")
        if natural is not None and near_chance(natural, self.images.n_classes):
            watch.say(
                f"training collapsed: natural accuracy {natural:.1f} % on held-out images is near chance; "
                "another backbone, --train-seed or preset may train"
            )
        files = {
            name: hashlib.sha256((self.folder / name).read_bytes()).hexdigest()
            for name in ("best.safetensors", "last.safetensors")
        }
        record = {
            "schema": 1,
            "key": self.training_key,
            "defense": self.name,
            "dataset": self.images.name,
            "backbone": self.backbone_name,
            "files": files,
            "trained": self._trained(fitted, where),
            "history": fitted.history,
        }
        atomic_write(self.folder / "model.json", json.dumps(record, indent=1).encode())
        (self.folder / trace.STATE).unlink(missing_ok=True)

    def _trained(self, fitted: Fitted, device: str) -> dict[str, Any]:
        assert self.preset is not None
        adversarial = any(s.adversarial for s in self.stages)
        return {
            "weights": "best",
            "key": self.training_key,
            "train_seed": self.train_seed,
            "threat": {"norm": self.threat.norm, "eps": self.threat.eps} if adversarial else None,
            "preset": asdict(self.preset),
            "epochs": len(fitted.history),
            "best_epoch": fitted.best.get("epoch"),
            "held_out": {
                "images": fitted.held_out,
                **{k: fitted.best[k] for k in ("natural", "pgd") if k in fitted.best},
            },
            "precision": self.schedule.precision,
            "device": device,
            "threads": fitted.threads,
            "torch": torch.__version__,
            "seconds": round(fitted.seconds, 2),
        }

    def _record(self) -> dict[str, Any]:
        path = self.folder / "model.json"
        try:
            record: dict[str, Any] = json.loads(path.read_bytes())
            sound = "best.safetensors" in record["files"] and "trained" in record
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise ArenaError(f"{path}: damaged; train again with --retrain") from None
        return record

    def _stored(self, record: dict[str, Any]) -> Mapping[str, Tensor]:
        path = self.folder / "best.safetensors"
        if not path.exists() or hash_file(path) != record["files"][path.name]:
            raise ArenaError(f"{path}: missing or damaged; train again with --retrain")
        return read_weights(path)

    def make(self) -> nn.Module:
        """Build the untrained model, its first weights drawn under the train seed."""
        return self.factory()

    @property
    def factory(self) -> Factory:
        """What builds the untrained model, here or in another process."""
        images, backbone = self.images, self.backbone.spec
        info = DatasetInfo(images.name, images.shape, images.n_classes, backbone.name, tuple(backbone.slots))
        build, options = self.defense.spec.build, dict(self.options)
        owner = f"defense '{self.defense.name}' ({self.defense.origin})"
        return Factory(owner, build, options, backbone.build, dict(self.backbone_options), info, self.train_seed)

    def untrained(self) -> Contender:
        """Return the model with its first weights: its parts and its passes are those of the trained one."""
        return self._contender(snapshot(self.make()), {"weights": "untrained"}, f"'{self.name}', not trained")

    def declared(self, model: nn.Module) -> Surface:
        """Return the surface of a model of this plan: the defense's own, and what a surface file adds."""
        declared = Surface() if self.defense.spec.surface is None else load(self.defense.spec.surface)(model)
        return declared if self.surface is None else declared.with_more(self.surface)

    def _contender(self, weights: Mapping[str, Tensor], trained: Mapping[str, Any], where: str) -> Contender:
        spec = self.defense.spec
        model = self.make()
        load_weights(model, weights, where)
        identity = f"{self.defense.distribution}/{canonical(spec.name, self.options)} on {self.backbone_name}"
        finish = partial(load(spec.apply), **self.eval_options) if spec.apply and self.eval_options else None
        found = Contender(
            name=self.name,
            id=model_id(model, identity, canonical("eval", self.eval_options)),
            key=self.key,
            backbone=self.backbone_name,
            options=self.options,
            eval_options=self.eval_options,
            trained=trained,
            parameters=count(model),
            twin=spec.twin,
            origin=self.defense.origin,
            surface=self.declared(model),
            factory=self.factory,
            weights=snapshot(model),
            finish=finish,
        )
        return found


@dataclass(frozen=True)
class Factory:
    """Builds a registered defense's untrained model; small, so that it can be sent to other processes."""

    owner: str
    """Defense, with its origin, for messages."""
    build: str
    """``package.module:attribute`` that puts the defense into a backbone."""
    options: Mapping[str, Value]
    backbone: str
    """``package.module:attribute`` that builds the backbone."""
    backbone_options: Mapping[str, Value]
    info: DatasetInfo
    train_seed: int

    def __call__(self) -> nn.Module:
        """Build it, its first weights drawn under the train seed.

        Raises:
            PluginError: what was built is no module.
        """
        info = self.info
        with seeded(seed_of("init", self.train_seed)):
            inner = load(self.backbone)(shape=info.shape, n_classes=info.n_classes, **self.backbone_options)
            model = load(self.build)(inner, info, **self.options)
        if not isinstance(model, nn.Module):
            raise PluginError(f"{self.owner}: build returned a {type(model).__name__}, expected an nn.Module")
        return model


def _beside(checkpoint: Path, sha256: str) -> dict[str, Any]:
    """Return how a checkpoint of arena's own was trained, if its record lies beside it and speaks of these weights."""
    try:
        record = json.loads((checkpoint.parent / "model.json").read_bytes())
        name = next((name for name, known in record["files"].items() if known == sha256), None)
        return {**record["trained"], "weights": name.partition(".")[0]} if name else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def near_chance(accuracy: float, n_classes: int) -> bool:
    """Tell whether an accuracy in percent is below one and a half times chance: such a model has learnt nothing."""
    return accuracy < 150.0 / n_classes
