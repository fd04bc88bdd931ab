"""Breaks go to disk and come back the same: the first of each point, in order, under a hash of the arrays alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arena.errors import ArenaError
from arena.examples import Breaks, examples_hash, keep_examples, read_examples

IMAGE = (1, 4, 5)


def pictures(n: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, *IMAGE, generator=torch.Generator().manual_seed(seed))


def test_examples_keep_their_hash_through_the_file(arena_home):
    x = pictures(3)
    kept = keep_examples("abc", x, torch.tensor([5, 2, 9]))
    back, index = read_examples(arena_home / kept["file"])
    assert torch.equal(back[:], x)
    assert index.tolist() == [5, 2, 9]
    assert examples_hash(back, index.numpy()) == examples_hash(x.numpy(), index.numpy()) == kept["sha256"]
    assert examples_hash(x.numpy() + np.float32(1e-7), index.numpy()) != kept["sha256"]


@given(st.lists(st.lists(st.integers(0, 30), unique=True, max_size=12), max_size=6))
def test_the_first_break_of_a_point_stays(tmp_path_factory, batches):
    breaks, first = Breaks(tmp_path_factory.mktemp("breaks"), IMAGE), {}
    for number, rows in enumerate(batches):
        x = pictures(len(rows), number)
        breaks.add(torch.tensor(rows, dtype=torch.int64), x)
        for k, row in enumerate(rows):
            first.setdefault(row, x[k])
    assert breaks.points == sorted(first)
    assert breaks.shape == (len(first), *IMAGE)
    for span in (slice(None), slice(2, 7), slice(40, 50)):
        wanted = [first[row] for row in sorted(first)[span]]
        assert torch.equal(breaks[span], torch.stack(wanted) if wanted else torch.zeros(0, *IMAGE))


def test_many_breaks_are_written_as_numpy_would(arena_home, monkeypatch):
    monkeypatch.setattr("arena.examples.CHUNK", 4)
    x, index = pictures(11), torch.arange(11)
    breaks = Breaks(arena_home, IMAGE)
    breaks.add(index, x)
    kept = keep_examples("abc", breaks, index)
    with np.load(arena_home / kept["file"], allow_pickle=False) as file:
        assert np.array_equal(file["x_adv"], x.numpy())
        assert file["index"].tolist() == index.tolist()
    assert kept["sha256"] == keep_examples("def", x, index)["sha256"] == examples_hash(x.numpy(), index.numpy())
    assert sorted(p.name for p in arena_home.rglob("*") if p.is_file()) == ["abc.npz", "def.npz"]  # no name leads to it


def test_a_match_without_breaks_keeps_none(arena_home):
    kept = keep_examples("abc", Breaks(arena_home, IMAGE), torch.zeros(0, dtype=torch.int64))
    x, index = read_examples(arena_home / kept["file"])
    assert tuple(x.shape) == tuple(x[:].shape) == (0, *IMAGE)
    assert len(index) == 0


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("order", ["C", "F"])
def test_files_of_others_are_read_whatever_their_layout(arena_home, tmp_path, save, order):
    x = pictures(5).numpy()
    save(tmp_path / "x.npz", x_adv=np.asarray(x, order=order), index=np.arange(5))
    arena_home.mkdir()
    assert np.array_equal(read_examples(tmp_path / "x.npz")[0][1:4].numpy(), x[1:4])


def test_a_file_that_ends_early_gets_one_line(arena_home, tmp_path):
    import io
    import zipfile

    whole = io.BytesIO()
    np.save(whole, pictures(5).numpy())
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("x_adv.npy", whole.getvalue()[:-8])
        index = io.BytesIO()
        np.save(index, np.arange(5))
        archive.writestr("index.npy", index.getvalue())
    with pytest.raises(ArenaError, match=r"not a readable npz file \(x_adv holds 392 bytes") as caught:
        read_examples(tmp_path / "x.npz")
    assert "\n" not in str(caught.value)
