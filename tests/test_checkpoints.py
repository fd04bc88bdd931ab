"""Weights on disk, errors of one line, identity."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import nn

from arena.checkpoints import load_weights, model_id, read_weights, restore, snapshot, write_weights
from arena.errors import ArenaError


def net(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def one_line(error: pytest.ExceptionInfo[ArenaError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_safetensors_round_trip(tmp_path):
    model = net()
    digest = write_weights(tmp_path / "w.safetensors", model.state_dict())
    assert digest == write_weights(tmp_path / "again.safetensors", model.state_dict())
    got = read_weights(tmp_path / "w.safetensors")
    assert all(torch.equal(v, got[k]) for k, v in model.state_dict().items())
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("key", [None, "state_dict", "model"])
@pytest.mark.parametrize("old", [False, True])
def test_torch_files_and_wrappers(tmp_path, key, old):
    weights = {f"module.{k}": v for k, v in net().state_dict().items()}
    torch.save(
        weights if key is None else {key: weights, "epoch": 3},
        tmp_path / "w.pt",
        _use_new_zipfile_serialization=not old,
    )
    model = net()
    with torch.no_grad():
        model[0].weight.zero_()
    load_weights(model, read_weights(tmp_path / "w.pt"), "w.pt")
    assert torch.equal(model[0].weight, net()[0].weight)


class Bomb:
    def __reduce__(self):
        return (exec, ("raise SystemExit('executed')",))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: None, "no such file"),
        (lambda p: p.write_bytes(b""), "neither safetensors nor a torch file"),
        (lambda p: p.write_bytes(b"hello, this is no model"), "neither safetensors nor a torch file"),
        (lambda p: p.write_bytes(b"PK\x03\x04 broken"), "cannot be read as weights only"),
        (lambda p: torch.save(net(), p), "cannot be read as weights only"),
        (lambda p: torch.save(Bomb(), p), "cannot be read as weights only"),
        (lambda p: p.write_bytes(pickle.dumps(Bomb())), "neither safetensors nor a torch file"),
        (lambda p: torch.save({"a": 1}, p), "expected a state dict of tensors, got a dict of a"),
        (lambda p: torch.save([1, 2], p), "expected a state dict of tensors, got list"),
        (lambda p: p.mkdir(), "cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_said_in_one_line(tmp_path, make, words):
    path = tmp_path / "w.bin"
    make(path)
    with pytest.raises(ArenaError) as error:
        read_weights(path)
    assert one_line(error).startswith(f"checkpoint '{path}': ")
    assert words in str(error.value)


def test_a_truncated_file_is_said(tmp_path):
    path = tmp_path / "w.safetensors"
    write_weights(path, net().state_dict())
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ArenaError, match="neither safetensors"):
        read_weights(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: w.pop("0.weight"), r"lacks '0\.weight' \(3, 4\); did you mean '2\.weight'"),
        (lambda w: w.update(extra=torch.zeros(2)), r"'extra' \(2,\) is not in the model"),
        (lambda w: w.update({"2.weight": torch.zeros(5, 3)}), r"'2\.weight' is \(5, 3\), the model's is \(2, 3\)"),
    ],
)
def test_another_architecture_is_named_by_its_first_difference(change, words):
    weights = dict(net().state_dict())
    change(weights)
    with pytest.raises(ArenaError, match=f"^here: another architecture's weights: {words}") as error:
        load_weights(net(), weights, "here")
    one_line(error)


def test_differences_are_counted():
    with pytest.raises(ArenaError, match=r"\(7 differences in 9 tensors\)"):
        load_weights(net(3), net(5).state_dict(), "here")


def test_weights_that_are_not_finite_are_refused():
    weights = dict(net().state_dict())
    weights["0.bias"] = torch.tensor([0.0, float("nan"), 1.0])
    with pytest.raises(ArenaError, match=r"'0\.bias' holds values that are not finite"):
        load_weights(net(), weights, "here")


def test_identity_sees_every_parameter_buffer_name_type_and_text():
    base = model_id(net(), "spec")
    assert base == model_id(net(), "spec")
    assert len(base) == 64
    assert base != model_id(net(), "other")
    assert model_id(net(), "a", "b") != model_id(net(), "ab")
    changed = net()
    changed[1].running_mean[0] += 1e-7
    assert base != model_id(changed, "spec")
    changed = net()
    with torch.no_grad():
        changed[2].bias[1] = torch.nextafter(changed[2].bias[1], torch.tensor(9.0))
    assert base != model_id(changed, "spec")
    assert base != model_id(net().double(), "spec")
    assert base == model_id(net().train(), "spec")


def test_identity_by_hand():
    import hashlib

    layer = nn.Linear(2, 1)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2.0]]))
        layer.bias.zero_()
    data = b"bias\nfloat32\n(1,)\n" + b"\0" * 4
    data += b"weight\nfloat32\n(1, 2)\n" + bytes.fromhex("0000803f00000040") + b"\ntext"
    assert model_id(layer, "text") == hashlib.sha256(data).hexdigest()


class Hidden(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("noise", torch.rand(3), persistent=False)


def test_snapshot_holds_buffers_that_a_state_dict_leaves_out():
    first, second = Hidden(), Hidden()
    assert not torch.equal(first.noise, second.noise)
    restore(second, snapshot(first), "x")
    assert torch.equal(first.noise, second.noise)
    with pytest.raises(ArenaError, match="x: builds another architecture each time"):
        restore(net(), snapshot(first), "x")


def test_a_lazy_module_is_named():
    with pytest.raises(ArenaError, match=r"parameter 'weight' has no shape yet"):
        snapshot(nn.LazyLinear(3))
