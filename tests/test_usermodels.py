"""A user's own model: found, built, loaded; and every way it can go wrong, in one line."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from arena.errors import ArenaError
from arena.usermodels import find_own, is_own, plan_own
from arena.watch import Silent

SOURCE = """
import torch
from torch import nn
from beside import WIDTH

class Net(nn.Module):
    def __init__(self, width=WIDTH):
        super().__init__()
        self.one = nn.Linear(16, width)
        self.two = nn.Linear(width, 3)

    def forward(self, x):
        return self.two(self.one(x.flatten(1)))

def factory():
    return Net()

def wide():
    from beside import WIDTH as again
    return Net(again + 1)

def crash():
    raise KeyError("weights are\\nmissing")

def leave():
    raise SystemExit(3)

def number():
    return 7

fixed = 7
"""


@pytest.fixture
def source(tmp_path) -> Path:
    (tmp_path / "beside.py").write_text("WIDTH = 4\n")
    path = tmp_path / "my model.py"
    path.write_text(SOURCE)
    return path


def obtain(text, **given):
    settings = {"train_seed": 0, "checkpoint": None, "surface": None, **given}
    return plan_own(text, **settings).obtain(train=False, retrain=False, device="cpu", watch=Silent())


def test_what_counts_as_own():
    assert is_own("my.py:factory")
    assert is_own("/a b/my.py:factory")
    assert not is_own("fgaa_sat(lam=1)")
    assert not is_own("ewas_sat(slot=a:b)")
    assert not is_own("package/defense")


def test_built_again_and_again_the_same(source):
    torch.manual_seed(5)
    a = obtain(f"{source}:factory")
    torch.manual_seed(6)
    b = obtain(f"{source}:factory")
    assert a.id == b.id
    assert a.key == b.key
    one, two = a.build(), a.build()
    assert one is not two
    assert torch.equal(one.one.weight, two.one.weight)
    assert not one.training
    assert not any(p.requires_grad for p in one.parameters())
    assert (a.name, a.backbone, a.twin, a.origin) == (f"{source}:factory", None, "", "")
    assert a.parameters == 16 * 4 + 4 + 4 * 3 + 3
    assert obtain(f"{source}:wide").parameters > a.parameters
    with torch.no_grad():
        one.one.weight.zero_()
    assert torch.equal(a.build().one.weight, two.one.weight)


def test_identity_and_key_follow_source_factory_weights_and_surface(source, tmp_path):
    base = obtain(f"{source}:factory")
    weights = {"one.weight": torch.ones(4, 16), "one.bias": torch.ones(4), "two.weight": torch.ones(3, 4)}
    save_file({**weights, "two.bias": torch.zeros(3)}, tmp_path / "w.safetensors")
    loaded = obtain(f"{source}:factory", checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(loaded.build().one.weight, torch.ones(4, 16))
    (tmp_path / "s.toml").write_text('[heads.hidden]\npath = "two"\n')
    declared = obtain(f"{source}:factory", surface=tmp_path / "s.toml")
    assert list(declared.surface.heads) == ["hidden"]
    assert declared.id == base.id  # what is declared about a model does not change it
    source.write_text(SOURCE + "\n# changed\n")
    edited = obtain(f"{source}:factory")
    assert len({base.id, loaded.id, edited.id}) == 3
    assert len({base.key, loaded.key, declared.key, edited.key}) == 4
    assert edited.trained["source_sha256"] != base.trained["source_sha256"]


def test_a_module_of_a_package(tmp_path, monkeypatch):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "nets.py").write_text(
        "from torch import nn\ndef make():\n    return nn.Linear(16, 3)\n"
    )
    monkeypatch.chdir(tmp_path)
    assert isinstance(obtain("own_package.nets:make").build(), nn.Linear)
    with pytest.raises(ArenaError, match=r"has no factory 'mak'; did you mean 'make'"):
        obtain("own_package.nets:mak")
    with pytest.raises(ArenaError, match=r"no module 'own_package.net' \(a file is written path/to/file.py:factory\)"):
        obtain("own_package.net:make")


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("factori", "has no factory 'factori'; did you mean 'factory'"),
        ("zzzz", "has no factory 'zzzz'; it has: Net, crash, factory, leave, number, wide"),
        ("fixed", "holds int, not a callable, as 'fixed'"),
        ("crash", "the factory raised KeyError: 'weights are\\nmissing' (my model.py, line 23)"),
        ("leave", "the factory raised SystemExit: 3"),
        ("number", "the factory returned int, expected an nn.Module"),
        ("factory(width=3)", "a factory is called without arguments"),
        ("", "expected FILE.py:FACTORY or package.module:FACTORY"),
    ],
)
def test_wrong_factories(source, factory, words):
    with pytest.raises(ArenaError) as error:
        obtain(f"{source}:{factory}")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("def factory(:\n", "raised SyntaxError"),
        ("import nowhere_to_be_found\n", "running broken.py raised ModuleNotFoundError: No module named"),
        ("raise SystemExit\n", "running broken.py raised SystemExit"),
    ],
)
def test_wrong_files(tmp_path, text, words):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ArenaError) as error:
        obtain(f"{path}:factory")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_files(source, tmp_path):
    with pytest.raises(ArenaError, match="no such file"):
        obtain(f"{tmp_path}/none.py:factory")
    with pytest.raises(ArenaError, match="no such file"):
        obtain(f"{source}:factory", checkpoint=tmp_path / "none.pt")
    with pytest.raises(ArenaError, match="no such file"):
        obtain(f"{source}:factory", surface=tmp_path / "none.toml")


def test_a_checkpoint_of_another_architecture(source, tmp_path):
    save_file({"one.weight": torch.ones(5, 16)}, tmp_path / "w.safetensors")
    with pytest.raises(
        ArenaError, match=r"another architecture's weights: lacks 'one.bias' \(4,\).*\(4 differences in 4"
    ):
        obtain(f"{source}:factory", checkpoint=tmp_path / "w.safetensors")


def test_a_factory_is_found_again_elsewhere_and_known_by_its_hash(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("import torch\n\ndef factory():\n    return torch.nn.Linear(2, 3)\n")
    made = find_own(f"{path}:factory", 7)
    sent = pickle.dumps(made)
    again = pickle.loads(sent)
    assert torch.equal(again().weight, made().weight)
    assert again.name == made.name
    path.write_text("import torch\n\ndef factory():\n    return torch.nn.Linear(2, 4)\n")
    with pytest.raises(ArenaError, match="holds another file than where the match was begun"):
        pickle.loads(sent)
    path.unlink()
    with pytest.raises(ArenaError, match="no such file"):
        pickle.loads(sent)
