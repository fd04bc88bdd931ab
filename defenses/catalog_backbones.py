"""The built-in backbones, as specs. Imports no torch."""

from __future__ import annotations

from arena.specs import BackboneSpec, Option

_WIDTH = {"width": Option(16, "channels of the first convolution", low=1, high=512)}


def backbones() -> list[BackboneSpec]:
    """Return the built-in backbones."""
    layers = ((1, 2), (2, 2), (3, 2), (4, 2))
    return [
        BackboneSpec(
            "cnn",
            "four 3x3 convolutions and a linear layer, for 8x8 to 32x32 pictures",
            "arena_defenses.backbones:cnn",
            ("block1.out", "block2.out", "block3.out", "block4.out"),
            _WIDTH,
        ),
        BackboneSpec(
            "resnet_small",
            "residual network for 8x8 pictures, 76 thousand parameters",
            "arena_defenses.backbones:resnet_small",
            ("stem.out", "layer1.0.out", "layer2.0.out", "layer2.1.out"),
            _WIDTH,
        ),
        BackboneSpec(
            "resnet18",
            "ResNet-18 in its CIFAR form: 3x3 stem, no stem pool",
            "arena_defenses.backbones:resnet18",
            ("stem.out", *(f"layer{i}.{j}.out" for i, blocks in layers for j in range(blocks))),
            {"width": Option(64, "channels of the first convolution", low=1, high=512)},
            paper="He et al., Deep Residual Learning for Image Recognition, CVPR 2016",
        ),
        *_deepdefense(),
    ]


def _deepdefense() -> list[BackboneSpec]:
    return [
        BackboneSpec(
            "deepdefense_cnn",
            "DeepDefense's CNN: two 3x3 convolutions with max pools, three linear layers without biases",
            "arena_defenses.backbones_small:deepdefense_cnn",
            ("out1", "out2"),
            {
                "width": Option(32, "channels of the convolutions; the linear layers scale with it", low=1, high=512),
                "activation": Option("relu", "activation (the paper does not say)", ("relu", "tanh", "gelu")),
            },
            paper="DeepDefense",
        ),
        BackboneSpec(
            "mlp",
            "DeepDefense's perceptron: three linear layers without biases, tanh; no slots",
            "arena_defenses.backbones_small:mlp",
            (),
            {"width": Option(600, "first hidden layer; the second is half as wide", low=1, high=8192)},
            paper="DeepDefense",
        ),
    ]
