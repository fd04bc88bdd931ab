"""A GPU that is pretended: tensors that were sent there meet no others, as on a real one, and numpy does not take them.

Their numbers lie on the CPU all the same, so that code for a GPU is played where there is none. Not pretended are
speed, rounding, graphs, generators, and a model's own weights: parameters, the buffers of a module that was sent there,
and what is made of these alone, are taken for being wherever they are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda", 0)
#: What may be given tensors of both places: these move or index.
MAY_MIX = {"copy_", "to", "__getitem__", "__set__"}
#: What a tensor has to leave the GPU for.
TO_NUMPY = {"numpy", "__array__", "__array_wrap__"}


class OnGpu(torch.Tensor):
    """A tensor on the pretended GPU."""


def _was_sent(tensor: Any) -> bool:
    """Tell whether a tensor is a module's that was sent to the GPU, or was made of such alone."""
    return getattr(tensor, "_anywhere", False)


def _anywhere(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or _was_sent(tensor)


def _place(value: Any) -> torch.device | None:
    """Return the device that a value names, if it names one."""
    if isinstance(value, torch.Tensor):
        return GPU if isinstance(value, OnGpu) else torch.device("cpu")
    if isinstance(value, str | torch.device):
        return torch.device(value)
    return None


def _sent(tensors: Any, there: bool) -> Any:
    def send(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or isinstance(value, OnGpu) == there:
            return value
        return value.as_subclass(OnGpu if there else torch.Tensor)

    return tree_map(send, tensors)


class _Pretending(TorchFunctionMode):
    def __torch_function__(self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", str(function))
        owner = getattr(getattr(function, "__self__", None), "__name__", "")  # of a property: the name is __get__
        first = args[0] if args else None
        if name == "__get__" and owner in ("device", "is_cuda") and (isinstance(first, OnGpu) or _was_sent(first)):
            return GPU if owner == "device" else True
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        on_gpu = any(isinstance(t, OnGpu) for t in tensors)
        if name in TO_NUMPY and isinstance(first, OnGpu):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first")
        wanted = None
        if name in ("to", "cuda", "cpu"):
            places = [p for p in map(_place, args[1:]) if p is not None] or [_place(kwargs.get("device"))]
            wanted = {"cuda": GPU, "cpu": torch.device("cpu")}.get(name) or places[0]
            args = (first, *(_there(a) for a in args[1:]))
            function = torch.Tensor.to if name == "cuda" else function
            args = (first, "cpu") if name == "cuda" else args
        elif kwargs.get("device") is not None:
            wanted = torch.device(kwargs["device"])
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if wanted is None and on_gpu:
            self._check(name, tensors, first)
        with torch._C.DisableTorchFunctionSubclass():
            made = function(*args, **kwargs)
        if name == "__set__" or name == "__setitem__":
            return made
        there = on_gpu if wanted is None else wanted.type == "cuda"
        made = _sent(made, there)
        if not there and any(map(_anywhere, tensors)):
            for part in tree_leaves(made):
                if isinstance(part, torch.Tensor):
                    part._anywhere = True
        return made

    @staticmethod
    def _check(name: str, tensors: list[torch.Tensor], first: Any) -> None:
        others = [t for t in tensors if not isinstance(t, OnGpu) and t.dim() and not _anywhere(t)]
        if name == "__setitem__" and isinstance(first, OnGpu):
            others = [t for t in others if t is tensors[-1]]  # the value; indices may lie on the CPU
        elif name in MAY_MIX and (name != "__getitem__" or isinstance(first, OnGpu)):
            return
        if others:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found at least two, cuda:0 and cpu! ({name})"
            )


def _there(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, str | torch.device) else value


def _module_to(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    places = [p for p in (*map(_place, args), _place(kwargs.get("device"))) if p is not None]
    if places and places[0].type == "cuda":
        for part in (*self.parameters(), *self.buffers()):
            part._anywhere = True
        return self
    return _to(self, *args, **kwargs)


def _autocast(device_type: str, *args: Any, **kwargs: Any) -> Any:
    return _real_autocast("cpu" if device_type == "cuda" else device_type, *args, **kwargs)


_to, _real_autocast = nn.Module.to, torch.autocast


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that the machine has one GPU."""
    with (
        mock.patch.multiple(
            torch.cuda,
            is_available=lambda: True,
            device_count=lambda: 1,
            synchronize=lambda device=None: None,
            mem_get_info=lambda device=None: (2**33, 2**33),
            get_device_name=lambda device=None: "a pretended GPU",
            empty_cache=lambda: None,
            get_rng_state=lambda device=None: torch.get_rng_state(),
            set_rng_state=lambda state, device=None: None,
        ),
        mock.patch.object(torch, "autocast", _autocast),
        mock.patch.object(nn.Module, "to", _module_to),
        _Pretending(),
    ):
        yield
