"""FGAA's and EWAS's mask against a case worked out by hand; where it sits; what it is told."""

from __future__ import annotations

import math

import pytest
import torch
from arena_defenses import ewas, fgaa, plain
from arena_defenses.backbones import cnn, resnet18, resnet_small
from arena_defenses.masks import ClassMask, surface

from arena.backbones import DatasetInfo
from arena.errors import ArenaError
from arena.selection import Mode, choosing, supervise, training_step
from arena.surface import Reader, selects


def mask(bias: bool) -> ClassMask:
    """Two classes on a (1, 1, 2) map: rows (1, 2) and (-3, 1), biases (0, 10)."""
    module = ClassMask((1, 1, 2), 2, bias)
    with torch.no_grad():
        module.scores.weight.copy_(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
        if bias:
            module.scores.bias.copy_(torch.tensor([0.0, 10.0]))
    return module


A = torch.tensor([[[[1.0, 1.0]]], [[[-1.0, 2.0]]]])  # scores without bias: (3, -2) and (3, 5)


def test_at_test_time_the_mask_is_the_row_of_its_own_argmax():
    assert torch.equal(mask(bias=False).eval()(A), torch.tensor([[[[1.0, 2.0]]], [[[3.0, 2.0]]]]))


def test_the_bias_takes_part_in_the_choice_but_not_in_the_mask():
    assert torch.equal(mask(bias=True).eval()(A), torch.tensor([[[[-3.0, 1.0]]], [[[3.0, 2.0]]]]))


def test_in_training_the_mask_is_the_row_of_the_true_label():
    module, y = mask(bias=False).train(), torch.tensor([1, 0])
    with training_step(), supervise(module, y):
        got = module(A)
    assert torch.equal(got, torch.tensor([[[[-3.0, 1.0]]], [[[-1.0, 4.0]]]]))
    # Train mode alone brings no label: the switch is the label, which only training can give.
    assert torch.equal(module(A), mask(bias=False).eval()(A))


def test_labels_cannot_reach_a_forward_pass_outside_training():
    module = mask(bias=False).eval()
    with pytest.raises(RuntimeError, match="only inside a training step"), supervise(module, torch.tensor([1, 0])):
        module(A)
    with training_step(), supervise(module, torch.tensor([1, 0])):
        pass
    assert torch.equal(module(A), torch.tensor([[[[1.0, 2.0]]], [[[3.0, 2.0]]]]))


def test_gradient_by_hand():
    module = mask(bias=False).train()
    a = A.clone().requires_grad_()
    with training_step(), supervise(module, torch.tensor([1, 0])):
        module(a).sum().backward()
    # d sum(a * m) / da = m, the chosen rows; nothing comes back through the choice.
    assert torch.equal(a.grad, torch.tensor([[[[-3.0, 1.0]]], [[[1.0, 2.0]]]]))
    # Row 1 was example 0's mask, row 0 example 1's.
    assert torch.equal(module.scores.weight.grad, torch.tensor([[-1.0, 2.0], [1.0, 1.0]]))


def test_the_heads_own_loss_reaches_features_and_weights():
    module = mask(bias=False).train()
    a = A.clone().requires_grad_()
    scores: list[torch.Tensor] = []
    module.scores.register_forward_hook(lambda _m, _i, out: scores.append(out))
    module(a)
    scores[0][:, 1].sum().backward()
    assert torch.equal(a.grad, torch.tensor([[[[-3.0, 1.0]]], [[[-3.0, 1.0]]]]))
    assert torch.equal(module.scores.weight.grad, torch.tensor([[0.0, 0.0], [0.0, 3.0]]))


def test_initial_weights_have_the_papers_bound():
    module = ClassMask((512, 4, 4), 10, bias=False)
    bound = 1 / math.sqrt(512 * 4 * 4)
    assert module.scores.weight.abs().max() <= bound
    assert module.scores.weight.abs().max() > 0.99 * bound
    assert sum(p.numel() for p in module.parameters()) == 81_920
    assert sum(p.numel() for p in ClassMask((512, 4, 4), 10, bias=True).parameters()) == 81_930


SLOTS = {
    resnet18: ("layer4.0.out", "layer4.1.out"),
    resnet_small: ("layer2.0.out", "layer2.1.out"),
    cnn: ("block3.out", "block4.out"),
}


@pytest.mark.parametrize("build", SLOTS)
def test_placement(build):
    shape = (3, 32, 32) if build is resnet18 else (1, 8, 8)
    info = DatasetInfo("test", shape, 10, build.__name__)
    first, second = SLOTS[build]
    both = surface(fgaa.build(build(shape, 10), info))
    assert [h.path for h in both.heads.values()] == [f"{first}.scores", f"{second}.scores"]
    assert [(s.path, s.scores) for s in both.selections.values()] == [
        (f"{first}.select", "head1"),
        (f"{second}.select", "head2"),
    ]
    assert not both.random
    one = surface(ewas.build(build(shape, 10), info))
    assert [h.path for h in one.heads.values()] == [f"{first}.scores"]
    if build is resnet18:
        model = fgaa.build(build(shape, 10), info)
        assert model.layer4[0].out.shape == (512, 4, 4)
        assert model.layer4[0].out.scores.bias is None
        assert ewas.build(build(shape, 10), info).layer4[0].out.scores.bias is not None


def test_the_second_head_sees_what_the_first_has_masked():
    info = DatasetInfo("test", (1, 8, 8), 10, "cnn")
    model = fgaa.build(cnn((1, 8, 8), 10), info).eval()
    declared = surface(model)
    x = torch.rand(9, 1, 8, 8)
    one, two = (torch.full((9,), c) for c in (1, 2))
    with torch.no_grad(), Reader(model, declared) as read:
        seen = []
        for classes in (one, two):
            with choosing(selects(model, declared), {"mask1": Mode("forced", classes=classes)}):
                seen.append(read(x))
    assert torch.equal(seen[0].heads["head1"], seen[1].heads["head1"])
    assert not torch.equal(seen[0].heads["head2"], seen[1].heads["head2"])


def test_ewas_slot_option_and_its_error():
    info = DatasetInfo("test", (1, 8, 8), 10, "cnn")
    model = ewas.build(cnn((1, 8, 8), 10), info, slot="block2.out", lam=0.5)
    assert next(iter(surface(model).heads.values())).path == "block2.out.scores"
    with pytest.raises(ArenaError, match=r"unknown slot of backbone 'cnn' 'block5.out'; did you mean 'block\d.out'"):
        ewas.build(cnn((1, 8, 8), 10), info, slot="block5.out")


def test_a_backbone_with_too_few_slots_is_named():
    info = DatasetInfo("test", (1, 8, 8), 10, "flat")
    flat = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    for module in (fgaa, ewas):
        with pytest.raises(ArenaError, match="backbone 'flat' has 0 slots, expected at least 2"):
            module.build(flat, info)


@pytest.mark.parametrize("classes", [2, 3, 10])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (3, 9, 7)])
@pytest.mark.parametrize("build", [cnn, resnet_small])
@pytest.mark.parametrize("module", [plain, fgaa, ewas])
def test_every_module_on_every_small_backbone(module, build, shape, classes):
    info = DatasetInfo("test", shape, classes, build.__name__)
    model = module.build(build(shape, classes, width=4), info, lam=1.0).eval()
    x = torch.rand(9, *shape)
    logits = model(x)
    assert logits.shape == (9, classes)
    assert torch.allclose(model(x[:8]), logits[:8], atol=1e-6)
    assert model(x[:1]).shape == (1, classes)
    if module is not plain:
        declared = surface(model)
        with Reader(model, declared) as read:
            assert read(x).scores().shape == (9, 1 + len(declared.heads), classes)
        assert len(selects(model, declared)) == len(declared.heads)
