import math

import pytest
import torch

from arena.attack import Unsupported


@pytest.mark.parametrize("name", ["pgd", "cw_linf"])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_margin_reaches_the_exact_worst_case_of_a_linear_model(fight, models, worst_case, name, classes):
    options = {"loss": "margin"} if name == "pgd" else {}
    f = fight(name, models.linear((1, 8, 8), classes), eps="0.004", restarts=3, **options)
    outcome = f.run()
    exact = worst_case(f)
    held = ~f.broken(outcome)
    assert held.any()
    start = f.margins(type(outcome).empty(f.x))
    gained, possible = f.margins(outcome) - start, exact - start
    assert (gained[held] >= 0.98 * possible[held]).all()
    assert (gained[held] <= possible[held] + 1e-4).all()
    assert (f.broken(outcome)[exact > 0.05 * possible]).all()


def test_fgsm_on_two_classes_is_exact_and_costs_two_forwards_and_one_backward(fight, models, worst_case):
    f = fight("fgsm", models.linear((1, 4, 6), 2), shape=(1, 4, 6), eps="0.01")
    outcome = f.run()
    exact = worst_case(f)
    assert torch.allclose(f.margins(outcome), exact, atol=1e-4)
    assert outcome.forwards.tolist() == [2] * 12
    assert outcome.backwards.tolist() == [1] * 12
    assert outcome.moved


def test_l2_pgd_moves_along_the_gradient_to_the_sphere(fight, models):
    f = fight(
        "pgd", models.linear((3, 5, 4), 2), shape=(3, 5, 4), norm="L2", eps="0.05", loss="margin", low=0.3, high=0.7
    )
    outcome = f.run()
    layer = f.target.model[1]
    w = layer.weight[1 - f.y] - layer.weight[f.y]
    clean = f.margins(type(outcome).empty(f.x))
    held = ~f.broken(outcome)
    assert held.any()
    exact = clean + 0.05 * w.norm(dim=1)
    assert torch.allclose(f.margins(outcome)[held], exact[held], rtol=1e-3, atol=1e-3)


def test_unbroken_rows_cost_what_passes_says_and_broken_ones_leave_early(fight, models):
    f = fight("pgd", models.curved((1, 8, 8), 4), eps="1/100000", steps=3, restarts=2, batch_size=8)
    outcome = f.run()
    assert not f.broken(outcome).any()
    assert (outcome.forwards.tolist(), outcome.backwards.tolist()) == ([8] * 12, [6] * 12)
    assert f.attack.passes() == (8, 6)
    f = fight("pgd", models.linear((1, 8, 8), 10), eps="0.3")
    outcome = f.run()
    assert f.broken(outcome).all()
    assert (outcome.forwards < 21).all()


def test_averaging_over_draws_is_counted(fight, models):
    f = fight("pgd", models.curved((1, 8, 8), 4), eps="1/100000", steps=3, eot=4)
    outcome = f.run()
    assert f.attack.passes() == (16, 12) == (int(outcome.forwards[0]), int(outcome.backwards[0]))


def test_no_random_start_begins_at_the_image(fight, models):
    f = fight("pgd", models.curved((1, 8, 8), 4), random_start=False, restarts=5)
    state = f.attack.start(f.index, f.x, f.y, f.target.clean(f.x))
    assert torch.equal(state["point"], f.x)
    assert f.attack.passes() == (21, 20)


def test_more_restarts_never_weaken(fight, models):
    few = fight("pgd", models.curved((1, 8, 8), 4), eps="0.02", loss="margin", steps=4)
    many = fight("pgd", models.curved((1, 8, 8), 4), eps="0.02", loss="margin", steps=4, restarts=4)
    a, b = few.run(), many.run()
    assert not (few.broken(a) & ~many.broken(b)).any()
    both = ~many.broken(b)
    assert (many.margins(b)[both] >= few.margins(a)[both] - 1e-6).all()


class TestLambda:
    def weights(self, fight, models, **options):
        f = fight("lambda_pgd", models.curved((1, 8, 8), 4), surface=models.headed, **options)
        return f, f.attack.weights

    def test_weights_are_the_papers(self, fight, models):
        assert self.weights(fight, models, lam=0)[1] is None
        assert self.weights(fight, models, lam=2)[1].tolist() == [1.0, 2.0]
        assert self.weights(fight, models, lam=math.inf)[1].tolist() == [0.0, 1.0]
        assert self.weights(fight, models, lam=math.inf, head="early")[1].tolist() == [0.0, 1.0]

    def test_lam_inf_climbs_the_head(self, fight, models):
        f, _ = self.weights(fight, models, lam=math.inf, loss="ce", eps="0.02")
        outcome = f.run()
        before, after = f.target.clean(f.x)[:, 1], f.target.clean(outcome.x_adv)[:, 1]
        loss = torch.nn.functional.cross_entropy
        held = ~f.broken(outcome)
        assert held.any()
        assert (loss(after, f.y, reduction="none") > loss(before, f.y, reduction="none"))[held].all()

    def test_needs_heads(self, fight, models):
        with pytest.raises(Unsupported, match="needs heads"):
            fight("lambda_pgd", models.curved((1, 8, 8), 4))

    def test_unknown_head(self, fight, models):
        with pytest.raises(Unsupported, match="no head 'late'"):
            fight("pgd", models.curved((1, 8, 8), 4), surface=models.headed, head="late")
