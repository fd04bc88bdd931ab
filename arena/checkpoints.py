"""Weights on disk and the identity of a model: no pickle is ever executed, and what does not fit is named."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_safetensors
from safetensors.torch import save as make_safetensors
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from arena.errors import ArenaError, nearest
from arena.home import atomic_write
from arena.surface import WRAPPERS

Weights = dict[str, Tensor]


def write_weights(path: Path, weights: Mapping[str, Tensor]) -> str:
    """Write a state dict as safetensors, atomically; returns the file's sha256."""
    data = make_safetensors({k: v.detach().cpu().contiguous().clone() for k, v in weights.items()})
    atomic_write(path, data)
    return hashlib.sha256(data).hexdigest()


def read_weights(path: Path) -> Weights:
    """Read a state dict from safetensors, or from a torch file with ``weights_only=True``.

    A torch file may hold the state dict under ``state_dict``, ``model_state_dict``, ``model`` or ``net``.

    Raises:
        ArenaError: no such file, unreadable, or no state dict inside.
    """
    where = f"checkpoint '{path}'"
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArenaError(f"{where}: no such file") from None
    except OSError as e:
        raise ArenaError(f"{where}: cannot be read ({e.strerror or e})") from None
    try:
        found: Any = read_safetensors(data)
    except SafetensorError as e:
        # A torch file starts as a zip archive or, in the old format, as a pickle.
        if data[:2] not in (b"PK", b"\x80\x02"):
            raise ArenaError(f"{where}: neither safetensors nor a torch file ({_line(e)})") from None
        try:
            found = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as e2:
            raise ArenaError(f"{where}: cannot be read as weights only ({_line(e2)})") from None
    if isinstance(found, Mapping):
        for key in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(found.get(key), Mapping):
                found = found[key]
                break
    if not isinstance(found, Mapping) or not all(isinstance(v, Tensor) for v in found.values()):
        got = type(found).__name__ if not isinstance(found, Mapping) else f"a dict of {', '.join(list(found)[:4])}"
        raise ArenaError(f"{where}: expected a state dict of tensors, got {got}")
    return {str(k): v for k, v in found.items()}


def load_weights(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Load a state dict strictly; wrappers' prefixes (``module.``, ``_orig_mod.``) are dropped where that helps.

    Raises:
        ArenaError: the weights are another architecture's; names the first differing key and how many differ, or a
            value that is not finite.
    """
    expected = model.state_dict()
    given = dict(weights)
    if not set(given) & set(expected):
        given = {_bare(k): v for k, v in given.items()}
    problems = [f"lacks '{k}' {tuple(v.shape)}{nearest(k, given)}" for k, v in expected.items() if k not in given]
    problems += [
        f"'{k}' is {tuple(given[k].shape)}, the model's is {tuple(v.shape)}"
        for k, v in expected.items()
        if k in given and given[k].shape != v.shape
    ]
    problems += [f"'{k}' {tuple(given[k].shape)} is not in the model" for k in given if k not in expected]
    if problems:
        count = f" ({len(problems)} differences in {len(expected)} tensors)" if len(problems) > 1 else ""
        raise ArenaError(f"{where}: another architecture's weights: {problems[0]}{count}")
    for key, value in given.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ArenaError(f"{where}: '{key}' holds values that are not finite")
    model.load_state_dict(given, strict=True)


def _bare(key: str) -> str:
    parts = key.split(".")
    while len(parts) > 1 and parts[0] in WRAPPERS:
        parts = parts[1:]
    return ".".join(parts)


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return text[0][:160] if text else type(error).__name__


def snapshot(model: nn.Module) -> Weights:
    """Copy every parameter and buffer, those that a state dict leaves out included, to the CPU.

    Raises:
        ArenaError: a parameter of a lazy module that has not seen a batch yet.
    """
    return {name: tensor.detach().cpu().clone() for name, tensor in _tensors(model).items()}


def restore(model: nn.Module, weights: Mapping[str, Tensor], where: str) -> None:
    """Copy a ``snapshot`` into a model made by the same factory.

    Raises:
        ArenaError: the factory made another architecture this time.
    """
    tensors = _tensors(model)
    odd = [k for k in {**tensors, **weights} if k not in weights or k not in tensors]
    odd += [k for k in tensors if k in weights and tensors[k].shape != weights[k].shape]
    if odd:
        raise ArenaError(f"{where}: builds another architecture each time ('{odd[0]}' differs)")
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    found = dict(model.named_parameters(remove_duplicate=False))
    lazy = [k for k, v in found.items() if is_lazy(v)]
    if lazy:
        raise ArenaError(f"the model's parameter '{lazy[0]}' has no shape yet: run a lazy module once in its factory")
    return {**found, **dict(model.named_buffers(remove_duplicate=False))}


def model_id(model: nn.Module, *spec: str) -> str:
    """Return the model's identity: sha256 over sorted (name, dtype, shape, little-endian bytes) of parameters and
    buffers, then over the texts ``spec`` (spec identity, options, eval options, hashes of sources)."""
    digest = hashlib.sha256()
    tensors = _tensors(model)
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\n{str(tensor.dtype).removeprefix('torch.')}\n{tuple(tensor.shape)}\n".encode())
        digest.update(little_endian(tensor))
    for part in spec:
        digest.update(f"\n{part}".encode())
    return digest.hexdigest()


def little_endian(tensor: Tensor) -> bytes:
    """Return a tensor's bytes, least significant first on every machine."""
    import sys

    raw = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else None
    if raw is None:
        return b""
    size = tensor.element_size()
    if sys.byteorder == "big" and size > 1:
        raw = raw.reshape(-1, size)[:, ::-1]
    return bytes(raw.tobytes())
