"""The lists cannot lie: what each spec says it exposes is what the surface of the built model declares."""

from __future__ import annotations

import pytest
import torch

from arena.backbones import DatasetInfo
from arena.plugins import registry
from arena.specs import Exposed, complete, load
from arena.surface import Reader, Surface

DEFENSES = [r.name for r in registry().all("defense") if r.distribution == "adversarial-arena"]


@pytest.mark.parametrize("name", DEFENSES)
def test_the_spec_says_what_the_built_surface_declares(name):
    found = registry()
    spec, data = found.get("defense", name).spec, found.get("dataset", "digits").spec
    backbone = found.get("backbone", data.backbone).spec
    info = DatasetInfo("digits", (1, 8, 8), 10, backbone.name, tuple(backbone.slots))
    torch.manual_seed(0)
    model = load(spec.build)(
        load(backbone.build)(shape=info.shape, n_classes=10, **complete("backbone", backbone.options, {})),
        info,
        **complete(name, spec.options, {}),
    )
    surface = Surface() if spec.surface is None else load(spec.surface)(model)
    assert spec.exposed == Exposed.of(surface)
    with Reader(model.eval(), surface) as read:
        reading = read(torch.rand(8, 1, 8, 8))
    assert (tuple(reading.heads), tuple(reading.gates)) == (spec.exposed.heads, spec.exposed.gates)
    if spec.module:
        assert spec.recipe_name == spec.twin
    assert bool(spec.published) == bool(spec.published_on)
