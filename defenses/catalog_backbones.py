"""The built-in backbones, as specs. Imports no torch."""

from __future__ import annotations

from arena.specs import BackboneSpec, Option

_RESNET = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"
_WRN = "Zagoruyko and Komodakis, Wide Residual Networks, BMVC 2016"


def _width(default: int) -> dict[str, Option]:
    return {"width": Option(default, "channels of the first convolution", low=1, high=512)}


def _stages(name: str, *blocks: int) -> tuple[str, ...]:
    return tuple(f"{name}{i}.{j}.out" for i, n in enumerate(blocks, start=1) for j in range(n))


def _resnet(name: str, summary: str, module: str, *blocks: int) -> BackboneSpec:
    slots = ("stem.out", *_stages("layer", *blocks))
    return BackboneSpec(name, summary, f"arena_defenses.{module}:{name}", slots, _width(64), paper=_RESNET)


def _wrn(name: str, summary: str, blocks: int, width: int) -> BackboneSpec:
    inside = (f"block{i}.{j}.{point}" for i in (1, 2, 3) for j in range(blocks) for point in ("branch", "out"))
    return BackboneSpec(
        name,
        summary,
        f"arena_defenses.backbones_large:{name}",
        ("stem.out", *inside, "out"),
        {
            "width": Option(
                width, "widening factor: the groups have 16, 32 and 64 times as many channels", low=1, high=32
            )
        },
        paper=_WRN,
    )


def backbones() -> list[BackboneSpec]:
    """Return the built-in backbones."""
    return [
        BackboneSpec(
            "cnn",
            "four 3x3 convolutions and a linear layer, for 8x8 to 32x32 pictures",
            "arena_defenses.backbones:cnn",
            ("block1.out", "block2.out", "block3.out", "block4.out"),
            _width(16),
        ),
        BackboneSpec(
            "resnet_small",
            "residual network for 8x8 pictures, 76 thousand parameters",
            "arena_defenses.backbones:resnet_small",
            ("stem.out", "layer1.0.out", "layer2.0.out", "layer2.1.out"),
            _width(16),
        ),
        _resnet("resnet18", "ResNet-18 in its CIFAR form: 3x3 stem, no stem pool", "backbones", 2, 2, 2, 2),
        _resnet("resnet34", "ResNet-34 in its CIFAR form: OAT's network for CIFAR-10", "backbones", 3, 4, 6, 3),
        _resnet(
            "resnet50",
            "ResNet-50 in its CIFAR form: the papers' source of transferred examples",
            "backbones_large",
            *(3, 4, 6, 3),
        ),
        BackboneSpec(
            "vgg16",
            "VGG16 with batch norm and two hidden layers of 512",
            "arena_defenses.backbones_large:vgg16",
            _stages("block", 2, 2, 3, 3, 3),
            _width(64),
            paper="Simonyan and Zisserman, Very Deep Convolutional Networks, ICLR 2015",
        ),
        _wrn("wrn34_10", "WRN-34-10: wide residual network, five pre-activation blocks a group", 5, 10),
        _wrn("wrn32_10", "EWAS's WRN-32-10: its code builds five blocks a group, the same network as wrn34_10", 5, 10),
        _wrn("wrn28_10", "WRN-28-10: wide residual network, four pre-activation blocks a group", 4, 10),
        _wrn("wrn16_8", "WRN-16-8: wide residual network, two pre-activation blocks a group", 2, 8),
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
