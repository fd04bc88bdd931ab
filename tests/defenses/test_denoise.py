"""Denoising blocks: the non-local means by hand, the fresh block, placement, the squared error."""

from __future__ import annotations

import math

import pytest
import torch
from arena_defenses import denoise
from arena_defenses.backbones import cnn, resnet18, resnet_small

from arena.backbones import DatasetInfo
from arena.plugins import registry
from arena.specs import complete, load
from arena.stages import Usual


def by_hand(kind):
    """Two channels on a (1, 2) map; theta and phi read the first channel alone."""
    module = denoise.NonLocal(2, kind)
    with torch.no_grad():
        for embedding in (module.theta, module.phi):
            embedding.weight.copy_(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1))
    return module


#: Positions (1, 5) and (2, 7).
A = torch.tensor([[[[1.0, 2.0]], [[5.0, 7.0]]]])


def test_gaussian_by_hand():
    # Position i weighs position j by exp(a_i a_j): 1 asks (e, e^2), 2 asks (e^2, e^4).
    shares = [math.e**2 / (math.e + math.e**2), math.e**4 / (math.e**2 + math.e**4)]  # of the second position
    expected = torch.tensor([[[[1 + s for s in shares]], [[5 + 2 * s for s in shares]]]])
    assert torch.allclose(by_hand("gaussian")(A), expected)


def test_dot_by_hand():
    # Position i gets sum_j a_i a_j v_j / 2: 1: (1*1 + 2*2, 1*5 + 2*7) / 2; 2 twice that.
    assert torch.allclose(by_hand("dot")(A), torch.tensor([[[[2.5, 5.0]], [[9.5, 19.0]]]]))


def test_embeddings_have_half_the_channels_and_scale_the_product():
    torch.manual_seed(0)
    module = denoise.NonLocal(64, "gaussian")
    assert module.theta.weight.shape == (32, 64, 1, 1)
    assert float(module.theta.weight.detach().std()) == pytest.approx(0.01, rel=0.1)
    a = torch.rand(2, 64, 3, 2)
    theta, phi, flat = (t.flatten(2) for t in (module.theta(a), module.phi(a), a))
    weights = torch.einsum("nci,ncj->nij", theta, phi).div(32**0.5).softmax(2)
    assert torch.allclose(module(a), torch.einsum("nij,ncj->nci", weights, flat).view_as(a), atol=1e-6)


@pytest.mark.parametrize("kind", ["gaussian", "dot"])
def test_a_fresh_block_is_the_identity_and_learns_by_its_scale(kind):
    block, a = denoise.Denoise(4, kind).train(), torch.rand(8, 4, 3, 3)
    assert torch.equal(block(a), a)
    (block(a) * torch.rand_like(a)).sum().backward()
    assert block.norm.weight.grad.abs().max() > 0
    assert block.conv.weight.grad.abs().max() == 0  # behind a scale of 0
    with torch.no_grad():
        block.norm.weight.fill_(0.5)
    assert torch.allclose(block(a), a + block.norm(block.conv(block.nonlocal_(a))))
    assert not torch.equal(block(a), a)


@pytest.mark.parametrize(
    ("backbone", "shape", "at", "expected"),
    [
        (resnet18, (3, 32, 32), "stages", ["layer1.1.out", "layer2.1.out", "layer3.1.out", "layer4.1.out"]),
        (resnet_small, (1, 8, 8), "stages", ["layer1.0.out", "layer2.1.out"]),
        (cnn, (1, 8, 8), "stages", ["block1.out", "block4.out"]),
        (cnn, (3, 12, 8), "first", ["block1.out", "block2.out"]),
        (cnn, (3, 9, 7), "first", ["block1.out", "block2.out"]),
    ],
)
@pytest.mark.parametrize("kind", ["gaussian", "dot"])
def test_placement(backbone, shape, at, expected, kind):
    net = denoise.build(backbone(shape, 2, width=4), DatasetInfo("test", shape, 2, backbone.__name__), kind, at).eval()
    blocks = {p: m for p, m in net.named_modules() if isinstance(m, denoise.Denoise)}
    assert sorted(blocks) == expected
    assert {m.nonlocal_.kind for m in blocks.values()} == {kind}
    for block in blocks.values():
        torch.nn.init.ones_(block.norm.weight)
    x = torch.rand(9, *shape)
    with torch.no_grad():
        out = net(x)
        assert out.shape == (9, 2)
        assert torch.allclose(net(x.flip(0)).flip(0), out, atol=1e-5)


def test_squared_error_by_hand():
    model = lambda x: x  # noqa: E731
    out, y = torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.tensor([0, 0])
    loss, _ = denoise.Squared().loss(model, out, y, None)
    assert float(loss) == (0 + 0 + 0.25 + 4) / 4
    assert not denoise.Squared().adversarial


def test_labels_and_neighbours_do_not_reach_a_row():
    net = denoise.build(cnn((1, 8, 8), 10, width=4), DatasetInfo("test", (1, 8, 8), 10, "cnn")).eval()
    for m in net.modules():
        if isinstance(m, denoise.Denoise):
            torch.nn.init.ones_(m.norm.weight)
    x = torch.rand(16, 1, 8, 8)
    mixed = torch.cat((x[:8], torch.rand(8, 1, 8, 8)))
    assert torch.equal(net(x)[:8], net(mixed)[:8])


@pytest.mark.parametrize(
    ("name", "given", "expected", "at"),
    [
        ("fd_sat", {}, Usual("sat"), "stages"),
        ("fd_sat", {"at": "first", "kind": "dot"}, Usual("sat"), "first"),
        ("denoise_rt", {}, denoise.Squared(), "first"),
        ("denoise_rt", {"loss": "ce"}, Usual("rt"), "first"),
    ],
)
def test_registered(name, given, expected, at):
    spec = registry().get("defense", name).spec
    options = complete(name, spec.options, given)
    assert load(spec.recipe)(**options) == [expected]
    assert options["at"] == at
    net = load(spec.build)(cnn((1, 8, 8), 10, width=4), DatasetInfo("t", (1, 8, 8), 10, "cnn"), **options)
    assert net(torch.rand(8, 1, 8, 8)).shape == (8, 10)
    assert registry().has("defense", spec.twin)
    assert {"digits", "cifar10", "*"} <= set(spec.presets)
