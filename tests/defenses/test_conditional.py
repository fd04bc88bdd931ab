"""AFA and OAT alike: every backbone, norms on vectors, what the specs declare, training end to end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from arena_defenses import afa, oat
from arena_defenses.backbones import cnn, resnet18, resnet_small
from torch import nn

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.plugins import registry
from arena.specs import Preset, complete, load
from arena.surface import Reader
from arena.training import fit
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent))
from conditional import THREAT, batch, info, small

NAMES = ("afa_sat", "afa_trades", "afa_mart", "afa_iat", "oat_sat")


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (3, 9, 7)])
@pytest.mark.parametrize("build", [cnn, resnet_small])
@pytest.mark.parametrize("module", [afa, oat])
def test_every_small_backbone(module, build, shape, classes):
    model = small(module, build, shape, classes).eval()
    x, _ = batch(9, shape)
    logits = model(x)
    assert logits.shape == (9, classes)
    assert torch.allclose(model(x[:8]), logits[:8], atol=1e-5)
    assert model(x[:1]).shape == (1, classes)
    with Reader(model, module.surface(model)) as read:
        assert torch.equal(read(x).logits, logits)


@pytest.mark.parametrize("module", [afa, oat])
def test_resnet18(module):
    model = small(module, resnet18, (3, 32, 32), 10, width=8).eval()
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("module", [afa, oat])
def test_a_backbone_without_batch_norm_is_named(module):
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    with pytest.raises(ArenaError, match="backbone 'mlp' has no batch norm, expected at least one"):
        module.build(flat, info(backbone="mlp"))


class Vectors(nn.Module):
    """A norm on a map, then one on vectors, registered in the other order."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.fc = nn.BatchNorm1d(3), nn.Linear(3, 10)
        self.conv, self.early = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.fc(self.late(self.early(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize("form", ["single", "each"])
def test_norms_on_vectors(form):
    model = afa.build(Vectors(), info(), gate=form).eval()
    (gate,) = afa.surface(model).gates.values()
    assert gate.path == "body.early.gate"
    assert model(batch()[0]).shape == (12, 10)
    assert oat.build(Vectors(), info()).eval()(batch()[0]).shape == (12, 10)
    odd = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 10))
    with pytest.raises(ArenaError, match="the first batch norm of backbone 'cnn' is not on a feature map"):
        afa.build(odd, info())


@pytest.mark.parametrize("name", NAMES)
def test_declared(name):
    spec = registry().get("defense", name).spec
    for reference in (spec.build, spec.surface, spec.recipe, spec.apply):
        assert callable(load(reference))
    options = complete(name, spec.options, {})
    stages = load(spec.recipe)(**options)
    assert all(s.adversarial and s.start_from is None for s in stages)
    assert {"digits", "svhn", "*"} <= set(spec.presets)
    assert spec.twin == name.partition("_")[2]
    if name != "oat_sat":
        first, second = stages
        assert (first.recipe, first.k, second.made) == (spec.twin, 5, "gate")
        assert first.beta == {"trades": 6.0, "mart": 5.0}.get(first.recipe, 0.0)
        assert "reconstruction" in spec.summary
    model = load(spec.build)(cnn((1, 8, 8), 10, width=4), info(), **options)
    load(spec.apply)(model, **complete(name, spec.eval_options, {}))
    assert model.eval()(batch()[0]).shape == (12, 10)


@pytest.mark.parametrize("name", ["afa_trades", "oat_sat"])
def test_training_end_to_end(name, tiny_images, tmp_path):
    spec = registry().get("defense", name).spec
    options = complete(name, spec.options, {"k": 3, "hidden": 4} if name != "oat_sat" else {})
    data = DatasetInfo("tiny", (1, 4, 4), 3, "cnn")
    model = load(spec.build)(cnn((1, 4, 4), 3, width=4), data, **options)
    fitted = fit(
        model,
        load(spec.recipe)(**options),
        tiny_images,
        Preset(2, batch=9, lr=0.02, steps=2),
        THREAT,
        name=name,
        surface=load(spec.surface)(model),
        train_seed=0,
        folder=tmp_path,
        device=torch.device("cpu"),
        watch=Silent(),
    )
    assert [e["stage"] for e in fitted.history] == ([0, 0, 1] if name != "oat_sat" else [0, 0])
    assert all(torch.isfinite(torch.tensor(e["loss"])) for e in fitted.history)
    assert fitted.best["stage"] == fitted.history[-1]["stage"]
