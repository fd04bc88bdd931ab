"""Public data sets: small files in torchvision's layouts, downloads from a folder that plays the server."""

from __future__ import annotations

import gzip
import hashlib
import pickle
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch

from arena import downloads
from arena.datasets import describe, open_images
from arena.errors import ArenaError
from arena.plugins import discover


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "data"
    monkeypatch.setenv("ARENA_DATA", str(folder))
    return folder


@pytest.fixture
def registry():
    return discover(lambda distribution: distribution == "adversarial-arena")


def pixels(n: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(n).integers(0, 256, (n, *shape), np.uint8)


def md5(file: Path) -> str:
    return hashlib.md5(file.read_bytes()).hexdigest()


def idx(array: np.ndarray) -> bytes:
    """LeCun's format: zero, zero, type 8 (uint8), number of dimensions, sizes, bytes."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def mnist_files(n: int) -> dict[str, bytes]:
    labels = np.arange(n, dtype=np.uint8) % 10
    return {
        "train-images-idx3-ubyte": idx(pixels(n, 28, 28)),
        "train-labels-idx1-ubyte": idx(labels),
        "t10k-images-idx3-ubyte": idx(pixels(n // 2, 28, 28)),
        "t10k-labels-idx1-ubyte": idx(labels[: n // 2]),
    }


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_mnist_and_its_kin(root, registry, name, folder):
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    for file, content in mnist_files(20).items():
        (raw / file).write_bytes(content)
    images = open_images(name, registry)
    assert (images.name, images.shape, images.n_classes, images.subset_rule) == (name, (1, 28, 28), 10, "stratified-v1")
    assert (images.x_train.dtype, images.y_train.dtype) == (torch.uint8, torch.int64)
    assert (images.x_train[:, 0].numpy() == pixels(20, 28, 28)).all()
    assert images.y_test.tolist() == list(range(10))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.arange(9, dtype=np.uint8)))
    with pytest.raises(
        ArenaError, match=r"damaged \(10 pictures of \(1, 28, 28\) with 9 labels\); remove (MNIST|Fash)"
    ):
        open_images(name, registry)


@pytest.mark.parametrize(("name", "kind", "key"), [("cifar10", "CIFAR10", "labels"), ("cifar100", "CIFAR100", "fine")])
def test_cifar(root, registry, monkeypatch, name, kind, key):
    from torchvision import datasets

    cls = getattr(datasets, kind)
    folder = root / cls.base_folder
    folder.mkdir(parents=True)
    x = pixels(12, 3, 32, 32)
    key = key if key == "labels" else "fine_labels"
    parts = {"one": x[:4], "two": x[4:8], "test": x[8:]}
    for i, (file, part) in enumerate(parts.items()):
        batch = {"data": part.reshape(4, -1), key: [i, i + 1, i + 2, i + 3]}
        (folder / file).write_bytes(pickle.dumps(batch))
    (folder / "meta").write_bytes(pickle.dumps({"names": [str(i) for i in range(10)]}))
    monkeypatch.setattr(cls, "train_list", [[f, md5(folder / f)] for f in ("one", "two")])
    monkeypatch.setattr(cls, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(cls, "meta", {"filename": "meta", "key": "names", "md5": md5(folder / "meta")})
    images = open_images(name, registry)
    assert (images.shape, images.n_classes) == ((3, 32, 32), 100 if name == "cifar100" else 10)
    assert (images.x_train.numpy() == x[:8]).all()
    assert (images.x_test.numpy() == x[8:]).all()
    assert images.y_train.tolist() == [0, 1, 2, 3, 1, 2, 3, 4]
    (folder / "two").write_bytes(b"cut off")
    with pytest.raises(ArenaError) as caught:
        open_images(name, registry)
    assert str(caught.value) == (
        f"data set '{name}' in {root} is incomplete or damaged (Dataset not found or corrupted.); "
        f"remove {cls.base_folder} there and run: arena data get {name}"
    )


def test_svhn_calls_the_digit_zero_zero(root, registry, monkeypatch):
    import scipy.io
    from torchvision import datasets

    root.mkdir()
    lists = {}
    for split, n in (("train", 6), ("test", 4)):
        file = root / f"{split}_32x32.mat"
        x, y = pixels(n, 3, 32, 32), np.arange(1, n + 1)
        y[-1] = 10
        scipy.io.savemat(file, {"X": x.transpose(2, 3, 1, 0), "y": y[:, None].astype(np.uint8)})
        lists[split] = ["", file.name, md5(file)]
    monkeypatch.setattr(datasets.SVHN, "split_list", lists)
    images = open_images("svhn", registry)
    assert (images.x_train.numpy() == pixels(6, 3, 32, 32)).all()
    assert images.y_train.tolist() == [1, 2, 3, 4, 5, 0]
    assert (images.shape, images.x_test.is_contiguous()) == ((3, 32, 32), True)


def tiny(folder: Path) -> Path:
    """Two classes, one of the pictures grey, as some are in the original."""
    from PIL import Image

    for name in ("n02", "n01"):
        (folder / "train" / name / "images").mkdir(parents=True)
        (folder / "train" / name / f"{name}_boxes.txt").write_text("")
        for i in range(3):
            Image.fromarray(np.full((64, 64, 3), 10 * i, np.uint8)).save(
                folder / "train" / name / "images" / f"{name}_{i}.JPEG"
            )
    (folder / "val" / "images").mkdir(parents=True)
    Image.fromarray(np.full((64, 64), 200, np.uint8)).save(folder / "val" / "images" / "val_0.JPEG")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(folder / "val" / "images" / "val_1.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t9\t9\nval_1.JPEG\tn01\t0\t0\t9\t9\n")
    return folder


def test_tiny_imagenet(root, registry):
    folder = tiny(root / "tiny-imagenet-200")
    images = open_images("tiny_imagenet", registry)
    assert (images.shape, images.n_classes) == ((3, 64, 64), 200)
    assert images.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert images.y_test.tolist() == [1, 0]
    assert images.x_test.float().mean((1, 2, 3)).tolist() == [200, 90]
    (folder / "val" / "images" / "val_1.JPEG").unlink()
    with pytest.raises(ArenaError, match=r"data set 'tiny_imagenet' in .* is incomplete or damaged"):
        open_images("tiny_imagenet", registry)


@pytest.mark.parametrize("name", downloads.SOURCES)
def test_missing_data_says_what_to_run_and_touches_nothing(root, registry, name, monkeypatch):
    import urllib.request

    monkeypatch.setattr(urllib.request, "urlopen", lambda *a, **k: pytest.fail("a surprise download"))
    with pytest.raises(ArenaError) as caught:
        open_images(name, registry)
    message = str(caught.value)
    assert message.startswith(f"data set '{name}' is not in {root}: download it with: arena data get {name} (or put ")
    assert "ARENA_DATA" in message
    assert "\n" not in message
    assert not root.exists()


def test_the_folder_is_under_the_home_unless_named(arena_home, monkeypatch):
    monkeypatch.delenv("ARENA_DATA", raising=False)
    assert downloads.root() == arena_home / "data"
    monkeypatch.setenv("ARENA_DATA", "~/pictures")
    assert downloads.root() == Path("~/pictures").expanduser()


@pytest.fixture
def served(tmp_path, monkeypatch) -> Iterator[tuple[Path, str]]:
    """A folder and the address where a server of this process offers it."""
    folder = tmp_path / "server"
    folder.mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None: ...


@pytest.fixture
def server(served, monkeypatch) -> Path:
    """A folder from which torchvision downloads MNIST."""
    from torchvision import datasets

    folder, address = served
    for file, content in mnist_files(20).items():
        (folder / f"{file}.gz").write_bytes(gzip.compress(content))
    monkeypatch.setattr(datasets.MNIST, "mirrors", [address])
    monkeypatch.setattr(datasets.MNIST, "resources", [(f.name, md5(f)) for f in sorted(folder.iterdir())])
    return folder


def test_download(root, server, registry):
    assert downloads.get("mnist") == (root, True)
    assert len(open_images("mnist", registry).y_train) == 20
    assert sorted(p.name for p in root.iterdir()) == ["MNIST"]  # neither archives nor a half-made folder
    assert sorted(p.name for p in (root / "MNIST" / "raw").iterdir()) == sorted(mnist_files(2))
    for file in server.iterdir():
        file.unlink()
    assert downloads.get("mnist") == (root, False)


def test_a_failed_download_leaves_nothing(root, server):
    (server / "t10k-labels-idx1-ubyte.gz").write_bytes(b"something else")
    with pytest.raises(ArenaError, match="data set 'mnist' could not be downloaded") as caught:
        downloads.get("mnist")
    assert "\n" not in str(caught.value)
    assert list(root.iterdir()) == []
    assert not downloads.present("mnist")


def test_tiny_imagenet_is_unpacked(root, tmp_path, served, monkeypatch, registry):
    folder = tiny(tmp_path / "made" / "tiny-imagenet-200")
    archive = served[0] / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*")):
            file.write(path, path.relative_to(folder.parent))
    monkeypatch.setattr(downloads, "TINY_URL", served[1] + archive.name)
    monkeypatch.setattr(downloads, "TINY_MD5", md5(archive))
    assert downloads.get("tiny_imagenet") == (root, True)
    assert [p.name for p in root.iterdir()] == ["tiny-imagenet-200"]
    assert open_images("tiny_imagenet", registry).y_test.tolist() == [1, 0]


def test_two_downloads_do_not_meet(root, server):
    from arena.home import lock

    with lock("data-mnist"), pytest.raises(ArenaError, match="data-mnist is in use by another arena process"):
        downloads.get("mnist")


def test_specs(registry):
    seen = {}
    for name in downloads.SOURCES:
        spec = describe(name, registry)
        assert spec.load == f"arena.downloads:{name}"
        assert callable(getattr(downloads, name))
        assert not spec.cpu
        assert registry.has("backbone", spec.backbone)
        seen[name] = (spec.norm, spec.eps)
    assert seen["mnist"] == ("Linf", "0.3")
    assert {seen[n] for n in ("cifar10", "cifar100", "svhn", "tiny_imagenet")} == {("Linf", "8/255")}


def test_importing_brings_in_nothing_heavy():
    code = (
        "import sys, arena.downloads; print([m for m in ('torch', 'torchvision', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
