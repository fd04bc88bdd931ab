"""Laws every native attack keeps, whatever it does."""

import io
from dataclasses import replace

import pytest
import torch
from arena_attacks.square import Square
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SHORT = {
    "fgsm": {"random_start": True},
    "pgd": {"steps": 4, "restarts": 2},
    "cw_linf": {"steps": 4},
    "lambda_pgd": {"steps": 4, "lam": 2.0, "loss": "margin", "restarts": 2},
    "apgd_ce": {"steps": 12, "restarts": 2},
    "apgd_dlr": {"steps": 12, "head": "early"},
    "apgd_t": {"steps": 9, "targets": 3, "restarts": 2},
    "fab_t": {"steps": 6, "targets": 3, "restarts": 2},
    "staged": {"lanes": 3, "look": 3, "glance": 3, "steps": 5, "search": 3, "rounds": 3, "hope": float("inf")},
    "square": {"queries": 75, "restarts": 2},
    "nes": {"steps": 4, "pairs": 5, "restarts": 2},
    "rays": {"queries": 60},
}
#: These need more of a surface than heads. After a comma: another way of the same attack.
SURROGATE = {
    "gate_pgd": {"steps": 4, "restarts": 2, "b": 2.0, "loss": "margin"},
    "gate_held": {"steps": 4, "restarts": 2, "value": 0.25},
    "relaxed": {"steps": 12, "restarts": 2},
    "forced": {"steps": 9, "targets": 2},
    "gate_pgd, near": {"steps": 4, "restarts": 2, "start": "rounded", "shrink": 0.5},
    "gate_held, near": {"steps": 4, "start": "fgsm", "shrink": 0.25},
    "forced, pair": {"steps": 9, "targets": 2, "place": "behind"},
    "knob": {"steps": 9, "loss": "dlr_targeted", "targets": 2},
    "joint_t": {"steps": 9, "targets": 2, "weights": "order"},
    "steer": {"steps": 9, "targets": 2, "restarts": 2},
}
SHORT |= SURROGATE
WAYS = {"tangent": ("Linf", "L2"), "tanh": ("Linf", "L2"), "box": ("L2",)}
EVERY = [(name, norm) for name in SHORT for norm in ("Linf", "L2") if (name, norm) != ("cw_linf", "L2")]


def make(fight, models, name, norm, *, shape=(1, 6, 6), classes=4, eps=None, random=False, **keywords):
    eps = eps or {"Linf": "0.02", "L2": "0.08"}[norm]
    rich = name in SURROGATE
    model, surface = (models.rich, models.full) if rich else (models.curved, models.headed)
    if random:
        surface = replace(surface, random=True)
    keywords = SHORT[name] | keywords
    return fight(
        name.partition(",")[0], model(shape, classes), shape=shape, norm=norm, eps=eps, surface=surface, **keywords
    )


def stepwise(f, rows, stop=None):
    """Drive rows without the engine; at ``stop`` tells, write the state to a file and read it back."""
    state = f.attack.start(f.index[rows], f.x[rows], f.y[rows], f.target.clean(f.x[rows]))
    owned = {"x": f.x[rows], "y": f.y[rows], "index": f.index[rows]}
    state = {**state, **owned}
    outcome, told = {}, 0
    while True:
        if told == stop:
            file = io.BytesIO()
            torch.save(state, file)
            file.seek(0)
            state = torch.load(file, weights_only=True)
        before = {k: v.clone() for k, v in state.items()}
        query = f.attack.ask(state)
        answer = f.target.answer(query, state["y"])
        new = f.attack.tell(state, answer)
        assert all(torch.equal(v, state[k]) for k, v in before.items()), "tell changed its argument"
        assert {k: v.dtype for k, v in new.items()} == {k: v.dtype for k, v in state.items()}
        assert {k: v.shape for k, v in new.items()} == {k: v.shape for k, v in state.items()}
        state, told = new, told + 1
        for k in state["done"].nonzero().flatten().tolist():
            outcome.setdefault(int(state["index"][k]), state["best"][k])
        if len(outcome) == len(rows):
            return torch.stack([outcome[int(i)] for i in f.index[rows]]), told
        keep = (~state["done"]).nonzero().flatten()
        state = {k: v[keep] for k, v in state.items()}


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_outcomes_do_not_depend_on_company(fight, models, name, norm):
    f = make(fight, models, name, norm, n=19)
    whole = f.run()
    order = torch.randperm(19, generator=torch.Generator().manual_seed(5))
    assert torch.equal(f.run(order).x_adv, whole.x_adv[order])
    assert torch.equal(f.run(order).forwards, whole.forwards[order])
    small = make(fight, models, name, norm, n=19, batch_size=8)
    assert torch.equal(small.run().x_adv, whole.x_adv)
    for k in (0, 7):
        alone = f.run(torch.tensor([k]))
        assert torch.equal(alone.x_adv[0], whole.x_adv[k])
        assert alone.forwards[0] == whole.forwards[k]


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_a_state_read_back_from_a_file_goes_on_as_if_nothing_happened(fight, models, name, norm):
    f = make(fight, models, name, norm, n=6, eps="1/500")
    rows = torch.arange(6)
    whole, told = stepwise(f, rows)
    for stop in sorted({0, 1, 2, told // 3, told // 2, told - 1}):
        again, _ = stepwise(f, rows, stop)
        assert torch.equal(again, whole)


def asking_all(f):
    """Let square ask for proposals whose answer is known too (tests/attacks/test_square_memory.py)."""
    if isinstance(f.attack, Square):
        f.attack.memory = None
    return f


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_unbroken_rows_cost_exactly_what_passes_says(fight, models, name, norm):
    f = asking_all(make(fight, models, name, norm, eps="1/1000000"))
    outcome = f.run()
    assert not f.broken(outcome).any()
    assert (outcome.forwards == f.attack.passes()[0]).all()
    assert (outcome.backwards == f.attack.passes()[1]).all()


@pytest.mark.parametrize(("name", "norm"), EVERY)
def test_no_row_leaves_for_a_mistake_that_bf16_alone_sees(fight, models, liar, name, norm):
    f = asking_all(make(fight, models, name, norm, eps="1/1000000"))
    f.target = liar(f.target.model, f.target.surface, f.target.n_classes, 64, precision="bf16")
    outcome = f.run()
    assert not outcome.error, outcome.trace
    assert (outcome.forwards == f.attack.passes()[0]).all()
    assert (outcome.again > 0).all()
    assert (outcome.again <= outcome.forwards).all()
    small = asking_all(make(fight, models, name, norm, eps="1/1000000"))
    small.target = liar(f.target.model, f.target.surface, f.target.n_classes, 16, precision="bf16")
    assert torch.equal(small.run(torch.arange(3)).again, outcome.again[:3])


@pytest.mark.parametrize("name", SHORT)
def test_for_random_models_the_bound_on_forwards_is_exact_too(fight, models, name):
    f = make(fight, models, name, "Linf", eps="1/1000000", n=5, random=True)
    outcome = f.run(draws=3)
    assert (outcome.forwards == outcome.most).all()


@pytest.mark.parametrize(("name", "norm"), EVERY)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.sampled_from([(1, 4, 4), (3, 3, 7), (1, 1, 5), (3, 6, 2)]),
    classes=st.sampled_from([2, 3, 4, 10]),
    eps=st.sampled_from(["0", "1/100000", "8/255", "0.3", "1"]),
    n=st.sampled_from([1, 5]),
)
def test_points_stay_in_ball_and_box(fight, models, name, norm, shape, classes, eps, n):
    f = make(fight, models, name, norm, shape=shape, classes=classes, eps=eps, n=n)
    f.x[0, 0, 0, 0], f.x[-1, 0, -1, -1] = 0.0, 1.0
    outcome = f.run()
    assert not outcome.error, outcome.trace
    assert outcome.attempted.all()
    assert torch.isfinite(outcome.x_adv).all()
    assert f.threat.inside(f.x, outcome.x_adv).all()
    assert ((outcome.x_adv >= 0) & (outcome.x_adv <= 1)).all()
    assert (outcome.forwards <= f.attack.passes()[0]).all()
    assert (outcome.backwards <= f.attack.passes()[1]).all()


class Trap(torch.nn.Module):
    """Answers 0, except where the upper left corner is bright: there 1. The slope leads there."""

    def forward(self, x):
        bright = x[:, 0, :3, :3].mean((1, 2))
        flat = torch.zeros_like(bright)
        return torch.stack((flat + 0.25, bright - 0.3, flat - 1, flat - 2), dim=1)


@pytest.mark.parametrize(
    ("name", "norm"),
    [e for e in EVERY if e[0] not in ("lambda_pgd", *SURROGATE) and "early" not in SHORT[e[0]].values()],
)
def test_a_planted_adversarial_is_found_and_the_row_leaves_at_once(fight, name, norm):
    longer = {
        "fgsm": {"random_start": False},
        "square": {"queries": 500},
        "rays": {"queries": 400},
        "nes": {"pairs": 16, "steps": 20},
    }
    options = SHORT[name] | longer.get(name, {"steps": 12})
    eps = {"Linf": "0.2", "L2": "0.8"}[norm]
    f = fight(name, Trap(), shape=(1, 4, 4), norm=norm, eps=eps, low=0.4, high=0.5, n=9, **options)
    outcome = f.run()
    assert f.broken(outcome).all()
    assert (outcome.x_adv[:, 0, :3, :3].mean((1, 2)) > 0.55).all()
    if name != "fgsm":
        assert (outcome.forwards < f.attack.passes()[0]).all()


class Odd(torch.nn.Module):
    """Linear, but its gradient is not a number where the first pixel is dark."""

    def forward(self, x):
        poison = torch.where(x[:, 0, 0, 0] < 0.45, torch.sqrt(x[:, 0, 0, 0] * 0), 0.0)
        flat = x.flatten(1)
        return torch.stack((flat.mean(1) + poison + 1, flat[:, 1] - poison, flat[:, 2]), dim=1)


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "apgd_t", "fab_t"])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_gradients_that_are_no_numbers_do_no_harm(fight, name, norm):
    f = fight(name, Odd(), shape=(1, 3, 3), norm=norm, eps="0.01", low=0.4, high=0.5, n=9, **SHORT[name])
    f.y[:] = 0
    outcome = f.run()
    assert torch.isfinite(outcome.x_adv).all()
    assert f.threat.inside(f.x, outcome.x_adv).all()


@pytest.mark.parametrize(("way", "norm"), [(way, norm) for way, norms in WAYS.items() for norm in norms])
def test_ways_to_step_keep_the_laws(fight, models, way, norm):
    f = make(fight, models, "pgd", norm, n=11, way=way, shape=(2, 5, 3))
    f.x[::2, :, 0] = 0.0
    whole = f.run()
    assert f.threat.inside(f.x, whole.x_adv).all()
    assert not torch.equal(whole.x_adv, make(fight, models, "pgd", norm, n=11, shape=(2, 5, 3)).run().x_adv)
    for k in (0, 7):
        assert torch.equal(f.run(torch.tensor([k])).x_adv[0], whole.x_adv[k])
    planted = fight(
        "pgd",
        Trap(),
        shape=(1, 4, 4),
        norm=norm,
        eps={"Linf": "0.2", "L2": "0.8"}[norm],
        low=0.4,
        high=0.5,
        n=9,
        steps=12,
        way=way,
    )
    if way != "tangent":  # the trap is brightness, which a tangential step never climbs
        assert planted.broken(planted.run()).all()


class Hole(torch.nn.Module):
    """Class 0 everywhere, and no finite logits where a pixel is bright."""

    def forward(self, x):
        bright = x.flatten(1).amax(1, keepdim=True)
        logits = torch.cat((bright, -bright), 1)
        return logits.masked_fill(bright > 0.5, torch.nan)


@pytest.mark.parametrize("name", ["pgd", "apgd_ce", "square", "rays"])
def test_a_point_without_finite_logits_is_handed_over(fight, name):
    f = fight(name, Hole(), shape=(1, 3, 3), eps="0.2", low=0.4, high=0.45, n=9, **SHORT[name])
    outcome = f.run()
    assert (f.y == 0).all()  # where a missing class would read as 0 too
    assert not torch.isfinite(f.target.logits(outcome.x_adv)).any()
