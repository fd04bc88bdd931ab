"""Pictures from folders: order, labels, grey and colour, and every way to be wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from arena.datasets import describe, open_images
from arena.errors import ArenaError
from arena.folders import from_folder
from arena.plugins import discover


def put(file: Path, value: int, size: tuple[int, int] = (5, 4), mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).convert(mode).save(file)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Two classes; names out of order, one picture deeper, things that are no pictures beside them."""
    home = tmp_path / "birds"
    put(home / "train" / "owl" / "b.png", 4)
    put(home / "train" / "owl" / "a.png", 3)
    put(home / "train" / "emu" / "old" / "z.PNG", 1)
    put(home / "train" / "emu" / "a.bmp", 0)
    put(home / "test" / "owl" / "q.png", 9)
    (home / "train" / "owl" / "notes.txt").write_text("no picture")
    put(home / "train" / ".cache" / "x.png", 0, (9, 9))
    put(home / "train" / "owl" / "._a.png", 0, (9, 9))
    return home


def test_order_and_labels(folder):
    images = from_folder(folder)
    assert (images.name, images.n_classes, images.subset_rule) == ("folder:birds", 2, "stratified-v1")
    assert images.shape == (3, 4, 5)  # 5 wide, 4 high
    assert images.x_train.dtype == torch.uint8
    assert images.x_train[:, 0, 0, 0].tolist() == [0, 1, 3, 4]
    assert images.y_train.tolist() == [0, 0, 1, 1]
    assert (images.y_test.tolist(), images.x_test.shape) == ([1], (1, 3, 4, 5))


def test_rows_and_channels_are_not_mixed_up(tmp_path):
    x = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    for split in ("train", "test"):
        (tmp_path / split / "a").mkdir(parents=True)
        Image.fromarray(x).save(tmp_path / split / "a" / "one.png")
    images = from_folder(tmp_path)
    assert (images.x_test[0].numpy() == x.transpose(2, 0, 1)).all()
    assert images.n_classes == 2  # logits of one class would say nothing


def test_grey_only_where_all_are_grey(folder):
    for file in folder.rglob("*.*"):
        if file.suffix.lower() in (".png", ".bmp"):
            Image.open(file).convert("L").save(file)
    assert from_folder(folder).shape == (1, 4, 5)
    put(folder / "test" / "emu" / "colour.png", 7)
    images = from_folder(folder)
    assert images.shape == (3, 4, 5)
    assert images.x_train[3].unique().tolist() == [4]


def test_opened_by_name(folder):
    registry = discover(lambda distribution: distribution == "adversarial-arena")
    name = f"folder:{folder}"
    assert open_images(name, registry).sha256 == from_folder(folder).sha256
    spec = describe(name, registry)
    assert (spec.name, spec.norm, spec.eps, spec.backbone, spec.cpu) == ("folder", "Linf", "8/255", "resnet18", False)


def broken(folder: Path, how: str) -> str:
    if how == "nothing":
        return f"no folder '{folder / 'none'}'; expected train/CLASS/PICTURE and test/CLASS/PICTURE"
    if how == "no test":
        (folder / "test" / "owl" / "q.png").unlink()
        return "no pictures under test/CLASS/ (.png, .jpg"
    if how == "class":
        put(folder / "test" / "owls" / "q.png", 0)
        return "class 'owls' is in test but not in train; did you mean 'owl'?"
    file = folder / "train" / "owl" / "a2.png"
    if how == "size":
        put(file, 0, (4, 5))
        put(folder / "train" / "owl" / "a3.png", 0, (6, 6))
        return f"'{file}' has 4x5 pixels, expected 5x4 like '{folder / 'train' / 'emu' / 'a.bmp'}'"
    if how == "alpha":
        put(file, 0, mode="RGBA")
        return f"'{file}' is of mode RGBA, expected 8-bit grey or RGB"
    if how == "deep":
        Image.fromarray(np.zeros((4, 5), np.uint16)).save(file)
        return f"'{file}' is of mode I;16, expected 8-bit grey or RGB"
    if how == "text":
        file.write_text("no picture")
        return f"'{file}' cannot be read as a picture (cannot identify image file"
    assert how == "cut"
    whole = folder / "train" / "owl" / "b.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)).save(whole)
    whole.write_bytes(whole.read_bytes()[:60])
    return f"'{whole}' cannot be read as a picture ("


@pytest.mark.parametrize("how", ["nothing", "no test", "class", "size", "alpha", "deep", "text", "cut"])
def test_messages_are_one_line_and_name_the_first_odd_file(folder, how):
    expected = broken(folder, how)
    asked = folder / "none" if how == "nothing" else folder
    with pytest.raises(ArenaError) as caught:
        from_folder(asked)
    assert str(caught.value).startswith(f"data set 'folder:{asked}': {expected}")
    assert "\n" not in str(caught.value)
