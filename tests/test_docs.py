"""The documentation cannot lie: hooks with their exact arguments are in it, and its code runs."""

from __future__ import annotations

import inspect
import re
import sys
import types
from dataclasses import MISSING, fields
from pathlib import Path

import pluggy
import pytest
import torch
from torch import nn

from arena import hookspecs, objectives, specs
from arena.attack import Setup, Unsupported
from arena.backbones import DatasetInfo, slot_shapes
from arena.datasets import to_float
from arena.engine import run_iterated
from arena.plugins import _HOOK_KINDS
from arena.rng import Stream
from arena.selection import Mode
from arena.surface import Gate, Reader, Surface, surface_from_toml
from arena.target import Target
from arena.threat import Threat

ROOT = Path(__file__).parent.parent
PLUGINS = (ROOT / "docs" / "plugins.md").read_text()
HOOKS = [name for name in vars(hookspecs) if name.startswith("arena_")]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def run(code: str, name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    exec(compile(code, f"docs/plugins.md:{name}", "exec"), module.__dict__)
    return module


def heading(hook: str) -> str:
    return f"{hook}({', '.join(inspect.signature(getattr(hookspecs, hook)).parameters)})"


@pytest.mark.parametrize("hook", HOOKS)
def test_each_hook_is_documented_with_its_exact_arguments(hook):
    assert re.findall(rf"^### {hook}.*$", PLUGINS, re.M) == [f"### {heading(hook)}"]


def test_no_hook_is_documented_that_does_not_exist():
    assert set(re.findall(r"^### (arena_\w+)", PLUGINS, re.M)) == set(HOOKS)


def documented(hook: str) -> types.ModuleType:
    marker = f"### {heading(hook)}\n"
    text = PLUGINS.split(marker)[1].split("\n##")[0]
    (code,) = blocks(text, "python")
    return run(code, hook)


@pytest.mark.parametrize("hook", HOOKS)
def test_the_smallest_plugin_of_each_hook_is_accepted(hook):
    manager = pluggy.PluginManager("arena")
    manager.add_hookspecs(hookspecs)
    module = documented(hook)
    manager.register(module, hook)
    manager.check_pending()
    assert [caller.name for caller in manager.get_hookcallers(module)] == [hook]


@pytest.mark.parametrize(("group", "hook"), hookspecs.REGISTRATION.items())
def test_documented_specs_are_whole(group, hook):
    made = list(getattr(documented(hook), hook)())
    assert made
    for spec in made:
        assert isinstance(spec, _HOOK_KINDS[group])
        assert specs.NAME.match(spec.name)


def test_other_documented_hooks_do_what_they_say(capsys):
    threat, gated = Threat.parse("Linf", "0.1"), Surface(gates={"g": Gate("g")})
    adaptive = documented("arena_adaptive_attacks").arena_adaptive_attacks
    assert list(adaptive(gated, threat)) == [("corners", {"steps": 1000})]
    assert list(adaptive(Surface(), threat)) == []
    record = {"defense": "sat", "natural": {"accuracy": 40.0}, "worst_case": {"robust_accuracy": 12.5}}
    context = types.SimpleNamespace(record=record)
    (indicator,) = documented("arena_audit").arena_audit(context)
    assert indicator.flag
    documented("arena_match_started").arena_match_started(record)
    documented("arena_attack_finished").arena_attack_finished({"name": "pgd", "broken": 3})
    documented("arena_match_finished").arena_match_finished(record)
    assert capsys.readouterr().out == "attacking sat\npgd broke 3\nsat 12.5\n"


def test_the_table_of_specs_names_real_fields_and_all_needed_ones():
    for name in ("DefenseSpec", "AttackSpec", "RosterSpec", "DatasetSpec", "BackboneSpec"):
        (row,) = re.findall(rf"^\| `{name}` \|(.*)\|(.*)\|$", PLUGINS, re.M)
        must, often = (set(re.findall(r"[a-z_]+", " ".join(re.findall(r"`([^`]*)`", cell)))) for cell in row)
        known = {f.name: f for f in fields(getattr(specs, name))}
        needed = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        assert must - {"iterate", "run"} == needed, name
        assert must | often <= set(known), name


@pytest.fixture
def attack() -> types.ModuleType:
    (code,) = (b for b in blocks(PLUGINS, "python") if "class Corners" in b)
    return run(code, "arena_example.attack")


def play(attack, linear, radius, batch_size=64, n=24):
    generator = torch.Generator().manual_seed(3)
    x = 0.3 + 0.4 * torch.rand(n, 1, 4, 4, generator=generator)
    y = linear.module(x).argmax(1)
    threat = Threat.parse("Linf", str(radius))
    setup = Setup(threat, 3, Surface(), (1, 4, 4), Stream.of(0, "corners"))
    target = Target(linear.module, Surface(), 3, batch_size=batch_size)
    outcome = run_iterated(attack.Corners(setup), target, x, y, torch.arange(100, 100 + n))
    assert outcome.error == ""
    broken = linear.module(outcome.x_adv).argmax(1) != y
    assert threat.inside(x, outcome.x_adv).all()
    return broken, linear.distance(x, y, "Linf"), outcome


def test_the_documented_attack_breaks_what_can_be_broken_and_nothing_else(attack, linear):
    broken, distance, outcome = play(attack, linear, 0.2)
    assert not broken[distance > 0.2].any()
    assert broken[distance < 0.12].all()  # random search within 0.6 of the optimum
    assert broken.any()
    assert not broken.all()
    assert (outcome.forwards <= 200).all()
    assert (outcome.backwards == 0).all()


def test_the_documented_attack_does_not_depend_on_its_batch(attack, linear):
    one, many = play(attack, linear, 0.2, batch_size=8), play(attack, linear, 0.2, batch_size=64)
    assert torch.equal(one[0], many[0])
    assert torch.equal(one[2].x_adv, many[2].x_adv)


def test_the_documented_attack_refuses_other_norms(attack):
    setup = Setup(Threat.parse("L2", "1"), 3, Surface(), (1, 4, 4), Stream.of(0, "corners"))
    with pytest.raises(Unsupported, match="corners of an L2 ball: expected Linf"):
        attack.Corners(setup)


def test_the_documented_plain_attack_and_roster(attack):
    x, threat = torch.rand(4, 1, 4, 4), Threat.parse("L2", "0.5")
    moved = attack.noise(None, x, None, threat, None, Stream.of(0, "noise"))
    assert threat.inside(x, moved).all()
    assert (moved != x).any()
    documented_names = {s.name for s in documented("arena_register_attacks").arena_register_attacks()}
    assert {name for name, _ in attack.cheap(Surface(), threat, 3)} <= documented_names


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.slot, self.fc = nn.Conv2d(1, 5, 3), nn.Identity(), nn.Linear(5, 3)

    def forward(self, x):
        return self.fc(self.slot(self.conv(x)).mean((2, 3)))


def test_the_documented_defense_builds_and_its_surface_is_read(monkeypatch):
    (code,) = (b for b in blocks(PLUGINS, "python") if "class EarlyExit" in b)
    module = run(code, "arena_example.defense")
    model = module.build(Backbone(), DatasetInfo("d", (1, 4, 4), 3, slots=("slot",)), lam=0.5).eval()
    with Reader(model, module.surface(model)) as reader:
        reading = reader(torch.rand(2, 1, 4, 4))
    assert reading.scores().shape == (2, 2, 3)
    surface = module.surface(model)
    (stage,) = module.recipe(lam=2.0)
    assert (stage.recipe, stage.lam) == ("sat", 2.0)
    (spec,) = documented("arena_register_defenses").arena_register_defenses()
    assert specs.Exposed.of(surface) == spec.exposes
    for reference in (spec.build, spec.surface, spec.recipe):
        monkeypatch.setitem(sys.modules, "arena_example", types.ModuleType("arena_example"))
        monkeypatch.setitem(sys.modules, "arena_example.defense", module)
        assert callable(specs.load(reference))


def test_the_documented_select_can_be_forced():
    (code,) = (b for b in blocks(PLUGINS, "python") if "class Masked" in b)
    module = run(code, "masked").Masked(5, 3)
    features = torch.rand(2, 5, 2, 2)
    module.select.mode = Mode("forced", classes=torch.tensor([2, 0]))
    expected = features * module.scores.weight[[2, 0]][:, :, None, None]
    assert torch.equal(module(features), expected)


def test_documented_toml_is_read(tmp_path):
    readme = (ROOT / "README.md").read_text()
    surfaces = [b for b in blocks(PLUGINS + readme, "toml") if "[heads." in b]
    assert len(surfaces) == 2
    for text in surfaces:
        file = tmp_path / "surface.toml"
        file.write_text(text)
        assert surface_from_toml(file).heads


def test_documented_objectives_exist():
    for name in ("ce", "margin", "dlr"):
        assert {name, f"{name}_targeted"} <= set(objectives.BUILT_IN)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))])
def test_relative_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#:]+)\)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", text):
        assert anchor in {slug(h) for h in re.findall(r"^#+ (.*)$", text, re.M)}


def slug(heading: str) -> str:
    """Return the anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def test_the_data_set_and_the_backbone_work():
    (code,) = (b for b in blocks(PLUGINS, "python") if "class TinyNet" in b)
    names: dict = {}
    exec(compile(code, "docs/plugins.md", "exec"), names)
    images = names["plates"]()
    assert images.shape == (1, 32, 64)
    assert len(images.subset(10)) == 10
    net = names["tiny"](images.shape, images.n_classes)
    assert list(slot_shapes(net, images.shape, ("block1.out", "block2.out")).values()) == [(8, 16, 32), (16, 8, 16)]
    assert net(to_float(images.x_test)).shape == (10, 4)
