"""Plans, keys, the cache and the command that is said when there is no model."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arena.checkpoints import read_weights
from arena.datasets import to_float
from arena.errors import ArenaError
from arena.home import home, lock
from arena.models import TrainedPlan, plan
from arena.plugins import registry
from arena.schedule import Schedule
from arena.surface import Reader, selects
from arena.threat import Threat
from arena.watch import Silent


class Counter(Silent):
    """Counts trainings and epochs."""

    def __init__(self) -> None:
        self.phases = 0
        self.epochs = 0

    def phase(self, name: str, total: int, unit: str) -> None:
        self.phases += 1

    def advance(self, done: int, note: str = "") -> None:
        self.epochs += note != "resumed"


def planned(text, images, **given) -> TrainedPlan:
    settings = {
        "dataset": "digits",
        "backbone": "cnn(width=4)",
        "train_seed": 0,
        "threat": Threat("Linf", "0.05"),
        "checkpoint": None,
        "surface": None,
        "registry": registry(),
        "schedule": Schedule(epochs=2),
    }
    found = plan(text, images=images, **{**settings, **given})
    assert isinstance(found, TrainedPlan)
    return found


def obtain(found, *, train=True, retrain=False, watch=None):
    return found.obtain(train=train, retrain=retrain, device="cpu", watch=watch or Silent())


def test_a_data_set_may_have_defaults_of_its_own(tiny_images):
    here, there = (planned("ewas_sat", tiny_images, dataset=d) for d in ("digits", "svhn"))
    assert (here.options["lam"], there.options["lam"]) == (0.01, 0.05)
    assert there.name == "ewas_sat"  # what the name says is measured from there
    asked = planned("ewas_sat(lam=0.01)", tiny_images, dataset="svhn")
    assert asked.name == "ewas_sat(lam=0.01)"
    assert "'ewas_sat(lam=0.01)'" in asked.command
    assert planned("ewas_sat(lam=0.05)", tiny_images, dataset="svhn").training_key == there.training_key
    assert len({p.training_key for p in (here, there, asked)}) == 3


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({}, True),
        ({"backbone": "cnn( width = 4 )"}, True),
        ({"threat": Threat.parse("linf", "5/100")}, True),
        ({"text": "adversarial-arena/fgaa_sat(lam=2)"}, True),
        ({"text": "fgaa_sat(inner=full)"}, True),
        ({"text": "fgaa_sat(inner=aux)"}, False),
        ({"text": "fgaa_rt"}, False),
        ({"backbone": "cnn"}, False),
        ({"backbone": "resnet_small(width=4)"}, False),
        ({"threat": Threat("Linf", "0.06")}, False),
        ({"threat": Threat("L2", "0.05")}, False),
        ({"train_seed": 1}, False),
        ({"schedule": Schedule(epochs=3)}, False),
        ({"schedule": Schedule(epochs=2, precision="bf16")}, False),
        ({"schedule": Schedule(epochs=2, patience=3)}, False),
        ({"schedule": Schedule(epochs=2, preset="cifar10")}, False),
    ],
)
def test_the_key_follows_what_decides_the_weights(tiny_images, change, same):
    base = planned("fgaa_sat", tiny_images)
    other = planned(change.pop("text", "fgaa_sat"), tiny_images, **change)
    assert (base.key == other.key) == same
    assert (base.training_key == other.training_key) == same


def test_the_threat_is_no_part_of_natural_training(tiny_images):
    a, b = (planned("rt", tiny_images, threat=Threat("Linf", eps)) for eps in ("0.1", "0.2"))
    assert a.key == b.key


def test_the_data_is_part_of_the_key(tiny_images):
    other = replace(tiny_images, y_train=tiny_images.y_train.flip(0))
    assert planned("rt", tiny_images).training_key != planned("rt", other).training_key


def test_trained_once_then_found(tiny_images, arena_home):
    watch = Counter()
    found = planned("fgaa_sat(lam=1)", tiny_images)
    assert not found.cached()
    first = obtain(found, watch=watch)
    assert (watch.phases, watch.epochs) == (1, 2)
    assert found.cached()
    second = obtain(planned("fgaa_sat(lam=1)", tiny_images), train=False, watch=watch)
    assert (watch.phases, watch.epochs) == (1, 2)
    assert first.id == second.id
    assert first.name == "fgaa_sat(lam=1)"
    assert first.backbone == "cnn(width=4)"
    assert (first.twin, first.options["inner"], dict(first.eval_options)) == ("sat", "full", {"index": "own"})
    assert first.origin.startswith("adversarial-arena ")
    assert list(first.surface.heads) == ["head1", "head2"]
    folder = home() / "models" / found.training_key[:16]
    assert {p.name for p in folder.iterdir()} == {"best.safetensors", "last.safetensors", "model.json", "train.jsonl"}
    record = json.loads((folder / "model.json").read_text())
    assert record["trained"] == json.loads(json.dumps(first.trained))
    assert len(record["history"]) == record["trained"]["epochs"] == 2
    assert {"natural", "pgd", "images"} == set(record["trained"]["held_out"])


def test_a_built_model_is_fresh_frozen_and_in_eval_mode(tiny_images, arena_home):
    contender = obtain(planned("ewas_sat", tiny_images))
    one, two = contender.build(), contender.build()
    x = to_float(tiny_images.x_test)
    assert torch.equal(one(x), two(x))
    assert one(x).shape == (24, 3)
    assert not any(m.training for m in one.modules())
    assert not any(p.requires_grad for p in one.parameters())
    assert contender.parameters == sum(p.numel() for p in one.parameters())
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}
    with Reader(one, contender.surface) as read:
        assert read(x).scores().shape == (24, 2, 3)
    assert set(selects(one, contender.surface)) == {"mask1"}
    folder = home() / "models" / planned("ewas_sat", tiny_images).training_key[:16]
    best = read_weights(folder / "best.safetensors")
    assert all(torch.equal(v, best[k]) for k, v in one.state_dict().items())


def test_the_callers_generator_is_left_alone(tiny_images, arena_home):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    obtain(planned("sat", tiny_images)).build()
    assert torch.equal(torch.rand(3), expected)


def test_retrain_trains_again_to_the_same_model(tiny_images, arena_home):
    watch = Counter()
    first = obtain(planned("sat", tiny_images), watch=watch)
    second = obtain(planned("sat", tiny_images), retrain=True, watch=watch)
    assert (watch.phases, watch.epochs) == (2, 4)
    assert first.id == second.id


def test_other_seeds_give_other_models(tiny_images, arena_home):
    assert len({obtain(planned("rt", tiny_images, train_seed=s)).id for s in (0, 1, 2)}) == 3


@pytest.mark.parametrize(
    ("text", "given", "command"),
    [
        ("sat", {"threat": Threat("Linf", "0.2"), "backbone": None}, "arena train sat --dataset digits"),
        (
            "fgaa_sat(lam=1)",
            {"train_seed": 3},
            "arena train 'fgaa_sat(lam=1)' --dataset digits --backbone 'cnn(width=4)' --norm Linf --eps 0.05 "
            "--train-seed 3",
        ),
        ("rt", {"dataset": "npz:a b.npz", "backbone": None}, "arena train rt --dataset 'npz:a b.npz'"),
        (
            "rt",
            {"backbone": None, "schedule": Schedule("cifar10", 3, "bf16", 2)},
            "arena train rt --dataset digits --preset cifar10 --epochs 3 --precision bf16 --patience 2",
        ),
    ],
)
def test_without_leave_to_train_the_command_is_said(tiny_images, arena_home, text, given, command):
    with pytest.raises(ArenaError) as error:
        obtain(planned(text, tiny_images, **{"schedule": None, **given}), train=False)
    assert str(error.value).startswith("no trained model of '")
    assert str(error.value).endswith(f"train it with: {command}")
    assert not (arena_home / "models").exists()


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("fgaa_sta", {}, "unknown defense 'fgaa_sta'; did you mean 'fgaa_sat'"),
        ("fgaa_sat(lamb=1)", {}, "defense 'fgaa_sat': unknown option 'lamb'; did you mean 'lam'"),
        ("fgaa_sat(inner=both)", {}, "option 'inner': expected full or aux, got 'both'"),
        ("fgaa_sat(lam=-1)", {}, "option 'lam': expected 0 to inf, got '-1'"),
        ("sat", {"backbone": "resnet81"}, "unknown backbone 'resnet81'; did you mean 'resnet18'"),
        ("sat", {"backbone": "cnn(widht=3)"}, "backbone 'cnn': unknown option 'widht'; did you mean 'width'"),
        ("sat", {"threat": Threat("L1", "1")}, "adversarial training knows Linf and L2, got L1"),
        ("sat", {"dataset": "digit"}, "unknown dataset 'digit'; did you mean 'digits'"),
        ("my.py:factory", {"backbone": "cnn"}, "takes no --backbone"),
        ("sat", {"checkpoint": Path("none.safetensors")}, "'none.safetensors': no such file"),
        ("sat", {"surface": Path("none.toml")}, "'none.toml': no such file"),
    ],
)
def test_mistakes_are_said_in_one_line(tiny_images, text, given, words):
    with pytest.raises(ArenaError) as error:
        planned(text, tiny_images, **given)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_ewas_names_the_nearest_slot(tiny_images, arena_home):
    with pytest.raises(ArenaError, match=r"'block4.outt'; did you mean 'block4.out'"):
        obtain(planned("ewas_sat(slot=block4.outt)", tiny_images))


def test_a_checkpoint_instead_of_training(tiny_images, arena_home, tmp_path):
    watch = Counter()
    trained = obtain(planned("fgaa_sat", tiny_images), watch=watch)
    path = home() / "models" / planned("fgaa_sat", tiny_images).training_key[:16] / "best.safetensors"
    copy = tmp_path / "mine.safetensors"
    copy.write_bytes(path.read_bytes())
    loaded = obtain(planned("fgaa_sat", tiny_images, checkpoint=copy), train=False, watch=watch)
    assert watch.phases == 1
    assert loaded.id == trained.id
    assert loaded.key != trained.key
    assert loaded.trained["weights"] == "checkpoint"
    # Attacked under any threat model, for nothing is trained.
    planned("fgaa_sat", tiny_images, checkpoint=copy, threat=Threat("L1", "1"))
    with pytest.raises(ArenaError, match=r"another architecture's weights: 'block1\.conv\.weight' is \(4, 1, 3, 3\)"):
        obtain(planned("fgaa_sat", tiny_images, checkpoint=copy, backbone="cnn(width=5)"))
    with pytest.raises(ArenaError, match="is not in the model"):
        obtain(planned("sat", tiny_images, checkpoint=copy))


def test_a_surface_file_replaces_the_declared_one(tiny_images, arena_home, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[heads.second]\npath = "block4.out.scores"\n')
    base = planned("fgaa_sat", tiny_images)
    other = planned("fgaa_sat", tiny_images, surface=path)
    assert other.key != base.key
    assert list(other.surface.heads) == ["second"]


def test_a_surface_file_may_name_a_head_that_the_defense_declares(tiny_images, arena_home, tmp_path):
    path = tmp_path / "s.toml"
    path.write_text('[selections.again]\npath = "block4.out.select"\nscores = "head2"\n')
    found = planned("fgaa_sat", tiny_images, surface=path)
    surface = found.declared(found.make())
    assert surface.selections["again"].scores == "head2"
    assert set(surface.selections) > {"again"}
    path.write_text('[selections.again]\nscores = "head3"\n')
    wrong = planned("fgaa_sat", tiny_images, surface=path)
    with pytest.raises(ArenaError, match=r"selection 'again': scores 'head3' is no head; did you mean 'head2'\?"):
        wrong.declared(wrong.make())


def test_a_damaged_cache_is_said(tiny_images, arena_home):
    found = planned("rt", tiny_images)
    obtain(found)
    weights = found.folder / "best.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ArenaError, match=r"best\.safetensors: missing or damaged; train again with --retrain"):
        obtain(found)
    (found.folder / "model.json").write_text("{")
    with pytest.raises(ArenaError, match=r"model\.json: damaged; train again with --retrain"):
        obtain(found)
    obtain(found, retrain=True)
    obtain(found, train=False)


def test_one_training_at_a_time(tiny_images, arena_home):
    found = planned("rt", tiny_images)
    with lock(f"model-{found.training_key[:16]}"), pytest.raises(ArenaError, match="in use by another"):
        obtain(found)


@pytest.mark.parametrize(
    ("shape", "classes", "backbone"),
    [((1, 8, 8), 2, "cnn(width=4)"), ((3, 9, 7), 3, "resnet_small(width=4)"), ((3, 8, 12), 4, "resnet18(width=2)")],
)
@pytest.mark.parametrize("text", ["fgaa_sat", "ewas_sat", "trades", "mart", "fgaa_rt", "ewas_rt"])
def test_any_classes_channels_and_sides_train(arena_home, text, shape, classes, backbone):
    from arena.datasets import Images

    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(24, *shape, generator=g), torch.arange(24) % classes
    images = Images("any", x[:16], y[:16], x[16:], y[16:], classes)
    model = obtain(planned(text, images, backbone=backbone, schedule=Schedule(epochs=1))).build()
    assert model(x[16:]).shape == (8, classes)
    assert torch.isfinite(model(x)).all()


def test_presets_by_data_set_and_backbone():
    spec = registry().get("defense", "ewas_sat").spec
    choose = Schedule().choose
    assert choose("ewas_sat", spec, "digits", "cnn") is spec.presets["digits"]
    assert choose("ewas_sat", spec, "svhn", "resnet18").lr == 0.01
    assert choose("ewas_sat", spec, "unheard_of", "resnet18") is spec.presets["*"]


def test_a_schedule_borrows_a_preset_and_moves_its_milestones():
    spec = registry().get("defense", "ewas_sat").spec
    paper = spec.presets["cifar10"]
    shorter = Schedule(preset="cifar10", epochs=paper.epochs // 10).choose("ewas_sat", spec, "npz", "resnet18")
    assert shorter == replace(paper, epochs=12, milestones=(6.0, 9.0))
    with pytest.raises(ArenaError, match="unknown preset of ewas_sat 'cifar'; did you mean 'cifar10'"):
        Schedule(preset="cifar").choose("ewas_sat", spec, "npz", "resnet18")
    for bad in (Schedule(epochs=0), Schedule(patience=-1), Schedule(precision="fp16")):
        with pytest.raises(ArenaError, match=r"--epochs 0|--patience -1|precision 'fp16'"):
            bad.choose("ewas_sat", spec, "digits", "cnn")


def test_a_checkpoint_of_arenas_own_keeps_its_record(arena_home, tiny_images):
    """A model trained on an unusual schedule is matched by its file, and says how it was trained."""
    trained = planned("rt", tiny_images, schedule=Schedule(epochs=1))
    first = obtain(trained)
    other = obtain(planned("rt", tiny_images, schedule=None, checkpoint=trained.folder / "best.safetensors"))
    assert other.id == first.id
    assert (other.trained["epochs"], other.trained["weights"]) == (1, "best")
    alone = arena_home / "alone.safetensors"
    alone.write_bytes((trained.folder / "best.safetensors").read_bytes())
    assert obtain(planned("rt", tiny_images, schedule=None, checkpoint=alone)).trained["weights"] == "checkpoint"


def test_sigkill_in_training_then_the_same_call_ends_alike(arena_home, tmp_path):
    """Kill a process in the middle of training; the next one goes on and reaches the uninterrupted weights."""
    script = tmp_path / "train.py"
    script.write_text(
        textwrap.dedent(
            """
            import arena.training, functools, sys, torch
            torch.set_num_threads(1)
            arena.training.fit.__kwdefaults__["save_every"] = 0.0
            from arena.datasets import digits
            from arena.models import plan
            from arena.plugins import registry
            from arena.schedule import Schedule
            from arena.threat import Threat
            class Say:
                def phase(self, *a): pass
                def say(self, text): pass
                def advance(self, done, note=""): print(done, note, flush=True)
            p = plan("fgaa_sat", dataset="digits", images=digits(), backbone="cnn(width=4)", train_seed=0,
                     schedule=Schedule(epochs=6),
                     threat=Threat("Linf", "0.2"), checkpoint=None, surface=None, registry=registry())
            print("id", p.obtain(train=True, retrain=False, device="cpu", watch=Say()).id, flush=True)
            """
        )
    )

    def run(folder: Path, kill_after: int | None) -> list[str]:
        environment = {**os.environ, "ARENA_HOME": str(folder), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)
        lines: list[str] = []
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line.strip())
            if kill_after is not None and line.startswith(f"{kill_after} "):
                time.sleep(0.03)
                process.send_signal(signal.SIGKILL)
                break
        process.stdout.close()
        process.wait()
        assert (process.returncode == 0) == (kill_after is None)
        return lines

    whole = run(tmp_path / "whole", None)
    run(tmp_path / "broken", 3)
    last = run(tmp_path / "broken", None)
    assert last[0] in ("3 resumed", "4 resumed", "5 resumed")
    assert last[-1] == whole[-1]
    assert last[-1].startswith("id ")


def test_a_training_that_learns_nothing_is_said(arena_home):
    """Labels that have nothing to do with the pictures."""
    from arena.datasets import Images

    said = []

    class Listening(Silent):
        def say(self, text: str) -> None:
            said.append(text)

    generator = torch.Generator().manual_seed(0)
    x, y = torch.full((200, 1, 4, 4), 0.5), torch.arange(200) % 10
    images = Images("noise", x, y[torch.randperm(200, generator=generator)], x[:20], y[:20], 10)
    planned("rt", images, backbone="cnn(width=2)", schedule=Schedule(epochs=1)).obtain(
        train=True, retrain=False, device="cpu", watch=Listening()
    )
    assert any("training collapsed" in text for text in said)


def test_what_builds_a_model_is_small_enough_to_be_sent(tiny_images):
    found = planned("fgaa_sat(lam=1)", tiny_images)
    sent = pickle.dumps(found.factory)
    assert len(sent) < 4000
    for one, other in zip(found.make().parameters(), pickle.loads(sent)().parameters(), strict=True):
        assert torch.equal(one, other)
