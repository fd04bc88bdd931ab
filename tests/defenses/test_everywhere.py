"""Every registered defense on every kind of backbone: it is built, answers, and its whole declared surface reads."""

from __future__ import annotations

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.plugins import registry
from arena.specs import complete, load
from arena.surface import Reader, Surface, selects, submodule

#: Narrow; 16x16 pictures keep maps larger than 1x1 wherever the papers' have them.
SHAPE, CLASSES = (3, 16, 16), 5
BACKBONES = {"resnet18": 8, "vgg16": 8, "wrn28_10": 1, "resnet34": 4, "resnet50": 2}
BUILT_IN = [r for r in registry().all("defense") if r.distribution == "adversarial-arena"]
NAMES = [r.name for r in BUILT_IN]


def build(name: str, backbone: str, **given):
    spec, base = (registry().get(kind, n).spec for kind, n in (("defense", name), ("backbone", backbone)))
    width = {"width": BACKBONES[backbone]} if backbone in BACKBONES else {}
    torch.manual_seed(0)
    inner = load(base.build)(shape=SHAPE, n_classes=CLASSES, **complete(backbone, base.options, width))
    info = DatasetInfo("test", SHAPE, CLASSES, backbone, tuple(base.slots))
    model = load(spec.build)(inner, info, **complete(name, spec.options, given)).eval()
    if spec.apply:
        load(spec.apply)(model, **complete(name, spec.eval_options, {}))
    return model, load(spec.surface)(model) if spec.surface else Surface()


def settle(model, x):
    """Give every batch norm the statistics of this batch; before any training a deep network may be all but constant.

    Returns the model in eval mode.
    """
    for norm in (m for m in model.modules() if isinstance(m, _BatchNorm)):
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(x)
    return model.eval()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", NAMES)
def test_builds_answers_and_shows_its_surface(name, backbone):
    model, surface = build(name, backbone)
    x = torch.rand(8, *SHAPE, generator=torch.Generator().manual_seed(1))
    settle(model, x)
    with torch.no_grad(), Reader(model, surface) as read:
        seen = read(x)
        other = read(torch.cat((x[:4], 1 - x[4:])))
    assert seen.logits.shape == (8, CLASSES)
    assert len(seen.logits.unique(dim=0)) == 8
    assert all(v.isfinite().all() for v in (seen.logits, *seen.heads.values()))
    assert set(seen.heads) == set(surface.heads)
    for gate, value in seen.gates.items():
        assert value.shape[0] == 8
        assert (value >= 0).all()
        assert (value <= 1).all(), gate
    if not surface.random:  # rows do not see their neighbors
        assert torch.allclose(seen.logits[:4], other.logits[:4], atol=1e-5)
    assert len(selects(model, surface)) == sum(bool(s.path) for s in surface.selections.values())
    assert all(hasattr(submodule(model, k.path), k.attribute) for k in surface.knobs.values())


#: What cannot sit where, and why.
REFUSED = [
    (
        ("fgaa_sat", "ewas_sat", "cas_sat", "saa_sat", "csaa_sat", "cifs_sat", "pcl_rt"),
        "mlp",
        "has 0 slots, .* least 2",
    ),
    (("fsr_sat", "fd_sat", "denoise_rt"), "mlp", "has 0 slots, expected at least 1"),
    (("afa_sat", "oat_sat"), "mlp", "has no batch norm"),
    (("afa_sat", "oat_sat"), "deepdefense_cnn", "has no batch norm"),
]


@pytest.mark.parametrize(("name", "backbone", "why"), [(n, b, why) for names, b, why in REFUSED for n in names])
def test_a_backbone_that_cannot_hold_it_is_refused_in_one_line(name, backbone, why):
    with pytest.raises(ArenaError, match=f"'{backbone}' {why}") as caught:
        build(name, backbone)
    assert "\n" not in str(caught.value)
