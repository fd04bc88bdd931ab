"""VGG16, wide residual networks, ResNet-34 and ResNet-50: sizes, maps, slots, and where a slot's module acts."""

from __future__ import annotations

import pytest
import torch
from arena_defenses.backbones_large import PreBlock, wrn
from torch import nn

from arena.backbones import place, slot_shapes
from arena.plugins import registry
from arena.specs import load

NARROW = {"vgg16": 4, "resnet34": 4, "resnet50": 4, "wrn34_10": 1, "wrn32_10": 1, "wrn28_10": 1, "wrn16_8": 1}


def build(name, shape=(3, 32, 32), classes=10, **options):
    return load(registry().get("backbone", name).spec.build)(shape=shape, n_classes=classes, **options)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vgg16", 15_251_402),  # FSR's Table 7: 15.25 million
        ("resnet34", 21_282_122),
        ("resnet50", 23_520_842),
        ("wrn34_10", 46_160_474),
        ("wrn32_10", 46_160_474),
        ("wrn28_10", 36_479_194),
        ("wrn16_8", 10_961_370),
    ],
)
def test_sizes_are_the_usual_ones(name, parameters):
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", NARROW)
def test_declared_slots_are_the_slots_in_forward_order(name):
    spec = registry().get("backbone", name).spec
    model = build(name, width=NARROW[name]).eval()
    order = []
    for path in spec.slots:
        model.get_submodule(path).register_forward_hook(lambda _m, _i, _o, path=path: order.append(path))
    with torch.no_grad():
        model(torch.rand(2, 3, 32, 32))
    assert tuple(order) == spec.slots
    assert set(slot_shapes(model, (3, 32, 32))) == set(spec.slots)


def test_maps_have_the_papers_sides():
    vgg = slot_shapes(build("vgg16", width=4), (3, 32, 32))
    assert vgg["block4.2.out"] == (32, 4, 4)
    assert {vgg[f"block5.{i}.out"] for i in range(3)} == {(32, 2, 2)}
    wide = slot_shapes(build("wrn34_10", width=1), (3, 32, 32))
    assert wide["block3.4.branch"] == wide["block3.1.out"] == wide["out"] == (64, 8, 8)
    assert wide["block2.4.out"] == (32, 16, 16)
    assert slot_shapes(build("resnet50", width=4), (3, 32, 32))["layer4.2.out"] == (128, 4, 4)


@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 5, 9), (3, 20, 28)])
@pytest.mark.parametrize("name", ["vgg16", "resnet34", "resnet50", "wrn28_10", "wrn16_8"])
def test_any_channels_any_sides_any_classes(name, shape):
    model = build(name, shape, classes=2, width=NARROW[name]).eval()
    x = torch.rand(9, *shape)
    assert model(x).shape == (9, 2)
    assert model(x[:1]).shape == (1, 2)


class Zero(nn.Module):
    def forward(self, a):
        return 0 * a


def test_the_branch_slot_leaves_the_shortcut_alone():
    block = PreBlock(2, 2, 1).eval()
    x = torch.randn(3, 2, 4, 4)
    place(block, {"branch": Zero()})
    # conv1 of nothing is nothing; fresh batch norm in eval mode and ReLU keep it so: only the raw input is left.
    assert torch.allclose(block(x), x)


def test_a_block_is_pre_activated():
    block = PreBlock(1, 1, 1).eval()
    seen = []
    block.branch.register_forward_hook(lambda _m, _i, out: seen.append(out))
    with torch.no_grad():
        for conv in (block.conv1, block.conv2):
            conv.weight.zero_()[0, 0, 1, 1] = 1.0
        out = block(torch.tensor([[[[-2.0, 3.0]]]]))
    assert torch.allclose(seen[0], torch.tensor([[[[0.0, 3.0]]]]), atol=1e-4)
    assert torch.allclose(out, torch.tensor([[[[-2.0, 6.0]]]]), atol=1e-4)  # x + relu(x), and no ReLU after it


def test_wide_slots_after_relu_and_not():
    model = build("wrn16_8", width=1).eval()
    low = {}
    for path in registry().get("backbone", "wrn16_8").spec.slots:
        model.get_submodule(path).register_forward_hook(lambda _m, _i, out, p=path: low.update({p: float(out.min())}))
    with torch.no_grad():
        model(torch.rand(4, 3, 32, 32))
    assert min(v for k, v in low.items() if k == "out" or k.endswith("branch")) >= 0
    assert low["block3.0.out"] < 0  # a sum that no ReLU follows


def test_depth_must_give_whole_blocks():
    with pytest.raises(ValueError, match="depth 32: expected 10, 16, 22"):
        wrn((3, 32, 32), 10, 32, 1)
