"""``arena data``, and a match on a set that is not there."""

from __future__ import annotations

from arena.downloads import SOURCES


def test_list_says_what_is_there(arena, tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_DATA", str(tmp_path / "data"))
    (tmp_path / "data" / "MNIST").mkdir(parents=True)
    lines = [" ".join(line.split()) for line in arena("data", "list").out.splitlines()]
    assert lines[:3] == [
        f"folder {tmp_path / 'data'}",
        "mnist there",
        "fashion_mnist missing: arena data get fashion_mnist",
    ]
    assert len(lines) == 1 + len(SOURCES)


def test_get(arena, monkeypatch, tmp_path):
    from arena import downloads

    monkeypatch.setattr(downloads, "get", lambda name: (tmp_path, name == "svhn"))
    assert (
        arena("data", "get", "svhn", "mnist").out == f"svhn: downloaded to {tmp_path}\nmnist: already in {tmp_path}\n"
    )
    assert arena("data", "get", "svnh").refusal == "unknown data set to download 'svnh'; did you mean 'svhn'?"
    assert arena("data", "got").refusal == "unknown command 'data got'; did you mean 'data get'?"


def test_a_match_on_missing_data_says_what_to_run(arena, tmp_path, monkeypatch):
    monkeypatch.setenv("ARENA_DATA", str(tmp_path / "data"))
    assert arena("match", "sat", "--dataset", "cifar10", "--vs", "fgsm").refusal == (
        f"data set 'cifar10' is not in {tmp_path / 'data'}: download it with: arena data get cifar10 (or put "
        "torchvision's cifar-10-batches-py there, or name another folder by ARENA_DATA)"
    )
