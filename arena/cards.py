"""Match cards: one match, or a grid of them, as TOML.

    [match]                                  # the question; all keys of 'arena match' may stand here
    vs = ["autoattack", "adaptive"]          # or one text, "autoattack,adaptive"; the default
    dataset = "digits"
    backbone = "cnn"
    norm = "Linf"
    eps = "8/255"                            # text, or a number
    n = 500
    protocol = "standard"                    # or "paper", whose default vs is ["papers"]
    seed = 0
    train_seed = 0
    checkpoint = "weights.safetensors"       # paths are relative to the card
    surface = "surface.toml"
    budget = 4000                            # passes an example a roster may cost

    [grid]                                   # every combination is played, the first key slowest
    defenses = ["rt", "sat", "fgaa_sat(lam=1)"]
    datasets = ["digits", "npz:my.npz"]
    backbones = ["cnn", "resnet_small"]
    eps = ["0.1", "0.2"]
    seeds = [0, 1]
    train_seeds = [0, 1, 2]

    [run]                                    # changes no outcome
    device = "auto"
    devices = "0,1"                          # or "cpu,cpu"; without device
    engine = "ray"                           # without devices; ray_address and workers as on the command line
    batch_size = 64
    replay = false
    retrain = false
    matrix = false
    audit = "normal"                         # or "deep", "none"
    time_limit = "10m"                       # of each match

``defense = "NAME"`` in ``[match]`` serves a card with one defense. A key may stand in ``[match]`` or, in its plural, in
``[grid]``, not in both. All errors of a card are told at once, each with its key path and the nearest valid key.
"""

from __future__ import annotations

import itertools
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from arena.entries import split
from arena.errors import ArenaError, nearest
from arena.limit import seconds_of
from arena.question import PROTOCOLS, Question, Running

Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1)]
Whole = Annotated[list[int], Field(min_length=1)]
Radius = Text | int | float


class _Table(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Match(_Table):
    defense: Text | None = None
    vs: Text | Texts | None = None
    dataset: Text | None = None
    backbone: Text | None = None
    norm: Text | None = None
    eps: Radius | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    seed: int | None = None
    train_seed: int | None = None
    train_norm: Text | None = None
    train_eps: Radius | None = None
    checkpoint: Text | None = None
    surface: Text | None = None
    budget: Annotated[int, Field(ge=1)] | None = None
    protocol: Literal["standard", "paper"] | None = None


class _Grid(_Table):
    defenses: Texts | None = None
    datasets: Texts | None = None
    backbones: Texts | None = None
    eps: Annotated[list[Radius], Field(min_length=1)] | None = None
    seeds: Whole | None = None
    train_seeds: Whole | None = None


class _Run(_Table):
    device: Text | None = None
    devices: Text | None = None
    engine: Literal["local", "ray"] | None = None
    ray_address: Text | None = None
    workers: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1)] | None = None
    replay: bool | None = None
    retrain: bool | None = None
    audit: Literal["normal", "deep", "none"] | None = None
    matrix: bool | None = None
    time_limit: Text | int | float | None = None


class _Card(_Table):
    match: _Match = _Match()
    grid: _Grid = _Grid()
    run: _Run = _Run()


_TABLES: dict[str, type[_Table]] = {"match": _Match, "grid": _Grid, "run": _Run}
#: Key of ``[grid]`` and the field of a question that it fills.
_AXES = {
    "defenses": "defense",
    "datasets": "dataset",
    "backbones": "backbone",
    "eps": "eps",
    "seeds": "seed",
    "train_seeds": "train_seed",
}


@dataclass(frozen=True)
class Card:
    """A card, checked."""

    questions: tuple[Question, ...]
    """In the order of play."""
    running: Running


def read_card(path: Path, overrides: Mapping[str, Any] | None = None) -> Card:
    """Read a card; ``overrides`` are fields of ``Question`` and ``Running`` that win over it.

    Raises:
        ArenaError: missing file, broken TOML, or bad keys and values: all of them in one message.
    """
    try:
        with path.open("rb") as file:
            data = tomllib.load(file)
    except OSError as error:
        raise ArenaError(f"card {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ArenaError(f"card {path}: no TOML ({error})") from None
    problems: list[str] = []
    try:
        card = _Card.model_validate(data)
    except ValidationError as error:
        problems = list(dict.fromkeys(_explain(e) for e in error.errors()))
        card = _Card()
    problems += _contradictions(data)
    try:
        limit = None if card.run.time_limit is None else seconds_of(card.run.time_limit)
    except ArenaError as error:
        problems.append(f"run.time_limit:{str(error).partition(':')[2]}, got {_shown(card.run.time_limit)}")
    if problems:
        count = f"{len(problems)} errors: " if len(problems) > 1 else ""
        raise ArenaError(f"card {path}: {count}{'; '.join(problems)}")
    return _expand(path, card, {"time_limit": limit, **(overrides or {})})


def _explain(error: Any) -> str:
    """Turn one of pydantic's errors into ``key path: what is wrong``."""
    where = [str(p) for p in error["loc"] if not str(p).startswith(("constrained-", "list["))]
    table = where[0] if where else ""
    if error["type"] == "extra_forbidden":
        known = list(_TABLES[table].model_fields) if len(where) > 1 else [*_TABLES]
        hint = nearest(where[-1], known) or _elsewhere(where[-1]) or f"; known: {', '.join(known)}"
        return f"{'.'.join(where)}: unknown key{hint}"
    if len(where) == 1:
        return f"{table}: expected a table [{table}], got {_shown(error['input'])}"
    named = [w for w in where[:2] if w]
    rest = [f"[{w}]" for w in where[2:] if w.isdigit()]
    return f"{'.'.join(named)}{''.join(rest)}: {_expected(named)}, got {_shown(error['input'])}"


def _elsewhere(key: str) -> str:
    """Say in which table a key would be right: the key may be good and the table wrong."""
    homes = {name: f"{table}.{name}" for table, model in _TABLES.items() for name in model.model_fields}
    close = nearest(key, homes)
    return next((f"; did you mean '{full}'?" for name, full in homes.items() if f"'{name}'" in close), "")


_WHOLE = ("n", "batch_size", "budget", "workers")


def _expected(where: Sequence[str]) -> str:
    table, key = where
    if table == "grid":
        inner = "whole numbers" if key.endswith("seeds") else "texts or numbers" if key == "eps" else "texts"
        return f"expected a list of {inner}, at least one"
    if key == "vs":
        return "expected a text or a list of texts, at least one"
    if key == "eps":
        return "expected a text or a number"
    if key in _WHOLE:
        return "expected a whole number of at least 1"
    if key.endswith("seed"):
        return "expected a whole number"
    if key == "protocol":
        return f"expected {' or '.join(PROTOCOLS)}"
    if key == "time_limit":
        return "expected a time such as 90, 90s, 10m or 1h30m"
    if key == "engine":
        return "expected local or ray"
    if key == "audit":
        return "expected normal, deep or none"
    return "expected true or false" if key in ("replay", "retrain", "matrix") else "expected a text"


def _shown(value: Any) -> str:
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 40 else text[:37] + "..."


def _contradictions(data: Mapping[str, Any]) -> list[str]:
    """Find keys that are given in both tables, and a card without a defense."""
    tables = [data.get(t) for t in ("match", "grid")]
    match, grid = (t if isinstance(t, dict) else {} for t in tables)
    found = [
        f"match.{one} and grid.{many} are both given" for many, one in _AXES.items() if many in grid and one in match
    ]
    if "defenses" not in grid and "defense" not in match:
        found.append('grid.defenses: missing; name the defenses, such as defenses = ["sat"]')
    return found


def _expand(path: Path, card: _Card, overrides: dict[str, Any]) -> Card:
    base = {k: v for k, v in card.match.model_dump().items() if v is not None}
    axes = {_AXES[k]: v for k, v in card.grid.model_dump().items() if v is not None}
    for key in ("checkpoint", "surface"):
        if key in base:
            base[key] = path.parent / Path(base[key]).expanduser()
    run = {k: v for k, v in card.run.model_dump().items() if v is not None}
    if "devices" in run:
        run["devices"] = tuple(run["devices"].split(","))
    running = Running(**run)
    how = {k: overrides.pop(k) for k in [*overrides] if k in Running.__dataclass_fields__}
    base |= overrides
    axes = {k: v for k, v in axes.items() if k not in overrides}
    vs = base.pop("vs", PROTOCOLS[base.get("protocol", "standard")])
    base["vs"] = tuple(split(vs) if isinstance(vs, str) else (part for text in vs for part in split(text)))
    questions = []
    for values in itertools.product(*axes.values()):
        made = {**base, **dict(zip(axes, values, strict=True)), "card": path.name}
        made |= {k: str(made[k]) for k in ("eps", "train_eps") if k in made}
        questions.append(Question(**made))
    return Card(tuple(dict.fromkeys(questions)), replace(running, **how))


def name_question(question: Question) -> str:
    """Name a question of a card by what tells it from its neighbours."""
    words = [question.defense, question.dataset, question.backbone or ""]
    words += [f"eps {question.eps}" if question.eps else "", f"seed {question.seed}" if question.seed else ""]
    words.append(f"train seed {question.train_seed}" if question.train_seed else "")
    return " · ".join(w for w in words if w)
