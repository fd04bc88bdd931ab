"""The built-in backbones and what is registered about them."""

from __future__ import annotations

import pytest
import torch

from arena.backbones import slot_shapes
from arena.plugins import registry
from arena.specs import Option, load


def build(name, shape, classes=10, **options):
    return load(registry().get("backbone", name).spec.build)(shape=shape, n_classes=classes, **options)


@pytest.mark.parametrize("name", ["cnn", "resnet_small", "resnet18"])
def test_declared_slots_are_the_slots_in_forward_order(name):
    spec = registry().get("backbone", name).spec
    assert tuple(slot_shapes(build(name, (1, 8, 8), width=4), (1, 8, 8))) == spec.slots
    assert isinstance(spec.options["width"], Option)


def test_sizes():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(build("resnet_small", (1, 8, 8))) <= 100_000
    assert count(build("resnet18", (3, 32, 32))) == 11_173_962  # the usual CIFAR ResNet-18
    assert count(build("resnet18", (3, 32, 32), width=16)) < count(build("resnet18", (3, 32, 32))) / 12


def test_resnet18_maps_are_the_papers():
    shapes = slot_shapes(build("resnet18", (3, 32, 32)), (3, 32, 32))
    assert shapes["layer3.1.out"] == (256, 8, 8)
    assert shapes["layer4.0.out"] == shapes["layer4.1.out"] == (512, 4, 4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 20, 28), (2, 5, 9)])
@pytest.mark.parametrize("name", ["cnn", "resnet_small", "resnet18"])
def test_any_channels_any_sides_any_classes(name, shape):
    model = build(name, shape, classes=2, width=4).eval()
    x = torch.rand(9, *shape)
    assert model(x).shape == (9, 2)
    assert all(min(s) > 0 for s in slot_shapes(model, shape).values())


@pytest.mark.parametrize("name", ["cnn", "resnet_small", "resnet18"])
def test_slots_come_after_a_relu(name):
    model = build(name, (1, 8, 8), width=4).eval()
    lows = []
    for path in registry().get("backbone", name).spec.slots:
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out: lows.append(float(out.min())))
    with torch.no_grad():
        model(torch.rand(8, 1, 8, 8))
    assert lows
    assert min(lows) >= 0
