import pytest
import torch
from arena_attacks import foreign

from arena.attack import Unsupported
from arena.engine import run_plain
from arena.errors import ArenaError
from arena.rng import Stream
from arena.surface import Surface
from arena.target import Target
from arena.threat import Threat


def play(function, model, threat, shape=(3, 8, 8), n=9, **options):
    target = Target(model, Surface(), 4, 8)
    x = torch.rand(n, *shape, generator=torch.Generator().manual_seed(1))
    y = target.logits(x).argmax(1)
    stream = Stream.of(0, "foreign")
    outcome = run_plain(function, target, x, y, torch.arange(n), threat, stream, options, chunk=5)
    assert not outcome.error, outcome.trace
    return target, x, y, outcome


@pytest.mark.parametrize(
    ("library", "cls", "norm", "options"),
    [
        ("foolbox", "LinfPGD", "Linf", {"steps": 10}),
        ("foolbox", "L2PGD", "L2", {"steps": 10}),
        ("foolbox", "LinfDeepFoolAttack", "Linf", {}),
        ("foolbox", "InversionAttack", "L2", {}),
        ("art", "SquareAttack", "Linf", {"max_iter": 60}),
        ("art", "SquareAttack", "L2", {"max_iter": 60}),
        ("art", "ProjectedGradientDescent", "Linf", {"max_iter": 5}),
        ("art", "BoundaryAttack", "L2", {"max_iter": 2, "init_size": 5}),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_points_come_back_inside_ball_and_box_and_passes_are_counted(models, library, cls, norm, options):
    threat = Threat.parse(norm, {"Linf": "0.2", "L2": "3"}[norm])
    target, x, y, outcome = play(getattr(foreign, library), models.linear((3, 8, 8), 4), threat, cls=cls, **options)
    assert outcome.attempted.all()
    assert outcome.x_adv.shape == x.shape
    assert outcome.x_adv.dtype == torch.float32
    assert threat.inside(x, outcome.x_adv).all()
    assert ((outcome.x_adv >= 0) & (outcome.x_adv <= 1)).all()
    assert int(outcome.forwards.sum()) > 0
    if cls not in ("InversionAttack", "BoundaryAttack"):
        assert (target.logits(outcome.x_adv).argmax(1) != y).float().mean() > 0.8
    if "Square" not in cls and cls not in ("InversionAttack", "BoundaryAttack"):
        assert int(outcome.backwards.sum()) > 0


@pytest.mark.parametrize(("library", "cls"), [("foolbox", "LinfPGD"), ("art", "SquareAttack")])
def test_equal_seeds_give_equal_points(models, library, cls):
    options = {"steps": 3} if library == "foolbox" else {"max_iter": 10}
    made = [
        play(getattr(foreign, library), models.linear((3, 8, 8), 4), Threat.parse("Linf", "0.01"), cls=cls, **options)
        for _ in range(2)
    ]
    assert torch.equal(made[0][3].x_adv, made[1][3].x_adv)


def test_rows_that_are_not_finite_become_the_clean_image():
    x = torch.rand(3, 1, 2, 2)
    bad = x.clone()
    bad[1, 0, 0, 0] = torch.nan
    bad[2] += 5
    tidy = foreign._tidy(bad, x, Threat.parse("Linf", "0.1"))
    assert torch.equal(tidy[:2], x[:2])
    assert torch.equal(tidy[2], (x[2] + 0.1).clamp(0, 1))


@pytest.mark.parametrize(
    ("library", "cls", "options", "message"),
    [
        ("foolbox", "LinfPGDX", {}, "unknown foolbox attack 'LinfPGDX'; did you mean 'LinfPGD'?"),
        ("foolbox", "LinfPGD", {"stps": 3}, "foolbox:LinfPGD: unknown option 'stps'; did you mean 'steps'?"),
        ("foolbox", "LinfPGD", {"steps": "ten"}, "foolbox:LinfPGD: option 'steps': expected a number, got 'ten'"),
        ("foolbox", "LinfPGD", {"steps": 2.5}, "foolbox:LinfPGD: option 'steps': expected a whole number, got '2.5'"),
        ("foolbox", "Attack", {}, "unknown foolbox attack 'Attack'"),
        ("art", "SquareAtack", {}, "unknown art attack 'SquareAtack'; did you mean 'SquareAttack'?"),
        ("art", "SquareAttack", {"max_iters": 3}, "art:SquareAttack: unknown option 'max_iters'"),
        ("art", "SquareAttack", {"max_iter": -3}, "art:SquareAttack: The argument max_iter has to be"),
        ("art", "PyTorchClassifier", {}, "unknown art attack 'PyTorchClassifier'"),
    ],
)
def test_bad_names_and_options_are_one_line(library, cls, options, message):
    with pytest.raises(ArenaError) as caught:
        foreign.check(library, cls, options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_good_names_pass():
    foreign.check("foolbox", "LinfPGD", {"steps": 40})
    foreign.check("art", "SquareAttack", {"max_iter": 10})


@pytest.mark.parametrize(
    ("library", "cls", "options"), [("foolbox", "L2PGD", {}), ("art", "SquareAttack", {"norm": 2})]
)
def test_a_class_of_another_norm_is_unsupported(models, library, cls, options):
    target = Target(models.linear((1, 4, 4), 3), Surface(), 3)
    x = torch.rand(2, 1, 4, 4)
    with pytest.raises(Unsupported, match="Linf"):
        getattr(foreign, library)(
            target,
            x,
            torch.zeros(2, dtype=torch.int64),
            Threat.parse("Linf", "0.1"),
            None,
            Stream.of(0, "a"),
            cls=cls,
            **options,
        )
