"""What every test gets: a home of its own, one torch thread a worker, a data set and a model with known answers."""

from __future__ import annotations

import os

# Several workers on few cores: one thread each, in subprocesses too. Set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import signal
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import Tensor, nn

from arena.datasets import Images
from arena.plugins import discover
from arena.target import Target

# A shell starts background jobs with Ctrl-C ignored, and what this process starts would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is no failure: laws are checked, never times.
settings.register_profile("arena", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("arena")

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _session_home(tmp_path_factory):
    """Keep every test away from the user's own home and store."""
    before = {k: os.environ.pop(k, None) for k in ("ARENA_HOME", "ARENA_STORE", "ARENA_PLUGINS_OFF")}
    os.environ["ARENA_HOME"] = str(tmp_path_factory.mktemp("arena-home"))
    yield
    os.environ.pop("ARENA_HOME")
    os.environ.update({k: v for k, v in before.items() if v is not None})


@pytest.fixture
def arena_home(tmp_path, monkeypatch) -> Path:
    """An empty ARENA_HOME for this test alone."""
    home = tmp_path / "arena-home"
    monkeypatch.setenv("ARENA_HOME", str(home))
    return home


@pytest.fixture
def liar() -> type[Target]:
    """A target whose passes in bf16 name every class wrong, on the output and on the heads."""

    class Liar(Target):
        def _cast(self, read, x):
            seen = super()._cast(read, x)
            if self.precision == "fp32":
                return seen
            return replace(seen, logits=-seen.logits, heads={k: -v for k, v in seen.heads.items()})

    return Liar


@pytest.fixture
def registry(tmp_path, monkeypatch, arena_home):
    """The installed plugins and the package of cheats."""
    cheats, info = Path(__file__).parent / "packages" / "cheats", tmp_path / "site" / "arena_cheats-0.0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: arena-cheats\nVersion: 0.0.1\n")
    (info / "entry_points.txt").write_text("[arena]\narena-cheats = arena_cheats\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.syspath_prepend(str(cheats))
    found = discover()
    assert not found.problems
    return found


@pytest.fixture
def tiny_images() -> Images:
    """Three classes of 1x4x4 pictures, told apart by which column is bright; 30 for training, 24 for testing."""
    generator = torch.Generator().manual_seed(0)

    def split(n: int) -> tuple[Tensor, Tensor]:
        y = torch.arange(n) % 3
        x = torch.rand(n, 1, 4, 4, generator=generator) * 0.4
        x[torch.arange(n), 0, :, y] += 0.5
        return (x * 255).to(torch.uint8), y

    return Images("tiny", *split(30), *split(24), n_classes=3)


@dataclass(frozen=True)
class Linear:
    """A linear model whose nearest decision boundary is known in closed form."""

    module: nn.Module

    def distance(self, x: Tensor, y: Tensor, norm: str) -> Tensor:
        """Return the distance of each row to the nearest boundary, float64 (N,); Linf, L2 or L1, ignoring the box."""
        layer = self.module[1]
        weight, bias = layer.weight.double(), layer.bias.double()
        logits = x.double().flatten(1) @ weight.T + bias
        dual = {"Linf": 1, "L2": 2, "L1": torch.inf}[norm]
        lead = logits.gather(1, y[:, None]) - logits
        steep = torch.linalg.vector_norm(weight[y][:, None] - weight[None], ord=dual, dim=2)
        far = torch.nn.functional.one_hot(y, logits.shape[1]).bool()
        return (lead / steep).masked_fill(far, torch.inf).amin(1)


@pytest.fixture
def linear() -> Linear:
    """A linear model over 1x4x4 pictures and 3 classes, fixed weights, eval mode."""
    generator = torch.Generator().manual_seed(1)
    layer = nn.Linear(16, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(3, 16, generator=generator))
        layer.bias.copy_(torch.randn(3, generator=generator) * 0.1)
    return Linear(nn.Sequential(nn.Flatten(), layer).eval().requires_grad_(False))
