"""Data sets: the fixed order and its laws, the embedded default, and files with every way to be wrong."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arena.datasets import Images, describe, digits, from_npz, open_images, stratified, to_float
from arena.errors import ArenaError
from arena.plugins import discover

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=120).map(np.array)


@given(LABELS, st.integers(0, 100))
def test_the_order_is_a_permutation_fixed_by_labels_and_seed(labels, seed):
    order = stratified(labels, seed)
    assert order.dtype == np.int64
    assert sorted(order) == list(range(len(labels)))
    assert (order == stratified(labels.copy(), seed)).all()


@given(LABELS, st.integers(0, 100))
def test_every_prefix_is_proportional(labels, seed):
    """With m of N points in a class, offsets in [0.2, 0.8]: a count is off n m / N by at most 0.8 (1 + K m / N)."""
    ordered, total = labels[stratified(labels, seed)], len(labels)
    classes = np.unique(labels)
    for label in classes:
        share = (labels == label).sum() / total
        counts = (ordered == label).cumsum()
        gap = np.abs(counts - share * np.arange(1, total + 1))
        assert gap.max() <= 0.8 * (1 + len(classes) * share) + 1e-9


def test_another_seed_is_another_order():
    labels = np.arange(100) % 10
    assert (stratified(labels, 0) != stratified(labels, 1)).any()


def test_digits_never_changes():
    images = digits()
    assert images.sha256 == digits().sha256
    assert images.sha256 == "c0118e95cb082d23932e84cdd773c46785890c7d046b8c6780e07e5a6abff0be"
    assert images.shape == (1, 8, 8)
    assert (len(images.y_train), len(images.y_test), images.n_classes) == (1197, 600, 10)
    assert images.x_test.dtype == torch.uint8
    assert images.x_test.max() == 255
    order = images.subset(600).numpy().astype("<i8").tobytes()
    assert hashlib.sha256(order).hexdigest() == "1faee1b66ea40650ff92c40dbf105c27739bb61a667167c805d159a9d8777928"


def test_digits_splits_share_no_picture_by_index_and_are_balanced():
    images = digits()
    for y in (images.y_train, images.y_test):
        share = torch.bincount(y, minlength=10) / len(y)
        assert (share - 0.1).abs().max() < 0.005
    rows = torch.cat((images.x_train, images.x_test)).flatten(1)
    assert len(rows) == 1797
    assert len(torch.unique(rows, dim=0)) == 1797  # no scan appears twice, so none is in both splits


def test_subsets_are_nested_and_hold_every_class():
    images = digits()
    whole = images.subset(600)
    for n in (1, 10, 37, 500):
        assert torch.equal(images.subset(n), whole[:n])
    assert images.missing_classes(images.subset(20)) == []
    assert len(images.missing_classes(images.subset(3))) >= 7
    assert images.subset_rule == "stratified-v1"


@pytest.mark.parametrize("n", [0, -1, 25])
def test_subset_size_is_checked(tiny_images, n):
    with pytest.raises(ArenaError, match=f"-n {n}: expected 1 to 24, the test points of data set 'tiny'"):
        tiny_images.subset(n)


def test_the_hash_sees_every_array_its_shape_and_its_type(tiny_images):
    base = vars(tiny_images)
    base = {k: base[k] for k in ("x_train", "y_train", "x_test", "y_test")}
    seen = {tiny_images.sha256}
    for key in base:
        changed = base[key].clone()
        changed.view(-1)[0] += 1
        seen.add(Images("tiny", **{**base, key: changed}, n_classes=3).sha256)
    seen.add(Images("tiny", **{**base, "x_test": base["x_test"].view(24, 1, 2, 8)}, n_classes=3).sha256)
    seen.add(Images("tiny", **{**base, "x_test": base["x_test"].to(torch.int8)}, n_classes=3).sha256)
    assert len(seen) == 7
    assert Images("other name", **base, n_classes=3).sha256 == tiny_images.sha256


def test_pixels_become_floats_in_the_unit_interval():
    stored = torch.tensor([0, 51, 255], dtype=torch.uint8)
    torch.testing.assert_close(to_float(stored), torch.tensor([0.0, 0.2, 1.0]))
    assert to_float(torch.rand(3, dtype=torch.float64)).dtype == torch.float32


def arrays(**changes):
    made = {
        "x_train": np.arange(4 * 3 * 2 * 3, dtype=np.uint8).reshape(4, 3, 2, 3),
        "y_train": np.array([0, 1, 2, 3]),
        "x_test": np.full((5, 3, 2, 3), 7, dtype=np.uint8),
        "y_test": np.array([3, 0, 1, 1, 0], dtype=np.uint8),
    }
    made.update(changes)
    return {k: v for k, v in made.items() if v is not None}


def saved(tmp_path, **changes):
    file = tmp_path / "d.npz"
    np.savez(file, **arrays(**changes))
    return file


def test_npz_bytes_are_nhwc(tmp_path):
    images = from_npz(saved(tmp_path))
    assert images.shape == (3, 3, 2)
    assert images.x_train.dtype == torch.uint8
    assert (images.x_train.numpy() == arrays()["x_train"].transpose(0, 3, 1, 2)).all()
    assert images.y_test.tolist() == [3, 0, 1, 1, 0]
    assert images.y_test.dtype == torch.int64
    assert (images.n_classes, images.name, images.subset_rule) == (4, "npz:d.npz", "file-order")


def test_npz_floats_are_nchw(tmp_path):
    x = np.random.default_rng(0).random((5, 1, 4, 6))
    images = from_npz(saved(tmp_path, x_train=x[:4], x_test=x))
    assert images.shape == (1, 4, 6)
    assert images.x_test.dtype == torch.float32
    assert (images.x_test.numpy() == x.astype(np.float32)).all()


def test_npz_keeps_file_order_and_names_missing_classes(tmp_path):
    images = from_npz(saved(tmp_path))
    assert images.subset(3).tolist() == [0, 1, 2]
    assert images.missing_classes(images.subset(3)) == [2]
    assert images.missing_classes(images.subset(5)) == [2]


FLOATS = np.full((5, 3, 4, 4), 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_test": None, "y_test": None}, "lacks x_test, y_test; it holds x_train, y_train"),
        (dict.fromkeys(arrays(), None), "lacks x_train, y_train, x_test, y_test; it holds nothing"),
        (
            {"x_test": np.zeros((5, 3, 2), np.uint8)},
            "x_test has shape (5, 3, 2), expected 4 dimensions (uint8 NHWC or float NCHW)",
        ),
        (
            {"x_test": np.zeros((5, 3, 32, 32), np.uint8)},
            "x_test has shape (5, 3, 32, 32), uint8 pictures are expected as N, H, W, C",
        ),
        (
            {"x_test": np.zeros((5, 32, 32, 3), np.float32)},
            "x_test has shape (5, 32, 32, 3), float pictures are expected as N, C, H, W",
        ),
        ({"x_test": np.zeros((5, 3, 2, 3), np.int64)}, "x_test is int64, expected uint8 NHWC or float NCHW in [0, 1]"),
        ({"x_test": FLOATS * 510}, "x_test runs from 255 to 255, expected finite values in [0, 1]"),
        ({"x_test": FLOATS - 1}, "x_test runs from -0.5 to -0.5, expected finite values in [0, 1]"),
        (
            {"x_test": np.where(np.arange(4) == 0, np.nan, FLOATS)},
            "x_test runs from 0.5 to 0.5, expected finite values in [0, 1]",
        ),
        (
            {"x_test": np.where(np.arange(4) == 0, np.inf, FLOATS)},
            "x_test runs from 0.5 to inf, expected finite values in [0, 1]",
        ),
        ({"x_test": FLOATS}, "x_train holds (3, 3, 2) pictures, x_test (3, 4, 4)"),
        ({"x_test": np.zeros((0, 3, 2, 3), np.uint8), "y_test": np.zeros(0, int)}, "x_test is empty"),
        ({"y_train": np.arange(3)}, "y_train is int64 (3,), expected integers of shape (4,)"),
        ({"y_train": np.eye(4)}, "y_train is float64 (4, 4), expected integers of shape (4,)"),
        ({"y_train": np.arange(4) * 1.0}, "y_train is float64 (4,), expected integers of shape (4,)"),
        ({"y_train": np.arange(4) - 1}, "y_train holds the label -1, expected 0 and up"),
        (
            {"y_train": np.array([{}] * 4, dtype=object)},
            "not a readable npz file (no zip archive of plain arrays)",
        ),
    ],
)
def test_npz_messages(tmp_path, changes, message):
    file = saved(tmp_path, **changes)
    with pytest.raises(ArenaError) as caught:
        from_npz(file)
    assert str(caught.value) == f"data set 'npz:{file}': {message}"


def test_damaged_files_are_one_line(tmp_path):
    file = tmp_path / "d.npz"
    np.savez_compressed(file, **arrays(x_train=np.random.default_rng(0).integers(0, 256, (4, 9, 9, 3), np.uint8)))
    whole = file.read_bytes()
    np.save(tmp_path / "one.npy", np.zeros(3))
    damaged = [b"", b"not a zip", whole[: len(whole) // 2], (tmp_path / "one.npy").read_bytes()]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(60, 400, 17)]
    messages = []
    for content in damaged:
        file.write_bytes(content)
        try:
            from_npz(file)
        except ArenaError as e:
            messages.append(str(e))
    assert len(messages) > 15  # a flipped byte of padding or of a time stamp harms nothing
    for message in messages:
        assert message.startswith(f"data set 'npz:{file}': ")
        assert "\n" not in message


def test_missing_file(tmp_path):
    with pytest.raises(ArenaError, match="no such file"):
        from_npz(tmp_path / "none.npz")
    with pytest.raises(ArenaError, match="not a readable npz file"):
        from_npz(tmp_path)


def test_names_and_files_are_opened_alike(tmp_path):
    registry = discover(lambda distribution: distribution == "adversarial-arena")
    assert open_images("digits", registry).sha256 == digits().sha256
    assert open_images(f"npz:{saved(tmp_path)}", registry).n_classes == 4
    assert describe("npz:anything", registry).cpu is False
    assert (describe("digits", registry).norm, describe("digits", registry).eps) == ("Linf", "0.2")
    with pytest.raises(ArenaError, match="unknown dataset 'digit'; did you mean 'digits'"):
        open_images("digit", registry)
