"""CIFS: relevance, mask and loss against cases worked out by hand; what is detached and what is not."""

from __future__ import annotations

import pytest
import torch
from arena_defenses import cifs
from arena_defenses.backbones import cnn, resnet18
from arena_defenses.cifs import ImportanceMask, Joint

from arena.backbones import DatasetInfo
from arena.models import plan
from arena.plugins import registry
from arena.schedule import Schedule
from arena.selection import Mode, choosing, supervise, training_step
from arena.stages import Usual
from arena.surface import Reader, Reading, selects, submodule
from arena.threat import Threat
from arena.watch import Silent

# Two channels with means (1, 2) on a (1, 2) map; probe rows (2, 0), (0, 1), (-1, -1): scores (2, 2.5, -3) with bias.
A = torch.tensor([[[[0.0, 2.0]], [[2.0, 2.0]]]])
ROWS = torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, -1.0]])


def linear(scale: float = 1.0) -> ImportanceMask:
    module = ImportanceMask(2, 3, scale=scale)
    with torch.no_grad():
        module.probe.weight.copy_(ROWS)
        module.probe.bias.copy_(torch.tensor([0.0, 0.5, 0.0]))
    return module


def masked(relevance, scale=1.0):
    return A * scale * torch.softmax(torch.tensor(relevance), 0).view(1, 2, 1, 1)


def test_at_test_time_the_two_top_classes_weigh_channels():
    # classes 1 and 0: relevance (0, 1) + (2, 0)
    assert torch.allclose(linear().eval()(A), masked([2.0, 1.0]))
    assert torch.allclose(linear(scale=2.0).eval()(A), masked([2.0, 1.0], 2.0))


@pytest.mark.parametrize(
    ("label", "relevance"),
    [(2, [1.0, -1.0]), (0, [4.0, 0.0]), (1, [2.0, 1.0])],  # rank two is class 0, counted twice where it is the label
)
def test_in_training_the_label_takes_the_first_place_and_rank_two_the_second(label, relevance):
    module = linear().train()
    with training_step(), supervise(module, torch.tensor([label])):
        got = module(A)
    assert torch.allclose(got, masked(relevance))
    assert torch.allclose(module(A), masked([2.0, 1.0]))  # train mode alone brings no label


def test_labels_cannot_reach_a_test_time_pass():
    module = linear().eval()
    with pytest.raises(RuntimeError, match="only inside a training step"), supervise(module, torch.tensor([2])):
        module(A)
    assert torch.allclose(module(A), masked([2.0, 1.0]))


@pytest.mark.parametrize("hidden", [0, 5])
def test_relevance_is_the_derivative_summed_over_positions(hidden):
    torch.manual_seed(0)
    module = ImportanceMask(4, 3, hidden)
    a = torch.randn(6, 4, 3, 2, requires_grad=True)
    scores = module.probe(a.mean((2, 3)))
    two = scores.topk(2, dim=1).values.sum()
    (grad,) = torch.autograd.grad(two, a)
    expected = a * torch.softmax(grad.sum((2, 3)), 1)[:, :, None, None]
    assert torch.allclose(module(a), expected, atol=1e-6)


@pytest.mark.parametrize("hidden", [0, 5])
def test_the_main_loss_passes_the_mask_by_and_the_knob_lets_it_in(hidden):
    torch.manual_seed(0)
    module = ImportanceMask(4, 3, hidden).eval()
    a = torch.randn(6, 4, 3, 2, requires_grad=True)

    def grad(mode: Mode) -> torch.Tensor:
        with choosing({"first": module.first, "second": module.second}, {"first": mode, "second": mode}):
            return torch.autograd.grad(module(a).sum(), a)[0]

    mask = (module(a) / a).detach()
    assert torch.allclose(grad(Mode()), mask, atol=1e-5)  # d sum(a * m) / da = m: nothing through m
    module.detach = False
    through = grad(Mode("soft"))
    assert not torch.allclose(through, mask, atol=1e-3)
    assert torch.isfinite(through).all()
    assert torch.isfinite(grad(Mode("straight_through"))).all()


def test_probe_learns_from_the_mask_and_the_features_from_the_probes_loss():
    module = linear().train()
    a = A.clone().requires_grad_()
    module(a).sum().backward()
    assert module.probe.weight.grad.abs().sum() > 0
    assert torch.equal(module.probe.weight.grad[2], torch.zeros(2))  # class 2 was not chosen
    a.grad = None
    seen = []
    module.probe.register_forward_hook(lambda _m, _i, out: seen.append(out))
    module(a)
    seen[0][:, 0].sum().backward()
    assert torch.equal(a.grad, torch.tensor([[[[1.0, 1.0]], [[0.0, 0.0]]]]))  # row (2, 0) over two positions


def test_it_needs_no_gradient_to_run():
    with torch.no_grad():
        assert torch.allclose(linear().eval()(A), masked([2.0, 1.0]))


def test_joint_loss_by_hand():
    y = torch.tensor([0])
    even = torch.zeros(1, 3)  # cross-entropy log 3
    sure = torch.tensor([[100.0, 0.0, 0.0]])  # 0
    reading = Reading(even, {"probe1": even, "probe2": sure}, {})
    log3 = torch.log(torch.tensor(3.0))
    for lam, expected in ((2.0, log3 + 2 * log3 / 2), (0.5, (log3 + 0.5 * log3 / 2) * 2)):
        loss, _ = Joint("sat", lam=lam).combine(None, reading, y)
        assert torch.allclose(loss, expected)


def test_recipe_and_warm_start():
    assert cifs.sat(lam=2.0, labels="true", slots="auto", scale=1.0) == [Joint("sat", lam=2.0)]
    (stage,) = cifs.sat(lam=1.0, labels="true", warm=True, slots="auto", scale=2.0)
    assert stage.start_from == "cifs_rt(labels=true,lam=1,scale=2,slots=auto)"
    assert cifs.rt() == [Joint("rt", lam=2.0)]
    assert cifs.sat() != [Usual("sat", lam=2.0)]


def test_warm_start_takes_the_weights_of_the_naturally_trained_model(tiny_images, arena_home):
    made = plan(
        "cifs_sat(warm=true,lam=1)",
        dataset="digits",
        images=tiny_images,
        backbone="cnn(width=4)",
        train_seed=0,
        threat=Threat("Linf", "0.05"),
        checkpoint=None,
        surface=None,
        registry=registry(),
        schedule=Schedule(epochs=1),
    )
    (start,) = made.starts.values()
    assert start.name == "cifs_rt(lam=1)"
    found = made.obtain(train=True, retrain=False, device="cpu", watch=Silent())
    assert start.cached()
    assert found.build()(torch.rand(8, *tiny_images.shape)).shape == (8, 3)


def test_surface_and_shapes():
    info = DatasetInfo("test", (3, 32, 32), 10, "resnet18")
    model = cifs.build(resnet18((3, 32, 32), 10, width=8), info).eval()
    declared = cifs.surface(model)
    assert [h.path for h in declared.heads.values()] == ["layer4.0.out.probe", "layer4.1.out.probe"]
    assert set(selects(model, declared)) == {"first1", "second1", "first2", "second2"}
    for knob in declared.knobs.values():
        assert getattr(submodule(model, knob.path), knob.attribute) is True
    with Reader(model, declared) as read:
        assert read(torch.rand(8, 3, 32, 32)).scores().shape == (8, 3, 10)
    sizes = [sum(p.numel() for p in model.layer4[i].out.parameters()) for i in (0, 1)]
    assert sizes == [64 * 128 + 128 + 128 * 10 + 10, 64 * 10 + 10]  # hidden layer first, linear last


@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 2), ((3, 9, 7), 3)])
def test_any_shape_any_classes(shape, classes):
    info = DatasetInfo("test", shape, classes, "cnn")
    model = cifs.build(cnn(shape, classes, width=4), info, lam=2.0, scale=2.0).eval()
    x = torch.rand(9, *shape)
    assert model(x).shape == (9, classes)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-6)
