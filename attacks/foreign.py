"""Attacks of foolbox and of the Adversarial Robustness Toolbox (ART), by class name: ``foolbox:LinfPGD(steps=40)``.

Neither library's verdict is used: points are projected into ball and box, rows that are not finite become the clean
image, and the referee decides. Options go to the class as they are. Both libraries are imported only when asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from arena.attack import Unsupported
from arena.errors import ArenaError, nearest, unknown
from arena.rng import Stream
from arena.specs import Value
from arena.target import Target
from arena.threat import Threat

#: ART attacks that read ``y`` as the class to reach: true labels would make them do nothing.
_ART_TARGETED_Y = ("SaliencyMapMethod",)


def check(library: str, cls: str, options: Mapping[str, Value]) -> None:
    """Check a class name and its options before a match starts.

    Raises:
        ArenaError: unknown class or option (nearest given), or values that the class refuses.
    """
    given = _plain(options)
    if library == "foolbox":
        _make(f"foolbox:{cls}", _foolbox_class(cls), given)
        return
    found = _art_class(cls)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    _make(f"art:{cls}", found, given, _art_classifier(model, (1, 2, 2), 2, torch.device("cpu")))


def foolbox(
    target: Target, x: Tensor, y: Tensor, threat: Threat, budget: object, rng: Stream, *, cls: str, **options: Value
) -> Tensor:
    """Run a foolbox attack at the threat model's eps; see ``arena.specs.AttackSpec.run``.

    Raises:
        Unsupported: the class works under another norm.
        ArenaError: as ``check``.
    """
    import foolbox as fb

    found, given = _foolbox_class(cls), _plain(options)
    if "distance" in _parameters(found):
        given.setdefault("distance", fb.distances.LpDistance(_order(threat.norm)))
    attack = _make(f"foolbox:{cls}", found, given)
    order = getattr(getattr(attack, "distance", None), "p", None)
    if order is not None and order != _order(threat.norm):
        raise Unsupported(f"foolbox:{cls} measures L{order:g}, the threat model is {threat.norm}")
    model = fb.PyTorchModel(target.module.eval(), bounds=(0, 1), device=x.device)
    parts = []
    for at in range(0, len(x), target.batch_size):
        rows = slice(at, at + target.batch_size)
        _, clipped, _ = attack(model, x[rows], fb.criteria.Misclassification(y[rows]), epsilons=threat.radius)
        parts.append(clipped)
    return _tidy(torch.cat(parts), x, threat)


def art(
    target: Target, x: Tensor, y: Tensor, threat: Threat, budget: object, rng: Stream, *, cls: str, **options: Value
) -> Tensor:
    """Run an ART evasion attack; see ``arena.specs.AttackSpec.run``.

    ``norm``, ``eps``, ``eps_step`` (a quarter of eps), ``batch_size`` and ``verbose`` are set where the class has them
    and the user gave none.

    Raises:
        Unsupported: the class works under another norm.
        ArenaError: as ``check``.
    """
    found = _art_class(cls)
    given = _plain(options)
    known = _parameters(found)
    defaults: dict[str, Any] = {
        "norm": _order(threat.norm),
        "eps": threat.radius,
        "eps_step": threat.radius / 4,
        "batch_size": target.batch_size,
        "verbose": False,
    }
    filled = {k: v for k, v in defaults.items() if k in known and k not in given} | given
    if "norm" in known and _number(filled["norm"]) != _order(threat.norm):
        raise Unsupported(f"art:{cls}: norm={filled['norm']} is not the threat model's {threat.norm}")
    shape: tuple[int, int, int] = tuple(x.shape[1:])  # type: ignore[assignment]
    classifier = _art_classifier(target.module, shape, target.n_classes, x.device)
    attack = _make(f"art:{cls}", found, filled, classifier)
    labels = None if cls in _ART_TARGETED_Y else y.cpu().numpy()
    made = attack.generate(x=x.cpu().numpy(), y=labels)
    return _tidy(torch.as_tensor(made, dtype=torch.float32, device=x.device), x, threat)


def _tidy(x_adv: Tensor, x: Tensor, threat: Threat) -> Tensor:
    bad = ~torch.isfinite(x_adv).flatten(1).all(1)
    whole = x.where(bad.view(-1, 1, 1, 1), x_adv.detach().to(x.dtype))
    return threat.project(x, whole)


def _order(norm: str) -> float:
    return {"Linf": math.inf, "L2": 2.0, "L1": 1.0, "L0": 0.0}[norm]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _plain(options: Mapping[str, Value]) -> dict[str, Any]:
    """Fractions as floats; the libraries know none."""
    return {k: float(v) if isinstance(v, Fraction) else v for k, v in options.items()}


def _foolbox_class(name: str) -> type:
    import foolbox.attacks as module
    from foolbox.attacks.base import Attack

    return _find("foolbox", name, vars(module), Attack)


def _art_class(name: str) -> type:
    import art.attacks.evasion as module
    from art.attacks.attack import EvasionAttack

    return _find("art", name, vars(module), EvasionAttack)


def _find(library: str, name: str, names: Mapping[str, Any], base: type) -> type:
    known = {
        k: v for k, v in names.items() if isinstance(v, type) and issubclass(v, base) and not inspect.isabstract(v)
    }
    if name not in known:
        raise unknown(f"{library} attack", name, known)
    return known[name]


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Return a constructor's options; the model argument of ART's classes is not one."""
    skip = ("self", "classifier", "estimator")
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return {k: p for k, p in parameters.items() if p.kind in kinds and k not in skip}


def _make(where: str, cls: type, options: Mapping[str, Any], *model: Any) -> Any:
    known = _parameters(cls)
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) or f"; it takes: {', '.join(known) or 'none'}"
            raise ArenaError(f"{where}: unknown option '{name}'{hint}")
        wanted = known[name].annotation
        if wanted in (int, float, "int", "float") and not isinstance(value, int | float):
            raise ArenaError(f"{where}: option '{name}': expected a number, got '{value}'")
        if wanted in (int, "int") and not float(value).is_integer():
            raise ArenaError(f"{where}: option '{name}': expected a whole number, got '{value:g}'")
    try:
        return cls(*model, **options)
    except Exception as e:  # whatever a library's constructor finds wrong with its options
        reason = " ".join(str(e).split()) or type(e).__name__
        raise ArenaError(f"{where}: {reason}") from None


class _Single(nn.Module):
    """Casts to float32: under numpy 2 some ART attacks hand over float64 images."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.module(x.float())
        return scores


def _art_classifier(model: nn.Module, shape: tuple[int, int, int], n_classes: int, device: torch.device) -> Any:
    from art.estimators.classification import PyTorchClassifier

    return PyTorchClassifier(
        _Single(model).eval(),
        loss=nn.CrossEntropyLoss(),
        input_shape=shape,
        nb_classes=n_classes,
        clip_values=(0.0, 1.0),
        device_type="gpu" if device.type == "cuda" else "cpu",
    )
