"""Backbones: undefended networks with named insertion slots, and how a defense's modules get into them.

A slot is an ``nn.Identity`` at a dotted path. Defenses ask for the slots' shapes, build modules to fit and ``place``
them; the backbone's own code never learns of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from arena.errors import PluginError, nearest


@dataclass(frozen=True)
class DatasetInfo:
    """What a defense is built for: the second argument of ``DefenseSpec.build``."""

    name: str
    """Data set's name."""
    shape: tuple[int, int, int]
    """(C, H, W)."""
    n_classes: int
    """Number of classes K."""
    backbone: str = ""
    """Backbone's registered name, without options."""
    slots: tuple[str, ...] = ()
    """The backbone's slots, in forward order."""


def slots(backbone: nn.Module) -> list[str]:
    """Return the dotted paths of all ``nn.Identity`` points, in the order of registration."""
    return [path for path, module in backbone.named_modules() if type(module) is nn.Identity]


def slot_shapes(
    backbone: nn.Module, shape: tuple[int, int, int], only: tuple[str, ...] = ()
) -> dict[str, tuple[int, int, int]]:
    """Return the shape (C, H, W) of the feature map at each slot, in forward order, by one pass over a grey image.

    ``only`` limits the answer to a backbone's declared slots. The backbone is left in the mode it came in.

    Raises:
        PluginError: a slot in ``only`` does not exist or is never reached.
    """
    seen: dict[str, tuple[int, int, int]] = {}
    handles = []

    def reader(path: str) -> object:
        def read(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            if out.dim() == 4:
                seen.setdefault(path, (int(out.shape[1]), int(out.shape[2]), int(out.shape[3])))

        return read

    modes = {m: m.training for m in backbone.modules()}
    try:
        for path in only or slots(backbone):
            handles.append(_slot(backbone, path).register_forward_hook(reader(path)))  # type: ignore[arg-type]
        backbone.eval()
        with torch.no_grad():
            backbone(torch.full((1, *shape), 0.5))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    for path in only:
        if path not in seen:
            raise PluginError(f"backbone: slot '{path}' is never reached with a feature map (N, C, H, W)")
    return seen


def place(backbone: nn.Module, modules: Mapping[str, nn.Module]) -> nn.Module:
    """Put each module in the slot of its path and return the backbone, changed in place.

    Raises:
        PluginError: no such slot, or the slot is taken; names the nearest free slot. Nothing is placed then.
    """
    for path in modules:
        _slot(backbone, path)
    for path, module in modules.items():
        parent, _, name = path.rpartition(".")
        setattr(backbone.get_submodule(parent), name, module)
    return backbone


def _slot(backbone: nn.Module, path: str) -> nn.Module:
    free = slots(backbone)
    if path in free:
        return backbone.get_submodule(path)
    hint = nearest(path, free) or f"; slots: {', '.join(free) or 'none'}"
    try:
        found = type(backbone.get_submodule(path)).__name__ if path else ""
    except AttributeError:
        found = ""
    if found:
        raise PluginError(f"backbone: '{path}' holds a {found}, expected a free slot (nn.Identity){hint}")
    raise PluginError(f"backbone: no slot '{path}'{hint}")
