"""``Surrogate``: what an attack may pretend about a model during a pass, and the only code that pretends it.

An attack climbs where the model itself shows no slope: through a choice made soft, a gate held, a temperature raised.
What it sees there is the surrogate's; whether a point is broken is for the model's own logits to say
(``arena.attack.Answer``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from arena.errors import ArenaError, unknown
from arena.selection import HARD, Mode, Select
from arena.surface import Gate, Knob, Surface, submodule


@dataclass(frozen=True)
class Surrogate:
    """Settings of the search copy for one pass; names are those of the surface."""

    modes: Mapping[str, Mode] = field(default_factory=dict)
    """How selections choose."""
    gates: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Values that gates are held at: a number, or one per row, (N,). What is read is still the gate's own value."""
    knobs: Mapping[str, Any] = field(default_factory=dict)
    """Values of knobs, the same for all rows."""
    source: str = ""
    """Another defense's model in the place of this one, lent by ``Setup.lend``; only its output is read."""

    def __bool__(self) -> bool:
        """Tell whether anything is set at all; without settings the surrogate is the model."""
        return bool(self.modes or self.gates or self.knobs or self.source)

    def rows(self, index: Tensor) -> Surrogate:
        """Return the settings for a subset of rows."""
        return Surrogate(
            {k: mode.rows(index) for k, mode in self.modes.items()},
            {k: v[index] if isinstance(v, Tensor) else v for k, v in self.gates.items()},
            self.knobs,
            self.source,
        )


@contextmanager
def posing(model: nn.Module, surface: Surface, surrogate: Surrogate | None) -> Iterator[None]:
    """Make ``model`` the surrogate for the passes inside; undone on the way out, also after an exception.

    Raises:
        ArenaError: a name that the surface does not have, a selection that is no ``Select``, or a knob's attribute
            that the module does not have.
    """
    with ExitStack() as undo:
        if surrogate:
            for name, mode in surrogate.modes.items():
                _choose(undo, model, surface, name, mode)
            for name, value in surrogate.gates.items():
                gate = _named("gate", name, surface.gates)
                undo.callback(submodule(model, gate.path).register_forward_hook(_holding(gate, value)).remove)
            for name, value in surrogate.knobs.items():
                _turn(undo, model, name, _named("knob", name, surface.knobs), value)
        yield


def _named(kind: str, name: str, declared: Mapping[str, Any]) -> Any:
    if name not in declared:
        raise unknown(kind, name, declared)
    return declared[name]


def _choose(undo: ExitStack, model: nn.Module, surface: Surface, name: str, mode: Mode) -> None:
    path = _named("selection", name, surface.selections).path
    module = submodule(model, path) if path else None
    if not isinstance(module, Select):
        raise ArenaError(f"surface: selection '{name}' is no Select, so its choice cannot be made another way")
    undo.callback(setattr, module, "mode", HARD)
    module.mode = mode


def _holding(gate: Gate, value: Tensor | float) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
    calls = 0

    def hold(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        if calls - 1 != gate.call:
            return None
        if not isinstance(value, Tensor):
            return torch.full_like(out, value)
        return value.to(out.dtype).view(-1, *(1,) * (out.dim() - 1)).expand_as(out)

    return hold


def _turn(undo: ExitStack, model: nn.Module, name: str, knob: Knob, value: Any) -> None:
    module = submodule(model, knob.path)
    if not hasattr(module, knob.attribute):
        raise ArenaError(f"surface: knob '{name}': '{knob.path}' has no attribute '{knob.attribute}'")
    before = getattr(module, knob.attribute)
    if isinstance(before, Tensor):  # a parameter or buffer stays itself; its content changes
        undo.callback(before.data.copy_, before.detach().clone())
        before.data.fill_(value)
    else:
        undo.callback(setattr, module, knob.attribute, before)
        setattr(module, knob.attribute, value)
