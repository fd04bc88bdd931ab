"""How options of the mask defenses reach their training, EWAS's MART by hand, and one step of every one of them."""

from __future__ import annotations

import pytest
import torch
from arena_defenses import fgaa
from arena_defenses.backbones import cnn
from arena_defenses.cifs import Joint
from arena_defenses.masks import follow, surface
from arena_defenses.recipes import SelfCompared

from arena.backbones import DatasetInfo
from arena.plugins import registry
from arena.selection import Mode, choosing, training_step
from arena.specs import Preset, complete, load
from arena.stages import Context, Usual, boosted_ce, divergence, probability
from arena.surface import Reader, Reading, selects
from arena.threat import Threat

ALL = [
    *(f"{m}_{r}" for m in ("fgaa", "ewas", "cas") for r in ("rt", "sat", "trades", "mart")),
    *("saa_sat", "csaa_sat", "cifs_rt", "cifs_sat"),
]


def spec_of(name):
    return registry().get("defense", name).spec


def stage(name, **given):
    spec = spec_of(name)
    (found,) = load(spec.recipe)(**complete(name, spec.options, given))
    return found


@pytest.mark.parametrize(
    ("name", "given", "expected"),
    [
        ("fgaa_trades", {}, Usual("trades", lam=2.0, beta=4.0)),
        ("fgaa_trades", {"lam": 0.5}, Usual("trades", lam=0.5, beta=4.0)),
        ("fgaa_mart", {}, Usual("mart", lam=2.0, beta=5.0, weight="main")),
        ("ewas_trades", {}, Usual("trades", lam=0.01, beta=6.0, mask="label")),
        ("ewas_trades", {"mask": "argmax"}, Usual("trades", lam=0.01, beta=6.0)),
        ("ewas_mart", {}, Usual("mart", lam=0.01, beta=6.0, mask="label", weight="own")),
        ("ewas_mart", {"weight": "main"}, Usual("mart", lam=0.01, beta=6.0, mask="label")),
        ("ewas_mart", {"aux_kl": "code"}, SelfCompared("mart", lam=0.01, beta=6.0, mask="label", weight="own")),
        ("cas_sat", {}, Usual("sat", lam=2.0)),
        ("cas_trades", {}, Usual("trades", lam=2.0, beta=4.0)),
        ("cas_mart", {"labels": "own"}, Usual("mart", lam=2.0, beta=5.0, labels="own")),
        ("csaa_sat", {"lam": 1}, Usual("sat", lam=1.0)),
        ("cifs_sat", {}, Joint("sat", lam=2.0)),
    ],
)
def test_options_reach_the_stage(name, given, expected):
    assert stage(name, **given) == expected


@pytest.mark.parametrize("name", ALL)
def test_what_is_registered(name):
    spec = spec_of(name)
    assert callable(load(spec.build))
    assert callable(load(spec.surface))
    assert registry().has("defense", spec.twin)
    assert f"{spec.module}_{spec.twin}" == name
    assert {"digits", "cifar10", "*"} <= set(spec.presets)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("fgaa_sat", "cifar10", Preset(200, lr=0.01, weight_decay=2e-4, milestones=(75, 90), augment="crop_flip")),
        (
            "fgaa_trades",
            "fashion_mnist",
            Preset(100, lr=0.2, weight_decay=5e-4, milestones=(75, 90, 100), step_size="7/31"),
        ),
        ("fgaa_sat", "fashion_mnist", Preset(200, lr=0.1, weight_decay=2e-4, milestones=(75, 90))),
        ("ewas_trades", "cifar10", Preset(85, lr=0.1, weight_decay=2e-4, milestones=(75,), augment="crop_flip")),
        ("ewas_mart", "svhn", Preset(120, lr=0.01, weight_decay=5e-4, milestones=(75, 90))),
        ("cas_sat", "cifar10", Preset(200, lr=0.1, weight_decay=1e-4, milestones=(75, 90), augment="crop_flip")),
        ("cifs_sat", "cifar10", Preset(120, lr=0.1, weight_decay=2e-4, milestones=(75, 90), augment="crop_flip")),
    ],
)
def test_presets_are_the_papers(name, data, expected):
    assert spec_of(name).presets[data] == expected


# One row, three classes: natural and adversarial scores of the main output and of one head.
MAIN, MAIN_ADV = torch.tensor([[1.0, 0.0, -1.0]]), torch.tensor([[0.0, 1.0, 0.0]])
HEAD, HEAD_ADV = torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[0.0, 0.0, 2.0]])
Y = torch.tensor([0])


def mart(**given):
    head_adv = HEAD_ADV.clone().requires_grad_()
    head = HEAD.clone().requires_grad_()
    loss, _ = stage("ewas_mart", lam=0.5, beta=2, **given).combine(
        Reading(MAIN, {"head1": head}, {}), Reading(MAIN_ADV, {"head1": head_adv}, {}), Y
    )
    return loss, head, head_adv


def main_term():
    return boosted_ce(MAIN_ADV, Y) + 2 * (divergence(MAIN, MAIN_ADV) * (1.0000001 - probability(MAIN, Y))).mean()


@pytest.mark.parametrize(("weight", "judge"), [("own", HEAD), ("main", MAIN)])
def test_ewas_mart_as_in_the_paper_and_with_the_codes_weight(weight, judge):
    loss, head, _ = mart(weight=weight)
    aux = boosted_ce(HEAD_ADV, Y) + 2 * (divergence(HEAD, HEAD_ADV) * (1.0000001 - probability(judge, Y))).mean()
    assert torch.allclose(loss, main_term() + 0.5 * aux)
    assert torch.autograd.grad(loss, head)[0].abs().sum() > 0


def test_ewas_mart_with_the_codes_mistake_has_no_divergence_of_the_head():
    loss, head, head_adv = mart(aux_kl="code")
    assert torch.allclose(loss, main_term() + 0.5 * boosted_ce(HEAD_ADV, Y))
    from_head, from_adv = torch.autograd.grad(loss, (head, head_adv), allow_unused=True)
    assert from_head is None  # the natural head is not in the loss at all
    boosted = boosted_ce(head_adv, Y)
    assert torch.allclose(from_adv, 0.5 * torch.autograd.grad(boosted, head_adv)[0])


def test_masks_by_the_main_logits_take_a_second_pass():
    torch.manual_seed(0)
    info = DatasetInfo("test", (1, 8, 8), 3, "cnn")
    model = fgaa.build(cnn((1, 8, 8), 3, width=4), info).eval()
    declared = surface(model)
    x = torch.rand(32, 1, 8, 8)
    every = selects(model, declared)

    def forced(classes):
        with choosing(every, dict.fromkeys(every, Mode("forced", classes=classes))):
            return model(x)

    with torch.no_grad(), Reader(model, declared) as read:
        own, heads = model(x), read(x).heads
        assert (own.argmax(1) != heads["head1"].argmax(1)).any()  # else the two rules could not differ
        expected, zero = forced(own.argmax(1)), forced(torch.zeros(32, dtype=torch.int64))
        follow(model, "own")
        assert torch.equal(model(x), own)
        follow(model, "main")
        assert torch.equal(model(x), expected)
        assert not torch.allclose(expected, own)
        assert torch.equal(read(x).heads["head1"], heads["head1"])
        assert torch.equal(forced(torch.zeros(32, dtype=torch.int64)), zero)  # an attack's choice stays


@pytest.mark.parametrize("name", ALL)
def test_one_step_of_training_moves_every_parameter(name):
    torch.manual_seed(0)
    spec = spec_of(name)
    options = complete(name, spec.options, {})
    model = load(spec.build)(cnn((1, 8, 8), 3, width=4), DatasetInfo("test", (1, 8, 8), 3, "cnn"), **options).train()
    declared = load(spec.surface)(model)
    (found,) = load(spec.recipe)(**options)
    x, y = torch.rand(12, 1, 8, 8), torch.arange(12) % 3
    preset = Preset(1, batch=12, lr=0.1, weight_decay=0.0, steps=2)
    with Reader(model, declared) as read:
        ctx = Context(preset, Threat("Linf", "0.2"), 3, declared, read, torch.Generator().manual_seed(0))
        adversary = found.adversary(ctx)
        with training_step():
            x_adv = adversary(model, x, y) if adversary else None
            loss, _ = found.loss(model, x, y, Context(**{**vars(ctx), "x_adv": x_adv}))
        loss.backward()
    assert torch.isfinite(loss)
    assert (adversary is None) == name.endswith("_rt")
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
