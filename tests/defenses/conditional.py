"""What the tests of AFA and OAT share: small models, a batch, a context, norms that differ."""

from __future__ import annotations

import pytest
import torch
from arena_defenses.backbones import cnn
from torch import nn

from arena.backbones import DatasetInfo
from arena.specs import Preset
from arena.stages import Context
from arena.surface import Surface
from arena.threat import Threat

THREAT = Threat.parse("Linf", "0.2")
PRESET = Preset(10, batch=16, lr=0.1, steps=2, milestones=(8,))


def info(shape=(1, 8, 8), classes=10, backbone="cnn") -> DatasetInfo:
    return DatasetInfo("test", shape, classes, backbone)


def small(module, build=cnn, shape=(1, 8, 8), classes=10, width=4, **options) -> nn.Module:
    torch.manual_seed(0)
    return module.build(build(shape, classes, width=width), info(shape, classes, build.__name__), **options)


def batch(n=12, shape=(1, 8, 8), classes=10):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(n, *shape, generator=generator), torch.arange(n) % classes


def context(model, preset=PRESET, classes=10, x_adv=None) -> Context:
    generator = torch.Generator().manual_seed(2)
    return Context(preset, THREAT, classes, Surface(), lambda x: pytest.fail("read"), generator, x_adv=x_adv)


def scrambled(model: nn.Module) -> nn.Module:
    """Give each norm statistics and affine parts of its own, so that no two branches agree."""
    generator = torch.Generator().manual_seed(3)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.running_var, m.weight.data, m.bias.data):
                t.copy_(0.5 + torch.rand(t.shape, generator=generator))
    return model
