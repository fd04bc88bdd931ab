"""Hidden heads: learned scores and choices inside a model that its surface does not declare."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from arena.contender import seeded
from arena.referee import exact
from arena.selection import Select
from arena.surface import Reader, Surface, selects

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


@dataclass(frozen=True)
class _Point:
    """Scores seen in a forward pass."""

    path: str
    call: int
    output: int | str | None
    scores: Tensor

    @property
    def key(self) -> tuple[str, int | str | None]:
        """What all calls share."""
        return self.path, self.output


def heads(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Finding]:
    """Find submodules that emit learned (N, K) scores of ``x`` and are no declared heads, in forward order.

    Not counted: the layers that all of the logits go through, what is made from declared scores or from the logits, and
    scores that are not the output of a module of their own (a ``matmul`` inside a larger one).
    """
    with _recording(model, x.shape[0], n_classes) as points, reading(model, surface) as read:
        seen = read(x)
    declared = [p for p in points if any(_same(p.scores, t) for t in (*seen.heads.values(), *seen.gates.values()))]
    logits = [p for p in points if _same(p.scores, seen.logits)]
    known = [*declared, *logits]
    unknown: list[_Point] = []
    modules = dict(model.named_modules())
    for point in points:
        if any(_same(point.scores, other.scores) for other in (*known, *unknown)):
            known.append(point)  # wrappers emit what their last part did: equal scores are one
        elif any(True for _ in modules[point.path].parameters()):
            unknown.append(point)
    # A layer that all of the logits go through, in all its calls, is the way to the output, no classifier beside it.
    way = set()
    for key in dict.fromkeys(p.key for p in unknown):
        together = [p for p in points if p.key == key]
        if _same(*(_call(model, x_, together) for x_ in (x, 1 - x))):
            way.add(key)
    # A model may run its network several times; then the first run's heads stand for the others'.
    runs = max((sum(p.key == key for p in points) for key in (*way, *(p.key for p in logits))), default=1)
    found = []
    for point in unknown:
        total = sum(p.key == point.key for p in points)
        each = total // runs if total % runs == 0 else total
        if point.key in way or any(p.key == point.key and p.call % each == point.call % each for p in declared):
            continue
        # What is made from declared scores, or from the logits, adds nothing to them.
        here, there = (_scores_at(model, x_, n_classes, point, known) for x_ in (x, 1 - x))
        if here is None or there is None or _same(here, there):
            continue
        known.append(point)
        agrees = (point.scores.argmax(1) == seen.logits.argmax(1)).float().mean()
        numbers = sum(p.numel() for p in modules[point.path].parameters())
        found.append(Finding("head", point.path, numbers, point.call, point.output, float(agrees)))
    return found


def selections(model: nn.Module, surface: Surface) -> list[Finding]:
    """Find ``Select`` modules that are no declared selections."""
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
    return next((p.scores for p in points if (p.key, p.call) == (at.key, at.call)), None)


@contextmanager
def reading(model: nn.Module, surface: Surface, grad: bool = False) -> Iterator[Reader]:
    """Read a surface with fixed random numbers, and exactly unless gradients are wanted."""
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
