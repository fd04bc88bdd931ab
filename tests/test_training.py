"""The loop: learns, resumes to the same weights, disturbs nothing, says when it diverges."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import arena.threads
import arena.training
from arena import trace
from arena.augment import augment
from arena.datasets import Images, to_float
from arena.errors import ArenaError
from arena.schedule import Schedule
from arena.specs import Preset
from arena.surface import Head, Reader, Surface
from arena.threat import Threat
from arena.training import Context, Usual, fit, rate, split
from arena.validation import judge
from arena.watch import Silent

CPU = torch.device("cpu")
THREAT = Threat("Linf", "0.05")
PRESET = Preset(6, batch=8, lr=0.1, steps=2, augment="shift")


class Net(nn.Module):
    """Has every kind of state a resume must carry: batch statistics, dropout's random numbers, momentum."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2))
        self.out = nn.Linear(12, 3)
        if head:
            self.head = nn.Linear(12, 3)

    def forward(self, x):
        a = self.body(x)
        if hasattr(self, "head"):
            self.head(a)
        return self.out(a)


SURFACE = Surface(heads={"head": Head("head")})


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return Net()


@dataclass
class Kill(Silent):
    """Stops training after an epoch, as Ctrl-C does."""

    after: int = 10**9
    seen: list[tuple[int, str]] = field(default_factory=list)
    phases: list[tuple[Any, ...]] = field(default_factory=list)

    def phase(self, name: str, total: int, unit: str) -> None:
        self.phases.append((name, total, unit))

    def advance(self, done: int, note: str = "") -> None:
        self.seen.append((done, note))
        if done == self.after and note != "resumed":
            raise KeyboardInterrupt


def train(images, folder: Path, *, stages=None, watch=None, preset=PRESET, model=None, seed=0, **more):
    model = model or net()
    folder.mkdir(parents=True, exist_ok=True)
    fitted = fit(
        model,
        stages if stages is not None else [Usual("sat", lam=0.5)],
        images,
        preset,
        THREAT,
        name="test",
        surface=SURFACE,
        train_seed=seed,
        folder=folder,
        device=CPU,
        watch=watch or Silent(),
        save_every=0.0,
        **more,
    )
    return model, fitted


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return set(a) == set(b) and all(torch.equal(a[k], b[k]) for k in a)


@dataclass(frozen=True)
class Slow(Usual):
    """A stage with a rate, a number of steps and milestones of its own."""

    def preset(self, preset: Preset) -> Preset:
        return replace(preset, lr=preset.lr / 4, steps=0, milestones=(1,), decay=0.5)


def test_a_stage_may_have_settings_of_its_own(tiny_images, tmp_path, monkeypatch):
    seen = []
    step = torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        seen.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    preset = replace(PRESET, epochs=2, batch=27, milestones=(9,))
    train(tiny_images, tmp_path, stages=[Usual("sat"), Slow("sat"), Usual("rt")], preset=preset)
    assert seen == pytest.approx([0.1, 0.1, 0.025, 0.0125, 0.1, 0.1])


def test_it_learns_and_reports(tiny_images, tmp_path):
    watch = Kill()
    model, fitted = train(tiny_images, tmp_path, watch=watch, preset=replace(PRESET, epochs=25, augment="none"))
    with torch.no_grad():
        right = model(to_float(tiny_images.x_test)).argmax(1) == tiny_images.y_test
    assert right.float().mean() > 0.9
    assert not model.training
    assert fitted.history[-1]["loss"] < fitted.history[0]["loss"] / 2
    assert {"loss", "main", "heads", "natural", "pgd", "epoch", "stage"} <= set(fitted.history[-1])
    assert fitted.best["pgd"] == max(h["pgd"] for h in fitted.history if "pgd" in h)
    assert watch.phases == [("train test", 25, "epochs")]
    assert [d for d, _ in watch.seen] == list(range(1, 26))
    assert watch.seen[-1][1].startswith("natural ")
    assert same(weights(tmp_path, "last"), model.state_dict())


def test_the_best_file_holds_the_epoch_with_the_best_score(tiny_images, tmp_path, monkeypatch):
    scores = iter([10.0, 50.0, 30.0, 50.0, 40.0, 20.0])
    monkeypatch.setattr(arena.training, "judge", lambda *a, **k: {"natural": 90.0, "pgd": next(scores)})
    model = net()
    states = []

    class Copy(Silent):
        def advance(self, done: int, note: str = "") -> None:
            states.append({k: v.clone() for k, v in model.state_dict().items()})

    _, fitted = train(tiny_images, tmp_path, model=model, watch=Copy())
    assert (fitted.best["epoch"], fitted.best["pgd"]) == (4, 50.0)
    assert same(weights(tmp_path, "best"), states[3])
    assert same(weights(tmp_path, "last"), states[5])


def test_equal_seeds_equal_weights_other_seeds_others(tiny_images, tmp_path):
    a, _ = train(tiny_images, tmp_path / "a")
    torch.manual_seed(12345)  # the caller's generator does not matter
    b, _ = train(tiny_images, tmp_path / "b")
    c, _ = train(tiny_images, tmp_path / "c", seed=1)
    assert same(a.state_dict(), b.state_dict())
    assert not same(a.state_dict(), c.state_dict())


def test_the_number_of_threads_neither_matters_nor_changes(tiny_images, tmp_path):
    before = torch.get_num_threads()
    made = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made.append(train(tiny_images, tmp_path / str(threads)))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert same(made[0][0].state_dict(), made[1][0].state_dict())
    assert [fitted.threads for _, fitted in made] == [1, 1]


def test_the_global_generator_is_left_alone(tiny_images, tmp_path):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    train(tiny_images, tmp_path)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("recipe", ["sat", "mart"])
@pytest.mark.parametrize("kills", [(1,), (3,), (2, 4, 5)])
def test_a_killed_training_ends_with_the_weights_of_an_unbroken_one(tiny_images, tmp_path, recipe, kills):
    stages = [Usual(recipe, lam=0.5, beta=2.0)]
    _, whole = train(tiny_images, tmp_path / "whole", stages=stages)
    broken = tmp_path / "broken"
    for epoch in kills:
        with pytest.raises(KeyboardInterrupt):
            train(tiny_images, broken, stages=stages, watch=Kill(after=epoch))
    watch = Kill()
    _, fitted = train(tiny_images, broken, stages=stages, watch=watch)
    if kills[-1] > 1:  # the first kill comes before anything was saved
        assert watch.seen[0][1] == "resumed"
    assert len(watch.seen) < 6 + 1
    for name in ("best", "last"):
        assert same(weights(broken, name), weights(tmp_path / "whole", name))
    assert fitted.history == whole.history
    assert fitted.best == whole.best


def test_stages_follow_each_other_and_resume_across_the_border(tiny_images, tmp_path):
    stages = [Usual("rt", lam=0.5), Usual("sat", lam=0.5)]
    preset = replace(PRESET, epochs=3)
    _, whole = train(tiny_images, tmp_path / "whole", stages=stages, preset=preset)
    assert [(h["stage"], h["epoch"]) for h in whole.history] == [(s, e) for s in (0, 1) for e in (1, 2, 3)]
    assert whole.best["stage"] == 1
    for epoch in (3, 4, 5):
        broken = tmp_path / f"broken{epoch}"
        with pytest.raises(KeyboardInterrupt):
            train(tiny_images, broken, stages=stages, preset=preset, watch=Kill(after=epoch))
        _, again = train(tiny_images, broken, stages=stages, preset=preset)
        assert again.history == whole.history
        assert same(weights(broken, "last"), weights(tmp_path / "whole", "last"))


@dataclass(frozen=True)
class OnlyHead(Usual):
    """A stage that trains one part of the model."""

    def trainable(self, model):
        return model.head.parameters()


def test_frozen_parameters_stay_and_thaw(tiny_images, tmp_path):
    model = net()
    before = {k: v.clone() for k, v in model.named_parameters()}
    train(tiny_images, tmp_path, stages=[OnlyHead("rt", lam=1.0)], model=model)
    changed = {k for k, v in model.named_parameters() if not torch.equal(v, before[k])}
    assert changed == {"head.weight", "head.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_no_stage_at_all_is_a_recipe(tiny_images, tmp_path):
    model = net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    _, fitted = train(tiny_images, tmp_path, stages=[], model=model)
    assert fitted.history == []
    assert same(weights(tmp_path, "best"), before)
    assert same(weights(tmp_path, "last"), before)


def test_a_stage_starts_from_another_defense_where_names_and_shapes_agree(tiny_images, tmp_path):
    given = Net(head=False).state_dict()
    stages = [Usual("rt", start_from="rt")]
    model, _ = train(
        tiny_images, tmp_path, stages=stages, preset=replace(PRESET, epochs=0), start={"rt": given}.__getitem__
    )
    assert torch.equal(model.out.weight, given["out.weight"])
    with pytest.raises(ArenaError, match="starts from 'rt', but no tensor"):
        train(tiny_images, tmp_path, stages=stages, start=lambda _: {"other": torch.zeros(1)})


def test_divergence_is_said(tiny_images, tmp_path):
    with pytest.raises(ArenaError, match=r"training of 'test' diverged: the loss was (nan|inf) in epoch 1 of 6"):
        train(tiny_images, tmp_path, preset=replace(PRESET, lr=1e30))


def test_a_damaged_resume_file_costs_a_fresh_start(tiny_images, tmp_path):
    whole, _ = train(tiny_images, tmp_path / "whole")
    broken = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        train(tiny_images, broken, watch=Kill(after=3))
    data = (broken / "resume.pt").read_bytes()
    (broken / "resume.pt").write_bytes(data[: len(data) // 2])
    model, _ = train(tiny_images, broken)
    assert same(model.state_dict(), whole.state_dict())


@pytest.mark.parametrize("norm", ["L1", "L0"])
def test_norms_that_training_does_not_know_are_refused(tiny_images, tmp_path, norm):
    with pytest.raises(ArenaError, match=f"adversarial training knows Linf and L2, got {norm}"):
        fit(
            net(), [Usual("sat")], tiny_images, PRESET, Threat(norm, "1"), name="sat", surface=SURFACE, train_seed=0,
            folder=tmp_path, device=CPU, watch=Silent(),
        )  # fmt: skip


@given(st.lists(st.integers(0, 4), min_size=2, max_size=200))
@settings(max_examples=40)
def test_the_split_is_a_partition_that_holds_out_a_tenth(labels):
    y = torch.tensor(labels)
    train_rows, held = split(y)
    assert sorted([*train_rows.tolist(), *held.tolist()]) == list(range(len(y)))
    assert len(held) == max(1, round(len(y) / 10))
    again = split(y)
    assert torch.equal(again[0], train_rows)


def test_one_image_cannot_be_split():
    with pytest.raises(ArenaError, match="at least 2 images"):
        split(torch.tensor([0]))


def test_augmentation_shifts_by_at_most_an_eighth():
    x = torch.zeros(200, 1, 16, 8)
    x[:, 0, 8, 4] = 1
    g = torch.Generator().manual_seed(0)
    shifted = augment(x, "shift", g)
    assert shifted.shape == x.shape
    assert torch.equal(shifted.sum((1, 2, 3)), torch.ones(200))
    where = shifted.flatten(1).argmax(1)
    rows, columns = where // 8, where % 8
    assert set(rows.tolist()) == set(range(6, 11))
    assert set(columns.tolist()) == {3, 4, 5}
    assert augment(x, "none", g) is x
    lone = torch.zeros(200, 1, 8, 8)
    lone[:, 0, 4, 1] = 1
    flipped = augment(lone, "crop_flip", g).flatten(1).argmax(1) % 8
    assert {5, 6, 7} & set(flipped.tolist())
    assert {0, 1, 2} & set(flipped.tolist())


def test_the_rate_is_a_staircase_or_one_cycle():
    stairs = Preset(10, milestones=(4, 8), decay=0.1)
    assert [rate(0, e, stairs) for e in (0, 3, 4, 8)] == pytest.approx([1, 1, 0.1, 0.01])
    cycle = Preset(10)
    assert rate(0.2, 0, cycle) == pytest.approx(1)
    assert rate(0.0, 0, cycle) == pytest.approx(0.05)
    assert rate(1.0, 0, cycle) == pytest.approx(0)


def test_the_log_tells_of_every_epoch_also_after_a_kill(tiny_images, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(tiny_images, tmp_path, watch=Kill(after=4))
    _, fitted = train(tiny_images, tmp_path)
    lines = trace.read(tmp_path / trace.LOG)
    assert [(line["stage"], line["epoch"]) for line in lines] == [(0, e) for e in range(1, 7)]
    for line, entry in zip(lines, fitted.history, strict=True):
        assert {k: line[k] for k in entry} == entry
        assert line["lr"] > 0
        assert line["images_per_second"] > 0


@pytest.mark.parametrize("text", ["", "nothing", '{"stage": 0}', "[1]"])
def test_what_is_no_log_is_refused(tmp_path, text):
    path = tmp_path / "some.jsonl"
    assert trace.Log.open(tmp_path, []).lines == []
    path.write_text(text)
    if text:
        with pytest.raises(ArenaError, match="not a training log"):
            trace.read(path)
    with pytest.raises(ArenaError, match="No such file"):
        trace.read(tmp_path / "none.jsonl")


def test_patience_ends_a_stage_and_not_the_next(tiny_images, tmp_path, monkeypatch):
    """The first stage's best look is its second, so patience 2 ends it after the fourth; the second stage improves."""
    scores = iter([10.0, 50.0, 30.0, 40.0, *(5.0, 6.0, 7.0, 8.0, 9.0, 10.0)])
    monkeypatch.setattr(arena.training, "judge", lambda *a, **k: {"natural": 90.0, "pgd": next(scores)})
    said: list[str] = []
    watch = Kill()
    watch.say = said.append  # type: ignore[method-assign]
    stages = [Usual("sat", lam=0.5), Usual("sat", lam=0.25)]
    _, fitted = train(tiny_images, tmp_path, stages=stages, watch=watch, schedule=Schedule(patience=2))
    assert [(h["stage"], h["epoch"]) for h in fitted.history] == [(0, e) for e in range(1, 5)] + [
        (1, e) for e in range(1, 7)
    ]
    assert (fitted.best["stage"], fitted.best["epoch"]) == (1, 6)
    assert said == ["stopped after 4 of 6 epochs: no better since epoch 2"]


def test_patience_waits_for_the_first_look(tiny_images, tmp_path):
    given = {"preset": replace(PRESET, epochs=40), "schedule": Schedule(patience=1)}  # looks after epochs 2, 4, ...
    _, fitted = train(tiny_images, tmp_path, stages=[Usual("rt")], **given)
    assert ["natural" in h for h in fitted.history[:4]] == [False, True, False, True]


@pytest.mark.parametrize("kill", [3, 4, 5])
def test_an_early_stop_survives_a_kill(tiny_images, tmp_path, kill):
    stages = [Usual("rt", lam=0.5), Usual("rt", lam=0.25)]
    given = {"stages": stages, "schedule": Schedule(patience=1), "preset": replace(PRESET, epochs=8)}
    _, whole = train(tiny_images, tmp_path / "whole", **given)
    assert any(h.get("stopped") for h in whole.history)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_images, tmp_path / "broken", watch=Kill(after=kill), **given)
    _, again = train(tiny_images, tmp_path / "broken", **given)
    assert again.history == whole.history
    assert same(weights(tmp_path / "broken", "last"), weights(tmp_path / "whole", "last"))


def test_bf16_learns_and_keeps_fp32_weights(tiny_images, tmp_path):
    preset = replace(PRESET, epochs=25, augment="none")
    model, fitted = train(tiny_images, tmp_path / "bf16", preset=preset, schedule=Schedule(precision="bf16"))
    plain, _ = train(tiny_images, tmp_path / "fp32", preset=preset)
    assert fitted.best["natural"] == 100
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not same(model.state_dict(), plain.state_dict())


@dataclass(frozen=True)
class SecondOrder(Usual):
    @property
    def second_order(self) -> bool:
        return True


def test_gradients_of_gradients_take_fp32(tiny_images, tmp_path):
    with pytest.raises(ArenaError, match=r"--precision bf16: 'test' differentiates gradients"):
        train(tiny_images, tmp_path, stages=[SecondOrder("rt")], schedule=Schedule(precision="bf16"))


def test_a_large_model_trains_with_channels_last_to_the_same_loss(tmp_path, monkeypatch):
    """Memory order changes speed, not mathematics: the first epoch's loss agrees to rounding."""
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(40, 3, 8, 8, generator=generator), torch.arange(40) % 3
    images = Images("made", x[:30], y[:30], x[30:], y[30:], 3)

    def made() -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 3))

    losses = {}
    for name, limit in (("small", 10**6), ("large", 0)):
        monkeypatch.setattr(arena.threads, "SMALL_MODEL", limit)
        model = made()
        folder = tmp_path / name
        folder.mkdir()
        fitted = fit(
            model, [Usual("sat")], images, replace(PRESET, epochs=1), THREAT, name="test", surface=Surface(),
            train_seed=0, folder=folder, device=CPU, watch=Silent(),
        )  # fmt: skip
        losses[name] = fitted.history[0]["loss"]
        assert model[0].weight.is_contiguous(memory_format=torch.channels_last) == (name == "large")
    assert losses["large"] == pytest.approx(losses["small"], rel=1e-4)


@dataclass(frozen=True)
class Earliest(Usual):
    """A stage with a taste of its own: the first epoch is the best."""

    def score(self, entry):
        return (-entry["epoch"],)


def test_a_stage_may_say_what_the_best_epoch_is(tiny_images, tmp_path):
    _, fitted = train(tiny_images, tmp_path, stages=[Earliest("rt")])
    assert fitted.best["epoch"] == 1


def test_validation_does_not_climb_a_head_that_is_trained_to_be_wrong():
    """A head that is the output turned round cancels it in the attack's objective, unless it is said not to answer."""

    class TurnedRound(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.out.weight = nn.Parameter(torch.eye(2) * 4)
            self.head.weight = nn.Parameter(-torch.eye(2) * 4)

        def forward(self, x):
            self.head(x.flatten(1))
            return self.out(x.flatten(1))

    model = TurnedRound().eval()
    x = torch.tensor([[0.52, 0.48], [0.48, 0.52]]).view(2, 1, 1, 2)
    y = torch.tensor([0, 1])
    left = {}
    for answers in (True, False):
        surface = Surface(heads={"head": Head("head", answers=answers)})
        with Reader(model, surface) as read:
            ctx = Context(replace(PRESET, steps=10), THREAT, 2, surface, read, torch.Generator())
            left[answers] = judge(model, read, ctx, x, y, adversarial=True)
    assert left[True]["natural"] == left[False]["natural"] == 100
    assert left[False]["pgd"] == 0
    assert left[True]["pgd"] > 0
