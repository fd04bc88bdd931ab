"""Runs one peer on one case, in a process of its own: ``python -m ensemble.peer JOB.json ANSWER.json``.

The peer gets the eager model in fp32, wrapped only to count rows, and the points a batch at a time. What it returns is
judged as it is returned, by arena's referee. A job says ``what`` (``reference``, ``member`` or ``pgd``), the
``library``, the case, its train seed and points, the attack's seed and settings, and the threads.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from arena.home import atomic_write
from arena.plugins import registry
from arena.referee import Referee
from arena.surface import Surface
from arena.target import Target
from arena.watch import Silent

from .bare import Bare, timed
from .cases import Subject, named, subject
from .games import masks
from .plain import BATCH

#: Takes a batch of points and labels to a batch of points.
Attack = Callable[[Tensor, Tensor], Tensor]


class Counted(nn.Module):
    """A model that counts the rows of its forwards, and of the gradients taken of what it returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = len(x)
        self.forwards += rows
        scores: Tensor = self.model(x)
        if scores.requires_grad:
            scores.register_hook(lambda grad: self._back(rows))
        return scores

    def _back(self, rows: int) -> None:
        self.backwards += rows


class Steps(logging.Handler):
    """Takes rows and time apart by the reference's attacks, from what it logs when it begins one; keeps warnings."""

    def __init__(self, model: Counted) -> None:
        super().__init__(logging.DEBUG)
        self.model = model
        self.marks: list[tuple[str, int, int, float]] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text.startswith("running "):
            self.mark(text.removeprefix("running "))
        elif record.levelno >= logging.WARNING and text not in self.warnings:
            self.warnings.append(text)

    def mark(self, name: str) -> None:
        """Note that an attack begins."""
        self.marks.append((name, self.model.forwards, self.model.backwards, time.perf_counter()))

    def rows(self) -> list[dict[str, Any]]:
        """Return what each attack cost; the last mark is the end."""
        found = []
        for (name, f, b, t), (_, f2, b2, t2) in zip(self.marks, self.marks[1:], strict=False):
            found.append({"name": name, "forwards": f2 - f, "backwards": b2 - b, "seconds": round(t2 - t, 6)})
        return found


def reference(job: Mapping[str, Any], on: Subject, model: Counted) -> tuple[Attack, int | None, Callable[[], Any]]:
    """Make the reference AutoAttack, version ``standard``, as its user calls it: on all points, in batches of 250."""
    from pyautoattack import AutoAttack

    logger, steps = logging.getLogger("auto-attack"), Steps(model)
    logger.setLevel(logging.DEBUG)
    logger.addHandler(steps)
    logger.propagate = False
    found = AutoAttack(model, norm="Linf", eps=on.threat.radius, seed=job["seed"], version="standard", device="cpu")

    def run(x: Tensor, y: Tensor) -> Tensor:
        x_adv: Tensor = found.run_standard_evaluation(x, y, batch_size=BATCH)[0]
        steps.mark("end")
        return x_adv

    return run, None, lambda: {"attacks": steps.rows(), "flags": steps.warnings}


def member(job: Mapping[str, Any], on: Subject, model: Counted) -> Attack:
    """Make one of torchattacks' four, with the settings of the reference (its own defaults are others)."""
    import torchattacks

    common: dict[str, Any] = {"norm": "Linf", "eps": on.threat.radius, "n_restarts": 1, "seed": job["seed"]}
    classes, steps = on.images.n_classes, job["steps"]
    made: dict[str, Callable[[], Any]] = {
        "apgd_ce": lambda: torchattacks.APGD(model, steps=steps, loss="ce", eot_iter=1, rho=0.75, **common),
        "apgd_t": lambda: torchattacks.APGDT(model, steps=steps, eot_iter=1, rho=0.75, n_classes=classes, **common),
        "fab_t": lambda: torchattacks.FAB(
            model, steps=steps, alpha_max=0.1, eta=1.05, beta=0.9, multi_targeted=True, n_classes=classes, **common
        ),
        "square": lambda: torchattacks.Square(
            model, n_queries=job["queries"], p_init=0.8, loss="margin", resc_schedule=False, **common
        ),
    }
    found = made[job["member"]]()
    if job["variant"] == "to the rim":  # its squares begin below what it calls high, which leaves out the last place
        drawn = found.random_int
        found.random_int = lambda low=0, high=1, shape=(1,): drawn(low, high + 1, shape)
    attack: Attack = found
    return attack


def pgd(job: Mapping[str, Any], on: Subject, model: Counted) -> Attack:
    """Make a library's PGD: random start, ``steps`` steps of a quarter of eps, no early stop."""
    torch.manual_seed(job["seed"])
    eps, steps = on.threat.radius, job["steps"]
    if job["library"] == "torchattacks":
        import torchattacks

        attack: Attack = torchattacks.PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=True)
        return attack
    if job["library"] == "foolbox":
        import foolbox as fb

        found = fb.attacks.LinfPGD(rel_stepsize=0.25, steps=steps, random_start=True)
        wrapped = fb.PyTorchModel(model, bounds=(0, 1), device="cpu")

        def run(x: Tensor, y: Tensor) -> Tensor:
            clipped: Tensor = found(wrapped, x, fb.criteria.Misclassification(y), epsilons=eps)[1]
            return clipped

        return run
    import numpy as np
    from art.attacks.evasion import ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier

    classifier = PyTorchClassifier(
        model,
        loss=nn.CrossEntropyLoss(),
        input_shape=on.images.shape,
        nb_classes=on.images.n_classes,
        clip_values=(0.0, 1.0),
        device_type="cpu",
    )
    np.random.seed(job["seed"])
    made = ProjectedGradientDescentPyTorch(
        classifier,
        norm=np.inf,
        eps=eps,
        eps_step=eps / 4,
        max_iter=steps,
        num_random_init=1,
        batch_size=BATCH,
        verbose=False,
    )
    return lambda x, y: torch.as_tensor(made.generate(x=x.numpy(), y=y.numpy()), dtype=torch.float32)


def run(job: Mapping[str, Any]) -> dict[str, Any]:
    """Do a job and return its cell."""
    torch.set_num_threads(job["threads"])
    cifar = Path(job["cifar"]) if job["cifar"] else None
    on = subject(named(job["case"]), job["train_seed"], job["n"], cifar, registry(), Silent(), train=False)
    contender = on.obtain()
    model, referee = Counted(contender.build()).eval(), Referee(contender.build(), on.threat)
    x, y, index = on.x, on.y, on.index
    natural = referee.score(x, y, index).predicted == y
    met, batch = natural.nonzero().squeeze(1), BATCH
    more: Callable[[], Any] = dict
    if job["what"] == "reference":
        attack, batch, more = reference(job, on, model)  # type: ignore[assignment]
        met = torch.arange(len(y))
    else:
        attack = {"member": member, "pgd": pgd}[job["what"]](job, on, model)
    bare = Bare.of(Target(contender.build(), Surface(), on.images.n_classes, BATCH), x[met], BATCH)
    bare.look()
    model.forwards = model.backwards = 0
    parts: list[Tensor] = []

    def work() -> None:
        for rows in met.split(batch or len(met)):
            parts.append(attack(x[rows].clone(), y[rows].clone()).detach())

    took = timed(work)
    forwards, backwards = model.forwards, model.backwards
    bare.look()
    word = referee.judge(x[met], torch.cat(parts), y[met], index[met])
    broken = torch.zeros_like(natural)
    broken[met] = word.broken
    return {
        **masks(natural, broken & natural),
        "forwards": forwards,
        "backwards": backwards,
        **took.record(),
        "bare": round(bare.seconds(forwards, backwards), 6),
        "threads": torch.get_num_threads(),
        "batch_size": BATCH,
        "model": contender.id,
        "violations": dict(word.violations),
        **more(),
    }


def main() -> int:
    """Read a job, do it, write the answer."""
    asked, answered = map(Path, sys.argv[1:3])
    atomic_write(answered, json.dumps(run(json.loads(asked.read_text()))).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
