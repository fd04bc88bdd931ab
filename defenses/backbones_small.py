"""DeepDefense's two networks (papers.md 6.1). Images (N, C, H, W) in [0, 1] to logits (N, K), scaled to [-1, 1] inside.

They are trained against mean squared error there, so "logits" near one-hot are meant; no batch norm, as in the paper.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from arena.specs import Value

from .backbones import MEAN, SCALE

#: Widths of the paper's two hidden linear layers at 32 channels.
HIDDEN = (1000, 600)
_ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}


class DeepDefenseCnn(nn.Module):
    """Conv3x3, max pool, conv3x3, max pool, three linear layers without biases; slots after each activation.

    The pools round up, so that any picture of at least one pixel fits; 32x32 is the paper's 2048-1000-600-K.
    """

    def __init__(self, shape: tuple[int, int, int], n_classes: int, width: int, activation: str) -> None:
        super().__init__()
        c, h, w = shape
        first, second = (max(1, round(size * width / 32)) for size in HIDDEN)
        self.conv1 = nn.Conv2d(c, width, 3, padding=1)
        self.out1 = nn.Identity()
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.out2 = nn.Identity()
        self.fc1 = nn.Linear(width * _quarter(h) * _quarter(w), first, bias=False)
        self.fc2 = nn.Linear(first, second, bias=False)
        self.fc3 = nn.Linear(second, n_classes, bias=False)
        self.act = _ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        a = F.max_pool2d(self.out1(self.act(self.conv1((x - MEAN) * SCALE))), 2, ceil_mode=True)
        a = F.max_pool2d(self.out2(self.act(self.conv2(a))), 2, ceil_mode=True)
        logits: Tensor = self.fc3(self.act(self.fc2(self.act(self.fc1(a.flatten(1))))))
        return logits


class Mlp(nn.Module):
    """Three linear layers without biases, tanh between them; at 28x28 the paper's 784-600-300-K."""

    def __init__(self, shape: tuple[int, int, int], n_classes: int, width: int) -> None:
        super().__init__()
        c, h, w = shape
        half = max(1, width // 2)
        self.fc1 = nn.Linear(c * h * w, width, bias=False)
        self.fc2 = nn.Linear(width, half, bias=False)
        self.fc3 = nn.Linear(half, n_classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a = ((x - MEAN) * SCALE).flatten(1)
        logits: Tensor = self.fc3(self.fc2(self.fc1(a).tanh()).tanh())
        return logits


def _quarter(side: int) -> int:
    """Return a side after two pools that round up."""
    return -(-side // 4)


def deepdefense_cnn(
    shape: tuple[int, int, int], n_classes: int, width: int = 32, activation: Value = "relu"
) -> nn.Module:
    """Build DeepDefense's CNN; ``width`` scales convolutions and linear layers alike."""
    return DeepDefenseCnn(shape, n_classes, width, str(activation))


def mlp(shape: tuple[int, int, int], n_classes: int, width: int = 600) -> nn.Module:
    """Build DeepDefense's multilayer perceptron; ``width`` and half of it are the hidden layers."""
    return Mlp(shape, n_classes, width)
