"""Several processes train one model: the gradient is the whole batch's, one of them speaks, a failure ends them all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from arena.checkpoints import read_weights
from arena.distributed import World, launch, parse
from arena.errors import ArenaError

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def test_alone_nothing_is_exchanged():
    world = World()
    rows = torch.arange(5)
    p = torch.nn.Parameter(torch.ones(2))
    p.grad = torch.tensor([1.0, 2.0])
    world.sum_gradients([p], 0.25)
    assert torch.equal(p.grad, torch.tensor([1.0, 2.0]))
    assert world.share(rows) is rows
    assert world.sum_values({"a": 1.5}) == {"a": 1.5}
    world.wait()


@pytest.mark.parametrize("size", [2, 3, 5])
def test_shares_part_a_batch(size):
    rows = torch.arange(17)
    parts = [World(rank, size).share(rows) for rank in range(size)]
    assert torch.equal(torch.cat(parts), rows)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,x", "--devices '0,x': expected numbers of CUDA devices"),
        ("0,0", "--devices '0,0': one device twice"),
        ("0,4", "--devices '0,4': this machine has 2 CUDA devices"),
        ("-1", "--devices '-1': this machine has 2"),
    ],
)
def test_bad_lists_of_devices_are_refused(text, words):
    with pytest.raises(ArenaError) as error:
        parse(text, 2)
    assert str(error.value).startswith(words)
    assert parse("1,0", 2) == (1, 0)


SUM = """
import json, os, sys, torch
from pathlib import Path
from arena.distributed import joined
with joined("cpu") as (world, device):
    used, lone, unused = (torch.nn.Parameter(torch.zeros(2, 3)) for _ in range(3))
    used.grad = torch.full((2, 3), float(world.rank + 1))
    if world.rank == 1:
        lone.grad = torch.full((2, 3), 8.0)
    world.sum_gradients([used, lone, unused], [0.25, 0.75][world.rank])
    model = torch.nn.BatchNorm1d(2)
    model.running_mean += world.rank
    world.average_buffers(model)
    found = [used.grad[0, 0].item(), lone.grad[0, 0].item(), unused.grad is None, model.running_mean.tolist(),
             int(model.num_batches_tracked), world.sum_values({"a": world.rank + 1.0})]
    Path(sys.argv[1], f"{world.rank}.json").write_text(json.dumps(found))
"""


def run(script: str, folder: Path, size: int = 2) -> list[int]:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**ENVIRONMENT, "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    running = [
        subprocess.Popen([sys.executable, "-c", script, str(folder)], env={**shared, "RANK": str(rank)})
        for rank in range(size)
    ]
    return [process.wait(timeout=120) for process in running]


def test_gradients_are_summed_by_share_and_what_none_has_stays_none(tmp_path):
    assert run(SUM, tmp_path) == [0, 0]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        assert found == [1 * 0.25 + 2 * 0.75, 8 * 0.75, True, [0.5, 0.5], 0, {"a": 3.0}]


def test_two_processes_train_as_one_where_no_row_meets_another(tmp_path, monkeypatch):
    """A network without batch norm, natural training, no noise: then sharing changes only the order of sums."""
    arguments = ["train", "rt", "--backbone", "mlp", "--epochs", "2", "--device", "cpu", "--quiet"]
    for key, value in ENVIRONMENT.items():
        monkeypatch.setenv(key, value)
    made = []
    for size in (1, 2):
        monkeypatch.setenv("ARENA_HOME", str(tmp_path / str(size)))
        assert launch(arguments, size) == 0
        (folder,) = (tmp_path / str(size) / "models").iterdir()
        made.append((read_weights(folder / "last.safetensors"), json.loads((folder / "model.json").read_text())))
    (alone, record), (shared, other) = made
    assert record["key"] == other["key"]
    for name, tensor in alone.items():
        assert torch.allclose(tensor, shared[name], atol=1e-5), name
    assert [h["loss"] for h in record["history"]] == pytest.approx([h["loss"] for h in other["history"]], rel=1e-4)
    assert other["history"][-1]["natural"] > 50


def test_one_failure_ends_all(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("ARENA_HOME", str(tmp_path))
    assert launch(["train", "no_such_defense", "--device", "cpu"], 2) == 2
    assert capfd.readouterr().err.count("unknown defense 'no_such_defense'") == 1  # one of them says it


def test_ending_the_launcher_ends_all(tmp_path):
    """The first process holds the model's lock; one that went on alone would keep it."""
    environment = {**ENVIRONMENT, "ARENA_HOME": str(tmp_path)}
    script = "import sys; from arena.distributed import launch; sys.exit(launch(sys.argv[1:], 2))"
    words = ["train", "sat", "--backbone", "mlp", "--epochs", "5000", "--device", "cpu", "--quiet"]
    launcher = subprocess.Popen([sys.executable, "-c", script, *words], env=environment)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("models/*/train.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    launcher.terminate()
    assert launcher.wait(timeout=30) == 128 + signal.SIGTERM
    (log,) = tmp_path.glob("models/*/train.jsonl")
    size = log.stat().st_size
    time.sleep(2.5)  # the log is written every second
    assert log.stat().st_size == size
