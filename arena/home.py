"""Where the arena keeps what it made: one folder, written atomically, shared by processes through lock files."""

from __future__ import annotations

import os
import re
import secrets
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from arena.errors import ArenaError

if TYPE_CHECKING:
    from collections.abc import Iterator


def home() -> Path:
    """Return the arena's folder, created: ARENA_HOME, or the user's data folder of the platform.

    Raises:
        ArenaError: the folder cannot be created or written, or a file lies in its place.
    """
    named = os.environ.get("ARENA_HOME")
    if named:
        folder = Path(named).expanduser().absolute()
    else:
        from platformdirs import user_data_path

        folder = user_data_path("arena", appauthor=False)
    cure = "set ARENA_HOME to a folder you can write"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise ArenaError(f"ARENA_HOME {folder} is not a folder; {cure}") from None
    except OSError as error:
        raise ArenaError(f"ARENA_HOME {folder} cannot be created ({error.strerror}); {cure}") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ArenaError(f"ARENA_HOME {folder} cannot be written; {cure}")
    return folder


@contextmanager
def atomic_file(path: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when the block ends: readers see the old file or the whole new one, and neither
    an error nor a kill leaves a half.

    If `durable`, a loss of power leaves none either. Waiting for the disk takes milliseconds: what is written often,
    and done again where it is damaged, need not.

    Raises:
        ArenaError: the folder cannot be created, or the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise ArenaError(f"{path} cannot be written ({error.strerror or error})") from None
        raise


def atomic_write(path: Path, data: bytes, durable: bool = True) -> None:
    """Write `data` to `path` as ``atomic_file`` does.

    Raises:
        ArenaError: the folder cannot be created, or the file cannot be written.
    """
    with atomic_file(path, durable) as file:
        file.write(data)


@contextmanager
def lock(name: str) -> Iterator[None]:
    """Hold the lock `name` among all processes that share the arena's folder, until the block ends.

    The lock dies with its process, so a killed run never blocks the next one.

    Raises:
        ArenaError: another process holds it.
    """
    from filelock import FileLock, Timeout

    folder = home() / "locks"
    try:
        folder.mkdir(exist_ok=True)
        held = FileLock(folder / (re.sub(r"[^A-Za-z0-9._-]", "_", name) + ".lock"), timeout=0)
        held.acquire()
    except Timeout:
        raise ArenaError(f"{name} is in use by another arena process; wait for it to end or stop it") from None
    except OSError as error:
        raise ArenaError(f"lock {name} under {folder} cannot be made ({error.strerror or error})") from None
    try:
        yield
    finally:
        held.release()
