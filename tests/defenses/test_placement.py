"""Where masks sit in each backbone: the papers' places, EWAS's layer numbers, places a user names."""

from __future__ import annotations

import pytest
import torch
from arena_defenses import cas, cifs, ewas, fgaa, fsr
from arena_defenses.masks import ClassMask, surface
from arena_defenses.placement import deep, ends, first, last, late, single

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.plugins import registry
from arena.specs import load
from arena.surface import Reader

SHAPE = (3, 32, 32)


def bare(name, width=1, shape=SHAPE, classes=10):
    spec = registry().get("backbone", name).spec
    model = load(spec.build)(shape=shape, n_classes=classes, width=width)
    return model, DatasetInfo("test", shape, classes, name, spec.slots)


@pytest.mark.parametrize(
    ("name", "width", "slots"),
    [
        ("resnet18", 2, ["layer4.0.out", "layer4.1.out"]),
        ("resnet34", 1, ["layer4.1.out", "layer4.2.out"]),
        ("resnet50", 1, ["layer4.1.out", "layer4.2.out"]),
        ("vgg16", 1, ["block5.0.out", "block5.1.out", "block5.2.out"]),
        ("wrn34_10", 1, ["block3.4.branch", "out"]),
        ("wrn28_10", 1, ["block3.3.branch", "out"]),
        ("wrn16_8", 1, ["block3.1.branch", "out"]),
    ],
)
@pytest.mark.parametrize("build", [fgaa.build, cas.build_cas])
def test_late_masks_sit_where_the_papers_put_them(build, name, width, slots):
    model = build(*bare(name, width)).eval()
    declared = surface(model)
    assert [h.path for h in declared.heads.values()] == [f"{s}.scores" for s in slots]
    with Reader(model, declared) as read:
        assert read(torch.rand(8, *SHAPE)).scores().shape == (8, 1 + len(slots), 10)


@pytest.mark.parametrize(
    ("name", "slot", "stages"),
    [
        ("resnet18", "layer4.1.out", ["layer1.1", "layer2.1", "layer3.1", "layer4.1"]),
        ("resnet34", "layer4.2.out", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("resnet50", "layer4.2.out", ["layer1.2", "layer2.3", "layer3.5", "layer4.2"]),
        ("vgg16", "block4.2.out", ["block1.1", "block2.1", "block3.2", "block4.2", "block5.2"]),
        ("wrn34_10", "out", ["block1.4", "block2.4", "block3.4"]),
        ("wrn16_8", "out", ["block1.1", "block2.1", "block3.1"]),
    ],
)
def test_fsr_sits_where_the_paper_puts_it_and_denoising_at_the_stages_ends(name, slot, stages):
    model, info = bare(name, 2)
    assert deep(model, info, "fsr") == slot
    assert ends(model, info, "fd") == [f"{s}.out" for s in stages]
    assert not [s for s in first(model, info, "fd", 2) if "branch" in s]
    assert last(model, info, "pcl", 2) == list(info.slots)[-2:]
    path, module = fsr.find(fsr.build(model, info))
    assert path == slot
    if name == "vgg16":
        assert module.aux[-1].in_features == 16  # block4 has eight times the width


def test_fsr_draws_its_first_weights_as_the_official_code_does():
    torch.manual_seed(0)
    parts = {n: fsr.find(fsr.build(*bare(n, 16 if n == "vgg16" else 1)))[1] for n in ("vgg16", "wrn16_8", "resnet18")}
    for name in ("vgg16", "wrn16_8"):
        for conv in (m for m in parts[name].modules() if isinstance(m, torch.nn.Conv2d)):
            assert conv.weight.std().item() == pytest.approx((2 / (9 * conv.out_channels)) ** 0.5, rel=0.02)
    assert parts["vgg16"].aux[-1].weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert parts["vgg16"].aux[-1].bias.abs().max() == 0
    assert parts["resnet18"].separation[3].weight.abs().max() <= (1 / (9 * 64)) ** 0.5  # torch's own: uniform


@pytest.mark.parametrize(
    ("name", "slot"),
    [
        ("resnet18", "layer4.0.out"),
        ("resnet34", "layer4.1.out"),
        ("wrn34_10", "block3.1.out"),
        ("wrn32_10", "block3.1.out"),
        ("wrn28_10", "block3.0.out"),
        ("wrn16_8", "block3.0.out"),
        ("vgg16", "block5.1.out"),
    ],
)
def test_ewas_sits_before_the_last_blocks(name, slot):
    assert single(*bare(name), "ewas") == slot


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("resnet18", {11: "layer3.0.out", 13: "layer3.1.out", 15: "layer4.0.out", 17: "layer4.1.out"}),
        (
            "wrn32_10",
            {21: "block2.4.out", 25: "block3.1.out", 27: "block3.2.out", 29: "block3.3.out", 31: "block3.4.out"},
        ),
        ("wrn28_10", {19: "block3.0.out"}),
    ],
)
def test_ewas_layer_numbers(name, numbers):
    model, info = bare(name)
    for number, slot in numbers.items():
        assert single(model, info, "ewas", number) == slot


def test_ewas_layer_that_does_not_exist():
    with pytest.raises(ArenaError, match=r"'resnet18' has no block that ends at layer 12; it has: 3, 5, 7, .*, 17$"):
        ewas.build(*bare("resnet18"), slot=12)
    with pytest.raises(ArenaError, match="'vgg16' has no block that ends at layer 9; it has: none"):
        ewas.build(*bare("vgg16"), slot=9)


def test_named_slots_in_forward_order_whatever_order_they_come_in():
    model, info = bare("resnet18")
    assert late(model, info, "fgaa", "layer4.0.out-layer2.1.out") == ["layer2.1.out", "layer4.0.out"]
    assert late(model, info, "fgaa", "layer3.1.out") == ["layer3.1.out"]
    with pytest.raises(ArenaError, match=r"unknown slot of backbone 'resnet18' 'layer5.0.out'"):
        late(model, info, "fgaa", "layer4.0.out-layer5.0.out")
    with pytest.raises(ArenaError, match="fgaa: option 'slots': expected different slots"):
        late(model, info, "fgaa", "layer4.0.out-layer4.0.out")


def test_in_a_wide_network_masks_start_as_its_layers_do():
    torch.manual_seed(0)
    two = [m for m in fgaa.build(*bare("wrn16_8", 4)).modules() if isinstance(m, ClassMask)]
    for mask in two:
        _, h, w = mask.shape
        assert mask.scores.weight.std().item() == pytest.approx((2 / (h * w * 10)) ** 0.5, rel=0.02)
    (one,) = (m for m in ewas.build(*bare("wrn16_8", 4)).modules() if isinstance(m, ClassMask))
    assert one.scores.bias.abs().max() == 0
    assert one.scores.weight.abs().max() <= one.scores.in_features**-0.5


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12)])
@pytest.mark.parametrize("name", ["vgg16", "wrn16_8"])
@pytest.mark.parametrize("build", [fgaa.build, ewas.build, cas.build_csaa, cifs.build])
def test_small_pictures_and_two_classes(build, name, shape):
    model = build(*bare(name, 2, shape, 2)).eval()
    assert model(torch.rand(8, *shape)).shape == (8, 2)
