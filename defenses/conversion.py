"""Conversion of a backbone's batch norms: found in forward order, replaced one by one."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from arena.backbones import DatasetInfo
from arena.errors import ArenaError


def norms(owner: str, backbone: nn.Module, dataset: DatasetInfo) -> dict[str, _BatchNorm]:
    """Return the backbone's batch norms by path, in the order in which a forward pass first calls them.

    Raises:
        ArenaError: there is none.
    """
    found: dict[str, _BatchNorm] = {}
    handles = []

    def note(path: str, module: nn.Module, _inputs: object) -> None:
        assert isinstance(module, _BatchNorm)
        found.setdefault(path, module)

    for path, module in backbone.named_modules():
        if isinstance(module, _BatchNorm):
            handles.append(module.register_forward_pre_hook(partial(note, path)))
    modes = {m: m.training for m in backbone.modules()}
    try:
        backbone.eval()
        with torch.no_grad():
            backbone(torch.full((1, *dataset.shape), 0.5))
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes.items():
            module.training = mode
    if not found:
        raise ArenaError(f"{owner}: backbone '{dataset.backbone}' has no batch norm, expected at least one")
    return found


def replace(backbone: nn.Module, path: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule at ``path``."""
    parent, _, name = path.rpartition(".")
    setattr(backbone.get_submodule(parent), name, module)
