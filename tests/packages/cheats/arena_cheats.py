"""Attacks and defenses that cheat or fail, each in its own way; the arena must catch every one by name."""

from __future__ import annotations

import functools
import sys

import torch
from torch import nn

from arena.attack import Query
from arena.datasets import digits, to_float
from arena.hookspecs import hookimpl
from arena.specs import AttackSpec

NORMS = ("Linf", "L2")
BAD_ATTACKS = {
    "outside_ball": "returns points far outside the ball",
    "outside_box": "returns points below 0",
    "gives_nan": "returns NaN",
    "wrong_shape": "returns images of another shape",
    "edits_weights": "zeroes the search copy's last layer and returns its input",
    "claims_success": "returns its input and claims that it broke everything",
    "claims_success_iterated": "the same, as an ask/tell attack",
    "crashes": "raises",
    "crashes_midway": "raises after half the chunks' first points",
    "returns_input": "returns its input without a query",
    "looks_only": "queries the clean image and returns it",
    "hooks_model": "patches the search copy's forward",
    "exits": "calls sys.exit",
    "short_claims": "returns fewer claims than points",
    "forgets": "sees breaks and hands over its input",
    "unloadable": "names code that is not there",
}


def outside_ball(target, x, y, threat, budget, rng):
    return (1 - x).round()


def outside_box(target, x, y, threat, budget, rng):
    return x - 0.9 * threat.radius - 1e-3


def gives_nan(target, x, y, threat, budget, rng):
    return x * float("nan")


def wrong_shape(target, x, y, threat, budget, rng):
    return x[:, :, :-1]


def edits_weights(target, x, y, threat, budget, rng):
    with torch.no_grad():
        list(target.model.parameters())[-1].add_(100 * torch.randn(1))
    return x.clone()


def hooks_model(target, x, y, threat, budget, rng):
    target.model.register_forward_hook(lambda module, args, out: -out)
    return x.clone()


def claims_success(target, x, y, threat, budget, rng):
    target.logits(x + 1e-3)
    return x, torch.ones(len(x), dtype=torch.bool)


def crashes(target, x, y, threat, budget, rng):
    raise ZeroDivisionError("division by a planted zero")


def exits(target, x, y, threat, budget, rng):
    sys.exit(0)


def short_claims(target, x, y, threat, budget, rng):
    target.logits(x + 1e-3)
    return x, torch.ones(1, dtype=torch.bool)


def returns_input(target, x, y, threat, budget, rng):
    return x


def looks_only(target, x, y, threat, budget, rng):
    target.module(x)
    return x


class ClaimsSuccess:
    def __init__(self, setup):
        self.eps = setup.threat.radius

    def start(self, index, x, y, clean):
        never = torch.zeros(len(y), dtype=torch.bool)
        return {"best": x, "done": never, "claim": never}

    def ask(self, state):
        return Query((state["x"] + self.eps / 10).clamp(0, 1).unsqueeze(1))

    def tell(self, state, answer):
        always = torch.ones_like(state["done"])
        return {"best": state["x"], "done": always, "claim": always}

    def passes(self):
        return 1, 0


class Forgets(ClaimsSuccess):
    """Walks to the mirrored picture, cut to the ball."""

    def __init__(self, setup):
        self.threat = setup.threat

    def ask(self, state):
        return Query(self.threat.project(state["x"], 1 - state["x"]).unsqueeze(1))

    def tell(self, state, answer):
        always = torch.ones_like(state["done"])
        return {"best": state["x"], "done": always}

    def start(self, index, x, y, clean):
        return {"best": x, "done": torch.zeros(len(y), dtype=torch.bool)}


class CrashesMidway(ClaimsSuccess):
    def tell(self, state, answer):
        raise RuntimeError("planted")


@hookimpl
def arena_register_attacks():
    iterated = {
        "claims_success_iterated": "ClaimsSuccess",
        "crashes_midway": "CrashesMidway",
        "forgets": "Forgets",
    }
    for name, summary in BAD_ATTACKS.items():
        if name == "unloadable":
            yield AttackSpec(name, summary, NORMS, run="arena_cheats:not_there")
        elif name in iterated:
            yield AttackSpec(name, summary, NORMS, iterate=f"arena_cheats:{iterated[name]}")
        else:
            yield AttackSpec(name, summary, NORMS, run=f"arena_cheats:{name}")


# -- defenses: user models for digits-like pictures (1, 8, 8), 10 classes ----------------------------------------


@functools.cache
def class_means():
    """Mean training picture of each class of digits, (10, 64)."""
    images = digits()
    x = to_float(images.x_train).flatten(1)
    return torch.stack([x[images.y_train == k].mean(0) for k in range(10)])


class Base(nn.Module):
    """An honest linear classifier: the nearest class mean."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(64, 10)
        means = class_means()
        with torch.no_grad():
            self.linear.weight.copy_(2 * means)
            self.linear.bias.copy_(-means.square().sum(1))

    def scores(self, x):
        return self.linear(x.flatten(1))

    def forward(self, x):
        return self.scores(x)


class UndeclaredRandomness(Base):
    def forward(self, x):
        return self.scores(x + 0.1 * torch.randn_like(x))


class DependsOnNeighbours(Base):
    def forward(self, x):
        scores = self.scores(x)
        return scores - scores.mean(0)


class ChangesWhenCalled(Base):
    """Moves its own weights a little at every call."""

    def forward(self, x):
        with torch.no_grad():
            self.linear.bias.add_(1e-3)
        return self.scores(x)


class ChangesLate(Base):
    """Counts calls in a buffer and turns into another model after a while, when the check is long over."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls > 40:
            with torch.no_grad():
                self.linear.bias.fill_(3.0)
        return self.scores(x)


class RemembersLate(Base):
    """Keeps its memory outside parameters and buffers."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return self.scores(x) * (1 if self.calls < 40 else -1)


class Probabilities(Base):
    def forward(self, x):
        return self.scores(x).softmax(1)


class NoGradient(Base):
    def forward(self, x):
        return self.scores(x.detach())


class OneHot(Base):
    def forward(self, x):
        return torch.nn.functional.one_hot(self.scores(x).argmax(1), 10).float()


class Nan(Base):
    def forward(self, x):
        return self.scores(x) / (x.flatten(1).sum(1, keepdim=True) > 1e9)


def honest():
    return Base()


def undeclared_randomness():
    return UndeclaredRandomness()


def own_weights():
    """Loads whatever weights lie beside the working directory."""
    model = Base()
    model.load_state_dict(torch.load("own_weights.pt"))
    return model


def depends_on_neighbours():
    return DependsOnNeighbours()


def changes_when_called():
    return ChangesWhenCalled()


def changes_late():
    return ChangesLate()


def remembers_late():
    return RemembersLate()


def probabilities():
    return Probabilities()


def no_gradient():
    return NoGradient()


def one_hot():
    return OneHot()


class Constant(Base):
    """Says class 0, whatever it sees."""

    def forward(self, x):
        return 0 * self.scores(x) + torch.eye(10)[0]


def constant():
    return Constant()
