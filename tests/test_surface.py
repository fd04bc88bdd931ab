"""Reading a model's surface: calls, outputs, wrappers, readouts, and a declaration from a file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from arena.errors import ArenaError
from arena.selection import Select
from arena.surface import Gate, Head, Knob, Reader, Selection, Surface, selects, submodule, surface_from_toml

X = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Calls one head twice, returns a tuple and a dict inside, has a gate and a Select, and one part never used."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))
        self.aux = nn.Linear(4, 3)
        self.pair = Pair()
        self.spatial = nn.Conv2d(4, 3, 1)
        self.gate = nn.Sigmoid()
        self.choice = Select()
        self.out = nn.Linear(4, 3)
        self.unused = nn.Linear(4, 3)
        self.wide = nn.Linear(4, 7)

    def forward(self, x):
        h = self.body(x)
        self.aux(h)
        self.aux(2 * h)
        self.pair(h)
        self.wide(h)
        self.spatial(h[:, :, None, None])
        gate = self.gate(h[:, 0])
        return self.out(h) * gate[:, None]


class Pair(nn.Module):
    def forward(self, h):
        return {"scores": h[:, :3], 1: h[:, 1:4], "count": 3}


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


def read(model, surface, x=X):
    with Reader(model, surface) as reader:
        return reader(x)


def test_heads_by_call_index_and_output_key(net):
    heads = {
        "first": Head("aux"),
        "second": Head("aux", call=1),
        "by_key": Head("pair", output="scores"),
        "by_index": Head("pair", output=1),
        "map": Head("spatial"),
    }
    reading = read(net, Surface(heads=heads, gates={"g": Gate("gate")}))
    h = net.body(X)
    assert list(reading.heads) == list(heads)
    torch.testing.assert_close(reading.heads["first"], net.aux(h))
    torch.testing.assert_close(reading.heads["second"], net.aux(2 * h))
    torch.testing.assert_close(reading.heads["by_key"], h[:, :3])
    torch.testing.assert_close(reading.heads["by_index"], h[:, 1:4])
    torch.testing.assert_close(reading.heads["map"], net.spatial(h[:, :, None, None])[:, :, 0, 0])
    torch.testing.assert_close(reading.gates["g"], torch.sigmoid(h[:, 0]))
    torch.testing.assert_close(reading.logits, net(X))
    assert reading.scores().shape == (5, 6, 3)
    torch.testing.assert_close(reading.scores()[:, 0], reading.logits)


def test_reading_keeps_gradients_and_changes_nothing(net):
    x = X.clone().requires_grad_()
    reading = read(net, Surface(heads={"a": Head("aux")}), x)
    (gradient,) = torch.autograd.grad(reading.heads["a"].sum(), x)
    assert (gradient != 0).any()
    assert torch.equal(reading.logits, net(X))


def test_every_pass_is_read_anew(net):
    with Reader(net, Surface(heads={"a": Head("aux", call=1)})) as reader:
        first, second = reader(X), reader(X[:2])
    assert first.heads["a"].shape == (5, 3)
    torch.testing.assert_close(second.heads["a"], first.heads["a"][:2])


def test_hooks_are_gone_afterwards_even_after_an_error(net):
    def hooks():
        return sum(len(m._forward_hooks) for m in net.modules())

    read(net, Surface(heads={"a": Head("aux")}))
    with pytest.raises(ArenaError):
        read(net, Surface(heads={"a": Head("unused")}))
    with pytest.raises(ArenaError):
        Reader(net, Surface(heads={"a": Head("aux"), "b": Head("nowhere")}))
    assert hooks() == 0


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile, lambda m: nn.DataParallel(nn.DataParallel(m))])
def test_wrappers_are_looked_through(net, wrap):
    wrapped = wrap(net)
    for path in ("aux", "module.aux", "_orig_mod.aux", "module.module.aux"):
        assert submodule(wrapped, path) is net.aux
        assert submodule(net, path) is net.aux
    assert submodule(wrapped, "") is net
    assert submodule(wrapped, "body.1") is net.body[1]


@pytest.mark.parametrize(
    ("surface", "message"),
    [
        (Surface(heads={"a": Head("unused")}), "surface: head 'a' at 'unused' (call 0) never fired"),
        (Surface(heads={"a": Head("aux", call=2)}), "surface: head 'a' at 'aux' (call 2) never fired"),
        (Surface(gates={"g": Gate("gate", call=1)}), "surface: gate 'g' at 'gate' (call 1) never fired"),
        (Surface(heads={"a": Head("aix")}), "surface: the model has no module 'aix'; did you mean 'aux'?"),
        (Surface(heads={"a": Head("body.2")}), "surface: the model has no module 'body.2'; did you mean 'body.1'?"),
        (Surface(heads={"a": Head("wide")}), "surface: head 'a' at 'wide': expected scores (5, 3), got (5, 7)"),
        (Surface(heads={"a": Head("gate")}), "surface: head 'a' at 'gate': expected scores (5, 3), got (5,)"),
        (Surface(heads={"a": Head("pair")}), "surface: head 'a' at 'pair': expected a tensor, got a dict"),
        (Surface(heads={"a": Head("pair", output="z")}), "surface: head 'a' at 'pair': no output 'z'"),
        (
            Surface(heads={"a": Head("pair", output="count")}),
            "surface: head 'a' at 'pair': expected a tensor, got a int",
        ),
        (
            Surface(heads={"a": Head("")}, readout=lambda model, x: {"logits": model(x)}),
            "surface: head 'a' at '' (call 0) never fired",
        ),
        (
            Surface(readout=lambda model, x: {"logit": model(x)}),
            "surface: readout gives no 'logits'; did you mean 'logit'?",
        ),
    ],
)
def test_messages(net, surface, message):
    with pytest.raises(ArenaError) as caught:
        read(net, surface)
    assert str(caught.value) == message


def test_readout_replaces_the_hooks(net):
    def readout(model, x):
        return {"logits": model(x), "late": x.flatten(1)[:, :3], "extra": x}

    reading = read(net, Surface(heads={"late": Head("no.such.path")}, readout=readout))
    assert list(reading.heads) == ["late"]
    assert torch.equal(reading.heads["late"], X.flatten(1)[:, :3])


def test_selects_are_found_and_checked(net):
    surface = Surface(selections={"s": Selection("choice"), "foreign": Selection(scores="a")}, heads={"a": Head("aux")})
    assert selects(net, surface) == {"s": net.choice}
    with pytest.raises(ArenaError, match="selection 's': 'aux' is a Linear, expected a Select"):
        selects(net, Surface(selections={"s": Selection("aux")}))


def test_selection_must_name_a_head():
    with pytest.raises(ArenaError, match=r"selection 's': scores 'alx' is no head; did you mean 'alc'\?"):
        Surface(heads={"alc": Head("fc")}, selections={"s": Selection(scores="alx")})


def test_a_choice_is_of_the_first_or_the_second_rank():
    heads = {"alc": Head("fc")}
    with pytest.raises(ArenaError, match="selection 's': rank 3, expected 1 or 2"):
        Surface(heads=heads, selections={"s": Selection("choice", scores="alc", rank=3)})


def test_a_file_beside_a_declared_surface_may_name_its_heads(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text('[selections.s]\npath = "second"\nscores = "alc"\nrank = 2\n')
    with pytest.raises(ArenaError, match="selection 's': scores 'alc' is no head"):
        surface_from_toml(file)
    added = surface_from_toml(file, whole=False)
    both = Surface(heads={"alc": Head("fc")}).with_more(added)
    assert type(both) is Surface
    assert both.selections == {"s": Selection("second", "alc", 2)}
    with pytest.raises(ArenaError, match=r"selection 's': scores 'alc' is no head; did you mean 'alx'\?"):
        Surface(heads={"alx": Head("fc")}).with_more(added)


def test_description_names_every_part():
    surface = Surface(
        heads={"a": Head("fc")},
        gates={"g": Gate("gate")},
        selections={"s": Selection("choice"), "t": Selection(scores="a")},
        knobs={"k": Knob("soft", "tau")},
        random=True,
    )
    assert surface.describe() == {
        "heads": {"a": "fc"},
        "gates": {"g": "gate"},
        "selections": {"s": "choice", "t": "scores:a"},
        "knobs": {"k": "soft.tau"},
        "random": True,
    }


WHOLE = """
random = true
[heads.alc]
path = "layer4.0.fc"
[heads.second]
path = "pair"
call = 1
output = "scores"
[gates.weight]
path = "gate"
shape = "element"
clean = 0
[selections.mask]
scores = "alc"
[knobs.tau]
path = "soft"
attribute = "tau"
kind = "temperature"
values = [0.1, 1, 10]
"""


def test_a_whole_file(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(WHOLE)
    assert surface_from_toml(file) == Surface(
        heads={"alc": Head("layer4.0.fc"), "second": Head("pair", 1, "scores")},
        gates={"weight": Gate("gate", shape="element", clean=0)},
        selections={"mask": Selection(scores="alc")},
        knobs={"tau": Knob("soft", "tau", "temperature", (0.1, 1, 10))},
        random=True,
    )


def test_an_empty_file_declares_nothing(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text("")
    assert surface_from_toml(file) == Surface()


def test_all_errors_of_a_file_come_at_once(tmp_path):
    file = tmp_path / "s.toml"
    file.write_text(
        'random = "no"\nknobs = 3\nhead = 1\n'
        '[heads.a]\npth = "fc"\n[heads.b]\n[heads.c]\npath = "x"\ncall = "two"\n[gates]\ng = 1\n'
    )
    with pytest.raises(ArenaError) as caught:
        surface_from_toml(file)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"surface file '{file}': unknown or bad ")
    assert set(message.split("unknown or bad ")[1].split("; ")) == {
        "'head'",
        "did you mean 'heads'?",
        "'random' (expected true or false)",
        "'knobs' (expected tables [knobs.NAME])",
        "'heads.a.pth'",
        "did you mean 'path'?",
        "'heads.b' lacks a key (it takes path, call, output, answers)",
        "'heads.c.call' (got 'two')",
        "'gates.g' (expected a table)",
    }


@pytest.mark.parametrize(("content", "message"), [(b"random = ", "Invalid value"), (b"\xff\xfe", "utf-8")])
def test_a_broken_file_is_named(tmp_path, content, message):
    file = tmp_path / "s.toml"
    file.write_bytes(content)
    with pytest.raises(ArenaError, match=message) as caught:
        surface_from_toml(file)
    assert str(caught.value).startswith(f"surface file '{file}': ")
    with pytest.raises(ArenaError, match="no such file"):
        surface_from_toml(tmp_path / "none.toml")
    with pytest.raises(ArenaError, match="Is a directory"):
        surface_from_toml(tmp_path)
