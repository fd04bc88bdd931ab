"""The two figures about class-conditional masks, on models where they are known."""

from __future__ import annotations

import torch
from torch import nn

from arena.diagnosis import diagnose
from arena.selection import Select
from arena.surface import Head, Selection, Surface

X = torch.rand(60, 1, 3, 3, generator=torch.Generator().manual_seed(0))
SURFACE = Surface(heads={"head": Head("head")}, selections={"mask": Selection("select", scores="head")})


class Masked(nn.Module):
    """The output is the chosen class (``decides``), or a classifier of its own that ignores the choice."""

    def __init__(self, decides: bool) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.head, self.own, self.select = nn.Linear(9, 4), nn.Linear(9, 4), Select()
        self.decides = decides

    def forward(self, x):
        chosen = self.select(self.head(x.flatten(1)), torch.eye(4))
        return chosen if self.decides else self.own(x.flatten(1))


def test_a_mask_that_decides_everything():
    model = Masked(True).eval()
    y = model.head(X.flatten(1)).argmax(1)
    with torch.no_grad():
        found = diagnose(model, SURFACE, X, y, X[:5], 4)
    assert found["heads"]["head"] == {"accuracy": 100.0, "agreement_clean": 100.0, "agreement_broken": 100.0}
    assert found["selections"]["mask"] == {"forced_output": 100.0, "forced_accuracy": 25.0}


def test_a_mask_that_decides_nothing():
    model = Masked(False).eval()
    with torch.no_grad():
        y = model(X).argmax(1)
        agree = float((model.head(X.flatten(1)).argmax(1) == y).float().mean()) * 100
        found = diagnose(model, SURFACE, X, y, X[:0], 4)
    assert abs(found["heads"]["head"]["agreement_clean"] - agree) < 0.01
    assert found["heads"]["head"]["agreement_broken"] is None
    assert found["selections"]["mask"] == {"forced_output": 25.0, "forced_accuracy": 100.0}
    assert model.select.mode.kind == "hard"


def test_nothing_to_say_without_heads_and_selections():
    assert diagnose(nn.Flatten(), Surface(), X, X[:, 0, 0, 0].long(), X[:0], 4) is None


class Experts(Masked):
    """Chooses between two ways, not among its four classes."""

    def forward(self, x):
        return self.own(x.flatten(1)) * self.select(scores=self.head(x.flatten(1))[:, :2], table=torch.ones(2, 1))


def test_a_choice_that_is_not_among_classes_is_left_out():
    model = Experts(False).eval()
    with torch.no_grad():
        found = diagnose(model, SURFACE, X, model(X).argmax(1), X[:5], 4)
    assert found["selections"] == {}
    assert found["heads"]["head"]["agreement_broken"] is not None
