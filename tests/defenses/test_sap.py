"""SAP: the estimator by hand and in the mean, where it acts, weights taken over, randomness declared."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import sap
from arena_defenses.backbones import cnn, resnet18, resnet_small
from torch import nn

from arena.backbones import DatasetInfo
from arena.models import plan
from arena.plugins import registry
from arena.specs import DatasetSpec, Preset, complete, load
from arena.surface import Reader, submodule
from arena.threat import Threat
from arena.watch import Silent


def model(backbone=cnn, shape=(1, 8, 8), classes=10):
    info = DatasetInfo("test", shape, classes, backbone.__name__)
    return sap.build(backbone(shape, classes, width=4), info)


def test_prune_by_hand(monkeypatch):
    monkeypatch.setattr(torch, "multinomial", lambda p, r, replacement: torch.tensor([[0, 1] * (r // 2)]))
    h = torch.tensor([[1.0, -3.0, 4.0, 0.0]])  # p = 1/8, 3/8, 1/2, 0; r = 4
    got = sap.prune(h, 1.0)
    assert torch.allclose(got, torch.tensor([[1 / (1 - (7 / 8) ** 4), -3 / (1 - (5 / 8) ** 4), 0.0, 0.0]]))
    got = sap.prune(h, 0.5)  # r = 2
    assert torch.allclose(got, torch.tensor([[1 / (1 - (7 / 8) ** 2), -3 / (1 - (5 / 8) ** 2), 0.0, 0.0]]))


@pytest.mark.parametrize("frac", [0.5, 1.0, 2.0])
def test_the_mean_is_the_map_and_the_share_kept_is_the_chance(frac):
    torch.manual_seed(0)
    h = torch.tensor([0.1, 0.3, 0.6, 1.0]).view(1, 1, 2, 2)
    many = sap.prune(h.expand(40000, 1, 2, 2), frac)
    p, r = h / h.sum(), round(4 * frac)
    chance = 1 - (1 - p) ** r
    assert torch.allclose((many != 0).float().mean(0), chance[0], atol=0.012)
    assert torch.allclose(many.mean(0), h[0], atol=0.02)


def test_edges():
    assert torch.equal(sap.prune(torch.zeros(2, 3, 2, 2), 1.0), torch.zeros(2, 3, 2, 2))
    alone = torch.zeros(1, 4)
    alone[0, 2] = 5.0
    assert torch.equal(sap.prune(alone, 1.0), alone)  # p = 1: always drawn, never scaled
    assert torch.isfinite(sap.prune(torch.tensor([[1e-30, 1.0]]), 1.0)).all()


def test_expected_gradient_is_that_of_the_identity():
    torch.manual_seed(0)
    h = torch.tensor([0.1, 0.3, 0.6, 1.0]).expand(40000, 4).clone().requires_grad_()
    sap.prune(h, 1.0).sum().backward()
    assert torch.allclose(h.grad.mean(0), torch.ones(4), atol=0.05)


def test_every_relu_is_pruned_once_and_only_in_eval_mode(monkeypatch):
    seen = []
    monkeypatch.setattr(sap, "prune", lambda h, frac: seen.append((tuple(h.shape[1:]), frac)) or h)
    net, x = model(resnet_small), torch.rand(8, 1, 8, 8)
    net.train()(x)
    assert not seen
    net.eval()
    sap.apply(net, frac=0.5)
    net(x)
    # The stem and, in each of three blocks, the inner ReLU and the last.
    assert seen == [((4, 8, 8), 0.5)] * 3 + [((12, 4, 4), 0.5)] * 4
    seen.clear()
    net.sampler.on = False
    net(x)
    assert not seen


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu, lambda x: x.relu()])
def test_however_a_network_writes_it(monkeypatch, relu):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)
            self.act = relu if isinstance(relu, nn.Module) else None

        def forward(self, x):
            return (self.act or relu)(self.layer(x))

    calls = []
    monkeypatch.setattr(sap, "prune", lambda h, frac: calls.append(h) or h)
    sap.Pruned(Net()).eval()(torch.rand(8, 4))
    assert len(calls) == 1


def test_nothing_stays_pruned_outside():
    net = model().eval()
    net(torch.rand(8, 1, 8, 8))
    x = torch.rand(100) - 0.3
    assert torch.equal(F.relu(x), x.clamp_min(0))
    with pytest.raises(RuntimeError):
        net(torch.rand(8, 5, 8, 8))
    assert torch.equal(F.relu(x), x.clamp_min(0))


def test_draws_are_averaged():
    net, x = model().eval(), torch.rand(8, 1, 8, 8)
    torch.manual_seed(0)
    singles = torch.stack([net(x) for _ in range(3)])
    assert not torch.equal(singles[0], singles[1])
    sap.apply(net, draws=3)
    torch.manual_seed(0)
    assert torch.allclose(net(x), singles.mean(0))


@pytest.mark.parametrize(
    ("backbone", "shape", "classes"),
    [(cnn, (1, 8, 8), 10), (cnn, (3, 12, 8), 2), (resnet_small, (3, 9, 7), 2), (resnet18, (3, 32, 32), 10)],
)
def test_names_and_weights_are_the_backbones(backbone, shape, classes):
    net = model(backbone, shape, classes)
    plain = backbone(shape, classes, width=4)
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict())
    net.sampler.on = False
    x = torch.rand(8, *shape)
    assert torch.equal(net.eval()(x), plain.eval()(x))
    net.train()
    assert all(m.training for m in net.modules())
    assert net._backbone.training
    assert not net.eval()._backbone.training


def test_gradient_reaches_the_image():
    net, x = model().eval(), torch.rand(8, 1, 8, 8, requires_grad=True)
    net(x).sum().backward()
    assert x.grad.abs().max() > 0


def test_surface_says_random_and_its_knobs_exist():
    net = model().eval()
    declared = sap.surface(net)
    assert declared.random
    for knob in declared.knobs.values():
        assert hasattr(submodule(net, knob.path), knob.attribute)
    with Reader(net, declared) as read:
        assert read(torch.rand(8, 1, 8, 8)).logits.shape == (8, 10)


def test_it_takes_over_the_weights_of_sat_and_trains_nothing(arena_home, tiny_images, monkeypatch):
    found = registry()
    short = {"*": Preset(1, batch=16, steps=1)}
    monkeypatch.setitem(found.get("defense", "sat").spec.__dict__, "presets", short)
    monkeypatch.setattr("arena.models.describe", lambda *_: DatasetSpec("tiny", "", "nowhere:load", backbone="cnn"))

    def get(name):
        return plan(
            name,
            dataset="tiny",
            images=tiny_images,
            backbone="cnn(width=4)",
            train_seed=0,
            threat=Threat.parse("Linf", "0.1"),
            checkpoint=None,
            surface=None,
            registry=found,
        ).obtain(train=True, retrain=False, device="cpu", watch=Silent())

    own, sat = get("sap_sat(frac=0.5)"), get("sat")
    assert all(torch.equal(sat.weights[k], v) for k, v in own.weights.items())
    assert set(own.weights) == set(sat.weights)
    assert own.trained["epochs"] == 0
    assert own.trained["threat"] == {"norm": "Linf", "eps": "0.1"}
    assert own.id != sat.id != get("sap_sat").id
    assert own.build().sampler.frac == 0.5


def test_registered():
    spec = registry().get("defense", "sap_sat").spec
    (stage,) = load(spec.recipe)(**complete("sap_sat", spec.options, {}))
    assert stage.start_from == spec.twin == "sat"
    assert stage.adversarial
    assert stage.epochs(Preset(30)) == 0
    assert not list(stage.trainable(model()))
