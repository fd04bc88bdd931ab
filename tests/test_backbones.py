"""Slots: found, measured, filled; and what is said when they are not there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arena.backbones import place, slot_shapes, slots
from arena.errors import PluginError


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Identity()
        self.stem = nn.Sequential(nn.Conv2d(2, 5, 3, stride=2), nn.BatchNorm2d(5))
        self.early = nn.Identity()
        self.never = nn.Identity()
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        a = self.late(self.early(self.stem(x)) * 2)
        return self.head(a.mean((2, 3)))


def test_shapes_come_in_forward_order_and_touch_nothing():
    net = Net().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert slot_shapes(net, (2, 9, 7)) == {"early": (5, 4, 3), "late": (5, 4, 3)}
    assert list(slot_shapes(net, (2, 9, 7))) == ["early", "late"]
    assert net.training
    assert net.stem.training
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not net.early._forward_hooks


def test_place_changes_what_flows_on():
    net = Net().eval()
    x = torch.rand(3, 2, 9, 7)

    class Zero(nn.Module):
        def forward(self, a):
            return a * 0

    assert place(net, {"early": Zero()}) is net
    assert torch.allclose(net(x), net.head.bias.expand(3, 3))
    assert slots(net) == ["late", "never"]


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("earl", ["no slot 'earl'", "did you mean 'early'"]),
        ("stem.0", ["'stem.0' holds a Conv2d", "nn.Identity"]),
        ("zzz", ["no slot 'zzz'", "slots: late, early, never"]),
    ],
)
def test_place_names_the_nearest_slot_and_places_nothing(path, words):
    net = Net()
    with pytest.raises(PluginError) as error:
        place(net, {"early": nn.ReLU(), path: nn.ReLU()})
    assert all(w in str(error.value) for w in words)
    assert "\n" not in str(error.value)
    assert type(net.early) is nn.Identity


def test_a_slot_that_is_never_reached_is_named():
    with pytest.raises(PluginError, match="slot 'never' is never reached"):
        slot_shapes(Net(), (2, 9, 7), ("early", "never"))
