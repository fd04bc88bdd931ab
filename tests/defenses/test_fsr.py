"""FSR: its equations by hand, its noise, where labels and gradients go, what it declares."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import fsr
from arena_defenses.backbones import cnn, resnet18, resnet_small
from torch import nn

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.inner import evaluating
from arena.plugins import registry
from arena.selection import training_step
from arena.specs import Preset, complete, load
from arena.stages import Context, divergence, mart, probability, trades
from arena.surface import Reader, submodule
from arena.threat import Threat


class Constant(nn.Module):
    """Returns a constant map whatever it sees, and remembers what that was."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.seen = value, None

    def forward(self, f):
        self.seen = f
        return torch.full_like(f, self.value)


def model(backbone=cnn, shape=(1, 8, 8), classes=10, **options):
    info = DatasetInfo("test", shape, classes, backbone.__name__)
    return fsr.build(backbone(shape, classes, width=4), info, **options)


def by_hand(r: float, rec: float, **options) -> fsr.Recalibration:
    """One channel, S(f) = r and R(f-) = rec everywhere, h(a) = (mean a, -mean a)."""
    module = fsr.Recalibration((1, 1, 2), 2, **options).eval()
    if module.separate:
        module.separation = Constant(r)
    if module.recalibrate:
        module.recalibration = Constant(rec)
    with torch.no_grad():
        module.aux[-1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        module.aux[-1].bias.zero_()
    return module


F_MAP = torch.tensor([[[[2.0, 4.0]]]])


def test_equations_by_hand():
    # sigmoid(r / tau) = 1/4 for r = -tau ln 3.
    module = by_hand(-0.1 * math.log(3), 8.0)
    heads = []
    module.aux.register_forward_hook(lambda _m, _i, out: heads.append(out))
    out = module(F_MAP)
    robust, nonrobust = F_MAP / 4, F_MAP * 3 / 4
    recalibrated = nonrobust + 0.75 * 8
    assert torch.allclose(out, robust + recalibrated)
    assert torch.allclose(out, F_MAP + 6)  # f + (1 - m) R(f-)
    assert torch.allclose(module.recalibration.seen, nonrobust)
    for seen, part in zip(heads, (robust, nonrobust, recalibrated), strict=True):
        assert torch.allclose(seen, torch.stack((part.mean(), -part.mean()))[None])


@pytest.mark.parametrize(("readout", "expected"), [("robust", 0.25), ("nonrobust", 0.75)])
def test_readouts(readout, expected):
    module = by_hand(-0.1 * math.log(3), 8.0)
    module.readout = readout
    assert torch.allclose(module(F_MAP), expected * F_MAP)
    module.readout = "recalibrated"
    assert torch.allclose(module(F_MAP), 0.75 * F_MAP + 6)


def test_ablations():
    everything = by_hand(0.0, 8.0, separate=False)
    assert everything.heads() == ["recalibrated"]
    assert torch.allclose(everything(F_MAP), F_MAP + 8)  # f + R(f)
    alone = by_hand(-0.1 * math.log(3), 0.0, recalibrate=False)
    assert alone.heads() == ["robust", "nonrobust"]
    assert torch.allclose(alone(F_MAP), F_MAP / 4)  # f+
    assert not hasattr(everything, "separation")
    assert not hasattr(alone, "recalibration")
    with pytest.raises(ArenaError, match="leave nothing"):
        model(separation=False, recalibration=False)


def test_mask_is_deterministic_in_eval_mode_and_noisy_in_training():
    mask, r = fsr.Mask(0.1), torch.tensor([[-0.2, 0.0, 0.3]])
    mask.eval()
    assert torch.allclose(mask(r), torch.sigmoid(10 * r))
    mask.train()
    torch.manual_seed(0)
    many = torch.cat([mask(r.expand(20000, 3))])
    # P(m > 1/2) = P(l > -r) = sigmoid(r): logistic noise, by four standard errors.
    assert torch.allclose((many > 0.5).float().mean(0), torch.sigmoid(r[0]), atol=0.015)
    torch.manual_seed(0)
    u = torch.rand(1, 3)
    torch.manual_seed(0)
    assert torch.allclose(mask(r), torch.sigmoid((r + (u / (1 - u)).log()) / 0.1), atol=1e-5)


def test_noise_is_the_two_class_gumbel_softmax():
    r, tau = torch.tensor([0.7], dtype=torch.float64), 0.5
    u, v = torch.tensor([0.3, 0.8], dtype=torch.float64)
    gumbel = torch.stack((F.logsigmoid(r) - (-u.log()).log(), F.logsigmoid(-r) - (-v.log()).log()))
    difference = (-v.log()).log() - (-u.log()).log()  # of two Gumbels: logistic
    assert torch.allclose((gumbel / tau).softmax(0)[0], torch.sigmoid((r + difference) / tau))


def test_gradient_reaches_both_nets_and_stops_where_asked():
    net = model()
    x, y = torch.rand(9, 1, 8, 8), torch.arange(9)
    path, module = fsr.find(net)
    for detach in (False, True):
        net.zero_grad()
        module.mask.detach = detach
        F.cross_entropy(net(x), y).backward()
        assert module.recalibration[0].weight.grad.abs().max() > 0
        grad = module.separation[-1].weight.grad
        assert grad is None if detach else grad.abs().max() > 0
    assert path == "block4.out"


def test_runner_up_is_the_best_wrong_class_and_carries_no_gradient():
    logits = torch.tensor([[3.0, 2.0, 1.0], [0.0, 5.0, 1.0], [4.0, 4.0, 9.0]], requires_grad=True)
    found = fsr.runner_up(logits, torch.tensor([0, 1, 0]))
    assert found.tolist() == [1, 2, 2]
    assert not found.requires_grad


def test_auxiliary_terms_by_hand():
    logits, y = torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([0])
    heads = {
        "robust": torch.tensor([[math.log(2), 0.0, 0.0]]),
        "nonrobust": torch.tensor([[0.0, math.log(3), 0.0]]),
        "recalibrated": torch.tensor([[math.log(8), 0.0, 0.0]]),
    }
    separation, recalibration = fsr.auxiliary_terms(logits, heads, y)
    assert float(separation) == pytest.approx(math.log(4 / 2) + math.log(5 / 3))  # y' = 1
    assert float(recalibration) == pytest.approx(math.log(10 / 8))
    separation, recalibration = fsr.auxiliary_terms(logits, {}, y)
    assert float(separation) == float(recalibration) == 0


def context(net, threat=None, **preset):
    declared = fsr.surface(net)
    read = Reader(net, declared)
    settings = Preset(1, steps=2, **preset)
    made = Context(
        settings, threat or Threat.parse("Linf", "8/255"), 10, declared, read, torch.Generator().manual_seed(0)
    )
    return made, read


@pytest.mark.parametrize("aux_on", ["adversarial", "natural"])
@pytest.mark.parametrize("recipe", ["sat", "trades", "mart"])
def test_loss_is_the_recipes_plus_weighted_auxiliary_terms(recipe, aux_on):
    torch.manual_seed(0)
    net = model().eval()  # eval mode: one pass like another
    x, y = torch.rand(9, 1, 8, 8), torch.arange(9)
    ctx, read = context(net)
    with read:
        stage = fsr.Separating(recipe, beta=3.0, lam_sep=0.5, lam_rec=0.25, aux_on=aux_on)
        x_adv = (x + 0.1).clamp(0, 1)
        object.__setattr__(ctx, "x_adv", x_adv)
        got, log = stage.loss(net, x, y, ctx)
        natural, adversarial = read(x), read(x_adv)
    z, z_adv = natural.logits, adversarial.logits
    main = {
        "sat": F.cross_entropy(z_adv, y),
        "trades": trades(z, z_adv, y, 3.0),
        "mart": mart(z, z_adv, y, 3.0, probability(z, y)),
    }[recipe]
    seen = natural if aux_on == "natural" and recipe != "sat" else adversarial
    terms = fsr.auxiliary_terms(seen.logits, seen.heads, y)
    assert torch.allclose(got, main + 0.5 * terms[0] + 0.25 * terms[1])
    assert set(log) == {"main", "separation", "recalibration"}


@pytest.mark.parametrize("recipe", ["sat", "trades", "mart"])
def test_inner_attack_climbs_the_main_term_alone_in_eval_mode(recipe):
    torch.manual_seed(0)
    net = model()
    with torch.no_grad():
        net.train()(torch.rand(64, 1, 8, 8))  # some batch statistics
    x, y = torch.rand(9, 1, 8, 8), torch.arange(9)
    modes = set()
    fsr.find(net)[1].mask.register_forward_hook(lambda m, _i, _o: modes.add(m.training))
    ctx, read = context(net.train())
    with read:
        attack = fsr.Separating(recipe, beta=3.0).adversary(ctx)
        with training_step():
            found = attack(net, x, y)
        assert modes == {False}
        assert net.training
        with torch.no_grad():  # another auxiliary layer changes nothing
            fsr.find(net)[1].aux[-1].weight.normal_()
        again, second = context(net)
        with second, training_step():
            assert torch.equal(fsr.Separating(recipe, beta=3.0).adversary(again)(net, x, y), found)
    value = lambda z: divergence(net(x), z) if recipe == "trades" else F.cross_entropy(z, y, reduction="none")  # noqa: E731
    with evaluating(net), torch.no_grad():
        assert value(net(found)).mean() > value(net(x)).mean()
    assert (found - x).abs().max() <= 8 / 255 + 1e-6


def test_labels_cannot_reach_a_forward_pass():
    net = model().eval()
    _, module = fsr.find(net)
    assert not [m for m in net.modules() if hasattr(m, "labels")]
    x = torch.rand(9, 1, 8, 8)
    assert torch.equal(net(x), net(x))
    assert module.readout == "full"


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize(
    ("backbone", "shape", "slot"),
    [
        (cnn, (1, 8, 8), "block4.out"),
        (cnn, (3, 12, 8), "block4.out"),
        (resnet_small, (3, 9, 7), "layer2.1.out"),
        (resnet18, (3, 32, 32), "layer4.1.out"),
    ],
)
def test_placement_and_surface(backbone, shape, slot, classes):
    net = model(backbone, shape, classes).eval()
    declared = fsr.surface(net)
    assert {h.path for h in declared.heads.values()} == {f"{slot}.aux"}
    with Reader(net, declared) as read, torch.no_grad():
        seen = read(torch.rand(9, *shape))
    assert list(seen.heads) == ["robust", "nonrobust", "recalibrated"]
    assert seen.scores().shape == (9, 4, classes)
    assert seen.gates["mask"].min() >= 0
    assert seen.gates["mask"].max() <= 1
    for knob in declared.knobs.values():
        assert hasattr(submodule(net, knob.path), knob.attribute)
    assert not declared.random


def test_ablations_declare_what_they_have():
    assert list(fsr.surface(model(separation=False)).heads) == ["recalibrated"]
    assert not fsr.surface(model(separation=False)).gates
    assert list(fsr.surface(model(recalibration=False)).heads) == ["robust", "nonrobust"]


def test_parameters_are_the_papers():
    plain = sum(p.numel() for p in resnet18((3, 32, 32), 10).parameters())
    net = fsr.build(resnet18((3, 32, 32), 10), DatasetInfo("test", (3, 32, 32), 10, "resnet18"))
    added = sum(p.numel() for p in net.parameters()) - plain
    assert round((plain + added) / 1e6, 2) == 12.43  # Table 7: 11.17 -> 12.43 million


def test_options_change_the_nets():
    kinds = lambda net: [type(m).__name__ for m in net]  # noqa: E731
    code, paper = (fsr.find(model(rec_last=last))[1] for last in ("code", "paper"))
    assert kinds(code.recalibration)[-1] == "Conv2d"
    assert kinds(paper.recalibration)[-3:] == ["Conv2d", "BatchNorm2d", "ReLU"]
    assert kinds(paper.separation)[-1] == "Conv2d"
    assert all(m.bias is None for m in code.modules() if isinstance(m, nn.Conv2d))
    assert kinds(fsr.find(model(aux="mlp"))[1].aux)[-3:] == ["Linear", "ReLU", "Linear"]
    assert fsr.find(model(hidden=3))[1].separation[0].weight.shape[0] == 3
    assert fsr.find(model(slot="block2.out"))[0] == "block2.out"
    with pytest.raises(ArenaError, match="unknown slot"):
        model(slot="block9.out")


def test_eval_options():
    net = model(tau=0.5)
    fsr.apply(net)
    module = fsr.find(net)[1]
    assert (module.readout, module.mask.tau) == ("full", 0.5)
    fsr.apply(net, readout="robust", test_tau=2.0)
    assert (module.readout, module.mask.tau) == ("robust", 2.0)
    with pytest.raises(ArenaError, match="unknown readout"):
        fsr.apply(model(recalibration=False), readout="recalibrated")
    with pytest.raises(ArenaError, match="test_tau"):
        fsr.apply(model(separation=False), test_tau=1.0)


@pytest.mark.parametrize("recipe", ["sat", "trades", "mart"])
def test_registered(recipe):
    spec = registry().get("defense", f"fsr_{recipe}").spec
    assert spec.twin == recipe
    assert registry().has("defense", recipe)
    assert all(callable(load(code)) for code in (spec.build, spec.surface, spec.recipe, spec.apply))
    given = {"lam_sep": 2, "lam_rec": 3, **({} if recipe == "sat" else {"beta": 4, "aux_on": "natural"})}
    (stage,) = load(spec.recipe)(**complete(spec.name, spec.options, given))
    assert (stage.recipe, stage.lam_sep, stage.lam_rec) == (recipe, 2.0, 3.0)
    if recipe != "sat":
        assert (stage.beta, stage.aux_on) == (4.0, "natural")
    assert {"digits", "cifar10", "svhn", "*"} <= set(spec.presets)
