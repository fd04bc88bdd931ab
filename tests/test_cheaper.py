"""The search copy's laws: what is folded is what the eager model is, and what cannot be folded is left."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from arena import cheaper
from arena.attack import Query, Setup
from arena.backbones import DatasetInfo
from arena.cheaper import GRADIENT_TOLERANCE, TOLERANCE, make_cheaper
from arena.comparing import differences, modes
from arena.contender import seeded
from arena.engine import run_iterated
from arena.folding import fold
from arena.objectives import margin
from arena.plugins import registry
from arena.referee import Referee
from arena.rng import Stream
from arena.selection import Mode, Select
from arena.specs import complete, load
from arena.surface import Gate, Head, Knob, Selection, Surface
from arena.surrogate import Surrogate
from arena.target import Target
from arena.threat import Threat

BACKBONES = {"cnn": 8, "resnet_small": 8, "resnet18": 8, "vgg16": 8, "wrn34_10": 1}
#: One defense of each family: every module that is built in, with the recipe that comes first.
FAMILIES = {s.spec.module: s.spec.name for s in reversed(registry().all("defense"))}


def lived(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and weights as after training; fresh ones fold into nothing."""
    generator = torch.Generator().manual_seed(1)
    for m in model.modules():
        if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor, low, high in ((m.running_mean, -0.3, 0.3), (m.running_var, 0.5, 2), (m.weight, 0.5, 1.5)):
                if tensor is not None:
                    tensor.data.uniform_(low, high, generator=generator)
            if m.bias is not None:
                m.bias.data.uniform_(-0.2, 0.2, generator=generator)
    return model.eval().requires_grad_(False)


def backbone(name: str, shape: tuple[int, int, int], width: int) -> nn.Module:
    with seeded(0):
        return load(registry().get("backbone", name).spec.build)(shape, 10, width=width)


def defense(name: str, inner: str = "cnn", shape=(1, 8, 8), width: int = 8) -> nn.Module:
    spec, base = registry().get("defense", name).spec, registry().get("backbone", inner).spec
    info = DatasetInfo("digits", shape, 10, inner, tuple(base.slots))
    model = backbone(inner, shape, width)
    with seeded(0):
        return lived(load(spec.build)(model, info, **complete(name, spec.options, {})))


def images(shape=(1, 8, 8), n: int = 32) -> torch.Tensor:
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(5))


def norms(model: nn.Module) -> int:
    return sum(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", BACKBONES)
def test_folded_backbones_are_the_eager_ones(name):
    def build() -> nn.Module:
        return lived(backbone(name, (3, 32, 32), BACKBONES[name]))

    model, done = make_cheaper(build, Surface(), images((3, 32, 32)))
    assert done.note == ""
    assert done.channels_last
    before_activation = name == "wrn34_10"  # its norms stand before the convolutions, so the first of a block may stay
    assert 0 < done.folded <= norms(build())
    assert (norms(model) == 0) != before_activation
    x = images((3, 32, 32), 64)  # twice as many as were compared
    gap, slope = differences(build(), model, Surface(), x)
    assert gap < TOLERANCE
    assert slope < GRADIENT_TOLERANCE


@pytest.mark.parametrize("module", FAMILIES)
def test_folded_defenses_are_the_eager_ones_in_every_mode(module):
    name = FAMILIES[module]
    spec = registry().get("defense", name).spec
    surface = load(spec.surface)(defense(name)) if spec.surface else Surface()
    model, done = make_cheaper(lambda: defense(name), surface, images())
    if surface.random:
        assert "cannot be compared" in done.note
        assert norms(model) == norms(defense(name))
        return
    assert done.note == ""
    assert (done.folded > 0) == (module not in ("afa", "oat"))  # whose convolutions are followed by two norms each
    gap, slope = differences(defense(name), model, surface, images(n=64))
    assert gap < TOLERANCE
    assert slope < GRADIENT_TOLERANCE
    assert len(modes(model, surface, 8)) > len(surface.selections)


class Odd(nn.Module):
    """Pairs that look foldable, of which only the last is."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm_of_read = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.twice, self.norm_of_twice = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.used, self.norm_of_used = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.tied, self.norm_of_tied = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.shared, self.first, self.second = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.apart, self.norm_of_apart = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.scores, self.norm_of_scores = nn.Linear(64, 4), nn.BatchNorm1d(4)
        self.last, self.norm_of_last = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.head = nn.Linear(64, 4)

    def forward(self, x):
        a = self.norm_of_read(self.read(x)).relu()
        a = self.norm_of_twice(self.twice(a)).relu()
        a = self.norm_of_twice(self.twice(a)).relu()  # each called twice
        b = self.used(a)
        a = self.norm_of_used(b).relu() + b  # what the norm takes goes on past it
        a = self.norm_of_tied(F.conv2d(self.tied(a), self.tied.weight, padding=1)).relu()  # the weights are read
        b = self.shared(a)
        a = (self.first(b) + self.second(b)).relu()  # two norms of one layer
        a = self.norm_of_apart(self.apart(a) * 2).relu()  # something in between
        s = self.norm_of_scores(self.scores(a.flatten(1)))
        a = self.norm_of_last(self.last(a)).relu()
        return self.head(a.flatten(1)) + s


def odd() -> nn.Module:
    with seeded(3):
        return lived(Odd())


ODD = Surface(heads={"s": Head("scores")})


def test_only_what_really_follows_is_folded():
    x = images((1, 4, 4))
    model = odd()
    plain = Surface()
    assert fold(model, plain, x[:8]) == 3
    gone = {k for k, m in model.named_modules() if type(m) is nn.Identity}
    assert gone == {"norm_of_read", "norm_of_scores", "norm_of_last"}
    assert differences(odd(), model, plain, x)[0] < TOLERANCE


def test_what_the_surface_names_stays():
    x = images((1, 4, 4))
    model = odd()
    assert fold(model, ODD, x[:8]) == 2
    assert type(model.norm_of_scores) is nn.BatchNorm1d
    assert differences(odd(), model, ODD, x)[0] < TOLERANCE
    named = Surface(
        heads={"s": Head("norm_of_scores")},
        gates={"g": Gate("norm_of_read", shape="element")},
        knobs={"k": Knob("last", "padding_mode", "constant")},
    )
    assert fold(odd(), named, x[:8]) == 0


def test_a_head_that_wraps_what_a_norm_takes_stays_right():
    """The head is a container whose output is the linear layer's own tensor: no path names the layer."""

    def build() -> nn.Module:
        model = odd()
        model.scores = nn.Sequential(model.scores)
        return model

    model, done = make_cheaper(build, ODD, images((1, 4, 4)))
    assert (done.folded, done.note) == (2, "")
    assert differences(build(), model, ODD, images((1, 4, 4), 64))[0] < TOLERANCE


class Turns(nn.Module):
    """A choice decides whether a norm or something else follows a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Linear(64, 4)
        self.scores, self.select = nn.Linear(16, 2), Select()
        self.table = nn.Parameter(torch.tensor([[1.0], [0.5]]))

    def forward(self, x):
        a = self.conv(x)
        chosen = self.select(self.scores(x.flatten(1)), self.table)
        b = self.norm(a) if self.select.mode.kind == "hard" else a
        return self.head((b * chosen[:, :, None, None]).relu().flatten(1))


def test_every_mode_is_looked_at():
    def build() -> nn.Module:
        with seeded(0):
            return lived(Turns())

    surface = Surface(heads={"s": Head("scores", output=None)}, selections={"c": Selection("select")})
    surface = Surface(selections=surface.selections)
    x = images((1, 4, 4))
    assert fold(build(), Surface(), x[:8]) == 1  # nobody said that there is a choice
    assert fold(build(), surface, x[:8]) == 0


class Minds(nn.Module):
    """Works only while its norm is a norm."""

    def __init__(self, loud: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.head, self.loud = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(16, 3), loud

    def forward(self, x):
        a = self.norm(self.conv(x))
        if self.loud:
            assert self.norm.num_features == 4
        scale = 1.0 if isinstance(self.norm, nn.BatchNorm2d) else 1.01
        return self.head(a.relu().flatten(1)) * scale


@pytest.mark.parametrize(("loud", "said"), [(True, "failed: AttributeError"), (False, "differs from the eager model")])
def test_a_copy_that_differs_is_not_used_and_the_record_says_so(loud, said):
    def build() -> nn.Module:
        with seeded(0):
            return lived(Minds(loud))

    x = images((1, 4, 4))
    model, done = make_cheaper(build, Surface(), x)
    assert (done.folded, done.channels_last) == (0, False)
    assert said in done.note
    assert torch.equal(model(x), build()(x))


def test_training_statistics_and_hooks_stay_unfolded():
    x = images((1, 4, 4))
    live = odd()
    live.norm_of_last.training = True
    live.norm_of_read.register_forward_hook(lambda *_: None)
    live.scores.register_forward_hook(lambda *_: None)
    assert fold(live, Surface(), x[:8]) == 0


# -- attacks on it ----------------------------------------------------------------------------------------------


def attacked(model: nn.Module, name: str, x, y, batch_size: int = 64, precision: str = "fp32"):
    threat, index = Threat.parse("Linf", "0.1"), torch.arange(len(y))
    spec = registry().get("attack", name).spec
    setup = Setup(threat, 10, Surface(), tuple(x.shape[1:]), Stream.of(0, name))
    attack = load(spec.iterate)(setup, **complete(name, spec.options, {"steps": 20}))
    target = Target(model, Surface(), 10, batch_size, precision=precision)
    return run_iterated(attack, target, x, y, index), target


def separated(n: int = 64):
    """A net with folded norms at work, points, its own labels, and the referee's word on the attacks' results."""
    model = lived(backbone("resnet_small", (1, 8, 8), 8))
    x = images(n=n)
    with torch.no_grad():
        y = model(x).argmax(1)
    return x, y, Referee(model, Threat.parse("Linf", "0.1"))


@pytest.mark.parametrize("name", ["pgd", "apgd_ce"])
def test_attacks_on_the_folded_copy_break_the_same_points(name):
    x, y, referee = separated()
    index = torch.arange(len(y))

    def build() -> nn.Module:
        return lived(backbone("resnet_small", (1, 8, 8), 8))

    model, done = make_cheaper(build, Surface(), x)
    assert done.folded == norms(build())
    eager, folded = (
        referee.judge(x, attacked(m, name, x, y)[0].x_adv, y, index) for m in (build().requires_grad_(False), model)
    )
    assert 5 < int(eager.broken.sum()) < 59
    odd_ones = eager.broken != folded.broken
    near = torch.minimum(eager.margin.abs(), folded.margin.abs()) < 1e-2
    assert not bool((odd_ones & ~near).any())
    assert int(odd_ones.sum()) <= 1


@pytest.mark.parametrize("name", ["pgd", "apgd_ce"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 32)])
def test_batch_sizes_change_no_outcome_on_the_cheaper_copy(name, shape):
    def build() -> nn.Module:
        return lived(backbone("cnn", shape, 8))

    x = images(shape, 48)
    model, done = make_cheaper(build, Surface(), x)
    assert done.folded == 4
    assert done.channels_last == (shape[0] == 3)
    with torch.no_grad():
        y = model(x).argmax(1)
    found = [attacked(model, name, x, y, size)[0] for size in (8, 24, 48, 512)]
    for other in found[1:]:
        assert torch.equal(other.x_adv, found[0].x_adv)
        assert torch.equal(other.forwards, found[0].forwards)


def test_no_weight_gets_a_gradient_and_one_forward_gives_value_and_gradient():
    x = images()
    model = lived(backbone("cnn", (1, 8, 8), 8)).requires_grad_(True)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    target = Target(model, Surface(), 10, 64)
    answer = target.answer(Query(x.unsqueeze(1), "ce", grad=True), torch.zeros(32, dtype=torch.int64))
    assert len(calls) == 1
    assert bool((answer.grad != 0).any())
    assert bool((answer.values != 0).all())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())


# -- bf16 -------------------------------------------------------------------------------------------------------


def test_bf16_passes_are_in_bf16_and_what_is_read_is_fp32():
    x = images()
    model = lived(backbone("cnn", (1, 8, 8), 8))
    seen = []
    model.block2.conv.register_forward_hook(lambda _m, _i, out: seen.append(out.dtype))
    target = Target(model, Surface(), 10, 64, precision="bf16")
    query = Query(x.unsqueeze(1), "ce", grad=True, counts=torch.zeros(32, dtype=torch.bool))
    answer = target.answer(query, torch.zeros(32, dtype=torch.int64))
    assert answer.logits.dtype == answer.grad.dtype == answer.values.dtype == torch.float32
    with target.in_fp32():
        exact = target.answer(query, torch.zeros(32, dtype=torch.int64))
    assert seen == [torch.bfloat16, torch.float32]
    assert not torch.equal(answer.logits, exact.logits)
    assert torch.allclose(answer.logits, exact.logits, atol=0.1)


def test_a_mistake_that_bf16_sees_is_fp32s_word_where_it_counts():
    x = images()
    target = Target(lived(backbone("cnn", (1, 8, 8), 8)), Surface(), 10, 16, precision="bf16")
    with target.in_fp32():
        exact = target.logits(x)
    y = exact.argmax(1)
    y[::2] = (y[::2] + 1) % 10  # half of them are mistakes
    count = torch.arange(32) % 4 < 2
    query = Query(torch.stack((x, x), 1), "margin", counts=count)
    before = target.meter.forwards
    answer = target.answer(query, y)
    assert answer.again.tolist() == (2 * (count & (exact.argmax(1) != y))).tolist()
    assert target.meter.forwards - before == 64 + int(answer.again.sum())
    seen = (answer.logits == exact.unsqueeze(1)).all(2)
    assert torch.equal(seen[:, 0], answer.again > 0)
    assert torch.equal(answer.values[:, 0] == margin(exact, y), answer.again > 0)
    with target.in_fp32():
        assert target.answer(replace(query, counts=None), y).again is None


@pytest.mark.parametrize("grad", [False, True, torch.arange(32) < 9])
def test_what_is_told_of_a_mistake_that_fp32_denies_is_all_fp32s(liar, grad):
    name = "fgaa_sat"
    model = defense(name)
    surface = load(registry().get("defense", name).spec.surface)(model)
    x, weights = images(), torch.ones(32, 1 + len(surface.heads))
    target = liar(model, surface, 10, 16, precision="bf16")
    with target.in_fp32():
        y = target.logits(x).argmax(1)
        query = Query(torch.stack((x, x), 1), "margin", weights, grad=grad)
        exact = target.answer(query, y)
    answer = target.answer(query, y)
    assert answer.again.tolist() == [2] * 32
    assert not answer.errors.any()
    for name in ("values", "logits", "errors", "scores"):
        assert torch.equal(getattr(answer, name), getattr(exact, name))
    mode = Surrogate(modes={next(iter(surface.selections)): Mode("soft")})
    posed = target.answer(replace(query, grad=False, surrogate=mode), y)
    assert torch.equal(posed.logits, exact.logits)  # the model's own
    assert not torch.equal(posed.values, exact.values)  # the surrogate's


def test_scores_of_a_search_in_bf16_do_not_tie():
    def build() -> nn.Module:
        return lived(backbone("cnn", (1, 8, 8), 8))

    model, done = make_cheaper(build, Surface(), images(), "bf16")
    assert done.precision == "bf16"
    target = Target(model, Surface(), 10, precision="bf16")
    scores = target.logits(images())
    assert not torch.equal(scores, scores.bfloat16().float())
    coarse = Target(make_cheaper(build, Surface(), images())[0], Surface(), 10, precision="bf16").logits(images())
    assert torch.equal(coarse, coarse.bfloat16().float())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_scores_of_another_type_are_left_as_they_are(dtype):
    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.head = lived(backbone("cnn", (1, 8, 8), 8)), nn.Linear(10, 10).to(dtype)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.head(self.net(x).to(dtype)).float()

    def build() -> nn.Module:
        with seeded(0):
            return Cast().eval()

    model, done = make_cheaper(build, Surface(), images(), "bf16")
    assert (done.precision, done.note) == ("bf16", "")
    assert torch.isfinite(Target(model, Surface(), 10, precision="bf16").logits(images())).all()


@pytest.mark.parametrize("tiles", [False, True])
def test_small_pictures_are_channels_last_in_bf16_where_the_cpu_has_tiles(monkeypatch, tiles):
    def build() -> nn.Module:
        return lived(backbone("cnn", (1, 8, 8), 8))

    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": tiles}, raising=False)
    made = {p: make_cheaper(build, Surface(), images(), p)[1].channels_last for p in ("fp32", "bf16")}
    assert made == {"fp32": False, "bf16": tiles}
    monkeypatch.setattr(cheaper, "_bf16_differs", lambda *_: "it does")
    done = make_cheaper(build, Surface(), images(), "bf16")[1]
    assert (done.precision, done.channels_last, done.note) == ("fp32", False, "searched in fp32, not bf16: it does")


def test_surrogates_are_read_in_bf16_too():
    name = "fgaa_sat"
    model = defense(name)
    surface = load(registry().get("defense", name).spec.surface)(model)
    mode = modes(model, surface, 32)[1]
    assert isinstance(mode, Surrogate)
    target = Target(model, surface, 10, 64, precision="bf16")
    answer = target.answer(
        Query(images().unsqueeze(1), "ce", grad=True, surrogate=mode), torch.zeros(32, dtype=torch.int64)
    )
    assert torch.isfinite(answer.grad).all()


def test_a_random_or_shaky_model_searches_in_fp32(monkeypatch):
    def build() -> nn.Module:
        return lived(backbone("cnn", (1, 8, 8), 8))

    assert make_cheaper(build, Surface(), images(), "bf16")[1].precision == "bf16"
    done = make_cheaper(build, Surface(random=True), images(), "bf16")[1]
    assert done.precision == "fp32"
    assert "searched in fp32, not bf16: the model is random" in done.note
    monkeypatch.setattr(cheaper, "BF16_TOLERANCE", 1e-6)
    done = make_cheaper(build, Surface(), images(), "bf16")[1]
    assert done.precision == "fp32"
    assert "of the probe's scores differ" in done.note
