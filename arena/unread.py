"""Learned parts that no declared surface reads: what a defense has and does not show.

Two questions, asked of an eval-mode forward on a few images. Which parameters does nothing depend on, neither the
logits nor any declared head, gate or selection, under no setting of the knobs? And which submodules emit (N, K) scores
from learned parameters without being declared as heads, or choose without being declared as selections (``hidden``)?
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from arena.batches import pad
from arena.hidden import Finding, heads, reading, selections
from arena.surface import Surface, selects, submodule
from arena.surrogate import Surrogate, posing

__all__ = ["Finding", "unread"]

#: Images looked at for hidden scores, and of these for unread parameters.
ROWS, FEW = 8, 4
#: Most forwards spent on telling read parameters from unread ones that got no gradient; then the rest count as read.
BUDGET = 200
#: Seeds under which parameters without a gradient are drawn anew.
REDRAWS = (3, 4)


def unread(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Finding]:
    """Find what ``surface`` leaves out of a model in eval mode; ``x`` is (N, C, H, W) in [0, 1], the first 8 are used.

    ``n_classes`` is the width K of the logits. The model is left as it came.

    Raises:
        ArenaError: the surface does not fit the model.
    """
    x = pad(x[:ROWS])
    found = [*heads(model, surface, x, n_classes), *selections(model, surface)]
    return found + _parameters(model, surface, x[:FEW])


def _parameters(model: nn.Module, surface: Surface, x: Tensor) -> list[Finding]:
    named = {name: p for name, p in model.named_parameters() if p.is_floating_point()}
    gradients = _gradients(model, surface, x, named)
    # No gradient proves little: a hard choice has none, nor has a dead unit. What stays unread must not move anything.
    left = set(_without(gradients))
    budget = [BUDGET]
    for k, setting in enumerate(_settings(model, surface)):
        if not left:
            break
        with setting():
            # under a knob only what the pass lays hands on can be read where it was not before
            part = left if k == 0 else left & _touched(named, lambda: _everything(model, surface, x))
            if part:
                unmoved = _still_unread(
                    [name for name in gradients if name in part],
                    named,
                    lambda: _everything(model, surface, x),
                    lambda some: _without(_gradients(model, surface, x, some)),
                    budget,
                )
                left -= part - set(unmoved)
    return _gathered(model, named, left)


class _Hands(TorchFunctionMode):
    """Notes every tensor that a torch function is given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        waiting = [args, kwargs or {}]
        while waiting:
            found = waiting.pop()
            if isinstance(found, Tensor):
                self.given.add(id(found))
            elif isinstance(found, list | tuple):
                waiting += found
            elif isinstance(found, dict):
                waiting += found.values()
        return func(*args, **(kwargs or {}))


def _touched(named: Mapping[str, nn.Parameter], read: Callable[[], list[Tensor]]) -> set[str]:
    """Return the parameters that some torch function is given; all, if none is: compiled code shows nothing."""
    with _Hands() as hands:
        read()
    found = {name for name, p in named.items() if id(p) in hands.given}
    return found or set(named)


def _without(gradients: Mapping[str, Tensor | None]) -> list[str]:
    """Return the names whose gradient is absent, or zero wherever it is a number."""
    return [name for name, g in gradients.items() if g is None or not bool(torch.nan_to_num(g).any())]


def _gradients(
    model: nn.Module, surface: Surface, x: Tensor, parameters: Mapping[str, nn.Parameter]
) -> dict[str, Tensor | None]:
    """Differentiate a random combination of all that can be read: a plain sum of probabilities would have none."""
    flags = {name: p.requires_grad for name, p in parameters.items()}
    for p in parameters.values():
        p.requires_grad_(True)
    try:
        with torch.enable_grad():
            read = _everything(model, surface, x, grad=True)
            generator = torch.Generator().manual_seed(0)
            total = sum((t * torch.randn(t.shape, generator=generator).to(t)).sum() for t in read)
            if not isinstance(total, Tensor) or not total.requires_grad:
                return dict.fromkeys(parameters)
            found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
            return dict(zip(parameters, found, strict=True))
    except Exception:  # a model without gradients is judged by what moves
        return dict.fromkeys(parameters)
    finally:
        for name, p in parameters.items():
            p.requires_grad_(flags[name])


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


@contextmanager
def _changed(named: Mapping[str, nn.Parameter], change: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    """Give parameters other values for a while: ``change(name, value)``."""
    kept = {name: p.detach().clone() for name, p in named.items()}
    try:
        with torch.no_grad():
            for name, p in named.items():
                p.copy_(change(name, p))
        yield
    finally:
        with torch.no_grad():
            for name, value in kept.items():
                named[name].copy_(value)


def _differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(some, others, strict=True))


def _noise(like: Tensor, seed: int) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(seed)).to(like)


def _fresh(seed: int, _name: str, p: Tensor) -> Tensor:
    """Draw a parameter anew, as for training: what was dead or saturated then passes gradients."""
    return _noise(p, seed) / (max(p[0].numel(), 1) if p.dim() > 1 and len(p) else 4) ** 0.5


def _still_unread(
    names: list[str],
    named: dict[str, nn.Parameter],
    read: Callable[[], list[Tensor]],
    without: Callable[[dict[str, nn.Parameter]], list[str]],
    budget: list[int],
) -> list[str]:
    """Change parameters by a lot, all at once, then by halves; return those that move nothing.

    Where all at once move something, those that get a gradient when drawn anew are read; ``without`` returns the
    others. Of these each part is changed alone, then again where all others are changed too: a dead unit may hide what
    stands behind it.
    """

    def seen(seeds: dict[str, int]) -> list[Tensor]:
        budget[0] -= 1
        with _changed(
            {name: named[name] for name in seeds},
            lambda name, p: p + _noise(p, seeds[name]) * (1 + p.abs().amax() if p.numel() else 1),
        ):
            return read()

    def redrawn(some: list[str], seed: int) -> AbstractContextManager[None]:
        return _changed({name: named[name] for name in some}, partial(_fresh, seed))

    def moves(part: list[str], others: dict[str, int], base: list[Tensor]) -> bool:
        return _differ(base, seen({**others, **dict.fromkeys(part, 1)}))

    alone = seen({})
    if not moves(names, {}, alone):  # a large change may leave a saturated unit where it was
        with redrawn(names, REDRAWS[0]):
            if not _differ(alone, read()):
                return names
    for seed in REDRAWS:
        with redrawn(names, seed):
            names = without({name: named[name] for name in names})
        if not names:
            return []
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
