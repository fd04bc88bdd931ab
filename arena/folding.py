"""Batch norms folded into the convolution or linear layer before, where a look at each mode proves that they may be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arena.comparing import looking, modes
from arena.surface import Surface, selects, submodule
from arena.surrogate import Surrogate

_NORMS: dict[type, type] = {nn.BatchNorm2d: nn.Conv2d, nn.BatchNorm1d: nn.Linear}


def fold(model: nn.Module, surface: Surface, x: Tensor) -> int:
    """Fold batch norms into the convolution or linear layer before, in place; return how many.

    A pair is folded where, in every mode of the surface, each of the two is called once a pass, the norm takes exactly
    what the layer gave and nobody else takes it, nobody else reads their numbers, and neither is named by the surface.
    ``x`` (N, C, H, W) are images to look at; N is a multiple of 8.
    """
    named = dict(model.named_modules(remove_duplicate=False))
    kept = {id(m) for m in _named_by(model, surface)}
    places = Counter(id(m) for m in named.values())
    norms = [m for m in model.modules() if _foldable(m) and id(m) not in kept and places[id(m)] == 1]
    if not norms:
        return 0
    pairs: set[tuple[nn.Module, nn.Module]] | None = None
    for mode in modes(model, surface, len(x)):
        seen = _pairs(model, surface, mode, x, norms)
        pairs = seen if pairs is None else pairs & seen
    parents = {id(m): path for path, m in named.items()}
    count = 0
    for layer, norm in pairs or ():
        if id(layer) in kept or places[id(layer)] != 1:
            continue
        _merge(layer, norm)
        parent, _, name = parents[id(norm)].rpartition(".")
        setattr(model.get_submodule(parent), name, nn.Identity())
        count += 1
    return count


def _named_by(model: nn.Module, surface: Surface) -> Iterator[nn.Module]:
    for group in (surface.heads, surface.gates, surface.knobs):
        for point in group.values():
            yield submodule(model, point.path)
    yield from selects(model, surface).values()


def _foldable(module: nn.Module) -> bool:
    """Tell whether a module is an untouched batch norm with statistics of its own."""
    return (
        type(module) in _NORMS
        and _plain(module)
        and not module.training
        and isinstance(module.running_mean, Tensor)
        and isinstance(module.running_var, Tensor)
    )


def _plain(module: nn.Module) -> bool:
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


class _Uses(TorchDispatchMode):
    """Notes which module is at work whenever a tensor is used by an operation."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work: list[nn.Module] = []
        self.users: dict[int, list[nn.Module | None]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.users.setdefault(id(leaf), []).append(self.at_work[-1] if self.at_work else None)
        return func(*args, **(kwargs or {}))


def _pairs(
    model: nn.Module, surface: Surface, mode: Surrogate | None, x: Tensor, norms: list[nn.Module]
) -> set[tuple[nn.Module, nn.Module]]:
    """Return (layer, norm) pairs that may be folded as far as one pass in one mode shows."""
    uses = _Uses()
    calls: Counter[int] = Counter()
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    taken: list[tuple[nn.Module, Any]] = []
    wanted = {id(m) for m in norms}
    layers = {t for m in norms for k, t in _NORMS.items() if type(m) is k}

    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        uses.at_work.append(module)
        calls[id(module)] += 1
        if id(module) in wanted and inputs:
            taken.append((module, inputs[0]))

    def after(module: nn.Module, _inputs: Any, out: Any) -> None:
        uses.at_work.pop()
        if type(module) in layers and isinstance(out, Tensor):
            made[id(out)] = module, out  # held, so that no later tensor takes its id
            uses.users[id(out)] = []

    plain = {id(m): _plain(m) for m in model.modules()}
    with looking(model, surface, mode) as read, ExitStack() as undo:
        for module in model.modules():
            undo.callback(module.register_forward_pre_hook(before).remove)
            undo.callback(module.register_forward_hook(after).remove)
        with torch.no_grad(), uses:
            read(x).scores()  # so that a head that is read is a head that is used
    found = set()
    for norm, tensor in taken:
        layer = made.get(id(tensor), (None, None))[0]
        if layer is None or type(layer) is not _NORMS[type(norm)] or not plain[id(layer)]:
            continue
        own = ((layer, _numbers(layer)), (norm, _numbers(norm)))
        alone = all(set(uses.users.get(id(t), ())) <= {m} for m, tensors in own for t in tensors)
        if calls[id(layer)] == calls[id(norm)] == 1 and uses.users[id(tensor)] == [norm] and alone:
            found.add((layer, norm))
    return found


def _numbers(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _merge(layer: Any, norm: Any) -> None:
    """Put a norm's scale and shift into a layer's weights, in float64 and rounded once."""
    weight, dtype = layer.weight.double(), layer.weight.dtype
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() if layer.bias is None else layer.bias.double() - norm.running_mean.double()
    shift = shift * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    weight = weight * scale.view(-1, *(1,) * (weight.dim() - 1))
    layer.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    layer.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
