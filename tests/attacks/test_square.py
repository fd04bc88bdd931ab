import pytest
import torch
from arena_attacks.square import BLOCK, bump, side


def test_the_share_halves_where_the_paper_says():
    sides = [side(q, 0.8, 32, 32) for q in range(10_001)]
    assert sides[0] == sides[10] == round((0.8 * 1024) ** 0.5)
    changes = [q for q in range(1, 10_001) if sides[q] != sides[q - 1]]
    assert changes == [11, 51, 201, 501, 1001, 2001, 4001, 6001, 8001][: len(changes)]
    assert sides[5000] == round((0.8 / 128 * 1024) ** 0.5)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (3, 9), (1, 5), (28, 28)])
def test_sides_fit_the_image(height, width):
    for smallest in (1, 3):
        found = {side(q, 0.8, height, width, smallest) for q in range(5000)}
        assert min(found) >= 1
        assert max(found) <= min(height, width)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7, 29])
def test_bump_is_a_hill_and_a_pit_of_unit_length(size):
    pattern = bump(size)
    assert pattern.norm().item() == pytest.approx(1)
    assert (pattern[: size // 2] > 0).all()
    assert (pattern[size // 2 :] < 0).all()
    half = pattern[size // 2 :]
    assert half.abs().max() == half[half.shape[0] // 2, size // 2].abs()


def walk(f, steps):
    state = {**f.attack.start(f.index, f.x, f.y, f.target.clean(f.x)), "x": f.x, "y": f.y, "index": f.index}
    for _ in range(steps):
        yield state
        owned = {k: state[k] for k in ("x", "y", "index")}
        state = {**f.attack.tell(state, f.target.answer(f.attack.ask(state), f.y)), **owned}


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 9), (40, 4, 4)])
def test_linf_starts_as_stripes_and_changes_one_square(fight, models, shape):
    f = fight("square", models.curved(shape, 3), shape=shape, eps="1/10000", low=0.4, high=0.6, n=40, queries=150)
    f.attack.memory = None
    corners = set()
    for k, state in enumerate(walk(f, 2 * BLOCK + 5)):
        delta = (state["point"] - f.x) / f.threat.radius
        assert torch.allclose(delta.abs(), torch.ones(()), atol=2e-3)
        if k == 0:
            stripes = delta.sign()
            assert (stripes == stripes[:, :, :1]).all()
            assert (stripes != stripes[:, :, :, :1]).any()
            assert 0.4 < (stripes > 0).float().mean() < 0.6
            continue
        changed = (state["point"] != state["held"]).any(1)
        length = side(k - 1, 0.8, *shape[1:])
        down, along = changed.any(2), changed.any(1)
        assert (down.sum(1) <= length).all()
        assert (along.sum(1) <= length).all()
        if k > 100:
            for row in range(40):
                if changed[row].any():
                    corners.add((int(down[row].int().argmax()), int(along[row].int().argmax())))
                    assert (delta[row] * changed[row]).flatten(1).abs().sum() > 0
    length = side(130, 0.8, *shape[1:])
    assert max(c[0] for c in corners) >= shape[1] - length
    assert max(c[1] for c in corners) >= shape[2] - length
    assert min(corners) == (0, 0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 10, 7)])
def test_l2_proposals_stay_on_the_sphere_while_the_box_is_far(fight, models, shape):
    f = fight("square", models.curved(shape, 3), shape=shape, norm="L2", eps="0.01", low=0.4, high=0.6, queries=80)
    moved = False
    for state in walk(f, 70):
        length = f.threat.distance(f.x, state["point"])
        assert torch.allclose(length, torch.tensor(0.01, dtype=torch.float64), rtol=1e-3)
        moved = moved or not torch.equal(state["point"], state["held"])
    assert moved


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_comes_close_to_the_worst_case_of_a_linear_model(fight, models, worst_case, norm):
    eps = {"Linf": "0.004", "L2": "0.03"}[norm]
    f = fight(
        "square", models.linear((1, 6, 6), 3), shape=(1, 6, 6), norm=norm, eps=eps, queries=800, low=0.2, high=0.8
    )
    outcome, exact = f.run(), worst_case(f)
    clean = f.margins(type(outcome).empty(f.x))
    held = ~f.broken(outcome)
    assert held.any()
    share = {"Linf": 0.9, "L2": 0.7}[norm]
    assert ((f.margins(outcome) - clean) >= share * (exact - clean))[held].all()


@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_asking_all_costs_one_forward_for_the_start_and_one_a_proposal(fight, models, norm):
    f = fight("square", models.curved((1, 5, 5), 3), shape=(1, 5, 5), norm=norm, eps="1/100000", queries=70, restarts=2)
    f.attack.memory = None
    outcome = f.run()
    assert not f.broken(outcome).any()
    assert f.attack.passes() == (142, 0)
    assert outcome.forwards.tolist() == [142] * 12
    assert outcome.backwards.tolist() == [0] * 12


def test_standard_cost(fight, models):
    assert fight("square", models.curved((1, 3, 3), 3), shape=(1, 3, 3)).attack.passes() == (5001, 0)


def test_rows_draw_their_own_patches(fight, models):
    f = fight("square", models.curved((1, 8, 8), 3), eps="1/10000", low=0.5, high=0.5, n=10, queries=30)
    for k, state in enumerate(walk(f, 20)):
        if k == 15:
            assert len({tuple(p.flatten().tolist()) for p in (state["point"] - state["held"])}) > 5
