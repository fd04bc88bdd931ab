"""Checks without gradients: they find what wrong gradients hide."""

import pytest
import torch
from torch import nn


class Backwards(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return -grad


class Reversed(nn.Module):
    """A linear model whose gradient points the wrong way."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(Backwards.apply(x))


class Steps(nn.Module):
    """The same seen through 16 grey levels: no gradient at all, and no difference between near points."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(torch.round(x * 15) / 15)


@pytest.mark.parametrize(("name", "hides"), [("nes", Reversed), ("rays", Reversed), ("rays", Steps)])
def test_a_check_breaks_what_gradients_cannot(fight, models, name, hides):
    def play(attack, model, **options):
        f = fight(attack, model, shape=(1, 4, 4), eps="0.2", low=0.3, high=0.7, n=24, **options)
        return f.broken(f.run()).sum()

    linear = models.linear((1, 4, 4), 3)
    honest = play("pgd", linear)
    assert honest >= 20
    assert play("pgd", hides(linear)) <= honest / 2
    assert play(name, hides(linear)) >= 0.8 * honest


def test_nes_sees_the_gradient_of_a_linear_model(fight, models):
    f = fight("nes", models.linear((1, 4, 4), 2), shape=(1, 4, 4), n=5, pairs=4000)
    index, y = f.index, f.y
    state = f.attack.start(index, f.x, y, f.target.clean(f.x)) | {"x": f.x, "y": y, "index": index}
    query = f.attack.ask(state)
    assert query.points.shape[1] == 8001
    values = f.target.answer(query, y).values.double()
    rise = (values[:, 1:4001] - values[:, 4001:]) / (2 * f.attack.sigma * 4000)
    estimate = (rise.view(5, 4000, 1, 1, 1) * f.attack._directions(state)).sum(1)
    w = f.target.model[1].weight
    exact = (w[1 - y] - w[y]).view_as(estimate)
    assert (torch.nn.functional.cosine_similarity(estimate.flatten(1), exact.flatten(1)) > 0.98).all()
