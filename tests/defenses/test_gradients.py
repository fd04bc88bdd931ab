"""Regularized gradients: each formula by hand, gradients through the gradient, labels in training alone."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from arena_defenses.backbones import cnn, resnet18
from arena_defenses.backbones_small import deepdefense_cnn, mlp
from arena_defenses.gradients import (
    Mixture,
    Regularized,
    cosine,
    laplacian,
    layer_inputs,
    norms,
    report,
    sobel,
    task_losses,
)
from torch import nn

from arena.datasets import Images
from arena.plugins import registry
from arena.selection import training_step
from arena.specs import Preset, complete, load
from arena.stages import Context
from arena.surface import Reader, Surface
from arena.threat import Threat
from arena.training import fit
from arena.watch import Silent

NAMES = ("gfafirst_rt", "gfadeep_rt", "gnr_rt", "gaie_rt", "advmix")
PRESET = Preset(1, batch=16, lr=0.05, steps=2)


def context(read, preset=PRESET) -> Context:
    return Context(preset, Threat.parse("Linf", "0.1"), 10, Surface(), read, torch.Generator().manual_seed(0))


def outer(stage, model, x, y, x_adv=None):
    """Return (loss, log) of one training step."""
    with Reader(model, Surface()) as read, training_step():
        return stage.loss(model, x, y, replace(context(read), x_adv=x_adv))


def stage(name, **given):
    spec = registry().get("defense", name).spec
    (found,) = load(spec.recipe)(**complete(name, spec.options, given))
    return found


def test_task_losses_by_hand():
    z, y = torch.tensor([[0.5, 0.0], [0.0, 3.0]]), torch.tensor([0, 0])
    assert torch.allclose(task_losses(z, y, "mse"), torch.tensor([0.25 / 2, (1 + 9) / 2]))
    assert torch.allclose(task_losses(z, y, "ce"), F.cross_entropy(z, y, reduction="none"))


def test_cosine_by_hand_and_per_row_on_flattened_tensors():
    a = torch.tensor([[[[1.0, 0.0]]], [[[1.0, 1.0]]], [[[2.0, 0.0]]]])
    b = torch.tensor([[[[3.0, 4.0]]], [[[1.0, 1.0]]], [[[-1.0, 0.0]]]])
    assert torch.allclose(cosine(a, b), torch.tensor([0.6, 1.0, -1.0]))


def test_cosine_stays_finite_where_the_gradient_vanishes():
    a, b = torch.ones(2, 3), torch.zeros(2, 3, requires_grad=True)
    found = cosine(a, b)
    assert torch.equal(found, torch.zeros(2))
    (grad,) = torch.autograd.grad(found.sum(), b)
    assert torch.isfinite(grad).all()
    # The direction of a small but real gradient is not washed out.
    assert cosine(a[:1], torch.full((1, 3), 1e-4)).item() == pytest.approx(1, abs=1e-3)


def test_norms_by_hand():
    g = torch.tensor([[[[3.0, -4.0]]]])
    assert norms(g, "l2").tolist() == [25]
    assert norms(g, "l1").tolist() == [7]


def test_edges_by_hand():
    step = torch.zeros(1, 1, 4, 4)
    step[..., 2:] = 1.0
    assert sobel(step)[0, 0, 1].tolist() == [0, 4, 4, 0]
    assert sobel(step.mT)[0, 0, :, 1].tolist() == [0, 4, 4, 0]
    assert laplacian(step)[0, 0, 1].tolist() == [0, 1, -1, 0]
    both = torch.cat([step, 1 - step], 1)
    assert torch.allclose(sobel(both)[:, 0], sobel(both)[:, 1])  # channel by channel


class Line(nn.Module):
    """Two pixels to two scores, z = W x + 0."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.fc1.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))

    def forward(self, x):
        return self.fc1(x.flatten(1))


X, Y = torch.tensor([[[[1.0, 0.5]]], [[[0.5, 0.0]]]]), torch.tensor([1, 0])
# Row 0: z = (1, 1), residual (1, 0), dL/dx = W^T residual = (1, 0). Row 1: z = (.5, 0), residual (-.5, 0), (-.5, 0).
GRADIENTS = torch.tensor([[1.0, 0.0], [-0.5, 0.0]])


def test_gfa_by_hand():
    loss, log = outer(Regularized("gfa", alpha=2.0, beta=3.0), Line(), X, Y)
    gfa = (1 / math.sqrt(1.25) - 1) / 2
    task = (0.5 + 0.125) / 2
    assert log["gfa_fc1"].item() == pytest.approx(gfa, abs=1e-5)
    assert log["task"].item() == pytest.approx(task)
    assert loss.item() == pytest.approx(2 * task + 3 * (1 - gfa), rel=1e-5)


@pytest.mark.parametrize(("norm", "expected"), [("l2", (1 + 0.25) / 2), ("l1", (1 + 0.5) / 2)])
def test_gnr_by_hand(norm, expected):
    loss, log = outer(Regularized("gnr", beta=10.0, form=norm), Line(), X, Y)
    assert log["gnr"].item() == pytest.approx(expected)
    assert loss.item() == pytest.approx(0.3125 + 10 * expected)


def test_gaie_by_hand():
    for form, edges, gradient in (("sobel", sobel(X), GRADIENTS.abs()), ("signed", -laplacian(X), GRADIENTS)):
        _, log = outer(Regularized("gaie", form=form), Line(), X, Y)
        expected = (1 - F.cosine_similarity(edges.flatten(1), gradient, dim=1)).mean()
        assert log["gaie"].item() == pytest.approx(float(expected), abs=1e-5)


def test_one_rows_gradient_does_not_depend_on_how_many_rows_there_are():
    one = outer(Regularized("gnr", form="l2"), Line(), X[:1], Y[:1])[1]["gnr"]
    many = outer(Regularized("gnr", form="l2"), Line(), X[:1].repeat(5, 1, 1, 1), Y[:1].repeat(5))[1]["gnr"]
    assert one.item() == pytest.approx(many.item())


@pytest.mark.parametrize("penalty", [("gfa", ""), ("gnr", "l2"), ("gnr", "l1"), ("gaie", "sobel"), ("gaie", "signed")])
def test_the_penalty_alone_moves_the_weights(penalty):
    """Double backprop: with alpha = 0 only the gradient's gradient is left, as a finite difference says it is."""
    torch.manual_seed(0)
    model = mlp((1, 4, 4), 3, width=6).double()
    x, y = torch.rand(5, 1, 4, 4, dtype=torch.double), torch.randint(3, (5,))
    regularized = Regularized(penalty[0], alpha=0.0, layers=2, form=penalty[1])
    outer(regularized, model, x, y)[0].backward()
    weight, found = model.fc2.weight, model.fc2.weight.grad[0, 0].item()
    values = []
    for change in (1e-5, -2e-5):
        with torch.no_grad():
            weight[0, 0] += change
        values.append(outer(regularized, model, x, y)[0].item())
    assert found == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-9)
    assert found != 0


@pytest.mark.parametrize(
    ("build", "paths"),
    [
        (deepdefense_cnn, ["conv1", "conv2", "fc1", "fc2", "fc3"]),
        (mlp, ["fc1", "fc2", "fc3"]),
        (cnn, ["block1.conv", "block2.conv", "block3.conv", "block4.conv", "head"]),
    ],
)
def test_layers_are_found_in_forward_order_and_reported(build, paths):
    model = build((1, 8, 8), 10, width=4)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    with layer_inputs(model) as seen:
        model(x)
    assert list(seen) == paths
    assert torch.equal(seen[paths[0]].flatten(), ((x - 0.5) * 2).flatten())  # GFA's image is the scaled one
    logs = {n: outer(Regularized("gfa", layers=n), model, x, y)[1] for n in (1, 3)}
    assert [k for k in logs[1] if k.startswith("gfa_")] == [f"gfa_{p}" for p in paths]
    assert not model._forward_pre_hooks
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not any(v.requires_grad for v in logs[1].values())


def test_layers_decide_what_is_in_the_loss():
    torch.manual_seed(0)
    model = deepdefense_cnn((1, 8, 8), 10, width=4)
    x, y = torch.rand(8, 1, 8, 8), torch.randint(10, (8,))
    for n, paths in ((1, ["conv1"]), (3, ["conv1", "conv2", "fc1"])):
        loss, log = outer(Regularized("gfa", beta=2.0, layers=n), model, x, y)
        assert loss.item() == pytest.approx(float(log["task"] + 2 * sum(1 - log[f"gfa_{p}"] for p in paths)), rel=1e-5)


def test_the_report_by_hand():
    model = Line().train()
    assert report(model, X, Y) == {"fc1": pytest.approx((1 / math.sqrt(1.25) - 1) / 2, abs=1e-5)}
    assert model.training
    many = X.repeat(300, 1, 1, 1), Y.repeat(300)  # more than one chunk
    assert report(model, *many)["fc1"] == pytest.approx(report(model, X, Y)["fc1"], abs=1e-5)
    deep = deepdefense_cnn((1, 8, 8), 10, width=4)
    assert list(report(deep, torch.rand(3, 1, 8, 8), torch.arange(3), layers=2)) == ["conv1", "conv2"]
    assert not any(m._forward_pre_hooks for m in deep.modules())


@pytest.mark.parametrize(("kind", "same"), [("frozen", True), ("batch", False)])
def test_with_frozen_norms_the_aligned_gradient_is_the_one_that_an_attacker_meets(kind, same):
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, width=4).train()
    x, y = torch.rand(8, 1, 8, 8), torch.arange(8)
    loss, log = outer(Regularized("gfa", norms=kind), model, x, y)
    loss.backward()
    assert model.block1.norm.weight.grad.abs().max() > 0  # scale and shift learn
    assert bool((model.block1.norm.running_mean == 0).all()) is same
    seen = {k.removeprefix("gfa_"): v.item() for k, v in log.items() if k.startswith("gfa_")}
    agree = [abs(report(model, x, y)[k] - v) < 1e-5 for k, v in seen.items()]
    assert all(agree) if same else not any(agree)


def test_the_mixture_adds_its_halves():
    model = Line()
    x_adv = X * 0.5
    clean, attacked = (task_losses(model(p), Y, "mse").mean().item() for p in (X, x_adv))
    loss, log = outer(Mixture(share=0.25), model, X, Y, x_adv)
    assert loss.item() == pytest.approx(0.75 * clean + 0.25 * attacked)
    assert (log["clean"].item(), log["attacked"].item()) == pytest.approx((clean, attacked))


def test_the_mixtures_attack_climbs_the_task_loss_in_eval_mode_within_the_ball():
    torch.manual_seed(0)
    model = cnn((1, 8, 8), 10, width=4).train()
    x, y = torch.rand(16, 1, 8, 8), torch.randint(10, (16,))
    with Reader(model, Surface()) as read, training_step():
        x_adv = Mixture().adversary(context(read))(model, x, y)
    assert model.training
    assert float((x_adv - x).abs().max()) <= 0.1 + 1e-6
    model.eval()
    with torch.no_grad():
        assert task_losses(model(x_adv), y, "mse").mean() > task_losses(model(x), y, "mse").mean()


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("gfafirst_rt", {}, Regularized("gfa", beta=0.03, layers=1, norms="frozen")),
        ("gfadeep_rt", {}, Regularized("gfa", beta=0.01, layers=3, norms="frozen")),
        (
            "gfadeep_rt",
            {"layers": 2, "task": "ce", "alpha": 3, "norms": "batch"},
            Regularized("gfa", "ce", 3.0, 0.01, 2),
        ),
        ("gnr_rt", {"norm": "l1"}, Regularized("gnr", "ce", beta=0.3, form="l1")),
        ("gaie_rt", {"edges": "signed"}, Regularized("gaie", "mse", beta=0.1, form="signed")),
        ("advmix", {"share": 0.25}, Mixture("mse", 0.25)),
    ],
)
def test_options_reach_the_stage(name, given, expected):
    assert stage(name, **given) == expected


@pytest.mark.parametrize("name", NAMES)
def test_names_presets_and_twins(name):
    spec = registry().get("defense", name).spec
    assert {"digits", "cifar10", "*"} <= set(spec.presets)
    assert spec.surface is None  # nothing beyond the logits: the network is the plain one
    if spec.module:
        assert (spec.name, spec.twin) == (f"{spec.module}_rt", "rt")
    assert stage(name).adversarial == (name == "advmix")


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 7)])
@pytest.mark.parametrize("build", [cnn, deepdefense_cnn, mlp])
@pytest.mark.parametrize("name", NAMES)
def test_a_step_on_every_backbone(name, build, shape):
    model = build(shape, 2, width=4).train()
    x, y = torch.rand(8, *shape), torch.arange(8) % 2
    loss, log = outer(stage(name), model, x, y, x)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(v) for v in log.values())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads
    assert all(torch.isfinite(g).all() for g in grads)
    assert not x.requires_grad


def test_a_step_on_resnet18():
    model = resnet18((3, 32, 32), 10, width=8).train()
    loss, log = outer(stage("gfadeep_rt"), model, torch.rand(4, 3, 32, 32), torch.arange(4))
    loss.backward()
    paths = [p for p, m in model.named_modules() if isinstance(m, nn.Conv2d)][:5]
    assert [k for k in log if k.startswith("gfa_")] == [f"gfa_{p}" for p in paths]  # Table 1 reports five
    assert torch.isfinite(model.head.weight.grad).all()


@pytest.mark.parametrize("name", NAMES)
def test_an_epoch_runs_and_its_log_shows_the_penalty(name, tiny_images: Images, tmp_path):
    torch.manual_seed(0)
    fitted = fit(
        mlp((1, 4, 4), 3, width=8),
        [stage(name)],
        tiny_images,
        PRESET,
        Threat.parse("Linf", "0.1"),
        name=name,
        surface=Surface(),
        train_seed=0,
        folder=tmp_path,
        device=torch.device("cpu"),
        watch=Silent(),
    )
    expected = {"gfafirst_rt": "gfa_fc1", "gfadeep_rt": "gfa_fc3", "gnr_rt": "gnr", "gaie_rt": "gaie"}
    assert expected.get(name, "attacked") in fitted.history[0]
