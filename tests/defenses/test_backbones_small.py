"""DeepDefense's CNN and perceptron: the paper's parameter counts, scaling inside, any picture."""

from __future__ import annotations

import pytest
import torch
from arena_defenses import ewas
from arena_defenses.backbones_small import deepdefense_cnn, mlp

from arena.backbones import DatasetInfo, slot_shapes
from arena.errors import ArenaError
from arena.plugins import registry
from arena.specs import complete, load


def counts(model):
    return {name: sum(p.numel() for p in m.parameters()) for name, m in model.named_children() if list(m.parameters())}


def test_the_cnn_has_the_papers_parameter_counts():
    expected = {"conv1": 896, "conv2": 9248, "fc1": 2_048_000, "fc2": 600_000, "fc3": 6000}
    assert counts(deepdefense_cnn((3, 32, 32), 10)) == expected


def test_the_perceptron_is_784_600_300_10_without_biases():
    model = mlp((1, 28, 28), 10)
    assert counts(model) == {"fc1": 784 * 600, "fc2": 600 * 300, "fc3": 300 * 10}
    assert not [name for name, _ in model.named_parameters() if "bias" in name]


def test_width_scales_convolutions_and_linear_layers():
    model = deepdefense_cnn((1, 8, 8), 10, width=16)
    assert (model.conv1.out_channels, model.fc1.in_features) == (16, 16 * 2 * 2)
    assert (model.fc1.out_features, model.fc2.out_features) == (500, 300)
    assert (mlp((1, 8, 8), 10, width=9).fc2.in_features, mlp((1, 8, 8), 10, width=9).fc2.out_features) == (9, 4)


@pytest.mark.parametrize("build", [deepdefense_cnn, mlp])
def test_images_in_0_1_reach_the_first_layer_in_minus_1_1(build):
    model = build((1, 8, 8), 10, width=8).eval()
    seen = []
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear))
    first.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].flatten(1)[0, :3]))
    x = torch.zeros(8, 1, 8, 8)
    x[:, 0, 0, 1], x[:, 0, 0, 2] = 0.5, 1.0
    model(x)
    assert torch.equal(seen[0], torch.tensor([-1.0, 0.0, 1.0]))


def test_the_perceptron_by_hand():
    model = mlp((1, 1, 2), 1, width=2).eval()
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        model.fc2.weight.copy_(torch.tensor([[1.0, -1.0]]))
        model.fc3.weight.copy_(torch.tensor([[3.0]]))
    x = torch.tensor([[[[1.0, 0.25]]]])  # scaled: 1, -0.5
    expected = 3 * torch.tanh(torch.tanh(torch.tensor(1.0)) - torch.tanh(torch.tensor(-1.0)))
    assert model(x).item() == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32), (3, 20, 28), (2, 5, 9)])
@pytest.mark.parametrize("build", [deepdefense_cnn, mlp])
def test_any_channels_any_sides_any_classes(build, shape):
    model = build(shape, 2, width=8).eval()
    x = torch.rand(9, *shape)
    logits = model(x)
    assert logits.shape == (9, 2)
    assert torch.allclose(model(x[:8]), logits[:8], atol=1e-6)


def test_specs():
    spec = registry().get("backbone", "deepdefense_cnn").spec
    model = load(spec.build)(shape=(1, 8, 8), n_classes=10, **complete("x", spec.options, {"activation": "tanh"}))
    assert tuple(slot_shapes(model, (1, 8, 8))) == spec.slots
    assert isinstance(model.act, torch.nn.Tanh)
    flat = registry().get("backbone", "mlp").spec
    assert flat.slots == ()
    info = DatasetInfo("test", (1, 8, 8), 10, "mlp", flat.slots)
    with pytest.raises(ArenaError, match="backbone 'mlp' has 0 slots"):
        ewas.build(load(flat.build)(shape=(1, 8, 8), n_classes=10), info)
