"""Built-in backbones. Images (N, C, H, W) in [0, 1] to logits (N, K); every slot is after a ReLU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

#: Pixels are shifted and scaled to about [-1, 1] inside the network; the same for every data set and channel.
MEAN, SCALE = 0.5, 2.0


class Block(nn.Module):
    """Convolution, batch norm, ReLU, slot ``out``."""

    def __init__(self, inside: int, outside: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outside)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(F.relu(self.norm(self.conv(x))))
        return found


class Cnn(nn.Module):
    """Four convolutions, the second of stride 2, and a linear layer on the flattened map."""

    def __init__(self, shape: tuple[int, int, int], n_classes: int, width: int) -> None:
        super().__init__()
        c, h, w = shape
        self.block1 = Block(c, width)
        self.block2 = Block(width, 2 * width, stride=2)
        self.block3 = Block(2 * width, 2 * width)
        self.block4 = Block(2 * width, 2 * width)
        self.head = nn.Linear(2 * width * ((h + 1) // 2) * ((w + 1) // 2), n_classes)

    def forward(self, x: Tensor) -> Tensor:
        a = self.block1((x - MEAN) * SCALE)
        a = self.block4(self.block3(self.block2(a)))
        logits: Tensor = self.head(a.flatten(1))
        return logits


def shortcut(inside: int, outside: int, stride: int) -> nn.Module:
    """Make a residual block's shortcut: nothing, or where the size changes a 1x1 convolution and batch norm."""
    if stride == 1 and inside == outside:
        return nn.Sequential()  # not an Identity: a shortcut is no slot
    return nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False), nn.BatchNorm2d(outside))


class Residual(nn.Module):
    """Basic residual block (He et al., CVPR 2016), slot ``out`` after its last ReLU."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.shortcut = shortcut(inside, outside, stride)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(self.conv1(x)))
        found: Tensor = self.out(F.relu(self.norm2(self.conv2(a)) + self.shortcut(x)))
        return found


class ResNet(nn.Module):
    """Residual network with a 3x3 stem and no stem pool; ``stages`` lists (channels, blocks, stride).

    ``block(inside, channels, stride)`` makes a block, whose output has ``expansion`` times ``channels``.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        n_classes: int,
        stem: int,
        stages: tuple[tuple[int, int, int], ...],
        block: Callable[[int, int, int], nn.Module] = Residual,
        expansion: int = 1,
    ) -> None:
        super().__init__()
        self.stem = Block(shape[0], stem)
        inside = stem
        for number, (channels, blocks, stride) in enumerate(stages, start=1):
            outside = expansion * channels
            layers = [block(inside if i == 0 else outside, channels, stride if i == 0 else 1) for i in range(blocks)]
            self.add_module(f"layer{number}", nn.Sequential(*layers))
            inside = outside
        self.depth = len(stages)
        self.head = nn.Linear(inside, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem((x - MEAN) * SCALE)
        for number in range(1, self.depth + 1):
            a = self.get_submodule(f"layer{number}")(a)
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(a, 1), 1))
        return logits


def cnn(shape: tuple[int, int, int], n_classes: int, width: int = 16) -> nn.Module:
    """Build the small network for 8x8 to 32x32 pictures of any channels, square or not."""
    return Cnn(shape, n_classes, width)


def resnet_small(shape: tuple[int, int, int], n_classes: int, width: int = 16) -> nn.Module:
    """Build a residual network for 8x8 pictures whose last stage, like ResNet-18's, is two blocks on a 4x4 map."""
    return ResNet(shape, n_classes, width, ((width, 1, 1), (3 * width, 2, 2)))


def resnet18(shape: tuple[int, int, int], n_classes: int, width: int = 64) -> nn.Module:
    """Build ResNet-18 in its CIFAR form: after layer4 a 32x32 picture is a (512, 4, 4) map at width 64."""
    return ResNet(shape, n_classes, width, four_stages(width, 2, 2, 2, 2))


def resnet34(shape: tuple[int, int, int], n_classes: int, width: int = 64) -> nn.Module:
    """Build ResNet-34 in its CIFAR form: the maps of ResNet-18, stages of 3, 4, 6 and 3 blocks."""
    return ResNet(shape, n_classes, width, four_stages(width, 3, 4, 6, 3))


def four_stages(width: int, *blocks: int) -> tuple[tuple[int, int, int], ...]:
    """Return (channels, blocks, stride) of ResNet's four stages: each after the first halves the map and has twice the
    channels."""
    return tuple((width * 2**i, n, 1 if i == 0 else 2) for i, n in enumerate(blocks))
