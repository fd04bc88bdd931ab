"""CAS, SAA and CSAA against cases worked out by hand."""

from __future__ import annotations

import pytest
import torch
from arena_defenses import cas
from arena_defenses.backbones import cnn, resnet18
from arena_defenses.masks import ClassMask, surface

from arena.backbones import DatasetInfo
from arena.selection import Mode, choosing, supervise, training_step
from arena.surface import Reader, selects

# Two channels on a (1, 2) map; means over positions (2, 0), over channels (2, 0).
A = torch.tensor([[[[3.0, 1.0]], [[1.0, -1.0]]]])


def mask(over: str) -> ClassMask:
    """Two classes with rows (1, 2) and (-3, 1), biases (0, 10)."""
    module = ClassMask((2, 1, 2), 2, bias=True, over=over)
    with torch.no_grad():
        module.scores.weight.copy_(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
        module.scores.bias.copy_(torch.tensor([0.0, 10.0]))
    return module


def test_cas_weighs_channels_by_the_row_of_its_own_argmax():
    # scores (2, -6 + 10): class 1, row (-3, 1) over channels
    assert torch.equal(mask("channels").eval()(A), torch.tensor([[[[-9.0, -3.0]], [[1.0, -1.0]]]]))


def test_saa_weighs_positions_by_the_row_of_its_own_argmax():
    # scores (2, -6 + 10): class 1, row (-3, 1) over positions
    assert torch.equal(mask("positions").eval()(A), torch.tensor([[[[-9.0, 1.0]], [[-3.0, -1.0]]]]))


@pytest.mark.parametrize("over", ["channels", "positions"])
def test_in_training_the_true_label_chooses(over):
    module = mask(over).train()
    with training_step(), supervise(module, torch.tensor([0])):
        got = module(A)
    expected = {
        "channels": [[[[3.0, 1.0]], [[2.0, -2.0]]]],
        "positions": [[[[3.0, 2.0]], [[1.0, -2.0]]]],
    }[over]
    assert torch.equal(got, torch.tensor(expected))
    assert torch.equal(module(A), mask(over).eval()(A))


@pytest.mark.parametrize("over", ["channels", "positions"])
def test_labels_cannot_reach_a_test_time_pass(over):
    module = mask(over).eval()
    with pytest.raises(RuntimeError, match="only inside a training step"), supervise(module, torch.tensor([0])):
        module(A)


def test_gradient_by_hand_nothing_is_detached():
    module = mask("channels").train()
    a = A.clone().requires_grad_()
    with training_step(), supervise(module, torch.tensor([0])):
        module(a).sum().backward()
    assert torch.equal(a.grad, torch.tensor([[[[1.0, 1.0]], [[2.0, 2.0]]]]))
    assert torch.equal(module.scores.weight.grad, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))


def test_parameters():
    count = lambda over: sum(p.numel() for p in ClassMask((512, 4, 4), 10, True, over).parameters())  # noqa: E731
    assert count("channels") == 5130
    assert count("positions") == 170
    with pytest.raises(ValueError, match="over 'pixels'"):
        ClassMask((1, 1, 1), 2, True, "pixels")


def test_csaa_is_cas_then_saa_in_each_place():
    info = DatasetInfo("test", (3, 32, 32), 10, "resnet18")
    model = cas.build_csaa(resnet18((3, 32, 32), 10, width=8), info).eval()
    paths = [h.path for h in surface(model).heads.values()]
    assert paths == [f"layer4.{i}.out.{j}.scores" for i in (0, 1) for j in (0, 1)]
    assert [model.get_submodule(p.removesuffix(".scores")).over for p in paths] == ["channels", "positions"] * 2
    with Reader(model, surface(model)) as read:
        assert read(torch.rand(8, 3, 32, 32)).scores().shape == (8, 5, 10)


@pytest.mark.parametrize(("build", "masks"), [(cas.build_cas, 2), (cas.build_saa, 2), (cas.build_csaa, 4)])
@pytest.mark.parametrize(("shape", "classes"), [((1, 8, 8), 10), ((3, 12, 8), 2)])
def test_forced_masks_change_the_output(build, masks, shape, classes):
    torch.manual_seed(0)
    info = DatasetInfo("test", shape, classes, "cnn")
    model = build(cnn(shape, classes, width=4), info).eval()
    declared = surface(model)
    assert len(declared.selections) == masks
    x = torch.rand(9, *shape)
    with torch.no_grad():
        outs = []
        for k in (0, 1):
            forced = Mode("forced", classes=torch.full((9,), k))
            with choosing(selects(model, declared), dict.fromkeys(declared.selections, forced)):
                outs.append(model(x))
    assert outs[0].shape == (9, classes)
    assert not torch.allclose(*outs)
