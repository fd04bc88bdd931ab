"""AFA: norms and gate by hand; who uses which norm; what each stage may change; gradients."""

from __future__ import annotations

import copy
import sys
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import afa, afa_stages
from arena_defenses.backbones import resnet_small
from torch import nn

from arena.errors import ArenaError
from arena.plugins import registry
from arena.selection import training_step
from arena.specs import Preset, complete, load
from arena.stages import Context, divergence, mart, probability, trades
from arena.surface import Reader, submodule
from arena.training import rate, settings

sys.path.insert(0, str(Path(__file__).parent))
from conditional import PRESET, THREAT, batch, context, scrambled, small


def by_hand() -> tuple[afa.BranchNorm, afa.Switch]:
    """Three branches on one channel: x, 10 (x - 1), 2 x + 5 (running variance such that eps does not matter)."""
    switch = afa.Switch()
    norm = afa.BranchNorm(nn.BatchNorm2d(1, eps=0.0), 3, switch, None).eval()
    for branch, (mean, scale, shift) in zip(norm.branches, ((0, 1, 0), (1, 10, 0), (0, 2, 5)), strict=True):
        branch.running_mean.fill_(mean)
        nn.init.constant_(branch.weight, scale)
        nn.init.constant_(branch.bias, shift)
    return norm, switch


def test_the_norm_mixes_first_and_last_by_each_images_weight():
    norm, switch = by_hand()
    a = torch.tensor([3.0, 3.0, 3.0]).view(3, 1, 1, 1)
    switch.weight = torch.tensor([1.0, 0.0, 0.25])
    assert norm(a).flatten().tolist() == [3.0, 11.0, 0.25 * 3 + 0.75 * 11]
    for branch, expected in enumerate((3.0, 20.0, 11.0)):
        switch.branch = branch
        assert norm(a).flatten().tolist() == [expected] * 3


def test_the_gate_by_hand():
    gate = afa.WeightGenerator(1, 1).eval()
    for m in gate.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.zeros_(m.weight)
            m.weight.data[0, 0, 1, 1] = 2.0
        if isinstance(m, nn.BatchNorm2d):
            m.eps = 0.0
    for layer, weight, bias in ((gate.first, 3.0, -1.0), (gate.second, 0.5, -2.0)):
        nn.init.constant_(layer.weight, weight)
        nn.init.constant_(layer.bias, bias)
    a = torch.tensor([[[[1.0, -7.0], [0.0, 0.0]]], [[[-1.0, -1.0], [-1.0, -1.0]]]])
    # Maps after both convolutions: 4, 0, 0, 0 and zeros; pooled 1 and 0; relu(3 p - 1) = 2 and 0; 0.5 h - 2 = -1, -2.
    torch.testing.assert_close(gate(a), torch.sigmoid(torch.tensor([-1.0, -2.0])))
    gate.constant = 0.75
    assert gate(a).tolist() == [0.75, 0.75]


def test_strengths_and_their_radii():
    assert [afa_stages.weaker(THREAT, s).fraction for s in afa_stages.strengths(5)] == [
        Fraction(n, 40) for n in (0, 1, 2, 4, 8)
    ]
    assert afa_stages.strengths(2) == [0, 1]
    assert afa_stages.strengths(3) == [0, Fraction(1, 2), 1]
    assert afa_stages.strengths(9) == [Fraction(n, 8) for n in range(9)]


@pytest.mark.parametrize("k", [2, 5])
def test_every_norm_gets_branches_and_the_first_the_gate(k):
    model = small(afa, resnet_small, k=k)
    converted = {p: m for p, m in model.named_modules() if isinstance(m, afa.BranchNorm)}
    assert len(converted) == sum(isinstance(m, nn.BatchNorm2d) for m in resnet_small((1, 8, 8), 10).modules())
    assert all(len(m.branches) == k for m in converted.values())
    assert [p for p, m in converted.items() if m.gate is not None] == ["body.stem.norm"]
    each = small(afa, resnet_small, k=k, gate="each")
    assert len(afa.gates(each)) == len(converted)


def test_constant_gates_are_the_two_branches():
    model = scrambled(small(afa)).eval()
    x, _ = batch()
    with torch.no_grad():
        free = model(x)
        for value, branch in ((1, 0), (0, -1)):
            afa.apply(model, w0=value)
            with afa.through(model, branch):
                alone = model(x)
            torch.testing.assert_close(model(x), alone)
            assert not torch.allclose(alone, free)
        afa.apply(model)
        assert torch.equal(model(x), free)
    with pytest.raises(ArenaError, match=r"'w0': expected 0 to 1, or -1 for the trained gate, got '-0.5'"):
        afa.apply(model, w0=-0.5)


@pytest.mark.parametrize("form", ["single", "each"])
def test_gates_are_read_and_forced_by_hooks(form):
    model = scrambled(small(afa, gate=form)).eval()
    declared = afa.surface(model)
    x, _ = batch()
    with torch.no_grad(), Reader(model, declared) as read:
        seen = read(x)
        assert list(seen.gates) == (["w0"] if form == "single" else ["w0_1", "w0_2", "w0_3", "w0_4"])
        for value in seen.gates.values():
            assert value.shape == (12,)
            assert ((value > 0) & (value < 1)).all()
        forced = torch.linspace(0, 1, 12)
        handles = [
            submodule(model, g.path).register_forward_hook(lambda _m, _i, _o: forced) for g in declared.gates.values()
        ]
        moved = model(x)
        for handle in handles:
            handle.remove()
        assert torch.equal(model(x), seen.logits)
        for row, w0 in enumerate(forced.tolist()):
            afa.apply(model, w0=w0)
            torch.testing.assert_close(model(x)[row], moved[row])
        assert (declared.gates["w0" if form == "single" else "w0_1"].clean, declared.random) == (1, False)
        for knob in declared.knobs.values():
            assert getattr(submodule(model, knob.path), knob.attribute) == 1.0


def test_gradient_reaches_the_image_through_the_gate():
    model = scrambled(small(afa)).eval()
    x, y = batch()
    x.requires_grad_()
    seen: list[torch.Tensor] = []
    handle = afa.gates(model)[0].register_forward_hook(lambda _m, _i, out: seen.append(out))
    (grad,) = torch.autograd.grad(F.cross_entropy(model(x), y), x, retain_graph=True)
    (by_gate,) = torch.autograd.grad(seen[0].sum(), x)
    handle.remove()
    assert by_gate.abs().max() > 0
    afa.gates(model)[0].register_forward_hook(lambda _m, _i, out: out.detach())
    (other,) = torch.autograd.grad(F.cross_entropy(model(x), y), x)
    assert not torch.allclose(grad, other)


def test_after_a_pass_the_model_holds_no_graph():
    model = small(afa)
    model(batch()[0])
    copied = copy.deepcopy(model)
    assert copied.switch is copied.get_submodule("body.block1.norm").switch
    assert copied.switch is not model.switch


def stage_one(recipe, model, k=3, **given) -> tuple[afa_stages.Branches, Context]:
    stage = afa_stages.Branches(recipe, k, **given)
    x, y = batch()
    ctx = context(model)
    with training_step():
        x_adv = stage.adversary(ctx)(model, x, y)
    return stage, context(model, x_adv=x_adv)


def test_each_branch_is_attacked_at_its_strength_and_the_model_left_in_train_mode():
    model = small(afa).train()
    before = copy.deepcopy(model.state_dict())
    _, ctx = stage_one("sat", model)
    x, _ = batch()
    weak, strong = ctx.x_adv.split(12)
    far = [(part - x).abs().amax().item() for part in (weak, strong)]
    assert far[0] <= 0.1 + 1e-6 < far[1] <= 0.2 + 1e-6
    assert ctx.x_adv.min() >= 0
    assert ctx.x_adv.max() <= 1
    assert all(m.training for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("recipe", ["sat", "trades", "mart"])
def test_stage_one_loss_is_the_papers_sum(recipe):
    model = scrambled(small(afa)).train()
    stage, ctx = stage_one(recipe, model, beta=2.0)
    x, y = batch()
    loss, log = stage.loss(copy.deepcopy(model), x, y, ctx)
    z = []
    for branch, part in enumerate((x, *ctx.x_adv.split(12))):
        with afa.through(model, branch):
            z.append(model(part))
    term = {
        "sat": lambda a: F.cross_entropy(a, y),
        "trades": lambda a: F.cross_entropy(z[0], y) + 2 * divergence(z[0], a).mean(),
        "mart": lambda a: mart(z[0], a, y, 2.0, probability(z[0], y)),
    }[recipe]
    torch.testing.assert_close(loss, F.cross_entropy(z[0], y) + term(z[1]) + term(z[2]))
    assert list(log) == ["clean", "branch1", "branch2"]
    if recipe == "trades":
        assert torch.equal(trades(z[0], z[1], y, 2.0), term(z[1]))


def test_mixup_by_hand():
    model = small(afa, k=2).eval()
    x, y = batch()
    ctx, twin = context(model), torch.Generator().manual_seed(2)
    share, other = torch.rand((), generator=twin), torch.randperm(12, generator=twin)
    with afa.through(model, 1):
        got = afa_stages.Branches._mixed(model, x, y, ctx)
        z = model(share * x + (1 - share) * x[other])
    torch.testing.assert_close(got, share * F.cross_entropy(z, y) + (1 - share) * F.cross_entropy(z, y[other]))
    stage, ctx = stage_one("iat", model, k=2)
    assert list(stage.loss(model, x, y, ctx)[1]) == ["clean", "branch1"]


def test_a_branch_sees_only_its_own_images():
    model = small(afa).train()
    stage, ctx = stage_one("sat", model)
    norm = model.body.block1.norm
    before = [b.running_mean.clone() for b in norm.branches]
    stage.loss(model, *batch(), ctx)[0].backward()
    moved = [not torch.equal(b.running_mean, old) for b, old in zip(norm.branches, before, strict=True)]
    assert moved == [True, True, True, False, False]  # three strengths here, five branches
    assert [b.weight.grad is not None for b in norm.branches] == moved
    assert model.body.block1.conv.weight.grad is not None
    assert all(p.grad is None for gate in afa.gates(model) for p in gate.parameters())
    names = {id(p) for p in stage.trainable(model)}
    assert all((id(p) in names) == (".gate." not in n) for n, p in model.named_parameters())


@pytest.mark.parametrize("made", ["gate", "branch"])
def test_stage_two_changes_the_gate_and_nothing_else(made):
    model = scrambled(small(afa)).train()
    stage = afa_stages.Weighing(5, made)
    for p in model.parameters():
        p.requires_grad_(False)
    for p in stage.trainable(model):
        p.requires_grad_(True)
    x, y = batch(60)
    before = copy.deepcopy(model.state_dict())
    (optimizer,) = stage.optimizers(model, context(model))
    with training_step():
        x_adv = stage.adversary(context(model))(model, x, y)
        loss, _ = stage.loss(model, x, y, context(model, x_adv=x_adv))
    loss.backward()
    optimizer.step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(".gate." in k for k in changed)
    assert any("running_mean" in k for k in changed)  # the gate's own norms train
    assert all(m.training for m in model.modules())
    drawn = torch.randint(5, (60,), generator=torch.Generator().manual_seed(2))
    far = (x_adv - x).abs().flatten(1).amax(1)
    for branch, share in enumerate(afa_stages.strengths(5)):
        rows = far[drawn == branch]
        assert len(rows)
        assert (rows <= 0.2 * float(share) + 1e-6).all()
        assert branch == 0 or (rows > 0).all()


def test_how_stage_two_makes_its_attacks_matters():
    x, y = batch(60)
    model = scrambled(small(afa))
    made = []
    for how in ("gate", "branch"):
        with training_step():
            made.append(afa_stages.Weighing(5, how).adversary(context(model))(model, x, y))
    assert not torch.equal(*made)


def test_stage_two_is_shorter_and_slower():
    stage = afa_stages.Weighing()
    own = settings(stage, Preset(100, lr=0.1, milestones=(75, 90)))
    assert (stage.epochs(Preset(100)), own.lr, own.milestones, own.epochs) == (20, pytest.approx(0.01), (10.0,), 100)
    cycle = settings(stage, Preset(30, lr=0.03))
    assert (cycle.milestones, cycle.lr) == ((), 0.1)
    assert [stage.epochs(Preset(n)) for n in (0, 1, 30)] == [0, 1, 6]
    assert settings(afa_stages.Branches("sat"), PRESET) == PRESET


@pytest.mark.parametrize(("given", "decay"), [({}, 0.1), ({"decay": 0.9}, 0.9)])
def test_both_stages_drop_the_rate_by_the_decay_asked_for(given, decay):
    spec = registry().get("defense", "afa_mart").spec
    preset = spec.presets["cifar10"]
    first, second = (settings(s, preset) for s in load(spec.recipe)(**complete("afa_mart", spec.options, given)))
    assert (rate(0.95, 95, first), rate(0.76, 15, second)) == pytest.approx((decay**2, decay))
