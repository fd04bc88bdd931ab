"""The store: every result ever made, in one database. Rows are added, never changed and never deleted.

SQLite under the arena's folder by default, in WAL mode so that a reader never waits for a writer; any other database by
URL in ``ARENA_STORE``. The schema's version is stamped into ``meta`` from the first day: a newer store than this code
knows is refused, never guessed at. A file that is no store, or a damaged one, is named and left as it is.

A result is kept twice: as its JSON record, which is the truth, and as columns that only serve to find it. Beside it
lies the outcome of each point, which paired tests between defenses need.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from arena.errors import ArenaError
from arena.home import home
from arena.threat import Threat

SCHEMA = 1
_BUSY_SECONDS = 30
_ID = re.compile(r"[0-9a-f]{12}\Z")

_tables = sa.MetaData()
_meta = sa.Table("meta", _tables, sa.Column("key", sa.String(40), primary_key=True), sa.Column("value", sa.Text))
_results = sa.Table(
    "results",
    _tables,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # order of arrival: the newest answers
    sa.Column("id", sa.String(12), unique=True, nullable=False),
    sa.Column("question", sa.String(200), nullable=False, index=True),
    sa.Column("defense", sa.Text, nullable=False),
    sa.Column("dataset", sa.Text, nullable=False),
    sa.Column("data_sha256", sa.String(64), nullable=False),
    sa.Column("norm", sa.String(8), nullable=False),
    sa.Column(
        "eps", sa.String(60), nullable=False
    ),  # as the exact fraction in lowest terms: equal radii are equal text
    sa.Column("n", sa.Integer, nullable=False),
    sa.Column("model_id", sa.String(64), nullable=False, index=True),
    sa.Column("created", sa.String(40), nullable=False),
    sa.Column("record", sa.Text, nullable=False),
    sa.Column("outcomes", sa.Text, nullable=False),
    sqlite_autoincrement=True,
)


@dataclass(frozen=True)
class Outcomes:
    """What became of each of the n points, in the order of the subset."""

    index: tuple[int, ...]
    """Indices into the data set's test split."""
    natural: tuple[bool, ...]
    """The clean image is classified rightly."""
    broken: tuple[bool, ...]
    """Some attack broke the point (per-example worst case); never true where ``natural`` is false."""

    @classmethod
    def of(cls, index: Any, natural: Any, broken: Any) -> Outcomes:
        """Build from sequences, arrays or tensors of equal length.

        Raises:
            ValueError: lengths differ.
        """
        ints = tuple(int(i) for i in _plain(index))
        right = tuple(bool(v) for v in _plain(natural))
        lost = tuple(bool(v) for v in _plain(broken))
        if not len(ints) == len(right) == len(lost):
            raise ValueError(f"outcomes: {len(ints)} indices, {len(right)} natural, {len(lost)} broken")
        return cls(ints, right, tuple(a and b for a, b in zip(right, lost, strict=True)))

    @property
    def survived(self) -> tuple[bool, ...]:
        """Rightly classified and never broken."""
        return tuple(a and not b for a, b in zip(self.natural, self.broken, strict=True))

    def dump(self) -> str:
        """Return the stored text: JSON of the indices and one letter a point (x wrong, b broken, s survived)."""
        letters = ("x" if not a else "b" if b else "s" for a, b in zip(self.natural, self.broken, strict=True))
        return json.dumps({"index": list(self.index), "outcome": "".join(letters)}, separators=(",", ":"))

    @classmethod
    def parse(cls, text: str) -> Outcomes:
        """Read what ``dump`` wrote."""
        data = json.loads(text)
        letters = data["outcome"]
        return cls(tuple(data["index"]), tuple(c != "x" for c in letters), tuple(c == "b" for c in letters))


def _plain(values: Any) -> Iterable[Any]:
    return values.tolist() if hasattr(values, "tolist") else values


def new_id() -> str:
    """Return a fresh result id: 12 hexadecimal digits."""
    return secrets.token_hex(6)


def exact(eps: str) -> str:
    """Write a radius as a fraction in lowest terms, so that ``0.2`` and ``1/5`` are equal.

    Raises:
        ArenaError: no number or fraction.
    """
    return str(Threat.parse("L1", eps).fraction)


class Store:
    """An open store; made by ``open_store``. A context manager that closes its connections."""

    def __init__(self, engine: sa.Engine, place: str) -> None:
        self._engine = engine
        self.place = place
        """Where it lies, without user name or password."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def put(self, question: str, record: Mapping[str, Any], outcomes: Outcomes) -> str:
        """Add a result in one transaction and return its id; adding the same id again changes nothing.

        Raises:
            ArenaError: the id is taken by the answer to another question, or the store cannot be written.
        """
        asked, threat = record["asked"], record["asked"]["threat"]
        row = {
            "id": record["id"],
            "question": question,
            "defense": record["defense"],
            "dataset": asked["dataset"],
            "data_sha256": data_hash(record),
            "norm": threat["norm"],
            "eps": exact(threat["eps"]),
            "n": asked["n"],
            "model_id": record["model"]["id"],
            "created": record.get("provenance", {}).get("started")
            or time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "record": json.dumps(record, ensure_ascii=False, separators=(",", ":")),
            "outcomes": outcomes.dump(),
        }
        if not _ID.match(row["id"]):
            raise ValueError(f"result id '{row['id']}': expected 12 hexadecimal digits")
        try:
            with self._connect() as connection, connection.begin():
                connection.execute(sa.insert(_results).values(row))
        except sa.exc.IntegrityError:
            held = self._rows(sa.select(_results.c.question).where(_results.c.id == row["id"]))
            if not held or held[0].question != question:
                raise ArenaError(f"store {self.place}: result id {row['id']} is taken by another question") from None
        return str(row["id"])

    def answer(self, question: str) -> dict[str, Any] | None:
        """Return the newest record that answers a question."""
        return self._newest(_results.c.question == question)

    def get(self, wanted: str) -> dict[str, Any]:
        """Return the record with this id, or whose id alone begins with this text.

        Raises:
            ArenaError: no result (the nearest id is named) or several.
        """
        text = wanted.strip().lower()
        rows = self._rows(sa.select(_results.c.id).order_by(_results.c.number))
        ids = [r.id for r in rows]
        found = [i for i in ids if i == text] or [i for i in ids if text and i.startswith(text)]
        if len(found) > 1:
            shown = ", ".join(found[:6]) + (", ..." if len(found) > 6 else "")
            raise ArenaError(f"result '{wanted}' is ambiguous: {shown}")
        if not found:
            close = difflib.get_close_matches(text, ids, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"the newest is {ids[-1]}" if ids else "the store is empty"
            raise ArenaError(f"unknown result '{wanted}'; {hint}")
        record = self._newest(_results.c.id == found[0])
        assert record is not None
        return record

    def latest(self, **filters: Any) -> dict[str, Any] | None:
        """Return the newest record under the filters of ``all``."""
        return self._newest(*_conditions(filters))

    def all(self, **filters: Any) -> list[dict[str, Any]]:
        """Return records, oldest first.

        Filters, all optional: ``defense``, ``dataset``, ``data_sha256``, ``norm``, ``eps`` (compared exactly), ``n``,
        ``model_id``, ``question``.
        """
        found = self._rows(sa.select(_results.c.record).where(*_conditions(filters)).order_by(_results.c.number))
        return [self._read(r.record) for r in found]

    def outcomes(self, result: str) -> Outcomes:
        """Return what became of each point of the result with this full id.

        Raises:
            ArenaError: no such result.
        """
        rows = self._rows(sa.select(_results.c.outcomes).where(_results.c.id == result))
        if not rows:
            raise ArenaError(f"unknown result '{result}'")
        return Outcomes.parse(rows[0].outcomes)

    def _newest(self, *conditions: Any) -> dict[str, Any] | None:
        rows = self._rows(sa.select(_results.c.record).where(*conditions).order_by(_results.c.number.desc()).limit(1))
        return self._read(rows[0].record) if rows else None

    def _read(self, text: str) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads(text)
        except ValueError:
            raise ArenaError(f"store {self.place} is damaged (a record is no JSON); it is left as it is") from None
        return record

    def _rows(self, query: Any) -> list[Any]:
        with self._connect() as connection:
            return list(connection.execute(query))

    @contextmanager
    def _connect(self) -> Iterator[sa.Connection]:
        """Open a connection; what the database refuses becomes one line, an integrity error passes."""
        with _named(self.place), self._engine.connect() as connection:
            yield connection


def _conditions(filters: Mapping[str, Any]) -> list[Any]:
    given = {k: v for k, v in filters.items() if v is not None}
    if "eps" in given:
        given["eps"] = exact(given["eps"])
    return [_results.c[k] == v for k, v in given.items()]


def data_hash(record: Mapping[str, Any]) -> str:
    """Return the hash that makes two results' data comparable: of pixels and labels where known, else of indices."""
    asked = record["asked"]
    return str(asked.get("data_sha256") or asked["indices_sha256"])


def open_store(url: str | None = None) -> Store:
    """Open the store: ``url``, else ``ARENA_STORE``, else ``arena.db`` in the arena's folder; made when absent.

    Raises:
        ArenaError: damaged, foreign or newer than this code knows, unreachable, or a URL that cannot be read.
    """
    named = url or os.environ.get("ARENA_STORE")
    try:
        # the default is not made as text: a path may hold characters to which a URL gives meaning
        parsed = sa.make_url(named or sa.URL.create("sqlite", database=str(home() / "arena.db")))
        backend = parsed.get_backend_name()
    except (sa.exc.ArgumentError, ValueError):
        raise ArenaError("ARENA_STORE is no database URL; expected sqlite:///FILE or postgresql://HOST/NAME") from None
    if backend in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
        place = f"postgresql://{parsed.host or ''}/{parsed.database or ''}"
    elif backend == "sqlite":
        place = parsed.database or ":memory:"
    else:
        raise ArenaError(f"ARENA_STORE: unknown database '{backend}'; expected sqlite or postgresql")
    try:
        engine = sa.create_engine(parsed, connect_args={"timeout": _BUSY_SECONDS} if backend == "sqlite" else {})
    except ModuleNotFoundError:
        raise ArenaError("ARENA_STORE: PostgreSQL needs psycopg: pip install 'adversarial-arena[postgres]'") from None
    if backend == "sqlite":
        _check_file(place)
        sa.event.listen(engine, "connect", _sqlite_settings)
    store = Store(engine, place)
    try:
        _prepare(store, engine)
    except BaseException:
        engine.dispose()
        raise
    return store


def _check_file(place: str) -> None:
    """Refuse what is no file. Its content is SQLite's to judge: opening and closing the file here would drop the locks
    that another connection of this process holds on it."""
    if place != ":memory:" and Path(place).exists() and not Path(place).is_file():
        raise ArenaError(f"store {place} is not a file")


def _sqlite_settings(connection: Any, _: Any) -> None:
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout = {_BUSY_SECONDS * 1000}")
    cursor.close()


def _prepare(store: Store, engine: sa.Engine) -> None:
    """Make an empty database a store; check the version stamp of any other."""
    with _named(store.place):
        tables = set(sa.inspect(engine).get_table_names())
    if tables and "meta" not in tables and "results" not in tables and engine.dialect.name == "sqlite":
        shown = ", ".join(sorted(tables)[:3])
        raise ArenaError(f"store {store.place} is a database of something else (tables {shown})")
    if not {"meta", "results"} <= tables or not store._rows(sa.select(_meta)):
        _make(store, engine)
    stamp = {r.key: r.value for r in store._rows(sa.select(_meta))}.get("schema", "")
    if not stamp.isdigit():
        raise ArenaError(f"store {store.place} has no readable version stamp (got '{stamp}')")
    if int(stamp) > SCHEMA:
        raise ArenaError(
            f"store {store.place} has schema {stamp}, this arena knows {SCHEMA}: upgrade adversarial-arena"
        )


def _make(store: Store, engine: sa.Engine) -> None:
    """Create tables and stamp; several processes may do so at once."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            if engine.dialect.name == "sqlite":
                with engine.connect() as connection:
                    connection.exec_driver_sql("PRAGMA journal_mode = WAL")
            _tables.create_all(engine)
            with engine.begin() as connection:
                connection.execute(sa.insert(_meta).values(key="schema", value=str(SCHEMA)))
            return
        except sa.exc.IntegrityError:
            return  # another process stamped it first
        except sa.exc.DBAPIError as error:
            # changing to WAL ignores busy_timeout, and two processes may create the same table
            text = str(error.orig)
            if not ("locked" in text or "already exists" in text) or time.monotonic() > deadline:
                with _named(store.place):
                    raise
            time.sleep(0.05)


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Turn a database's complaint into one line that names the place and no credential."""
    try:
        yield
    except sa.exc.IntegrityError:
        raise
    except sa.exc.DBAPIError as error:
        text = " ".join(str(error.orig).split())
        if any(sign in text for sign in ("malformed", "not a database", "disk image", "file is encrypted")):
            raise ArenaError(f"store {place} is damaged ({text}); it is left as it is: move it away") from None
        if place.startswith("postgresql:"):  # the driver's text may name the user
            text = "not reachable, refused, or its tables are missing"
        raise ArenaError(f"store {place}: {text}") from None
