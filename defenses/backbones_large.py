"""The papers' other backbones: VGG16, wide residual networks, ResNet-50. Images in [0, 1] to logits (N, K).

Pictures smaller than the papers' pass as well: a map of side 1 is pooled no further.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbones import MEAN, SCALE, Block, ResNet, four_stages, shortcut

Shape = tuple[int, int, int]


class Vgg(nn.Module):
    """VGG16 with batch norm: five groups of convolutions, each group pooled, two hidden layers and an output layer.

    Slots ``block1.0.out`` ... ``block5.2.out`` follow each convolution's ReLU, before any pool. The hidden layers are
    linear, batch norm, ReLU (papers.md 2.2); convolutions have no bias: 15.25 million parameters, as FSR's Table 7.
    """

    def __init__(self, shape: Shape, n_classes: int, width: int) -> None:
        super().__init__()
        inside, h, w = shape
        for number, (factor, layers) in enumerate(((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)), start=1):
            blocks = [Block(inside if i == 0 else factor * width, factor * width) for i in range(layers)]
            self.add_module(f"block{number}", nn.Sequential(*blocks))
            inside, h, w = factor * width, (h + 1) // 2, (w + 1) // 2
        hidden = 8 * width
        layers_: list[nn.Module] = []
        for before in (inside * h * w, hidden):
            layers_ += [nn.Linear(before, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        self.hidden = nn.Sequential(*layers_)
        self.head = nn.Linear(hidden, n_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        a = (x - MEAN) * SCALE
        for number in range(1, 6):
            a = F.max_pool2d(self.get_submodule(f"block{number}")(a), 2, ceil_mode=True)
        logits: Tensor = self.head(self.hidden(a.flatten(1)))
        return logits


class PreBlock(nn.Module):
    """Pre-activation residual block (Zagoruyko and Komodakis, BMVC 2016).

    Slot ``branch``: the residual branch's input after batch norm and ReLU; the shortcut does not pass it. Slot ``out``:
    the sum, which no ReLU follows and which can be negative. Where the size changes, the shortcut is a convolution of
    the activated input.
    """

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inside)
        self.conv1 = nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, padding=1, bias=False)
        self.resized = stride != 1 or inside != outside
        # An empty Sequential, not an Identity: a shortcut is no slot.
        self.shortcut = nn.Sequential()
        if self.resized:
            self.shortcut = nn.Sequential(nn.Conv2d(inside, outside, 1, stride=stride, bias=False))
        self.branch = nn.Identity()
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        a = self.conv2(F.relu(self.norm2(self.conv1(self.branch(active)))))
        found: Tensor = self.out(a + self.shortcut(active if self.resized else x))
        return found


class Stem(nn.Module):
    """A bare convolution and slot ``out``."""

    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inside, outside, 3, padding=1, bias=False)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(self.conv(x))
        return found


class WideResNet(nn.Module):
    """Wide residual network: a stem, three groups of ``blocks`` pre-activation blocks, batch norm, ReLU, average pool.

    Slot ``out`` follows the last ReLU, before the pool.
    """

    def __init__(self, shape: Shape, n_classes: int, blocks: int, width: int) -> None:
        super().__init__()
        self.stem = Stem(shape[0], 16)
        inside = 16
        for number, (channels, stride) in enumerate(((16, 1), (32, 2), (64, 2)), start=1):
            outside = channels * width
            group = [PreBlock(inside if i == 0 else outside, outside, stride if i == 0 else 1) for i in range(blocks)]
            self.add_module(f"block{number}", nn.Sequential(*group))
            inside = outside
        self.norm = nn.BatchNorm2d(inside)
        self.out = nn.Identity()
        self.head = nn.Linear(inside, n_classes)
        nn.init.zeros_(self.head.bias)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        a = self.stem((x - MEAN) * SCALE)
        for number in (1, 2, 3):
            a = self.get_submodule(f"block{number}")(a)
        a = self.out(F.relu(self.norm(a)))
        logits: Tensor = self.head(torch.flatten(F.adaptive_avg_pool2d(a, 1), 1))
        return logits


class Bottleneck(nn.Module):
    """Bottleneck residual block (He et al., CVPR 2016), slot ``out`` after its last ReLU."""

    def __init__(self, inside: int, middle: int, stride: int) -> None:
        super().__init__()
        outside = 4 * middle
        self.conv1 = nn.Conv2d(inside, middle, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(middle)
        self.conv2 = nn.Conv2d(middle, middle, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(middle)
        self.conv3 = nn.Conv2d(middle, outside, 1, bias=False)
        self.norm3 = nn.BatchNorm2d(outside)
        self.shortcut = shortcut(inside, outside, stride)
        self.out = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(self.conv1(x)))
        a = F.relu(self.norm2(self.conv2(a)))
        found: Tensor = self.out(F.relu(self.norm3(self.conv3(a)) + self.shortcut(x)))
        return found


def vgg16(shape: Shape, n_classes: int, width: int = 64) -> nn.Module:
    """Build VGG16 with batch norm: block5 of a 32x32 picture is a (512, 2, 2) map at width 64."""
    return Vgg(shape, n_classes, width)


def wrn(shape: Shape, n_classes: int, depth: int, width: int) -> nn.Module:
    """Build a wide residual network of ``depth`` 6 n + 4 and widening factor ``width``.

    Raises:
        ValueError: no whole number of blocks.
    """
    if depth < 10 or (depth - 4) % 6:
        raise ValueError(f"wrn: depth {depth}: expected 10, 16, 22, ...")
    return WideResNet(shape, n_classes, (depth - 4) // 6, width)


def wrn34_10(shape: Shape, n_classes: int, width: int = 10) -> nn.Module:
    """Build WRN-34-10: block3 of a 32x32 picture is a (640, 8, 8) map."""
    return wrn(shape, n_classes, 34, width)


def wrn32_10(shape: Shape, n_classes: int, width: int = 10) -> nn.Module:
    """Build EWAS's WRN-32-10: its code makes five blocks a group, the network that others call WRN-34-10."""
    return wrn(shape, n_classes, 34, width)


def wrn28_10(shape: Shape, n_classes: int, width: int = 10) -> nn.Module:
    """Build WRN-28-10."""
    return wrn(shape, n_classes, 28, width)


def wrn16_8(shape: Shape, n_classes: int, width: int = 8) -> nn.Module:
    """Build WRN-16-8."""
    return wrn(shape, n_classes, 16, width)


def resnet50(shape: Shape, n_classes: int, width: int = 64) -> nn.Module:
    """Build ResNet-50 in its CIFAR form: after layer4 a 32x32 picture is a (2048, 4, 4) map at width 64."""
    return ResNet(shape, n_classes, width, four_stages(width, 3, 4, 6, 3), Bottleneck, expansion=4)
