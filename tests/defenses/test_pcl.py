"""PCL's terms by hand, what gradient goes where, the three optimizers, the warm start."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import pcl
from arena_defenses.backbones import cnn, resnet18, resnet_small
from arena_defenses.backbones_small import mlp
from arena_defenses.pcl import Centers, Conforming, contrast, depths, distances, proximity

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.plugins import registry
from arena.selection import training_step
from arena.specs import Preset, complete, load
from arena.stages import Context
from arena.surface import Reader, Surface
from arena.threat import Threat
from arena.training import fit
from arena.watch import Silent

FEATURES = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
CENTERS = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 3.0]])
LABELS = torch.tensor([0, 2])
PRESET = Preset(1, batch=16, lr=0.05, steps=2)


def test_terms_by_hand():
    assert distances(FEATURES, CENTERS).tolist() == [[1, 1, 10], [4, 2, 1]]
    assert proximity(FEATURES, CENTERS, LABELS).item() == pytest.approx((1 + 1) / 2)
    assert contrast(FEATURES, CENTERS, LABELS).item() == pytest.approx(((1 + 10) / 2 + (4 + 2) / 2) / 2)


def made(build=cnn, shape=(1, 8, 8), classes=10, width=4):
    torch.manual_seed(0)
    return pcl.build(build(shape, classes, width=width), DatasetInfo("test", shape, classes, build.__name__))


def outer(stage, model, x, y, x_adv=None):
    with Reader(model, Surface()) as read, training_step():
        threat = Threat.parse("Linf", "0.1")
        ctx = Context(PRESET, threat, 10, Surface(), read, torch.Generator().manual_seed(0))
        return stage.loss(model, x, y, replace(ctx, x_adv=x_adv))


def batch(shape=(1, 8, 8), n=8, classes=10):
    return torch.rand(n, *shape), torch.arange(n) % classes


def test_the_features_pass_through_unchanged():
    module, a = Centers(3, 5), torch.randn(8, 3, 4, 4)
    assert torch.equal(module(a), a)


def test_the_loss_adds_up_over_two_depths():
    model, (x, y) = made().eval(), batch()
    loss, log = outer(Conforming(prox=0.5, contrast=0.01), model, x, y)
    a, expected = [], F.cross_entropy(model(x), y)
    handles = [d.register_forward_hook(lambda _m, _i, out: a.append(out.mean((2, 3)))) for d in depths(model)]
    model(x)
    for handle in handles:
        handle.remove()
    for d, f in zip(depths(model), a, strict=True):
        expected = expected + 0.5 * proximity(f, d.near, y) - 0.01 * contrast(f, d.far, y)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert set(log) == {"task", "near", "far"}
    assert not any(v.requires_grad for v in log.values())


def test_centers_learn_at_weight_one_features_at_the_terms_weight():
    x, y = batch()
    grads = {}
    for prox, con in ((1.0, 1e-4), (0.25, 1e-2), (0.0, 0.0)):
        model = made().eval()
        outer(Conforming(prox=prox, contrast=con), model, x, y)[0].backward()
        d = depths(model)[1]
        grads[prox] = (d.near.grad.clone(), d.far.grad.clone(), model.block1.conv.weight.grad.clone())
    for i in (0, 1):
        assert torch.allclose(grads[1.0][i], grads[0.25][i])
        assert torch.allclose(grads[1.0][i], grads[0.0][i])
        assert grads[1.0][i].abs().sum() > 0
    assert not torch.allclose(grads[1.0][2], grads[0.0][2])


def test_gradients_of_centers_by_hand():
    near = CENTERS.clone().requires_grad_()
    proximity(FEATURES, near, LABELS).backward()
    # d mean ||f - c_y||^2 / dc = 2 (c_y - f) / N: near centers go to their class's features ...
    assert near.grad.tolist() == [[-1, 0], [0, 0], [0, 1]]
    far = CENTERS.clone().requires_grad_()
    (-contrast(FEATURES, far, LABELS)).backward()
    # ... far ones, of wrong classes only, away from them: -2 (c_k - f) / (N (K - 1)).
    assert far.grad.tolist() == [[0, 1], [-0.5, 0], [0.5, -1.5]]


def test_every_kind_of_center_has_its_own_optimizer_and_rate():
    model = made()
    with Reader(model, Surface()) as read:
        ctx = Context(PRESET, Threat.parse("Linf", "0.1"), 10, Surface(), read, torch.Generator())
        made_optimizers = Conforming().optimizers(model, ctx)
    groups = [list(o.param_groups) for o in made_optimizers]
    assert [g[0]["lr"] for g in groups] == [0.05, 0.5, 1e-4]
    ids = [{id(p) for g in gs for p in g["params"]} for gs in groups]
    assert ids[1] == {id(d.near) for d in depths(model)}
    assert ids[2] == {id(d.far) for d in depths(model)}
    assert set.union(*ids) == {id(p) for p in model.parameters()}
    assert sum(map(len, ids)) == len(list(model.parameters()))


def test_nearest_center_scores_are_declared():
    model, (x, _) = made().eval(), batch()
    declared = pcl.surface(model)
    assert [h.path for h in declared.heads.values()] == ["block3.out.scores", "block4.out.scores"]
    with torch.no_grad(), Reader(model, declared) as read:
        seen = read(x)
        plain = model(x)
    assert torch.equal(seen.logits, plain)
    assert all((z <= 0).all() for z in seen.heads.values())
    with torch.no_grad():
        features = []
        handle = model.block4.out.register_forward_hook(lambda _m, _i, out: features.append(out.mean((2, 3))))
        model(x)
        handle.remove()
    nearest = distances(features[0], model.block4.out.near).argmin(1)
    assert torch.equal(seen.heads["near2"].argmax(1), nearest)


def test_no_label_takes_part_in_a_forward_pass():
    model, (x, _) = made(), batch()
    with training_step():
        first = model.train()(x)
    assert torch.equal(model.eval()(x), model.eval()(x))
    assert first.shape == (8, 10)


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (3, 9, 7)])
@pytest.mark.parametrize("build", [cnn, resnet_small])
def test_any_picture(build, shape, classes):
    model, (x, y) = made(build, shape, classes), batch(shape, 8, classes)
    loss, _ = outer(Conforming(), model.train(), x, y)
    loss.backward()
    assert torch.isfinite(loss)
    assert model.eval()(x).shape == (8, classes)


def test_on_resnet18_the_deeper_feature_is_the_classifiers_input():
    model = made(resnet18, (3, 32, 32), width=8).eval()
    seen = []
    model.head.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0]))
    model.layer4[1].out.pooled.register_forward_hook(lambda _m, _i, out: seen.append(out))
    model(torch.rand(2, 3, 32, 32))
    assert torch.equal(seen[0], seen[1])


def test_a_backbone_without_slots_is_named():
    with pytest.raises(ArenaError, match="pcl: backbone 'mlp' has 0 slots, expected at least 2"):
        pcl.build(mlp((1, 8, 8), 10, width=8), DatasetInfo("test", (1, 8, 8), 10, "mlp"))


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("pcl_rt", {}, Conforming(1.0, 1e-4)),
        ("pcl_rt", {"start": "none", "prox": 0.5}, Conforming(0.5, 1e-4, start_from=None)),
        ("pcl_sat", {}, Conforming(1.0, 1e-5, attacked=True)),
        ("pcl_sat", {"radius": "drawn"}, Conforming(1.0, 1e-5, attacked=True, radius="drawn")),
    ],
)
def test_options_reach_the_stage(name, given, expected):
    spec = registry().get("defense", name).spec
    assert list(load(spec.recipe)(**complete(name, spec.options, given))) == [expected]
    assert spec.twin == name.removeprefix("pcl_")
    assert {"digits", "cifar10", "*"} <= set(spec.presets)


def test_drawn_radii_lie_between_the_originals():
    model, (x, y) = made().eval(), batch(n=32)
    reached = []
    with Reader(model, Surface()) as read, training_step():
        ctx = Context(PRESET, Threat.parse("Linf", "0.1"), 10, Surface(), read, torch.Generator().manual_seed(1))
        attack = Conforming(attacked=True, radius="drawn").adversary(ctx)
        for _ in range(6):
            reached.append(float((attack(model, x, y) - x).abs().max()))
    assert len({round(r, 6) for r in reached}) == 6
    assert 0.06 < min(reached) < max(reached) <= 0.16


@pytest.mark.parametrize("attacked", [False, True])
def test_an_epoch_starts_from_trained_weights(attacked, tiny_images, tmp_path):
    info = DatasetInfo("tiny", (1, 4, 4), 3, "cnn")
    model = pcl.build(cnn((1, 4, 4), 3, width=4), info)
    asked = []

    def start(text):
        asked.append(text)
        return cnn((1, 4, 4), 3, width=4).state_dict()

    centers = depths(model)[0].near.detach().clone()
    fitted = fit(
        model,
        [Conforming(attacked=attacked)],
        tiny_images,
        PRESET,
        Threat.parse("Linf", "0.1"),
        name="pcl",
        surface=pcl.surface(model),
        train_seed=0,
        folder=tmp_path,
        device=torch.device("cpu"),
        watch=Silent(),
        start=start,
    )
    assert asked == ["rt"]
    assert {"near", "far", "task"} <= set(fitted.history[0])
    assert not torch.equal(depths(model)[0].near, centers)
