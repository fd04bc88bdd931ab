"""The overlap ratio by hand, and its laws."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from arena.errors import ArenaError
from arena.overlap import (
    active,
    channel_frequency,
    channel_magnitude,
    overlap_ratio,
    overlaps,
    spatial_magnitude,
)

#: Two maps of two channels and 1x2 positions.
MAPS = torch.tensor([[[[4.0, 2.0]], [[0.0, 0.2]]], [[[1.0, 1.0]], [[3.0, 5.0]]]])


def test_magnitudes_by_hand():
    assert torch.allclose(channel_magnitude(MAPS), torch.tensor([[3.0, 0.1], [1.0, 4.0]]))
    assert torch.allclose(spatial_magnitude(MAPS), torch.tensor([[2.0, 1.1], [2.0, 3.0]]))


def test_frequency_by_hand():
    # 0.1 is more than a hundredth of 3: both channels active in both maps. Above a twentieth it is not.
    assert channel_frequency(MAPS).tolist() == [1, 1]
    assert channel_frequency(MAPS, share=0.05).tolist() == [1, 0.5]
    assert channel_frequency(torch.zeros(3, 2, 1, 1)).tolist() == [0, 0]  # nothing is active in an empty map


def test_ratio_by_hand():
    edge = math.exp(-2)
    g = torch.tensor([1.0, edge + 1e-6, edge - 1e-6, 0.0])
    assert active(g).tolist() == [True, True, False, False]
    other = torch.tensor([0.0, 5.0, 5.0, 0.0])
    # {0, 1} and {1, 2}: one of three.
    assert overlap_ratio(g, other).item() == pytest.approx(1 / 3)
    assert overlap_ratio(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])) == 0
    assert overlap_ratio(-torch.ones(2), -torch.ones(2)) == 0  # nothing active
    assert torch.allclose(overlap_ratio(torch.stack([g, other]), torch.stack([other, other])), torch.tensor([1 / 3, 1]))


vectors = st.lists(st.floats(0, 100, width=16), min_size=5, max_size=5).map(torch.tensor)


@given(vectors, vectors, st.floats(0.01, 100))
def test_ratio_laws(g, h, scale):
    assert overlap_ratio(g, g).item() == pytest.approx(1)
    found = overlap_ratio(g, h)
    assert 0 <= found <= 1
    assert found == overlap_ratio(h, g)
    assert found == overlap_ratio(g.flip(0), h.flip(0))  # names of channels do not matter
    power = 2.0 ** round(math.log2(scale))  # exact in floating point
    assert found == overlap_ratio(g * power, h)  # nor does brightness


@given(vectors, vectors)
def test_one_share_of_the_union(g, h):
    one, other = set(active(g).nonzero().flatten().tolist()), set(active(h).nonzero().flatten().tolist())
    assert overlap_ratio(g, h).item() == pytest.approx(len(one & other) / len(one | other))


class Net(nn.Module):
    """Shows its images as the map of ``show``."""

    def __init__(self):
        super().__init__()
        self.show, self.never, self.fc = nn.Identity(), nn.Identity(), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.show(x).flatten(1))


def test_of_a_model():
    model = Net().train()
    swapped = MAPS.flip(1)
    same = overlaps(model, "show", MAPS, MAPS)
    assert same == pytest.approx({"channel_magnitude": 1, "spatial_magnitude": 1, "channel_frequency": 1})
    # Row 0: {0} against {1}. Row 1: {0, 1}, as 1 >= 4 e^-2, against the same.
    assert overlaps(model, "show", MAPS, swapped) == pytest.approx(
        {"channel_magnitude": 0.5, "spatial_magnitude": 1, "channel_frequency": 1}
    )
    # The first row alone: channel 1 has 0.1 of 3, above a hundredth, hence frequent; a tenth of that is not.
    dark = MAPS[:1] * torch.tensor([1.0, 0.1]).view(1, 2, 1, 1)
    assert overlaps(model, "show", MAPS[:1], dark)["channel_frequency"] == pytest.approx(1 / 2)
    assert model.training
    assert not model.show._forward_hooks


@pytest.mark.parametrize(
    ("path", "message"),
    [("shown", "no module 'shown'"), ("never", "'never' is not reached"), ("fc", "'fc' gives no feature map")],
)
def test_what_cannot_be_read_is_said(path, message):
    model = Net()
    with pytest.raises(ArenaError, match=message):
        overlaps(model, path, MAPS, MAPS)
    assert not any(m._forward_hooks for m in model.modules())


def test_batches_must_match():
    with pytest.raises(ArenaError, match="two equal, non-empty batches"):
        overlaps(Net(), "show", MAPS, MAPS[:1])
