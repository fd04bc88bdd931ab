"""Models built by hand for the papers' attacks; user models over (1, 4, 4) pictures."""

from __future__ import annotations

import torch
from torch import nn


class Hill(nn.Module):
    """Class 1 within 0.05 of 0.6 in the first pixel, class 0 elsewhere: a long step goes over the hill and back."""

    def forward(self, x):
        far = (x[:, 0, 0, 0] - 0.6).abs()
        return torch.stack((far, torch.full_like(far, 0.05)), 1)


class Steep(nn.Module):
    """Class 0 hangs on the first pixel, steeply; class 2 on the second; class 1 is what remains."""

    def forward(self, x):
        a, b = x[:, 0, 0, 0], x[:, 0, 0, 1]
        return torch.stack((10_000 * (a - 0.5), torch.zeros_like(a), b - 0.5), 1)


hill, steep = Hill, Steep
