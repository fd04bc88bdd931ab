"""Learned parts that no declared surface reads: what a defense has and does not show.

Two questions, asked of an eval-mode forward on a few images. Which parameters does nothing depend on, neither the
logits nor any declared head, gate or selection, under no setting of the knobs? And which submodules emit (N, K) scores
from learned parameters without being declared as heads, or choose without being declared as selections (``hidden``)?
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from arena.hidden import Finding, heads, reading, selections
from arena.surface import Surface, selects, submodule
from arena.surrogate import Surrogate, posing
from arena.target import pad

__all__ = ["Finding", "unread"]

#: Images looked at.
ROWS = 8
#: Most forwards spent on telling read parameters from unread ones that got no gradient; then the rest count as read.
BUDGET = 200


def unread(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Finding]:
    """Find what ``surface`` leaves out of a model in eval mode; ``x`` is (N, C, H, W) in [0, 1], the first 8 are used.

    ``n_classes`` is the width K of the logits. The model is left as it came.

    Raises:
        ArenaError: the surface does not fit the model.
    """
    x = pad(x[:ROWS])
    found = [*heads(model, surface, x, n_classes), *selections(model, surface)]
    return found + _parameters(model, surface, x)


def _parameters(model: nn.Module, surface: Surface, x: Tensor) -> list[Finding]:
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    flags = {name: p.requires_grad for name, p in named.items()}
    for p in named.values():
        p.requires_grad_(True)
    try:
        gradients = _gradients(model, surface, x, list(named.values()))
    finally:
        for name, p in named.items():
            p.requires_grad_(flags[name])
    # No gradient proves little: a hard choice has none, nor has a dead unit. What stays unread must not move anything.
    left = [name for name, g in zip(named, gradients, strict=True) if g is None or not bool(g.any())]
    budget = [BUDGET]
    for setting in _settings(model, surface):
        if left:
            with setting():
                left = _still_unread(left, named, lambda: _everything(model, surface, x), budget)
    return _gathered(model, named, set(left))


def _gradients(model: nn.Module, surface: Surface, x: Tensor, parameters: list[nn.Parameter]) -> list[Tensor | None]:
    """Differentiate a random combination of all that can be read: a plain sum of probabilities would have none."""
    try:
        with torch.enable_grad():
            read = _everything(model, surface, x, grad=True)
            generator = torch.Generator().manual_seed(0)
            total = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in read)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return [None] * len(parameters)
            return list(torch.autograd.grad(total, parameters, allow_unused=True))
    except Exception:  # a model without gradients is judged by what moves
        return [None] * len(parameters)


def _everything(model: nn.Module, surface: Surface, x: Tensor, grad: bool = False) -> list[Tensor]:
    """Return logits, heads, gates, and what the declared selections choose by."""
    seen: list[Tensor] = []

    def note(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
        seen.extend(t for t in inputs if isinstance(t, Tensor) and t.is_floating_point())

    handles = [m.register_forward_pre_hook(note) for m in selects(model, surface).values()]
    try:
        with reading(model, surface, grad) as read:
            shown = read(x)
    finally:
        for handle in handles:
            handle.remove()
    return [shown.logits, *shown.heads.values(), *shown.gates.values(), *seen]


def _settings(model: nn.Module, surface: Surface) -> list[Callable[[], Any]]:
    """Return contexts: the model as it is, then each value of each knob."""
    made: list[Callable[[], Any]] = [ExitStack]
    for name, knob in surface.knobs.items():
        for value in knob.values if hasattr(submodule(model, knob.path), knob.attribute) else ():
            made.append(partial(posing, model, surface, Surrogate(knobs={name: value})))
    return made


def _still_unread(
    names: list[str], named: dict[str, nn.Parameter], read: Callable[[], list[Tensor]], budget: list[int]
) -> list[str]:
    """Change parameters by a lot, all at once, then by halves; return those that move nothing.

    Each part is changed alone, then again where all others are changed too: a dead unit may hide what stands behind it.
    """

    def seen(seeds: dict[str, int]) -> list[Tensor]:
        kept = {name: named[name].detach().clone() for name in seeds}
        budget[0] -= 1
        try:
            with torch.no_grad():
                for name, seed in seeds.items():
                    p = named[name]
                    noise = torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)).to(p)
                    p.add_(noise * (1 + p.abs().amax()) if p.numel() else noise)
            return read()
        finally:
            with torch.no_grad():
                for name, value in kept.items():
                    named[name].copy_(value)

    def moves(part: list[str], others: dict[str, int], base: list[Tensor]) -> bool:
        now = seen({**others, **dict.fromkeys(part, 1)})
        return any(not torch.equal(a, b) for a, b in zip(base, now, strict=True))

    alone = seen({})
    if not moves(names, {}, alone):
        return names
    all_changed = dict.fromkeys(names, 2)
    among = seen(all_changed)

    def rest(part: list[str]) -> list[str]:
        if budget[0] <= 0:
            return []
        if not moves(part, {}, alone) and not moves(part, all_changed, among):
            return part
        middle = len(part) // 2
        return rest(part[:middle]) + rest(part[middle:]) if middle else []

    return rest(names)


def _gathered(model: nn.Module, named: dict[str, nn.Parameter], names: set[str]) -> list[Finding]:
    """Name the largest modules that are unread as a whole, else the single parameters."""
    found: dict[str, int] = {}
    for name in named:
        if name not in names:
            continue
        parts = name.split(".")
        ways = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
        inside = (w for w in ways if all(n in names for n in named if n == w or n.startswith(f"{w}.")))
        whole = next(inside)
        found[whole] = found.get(whole, 0) + named[name].numel()
    return [Finding("parameters", path, numbers) for path, numbers in found.items()]
