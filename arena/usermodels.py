"""A user's own model: ``path/to/file.py:factory`` or ``package.module:factory``, with weights and a surface if given.

The factory takes no arguments and returns an ``nn.Module`` from (N, C, H, W) images in [0, 1] to logits (N, K).
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
import traceback
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from arena.checkpoints import load_weights, model_id, read_weights, snapshot
from arena.contender import Contender, count, digest, seeded
from arena.errors import ArenaError, nearest
from arena.surface import Surface, surface_from_toml
from arena.watch import Watch


def is_own(text: str) -> bool:
    """Tell whether a defense's text names a factory, not a registered defense."""
    return ":" in text.partition("(")[0]


@dataclass(frozen=True)
class OwnPlan:
    """How to get a user's own model."""

    name: str
    key: str
    factory: OwnFactory
    checkpoint: Path | None
    surface: Surface

    def obtain(self, *, train: bool, retrain: bool, device: str, watch: Watch) -> Contender:
        """Build the model and load its weights. Nothing is trained: the factory or the checkpoint brings the weights.

        Raises:
            ArenaError: the factory fails or returns no module, or the checkpoint does not fit.
        """
        model = self.factory()
        source = self._source()
        trained: dict[str, Any] = {"weights": "factory"}
        if self.checkpoint is not None:
            weights = read_weights(self.checkpoint)
            load_weights(model, weights, f"checkpoint '{self.checkpoint}' for '{self.name}'")
            trained = {
                "weights": "checkpoint",
                "checkpoint": self.checkpoint.name,
                "sha256": hash_file(self.checkpoint),
            }
        return Contender(
            name=self.name,
            id=model_id(model, source, self.name.rpartition(":")[2]),
            key=self.key,
            backbone=None,
            options={},
            eval_options={},
            trained=trained | {"source_sha256": source},
            parameters=count(model),
            twin="",
            origin="",
            surface=self.surface,
            factory=self.factory,
            weights=snapshot(model),
        )

    def _source(self) -> str:
        """Hash the factory's file and every module of its folder that is loaded by now."""
        digest = hashlib.sha256(self.factory.source.encode())
        files = {getattr(m, "__file__", None) for m in list(sys.modules.values())}
        inside = sorted(Path(f) for f in files if f and Path(f).parent == self.factory.folder and f.endswith(".py"))
        for path in inside:
            digest.update(hash_file(path).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class OwnFactory:
    """Calls the factory of a user's own model. Another process finds it by its place and knows it by its hash."""

    name: str
    """As the user wrote it."""
    folder: Path
    """On the import path while the factory runs."""
    source: str
    """sha256 of the source file."""
    train_seed: int
    found: Callable[[], Any]

    def __call__(self) -> nn.Module:
        """Build the model.

        Raises:
            ArenaError: the factory fails, or returns no module.
        """
        # The seed makes weights that a factory draws at random the same every time.
        with seeded(self.train_seed), importable(self.folder):
            try:
                made = self.found()
            except KeyboardInterrupt:
                raise
            except BaseException as e:
                raise ArenaError(f"'{self.name}': the factory raised {said(e)}") from e
        if not isinstance(made, nn.Module):
            raise ArenaError(f"'{self.name}': the factory returned {type(made).__name__}, expected an nn.Module")
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _found_again, (self.name, self.folder, self.source, self.train_seed)


def _found_again(name: str, folder: Path, source: str, train_seed: int) -> OwnFactory:
    """Find a factory in another process than the one that asked for it.

    Raises:
        ArenaError: it is not there, or its file is another one.
    """
    where, _, factory = name.rpartition(":")
    here = f"{folder / Path(where).name}:{factory}" if _is_file(where) else name
    other = find_own(here, train_seed, folder)
    if other.source != source:
        raise ArenaError(f"'{name}': {folder} holds another file than where the match was begun (its sha256 differs)")
    return OwnFactory(name, folder, source, train_seed, other.found)


def find_own(text: str, train_seed: int, folder: Path | None = None) -> OwnFactory:
    """Find the factory behind ``file.py:factory`` or ``package.module:factory``.

    ``folder`` is where a package may lie besides the import path; None: the working directory.

    Raises:
        ArenaError: no such file, module or factory, an import that fails, or options in brackets.
    """
    where, _, factory = text.strip().rpartition(":")
    if "(" in factory or "(" in where:
        raise ArenaError(f"'{text}': a factory is called without arguments, expected FILE.py:FACTORY without brackets")
    if not where or not factory.isidentifier():
        raise ArenaError(f"'{text}': expected FILE.py:FACTORY or package.module:FACTORY")
    if _is_file(where):
        path = Path(where).expanduser()
        module, source, folder = _from_file(text, path), hash_file(path), path.absolute().parent
    else:
        folder = folder or Path.cwd()
        module, source = _from_package(text, where, folder)
    found = getattr(module, factory, None)
    if not callable(found):
        known = [k for k, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        what = "has no factory" if found is None else f"holds {type(found).__name__}, not a callable, as"
        hint = nearest(factory, known) or f"; it has: {', '.join(sorted(known)[:8]) or 'no callable of its own'}"
        raise ArenaError(f"'{text}': {where} {what} '{factory}'{hint}")
    return OwnFactory(text.strip(), folder, source, train_seed, found)


def _is_file(where: str) -> bool:
    return where.endswith(".py") or "/" in where


def plan_own(text: str, *, train_seed: int, checkpoint: Path | None, surface: Path | None) -> OwnPlan:
    """Find a user's own model.

    Raises:
        ArenaError: as ``find_own``, or a surface file that cannot be read.
    """
    factory = find_own(text, train_seed)
    declared = Surface() if surface is None else surface_from_toml(surface)
    fields = {
        "source": factory.source,
        "factory": factory.name.rpartition(":")[2],
        "train_seed": train_seed,
        "checkpoint": None if checkpoint is None else hash_file(checkpoint),
        "surface": None if surface is None else hash_file(surface),
    }
    return OwnPlan(factory.name, digest(fields), factory, checkpoint, declared)


def _from_file(text: str, path: Path) -> types.ModuleType:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArenaError(f"'{text}': no such file '{path}'") from None
    except OSError as e:
        raise ArenaError(f"'{text}': '{path}' cannot be read ({e.strerror or e})") from None
    # Compiled here rather than imported: what runs is what is hashed, never a stale byte-code file.
    name = f"arena_own_{hashlib.sha256(str(path.absolute()).encode() + data).hexdigest()[:12]}"
    module = types.ModuleType(name)
    module.__file__ = str(path.absolute())
    sys.modules[name] = module  # dataclasses and pickling look their module up here
    with importable(path.absolute().parent):
        try:
            exec(compile(data, str(path), "exec"), module.__dict__)
        except KeyboardInterrupt:
            raise
        except BaseException as e:
            del sys.modules[name]
            raise ArenaError(f"'{text}': running {path.name} raised {said(e)}") from e
    return module


def _from_package(text: str, name: str, folder: Path) -> tuple[types.ModuleType, str]:
    with importable(folder):
        try:
            module = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except ModuleNotFoundError as e:
            if e.name and (name == e.name or name.startswith(f"{e.name}.")):
                raise ArenaError(
                    f"'{text}': no module '{e.name}' (a file is written path/to/file.py:factory)"
                ) from None
            raise ArenaError(f"'{text}': importing {name} raised {said(e)}") from e
        except BaseException as e:
            raise ArenaError(f"'{text}': importing {name} raised {said(e)}") from e
    file = inspect.getsourcefile(module)
    return module, hash_file(Path(file)) if file else hashlib.sha256(name.encode()).hexdigest()


@contextmanager
def importable(folder: Path) -> Iterator[None]:
    """Put ``folder`` first on the import path for a while."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        if str(folder) in sys.path:
            sys.path.remove(str(folder))


def said(error: BaseException) -> str:
    """Write an error of someone else's code on one line, with the place it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}{': ' + lines[0][:200] if lines else ''}{place}"


def hash_file(path: Path) -> str:
    """Return the sha256 of a file the user named.

    Raises:
        ArenaError: missing or unreadable.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise ArenaError(f"'{path}': no such file") from None
    except OSError as e:
        raise ArenaError(f"'{path}': cannot be read ({e.strerror or e})") from None
