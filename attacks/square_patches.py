"""Squares on an image, numbered: the Linf proposals of the square attack, and which of them would change nothing.

A square of one side is told by its place and a sign a channel, and a small image has few of them: of side 1 on 1x8x8
there are 128, and half of these push a pixel to the edge at which it is already.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arena.threat import Threat

#: Added to a pixel, or taken from it, before projection: further than any ball and any box reaches.
BEYOND = 4


class Patches:
    """Squares on an image of ``shape`` (C, H, W); the number of one is (top * W + left) * 2^C + a bit a channel."""

    def __init__(self, shape: tuple[int, int, int]) -> None:
        self.shape = shape
        channels, height, width = shape
        self.signs = 2**channels
        self.count = height * width * self.signs
        """Of numbers; those of squares that would reach over the rim mean none."""

    def numbers(self, top: Tensor, left: Tensor, coins: Tensor) -> Tensor:
        """Return the numbers (N,) of squares at (N,), (N,) with signs (N, C) in {0, 1}."""
        signs = (coins << torch.arange(self.shape[0], device=coins.device)).sum(1)
        return (top * self.shape[2] + left) * self.signs + signs

    def pushes(self, top: Tensor, left: Tensor, coins: Tensor, size: Tensor) -> Tensor:
        """Return int8 (N, H + C * W), whose outer product pushes squares of ``size`` (N,) beyond any ball and box.

        1 on the pixel rows that a square lies on; then ``BEYOND``, with a channel's sign, on its columns.
        """
        down, along = self.spans(top, left, size)
        signs = (coins * (2 * BEYOND) - BEYOND).to(torch.int8)
        return torch.cat((down.to(torch.int8), (along.unsqueeze(1) * signs.unsqueeze(2)).flatten(1)), 1)

    def table(self, size: int) -> Tensor:
        """Return ``pushes`` of all squares of a side by number, int8 (count, H + C * W)."""
        number = torch.arange(self.count)
        place, coins = number // self.signs, self._bits(number.device)[number % self.signs]
        return self.pushes(place // self.shape[2], place % self.shape[2], coins, torch.full_like(number, size))

    def _bits(self, device: torch.device) -> Tensor:
        """Return the signs' bits by channel, (2^C, C)."""
        return (torch.arange(self.signs, device=device).unsqueeze(1) >> torch.arange(self.shape[0], device=device)) & 1

    def spans(self, top: Tensor, left: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Tell which pixel rows, bool (N, H), and which columns, (N, W), squares lie on."""
        _, height, width = self.shape
        down = torch.arange(height, device=top.device) - top.unsqueeze(1)
        along = torch.arange(width, device=top.device) - left.unsqueeze(1)
        size = size.unsqueeze(1)
        return (down >= 0) & (down < size), (along >= 0) & (along < size)

    def idle(self, threat: Threat, x: Tensor, point: Tensor, size: int) -> Tensor:
        """Tell which squares of a side change no pixel of ``point`` (N, C, H, W), bool (N, count).

        Numbers that mean no square are among them.
        """
        channels, height, width = self.shape
        edges = torch.stack((threat.project(x, x - BEYOND), threat.project(x, x + BEYOND)), 1)
        differ = (edges != point.unsqueeze(1)).flatten(1, 2).float()
        windows = torch.nn.functional.max_pool2d(differ, size, stride=1).bool()
        down, along = windows.shape[2:]
        windows = windows.view(-1, 2, channels, down, along)
        changed = torch.zeros(len(x), self.signs, height, width, dtype=torch.bool, device=x.device)
        bits = self._bits(x.device)
        for channel in range(channels):
            changed[:, :, :down, :along] |= windows[:, bits[:, channel], channel]
        return ~changed.movedim(1, 3).flatten(1)
