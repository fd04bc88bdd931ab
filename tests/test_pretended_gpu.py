"""Matches on a pretended GPU: tensors that were sent there meet no others, and all is found that is found on a CPU."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from arena.match import play
from arena.question import Question
from arena.watch import Silent

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent / "packages" / "cheats"))
from asking import GO, ask
from pretended_gpu import OnGpu, pretended_gpu

#: A model with a head, a choice and a gate.
MASKED = """
import torch
from arena.selection import Select
from arena_cheats import Base, class_means


class Masked(Base):
    def __init__(self):
        super().__init__()
        self.head, self.select = Base(), Select()
        self.masks = torch.nn.Parameter(1 + class_means() / 4)
        self.gate = torch.nn.Sequential(torch.nn.Linear(64, 1), torch.nn.Sigmoid(), torch.nn.Flatten(0))
        torch.nn.init.normal_(self.gate[0].weight, generator=torch.Generator().manual_seed(0))
        torch.nn.init.zeros_(self.gate[0].bias)

    def forward(self, x):
        flat = x.flatten(1)
        mask = self.select(self.head(x), self.masks)
        return self.scores(flat * mask * (0.9 + 0.1 * self.gate(flat).view(-1, 1)))


def factory():
    return Masked()
"""
SURFACE = """
[heads.h]
path = "head"
[selections.s]
path = "select"
scores = "h"
[gates.g]
path = "gate"
"""


def same(record, other):
    """Compare what must not depend on the device."""
    for one, two in zip(record["attacks"], other["attacks"], strict=True):
        for key in ("name", "status", "error", "attempted", "broken", "backwards"):
            assert one[key] == two[key], (one["name"], key)
        more = one["name"].startswith("square")  # which asks a GPU for all, and passes over what a CPU need not answer
        assert two["forwards"] >= one["forwards"] if more else two["forwards"] == one["forwards"], one["name"]
    assert record["worst_case"] == other["worst_case"]
    assert record["audit"]["verdict"] == other["audit"]["verdict"]
    assert record["diagnosis"] == other["diagnosis"]
    for key in ("folded", "precision", "again"):
        assert record["provenance"]["search"][key] == other["provenance"]["search"][key], key


def test_the_pretended_gpu_is_as_strict_as_one():
    with pretended_gpu():
        there, here = torch.arange(4.0, device="cuda"), torch.arange(4.0)
        assert there.is_cuda
        assert there.device.type == (there + 1).device.type == there[1:].device.type == "cuda"
        assert not here.is_cuda
        assert not there.cpu().is_cuda
        assert isinstance(here.to("cuda"), OnGpu)
        assert there[here.long()].is_cuda  # indices may lie on the CPU
        for wrong in (
            lambda: there + here,
            lambda: torch.cat((there, here)),
            lambda: torch.equal(there, here),
            lambda: there.where(there > 1, here),
            lambda: here[there.long()],
            lambda: there.index_fill(0, here.long(), 1.0),
            lambda: there.__setitem__(slice(None), here),
            lambda: here.__setitem__(slice(None), there),
        ):
            with pytest.raises(RuntimeError, match="same device"):
                wrong()
        with pytest.raises(TypeError, match="to numpy"):
            there.numpy()
    assert not torch.zeros(1).is_cuda


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_match_on_a_gpu_is_the_cpu_s(registry, precision):
    vs = ("pgd", "quick", "apgd_t(steps=10)", "square(queries=200,restarts=2)", "rays(queries=20)")
    how = replace(GO, audit="normal", precision=precision)
    found = ask(registry, vs=vs, running=how, eps="0.1").record
    assert found["attacks"][0]["broken"]
    with pretended_gpu():
        there = ask(registry, vs=vs, running=replace(how, device="cuda", replay=True), eps="0.1").record
    assert there["provenance"]["device"] == "a pretended GPU"
    same(found, there)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_what_a_surface_declares_is_attacked_on_a_gpu_as_on_a_cpu(registry, tmp_path, precision):
    (tmp_path / "masked.py").write_text(MASKED)
    (tmp_path / "surface.toml").write_text(SURFACE)
    vs = (
        "joint_t(steps=5,targets=2)",
        "relaxed(steps=5)",
        "forced(steps=3,targets=2)",
        "gate_held(steps=4)",
        "gate_pgd(steps=4)",
        "lambda_pgd(steps=4)",
        "steer(steps=4,targets=2)",
    )
    asked = Question(f"{tmp_path / 'masked.py'}:factory", vs, n=16, eps="0.1", surface=tmp_path / "surface.toml")
    how = replace(GO, audit="normal", precision=precision)
    found = play(asked, how, registry, Silent()).record
    assert {r["status"] for r in found["attacks"]} == {"ok"}
    assert any(r["broken"] for r in found["attacks"])
    with pretended_gpu():
        same(found, play(asked, replace(how, device="cuda", replay=True), registry, Silent()).record)
