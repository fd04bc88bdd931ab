"""The surface: what a defense declares an attacker may use, and how to read it.

A surface can be declared by the defense, by anyone from outside, or in TOML. Heads and gates are read by forward
hooks, so the model's ``forward`` stays ``images -> logits``. Paths are module paths with wrappers (``module.``,
``_orig_mod.``) stripped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import Any

import tomli
import torch
from torch import Tensor, nn

from arena.errors import ArenaError, nearest
from arena.selection import Select

WRAPPERS = ("module", "_orig_mod")
_TYPES: dict[str, tuple[type, ...]] = {
    "call": (int,),
    "rank": (int,),
    "clean": (int,),
    "output": (int, str),
    "answers": (bool,),
    "values": (list,),
}


@dataclass(frozen=True)
class Head:
    """An auxiliary classifier inside the model, read as (N, K) scores."""

    path: str
    """Module whose output holds the scores."""
    call: int = 0
    """Which call of the module in one forward pass, from 0."""
    output: int | str | None = None
    """Index or key into the module's output, if it is a tuple or a dict."""
    answers: bool = True
    """Whether it is trained to name the true class; one trained to name a wrong one is no guide to the decision."""


@dataclass(frozen=True)
class Gate:
    """A weight that decides between ways through the model."""

    path: str
    call: int = 0
    shape: str = "example"
    """``example``: one number a row; ``element``: one a feature."""
    clean: int = 1
    """The value the gate is meant to take on clean images, 0 or 1."""


@dataclass(frozen=True)
class Knob:
    """An attribute an attacker may set on the search copy."""

    path: str
    attribute: str
    kind: str = "temperature"
    """``temperature | detach | constant``."""
    values: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Selection:
    """A hard choice: the path of a ``Select``; for foreign code only the head that scores it (``scores``)."""

    path: str = ""
    scores: str = ""
    """Name of the head whose argmax is the choice."""
    rank: int = 1
    """1: the choice is that head's best class; 2: its second."""


@dataclass(frozen=True)
class Surface:
    """All that a defense declares an attacker may use, in forward order."""

    heads: Mapping[str, Head] = field(default_factory=dict)
    gates: Mapping[str, Gate] = field(default_factory=dict)
    selections: Mapping[str, Selection] = field(default_factory=dict)
    knobs: Mapping[str, Knob] = field(default_factory=dict)
    random: bool = False
    """The model draws random numbers at test time."""
    readout: Callable[[nn.Module, Tensor], Mapping[str, Tensor]] | None = None
    """Fallback where hooks cannot reach: (model, x) -> {"logits": (N, K), head name: (N, K), ...}."""

    def __post_init__(self) -> None:
        for name, gate in self.gates.items():
            if gate.shape not in ("example", "element") or gate.clean not in (0, 1):
                raise ArenaError(f"surface: gate '{name}': expected shape example or element, and clean 0 or 1")
        for name, knob in self.knobs.items():
            if knob.kind not in ("temperature", "detach", "constant"):
                raise ArenaError(
                    f"surface: knob '{name}': kind '{knob.kind}', expected temperature, detach or constant"
                )
        for name, selection in self.selections.items():
            if not selection.path and not selection.scores:
                raise ArenaError(
                    f"surface: selection '{name}': expected the path of a Select, or the head that scores it"
                )
            if selection.rank not in (1, 2):
                raise ArenaError(f"surface: selection '{name}': rank {selection.rank}, expected 1 or 2")
        self._check_scores()

    def _check_scores(self) -> None:
        for name, selection in self.selections.items():
            if selection.scores and selection.scores not in self.heads:
                raise ArenaError(
                    f"surface: selection '{name}': scores '{selection.scores}' is no head"
                    f"{nearest(selection.scores, self.heads)}"
                )

    def with_more(self, other: Surface) -> Surface:
        """Return this surface and what ``other`` declares beside it; of equal names, the other's."""
        return Surface(
            {**self.heads, **other.heads},
            {**self.gates, **other.gates},
            {**self.selections, **other.selections},
            {**self.knobs, **other.knobs},
            self.random or other.random,
            other.readout or self.readout,
        )

    def describe(self) -> dict[str, Any]:
        """Return the JSON form, for records and keys."""
        return {
            "heads": {k: v.path for k, v in self.heads.items()},
            "gates": {k: v.path for k, v in self.gates.items()},
            "selections": {k: v.path or f"scores:{v.scores}" for k, v in self.selections.items()},
            "knobs": {k: f"{v.path}.{v.attribute}" for k, v in self.knobs.items()},
            "random": self.random,
        }


class Addition(Surface):
    """What is declared beside another surface by its ``with_more``; choices may name that other one's heads."""

    def _check_scores(self) -> None:
        """Leave it to the whole surface."""


def submodule(model: nn.Module, path: str) -> nn.Module:
    """Find a module by dotted path, looking through wrappers.

    Raises:
        ArenaError: no such module; names the nearest path.
    """
    here = _unwrap(model)
    if path:
        for part in path.split("."):
            found = here._modules.get(part)
            if found is None and part in WRAPPERS:
                continue
            if found is None:
                known = [_strip(name) for name, _ in model.named_modules() if name]
                raise ArenaError(f"surface: the model has no module '{path}'{nearest(path, known)}")
            here = _unwrap(found)
    return here


def _unwrap(module: nn.Module) -> nn.Module:
    while len(module._modules) == 1 and next(iter(module._modules)) in WRAPPERS:
        inner = next(iter(module._modules.values()))
        if inner is None:
            break
        module = inner
    return module


def _strip(path: str) -> str:
    return ".".join(p for p in path.split(".") if p not in WRAPPERS)


@dataclass(frozen=True)
class Reading:
    """What one forward pass showed."""

    logits: Tensor
    """(N, K) main logits."""
    heads: dict[str, Tensor]
    """(N, K) scores by head, in forward order."""
    gates: dict[str, Tensor]
    """Gate values by name."""

    def parts(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return what it is made of, for code that knows tensors and containers only."""
        return self.logits, self.heads, self.gates

    def scores(self) -> Tensor:
        """Stack logits and heads: (N, 1 + G, K)."""
        return torch.stack((self.logits, *self.heads.values()), dim=1)


class Reader:
    """Calls a model and reads its surface. A context manager: hooks are removed on exit.

    Raises (from ``__call__``):
        ArenaError: a declared path never fired, or a head's output is no (N, K) tensor.
    """

    def __init__(self, model: nn.Module, surface: Surface) -> None:
        self.model = model
        self.surface = surface
        self._seen: dict[tuple[str, str], Tensor] = {}
        self._calls: dict[tuple[str, str], int] = {}
        self._handles = []
        points: list[tuple[str, str, Head | Gate]] = []
        if surface.readout is None:
            points = [("head", k, h) for k, h in surface.heads.items()]
        points += [("gate", k, g) for k, g in surface.gates.items()]
        modules = [submodule(model, point.path) for _, _, point in points]  # all found before any is hooked
        for module, (kind, name, point) in zip(modules, points, strict=True):
            self._handles.append(module.register_forward_hook(self._hook(kind, name, point)))

    def _hook(self, kind: str, name: str, point: Head | Gate) -> Callable[[nn.Module, Any, Any], None]:
        key = (kind, name)
        output = point.output if isinstance(point, Head) else None

        def read(_module: nn.Module, _inputs: Any, out: Any) -> None:
            call = self._calls.get(key, 0)
            self._calls[key] = call + 1
            if call != point.call:
                return
            if output is not None:
                try:
                    out = out[output]
                except (KeyError, IndexError, TypeError):
                    raise ArenaError(f"surface: {kind} '{name}' at '{point.path}': no output {output!r}") from None
            if not isinstance(out, Tensor):
                got = type(out).__name__
                raise ArenaError(f"surface: {kind} '{name}' at '{point.path}': expected a tensor, got a {got}")
            self._seen[key] = out

        return read

    def __call__(self, x: Tensor) -> Reading:
        """Run the model on (N, C, H, W) images and return its ``Reading``."""
        self._seen.clear()
        self._calls.clear()
        heads: dict[str, Tensor] = {}
        if self.surface.readout is not None:
            seen = dict(self.surface.readout(self.model, x))
            if "logits" not in seen:
                raise ArenaError(f"surface: readout gives no 'logits'{nearest('logits', seen)}")
            logits = seen.pop("logits")
            heads = {k: seen[k] for k in self.surface.heads if k in seen}
        else:
            logits = self.model(x)
        for name, head in self.surface.heads.items():
            if self.surface.readout is None and ("head", name) in self._seen:
                found = self._seen["head", name]
                heads[name] = found.flatten(1) if found.dim() > 2 else found
            if name not in heads:
                raise ArenaError(f"surface: head '{name}' at '{head.path}' (call {head.call}) never fired")
            if heads[name].shape != logits.shape:
                raise ArenaError(
                    f"surface: head '{name}' at '{head.path}': expected scores {tuple(logits.shape)}, "
                    f"got {tuple(heads[name].shape)}"
                )
        gates = {}
        for name, gate in self.surface.gates.items():
            if ("gate", name) not in self._seen:
                raise ArenaError(f"surface: gate '{name}' at '{gate.path}' (call {gate.call}) never fired")
            gates[name] = self._seen["gate", name]
        self._seen.clear()
        return Reading(logits, heads, gates)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def selects(model: nn.Module, surface: Surface) -> dict[str, Select]:
    """Return the ``Select`` modules that the surface's selections name.

    Raises:
        ArenaError: a path that is no ``Select``.
    """
    found = {}
    for name, selection in surface.selections.items():
        if not selection.path:
            continue
        module = submodule(model, selection.path)
        if not isinstance(module, Select):
            raise ArenaError(
                f"surface: selection '{name}': '{selection.path}' is a {type(module).__name__}, expected a Select; "
                "for foreign code name its scores instead"
            )
        found[name] = module
    return found


def surface_from_toml(path: Path, whole: bool = True) -> Surface:
    """Read a surface declared in a file; unless it is the ``whole`` surface, an ``Addition``.

    ``random = false``; tables ``[heads.NAME]``, ``[gates.NAME]``, ``[selections.NAME]``, ``[knobs.NAME]`` whose keys
    are the fields of ``Head``, ``Gate``, ``Selection``, ``Knob``.

    Raises:
        ArenaError: missing file, broken TOML or unknown keys; all unknown keys in one message.
    """
    try:
        data = tomli.loads(path.read_text())
    except FileNotFoundError:
        raise ArenaError(f"surface file '{path}': no such file") from None
    except (OSError, UnicodeDecodeError, tomli.TOMLDecodeError) as e:
        raise ArenaError(f"surface file '{path}': {e}") from None
    kinds: dict[str, type] = {"heads": Head, "gates": Gate, "selections": Selection, "knobs": Knob}
    problems = [f"'{k}'{nearest(k, [*kinds, 'random'])}" for k in data if k not in kinds and k != "random"]
    if not isinstance(data.get("random", False), bool):
        problems.append("'random' (expected true or false)")
    made: dict[str, dict[str, Any]] = {k: {} for k in kinds}
    for kind, cls in kinds.items():
        known = [f.name for f in fields(cls)]
        table = data.get(kind, {})
        if not isinstance(table, dict):
            problems.append(f"'{kind}' (expected tables [{kind}.NAME])")
            continue
        for name, entry in table.items():
            where = f"{kind}.{name}"
            if not isinstance(entry, dict):
                problems.append(f"'{where}' (expected a table)")
                continue
            bad = [k for k in entry if k not in known]
            problems += [f"'{where}.{k}'{nearest(k, known)}" for k in bad]
            wrong = [k for k in entry if k in known and type(entry[k]) not in _TYPES.get(k, (str,))]
            problems += [f"'{where}.{k}' (got {entry[k]!r})" for k in wrong]
            if bad or wrong:
                continue
            if "values" in entry:
                entry["values"] = tuple(entry["values"])
            try:
                made[kind][name] = cls(**entry)
            except TypeError:
                problems.append(f"'{where}' lacks a key (it takes {', '.join(known)})")
    if problems:
        raise ArenaError(f"surface file '{path}': unknown or bad {'; '.join(problems)}")
    return (Surface if whole else Addition)(
        heads=made["heads"],
        gates=made["gates"],
        selections=made["selections"],
        knobs=made["knobs"],
        random=data.get("random", False),
    )
