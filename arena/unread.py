"""Learned parts that no declared surface reads: what a defense has and does not show.

Two questions, asked of an eval-mode forward on a few images. Which parameters does nothing depend on, neither the
logits nor any declared head, gate or selection, under no setting of the knobs? And which submodules emit (N, K) scores
from learned parameters without being declared as heads, or choose without being declared as selections?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from arena.contender import seeded
from arena.referee import exact
from arena.selection import Select
from arena.surface import Reader, Surface, selects, submodule
from arena.target import pad

#: Images looked at.
ROWS = 8
#: Most forwards spent on telling read parameters from unread ones that got no gradient; then the rest count as read.
BUDGET = 200
#: Scores differ if they do by this share of their size.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Finding:
    """One learned part that no declared surface reads."""

    kind: str
    """``parameters`` (nothing depends on them), ``head`` (undeclared scores) or ``selection`` (undeclared choice)."""
    path: str
    """Of the module, or of one parameter."""
    numbers: int = 0
    """How many learned numbers it holds."""
    call: int = 0
    """Which call of the module, for heads."""
    output: int | str | None = None
    """Index or key into the module's output, for heads."""
    agrees: float | None = None
    """Share of the images on which a head's argmax is that of the logits."""


def unread(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Finding]:
    """Find what ``surface`` leaves out of a model in eval mode; ``x`` is (N, C, H, W) in [0, 1], the first 8 are used.

    ``n_classes`` is the width K of the logits. The model is left as it came. Scores that are not the output of a
    module of their own (a ``matmul`` inside a larger module) are not seen.

    Raises:
        ArenaError: the surface does not fit the model.
    """
    x = pad(x[:ROWS])
    found = [*_heads(model, surface, x, n_classes), *_selections(model, surface)]
    return found + _parameters(model, surface, x)


# -- heads and selections ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Point:
    """Scores seen in a forward pass."""

    path: str
    call: int
    output: int | str | None
    scores: Tensor


def _heads(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Finding]:
    with _recording(model, x.shape[0], n_classes) as points, _reader(model, surface) as read:
        reading = read(x)
    declared = [*reading.heads.values(), *reading.gates.values()]
    known: list[_Point] = []
    unknown: list[_Point] = []
    for point in points:  # wrappers emit what their last part did: equal scores are one
        if any(_same(point.scores, other) for other in (*declared, reading.logits, *(u.scores for u in unknown))):
            known.append(point)
        else:
            unknown.append(point)
    found = []
    modules = dict(model.named_modules())
    for point in unknown:
        numbers = sum(p.numel() for p in modules[point.path].parameters())
        if not numbers:
            continue
        # What is made from declared scores, or from the logits, adds nothing to them.
        here, there = (_scores_at(model, x_, n_classes, point, known) for x_ in (x, 1 - x))
        if here is None or there is None or _same(here, there):
            continue
        # A layer that all of the logits go through is the way to the output, not a classifier beside it.
        if _same(*(_call(model, x_, [point]) for x_ in (x, 1 - x))):
            continue
        known.append(point)
        agrees = (point.scores.flatten(1).argmax(1) == reading.logits.argmax(1)).float().mean()
        found.append(Finding("head", point.path, numbers, point.call, point.output, float(agrees)))
    return found


def _selections(model: nn.Module, surface: Surface) -> list[Finding]:
    named = {id(m) for m in selects(model, surface).values()}
    return [
        Finding("selection", path)
        for path, module in model.named_modules()
        if isinstance(module, Select) and id(module) not in named
    ]


@contextmanager
def _recording(model: nn.Module, rows: int, n_classes: int) -> Iterator[list[_Point]]:
    """Collect every submodule's (N, K) outputs, in the order in which they are made."""
    points: list[_Point] = []
    calls: dict[str, int] = {}

    def hook(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def read(_module: nn.Module, _inputs: Any, out: Any) -> None:
            call = calls[path] = calls.get(path, -1) + 1
            for key, part in _parts(out):
                if part.dim() >= 2 and part.shape[:2] == (rows, n_classes) and part.numel() == rows * n_classes:
                    points.append(_Point(path, call, key, part.detach().clone().flatten(1)))

        return read

    handles = [m.register_forward_hook(hook(path)) for path, m in model.named_modules() if path]
    try:
        yield points
    finally:
        for handle in handles:
            handle.remove()


def _parts(out: Any) -> list[tuple[int | str | None, Tensor]]:
    parts: list[tuple[Any, Any]] = [(None, out)]
    if isinstance(out, list | tuple):
        parts = list(enumerate(out))
    elif isinstance(out, dict):
        parts = list(out.items())
    return [(k, v) for k, v in parts if isinstance(v, Tensor) and v.is_floating_point()]


@contextmanager
def _held(model: nn.Module, points: Sequence[_Point]) -> Iterator[None]:
    """Put fixed scores, those of the first image, in the place of the given ones."""

    def hook(path: str) -> Callable[[nn.Module, Any, Any], Any]:
        calls = 0

        def replace(_module: nn.Module, _inputs: Any, out: Any) -> Any:
            nonlocal calls
            call, calls = calls, calls + 1
            for point in points:
                if (point.path, point.call) != (path, call):
                    continue
                if point.output is None:
                    out = _fixed(point, out)
                elif isinstance(out, dict):
                    out = {k: _fixed(point, v) if k == point.output else v for k, v in out.items()}
                else:
                    parts = [_fixed(point, v) if k == point.output else v for k, v in enumerate(out)]
                    out = type(out)(*parts) if hasattr(out, "_fields") else type(out)(parts)
            return out

        return replace

    paths = dict.fromkeys(p.path for p in points)
    modules = dict(model.named_modules())
    handles = [modules[path].register_forward_hook(hook(path)) for path in paths]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fixed(point: _Point, out: Tensor) -> Tensor:
    return point.scores[:1].expand_as(point.scores).reshape(out.shape).clone()


def _scores_at(model: nn.Module, x: Tensor, n_classes: int, at: _Point, held: Sequence[_Point]) -> Tensor | None:
    with _recording(model, x.shape[0], n_classes) as points:
        _call(model, x, held)
    key = (at.path, at.call, at.output)
    return next((p.scores for p in points if (p.path, p.call, p.output) == key), None)


# -- parameters --------------------------------------------------------------------------------------------------


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
        with _reader(model, surface, grad) as read:
            reading = read(x)
    finally:
        for handle in handles:
            handle.remove()
    return [reading.logits, *reading.heads.values(), *reading.gates.values(), *seen]


def _settings(model: nn.Module, surface: Surface) -> list[Callable[[], Any]]:
    """Return contexts: the model as it is, then each value of each knob."""

    def turned(module: nn.Module, attribute: str, value: Any) -> Callable[[], Any]:
        @contextmanager
        def context() -> Iterator[None]:
            before = getattr(module, attribute)
            setattr(module, attribute, value)
            try:
                yield
            finally:
                setattr(module, attribute, before)

        return context

    made: list[Callable[[], Any]] = [ExitStack]
    for knob in surface.knobs.values():
        module = submodule(model, knob.path)
        made += [turned(module, knob.attribute, value) for value in knob.values if hasattr(module, knob.attribute)]
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


# -- calls -------------------------------------------------------------------------------------------------------


@contextmanager
def _reader(model: nn.Module, surface: Surface, grad: bool = False) -> Iterator[Callable[[Tensor], Any]]:
    with Reader(model, surface) as reader, seeded(0), ExitStack() as stack:
        if not grad:
            stack.enter_context(exact())
        yield reader


def _call(model: nn.Module, x: Tensor, held: Sequence[_Point] = ()) -> Tensor:
    with _held(model, held), seeded(0), exact():
        out: Tensor = model(x)
    return out


def _same(a: Tensor, b: Tensor) -> bool:
    if a.numel() != b.numel():
        return False
    a, b = a.flatten(), b.flatten()
    return bool(((a - b).abs() <= TOLERANCE * (1 + a.abs().max())).all())
