"""The defense check: what a model must keep to before a number about it means anything.

Each rule becomes an ``Indicator``; a broken rule that voids every number is fatal, and the match is not played.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from arena.batches import pad
from arena.datasets import SPLIT_SEED
from arena.errors import ArenaError
from arena.objectives import best_other
from arena.referee import exact
from arena.specs import Indicator
from arena.surface import Reader, Surface, selects, submodule
from arena.unread import Finding, unread

#: Images of the probe.
PROBE = 32
#: Logits of the same batch, seen again, may differ by this share of their spread (order of sums on a GPU).
DRIFT = 1e-5
#: Logits of the same row may differ by this share of their spread between neighbours (fp32 rounding).
NEIGHBOUR_TOLERANCE = 1e-4
#: Passes of the probe over which a model must stay as it is.
REPEATS = 6
#: Remedy for learned parts that the surface leaves out.
DECLARE = (
    "declare them on the surface, or in a file for --surface ([heads.NAME] path = ...), so that attacks may use them"
)


def state_hash(model: nn.Module) -> str:
    """Hash parameters, buffers and the training flag of every module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    digest.update("".join("T" if m.training else "E" for m in model.modules()).encode())
    return digest.hexdigest()


def changed_parts(model: nn.Module, before: dict[str, Tensor]) -> str:
    """Name what differs from an earlier ``state_dict`` copy, for messages."""
    now = model.state_dict()
    names = [k for k, v in before.items() if k not in now or not torch.equal(v, now[k])]
    names += [k for k in now if k not in before]
    if any(m.training for m in model.modules()):
        names.append("the training flag")
    return _list(names)


def drift(device: str | torch.device) -> float:
    """Return by what share of their spread scores of the same images may differ when they are made again.

    Nothing on the CPU; elsewhere sums may run in another order.
    """
    return 0.0 if torch.device(device).type == "cpu" else DRIFT


def came_again(now: Tensor, before: Tensor, tolerance: float) -> bool:
    """Tell whether scores (..., K) are what they were, up to a share of the spread of each K."""
    if tolerance == 0:
        return torch.equal(now, before)
    gap = (now - before).abs().amax(-1)
    return bool((gap <= tolerance * (before.amax(-1) - before.amin(-1))).all())


def check_defense(
    build: Callable[[], nn.Module], surface: Surface, x: Tensor, y: Tensor, n_classes: int
) -> tuple[int, list[Indicator]]:
    """Probe a freshly built model with clean images (N, C, H, W); return the width of its logits and the findings.

    At most ``PROBE`` images are used.

    Rules: deterministic unless declared random; a row's logits do not depend on its neighbours; eval mode, parameters
    and buffers unchanged by queries; logits, not probabilities; a gradient with respect to the image exists; the
    declared surface can be read, and leaves out no learned part.

    Raises:
        ArenaError: the model cannot be called on such images, or returns no (N, K) float tensor, or its surface does
            not fit it.
    """
    model = build().eval().requires_grad_(False)
    x, y = x[:PROBE], y[:PROBE]
    before = {k: v.detach().clone() for k, v in model.state_dict().items()}
    start = state_hash(model)
    logits = _first(model, x, n_classes)
    with Reader(model, surface) as read, exact():
        _read_alike(surface, logits, read(pad(x)).logits[: len(x)])
    selects(model, surface)
    for name, knob in surface.knobs.items():
        if not hasattr(submodule(model, knob.path), knob.attribute):
            raise ArenaError(
                f"surface: knob '{name}': '{knob.path or 'the model'}' has no attribute '{knob.attribute}'"
            )
    found = [
        *_determinism(model, surface, x, logits),
        _neighbours(model, surface, x),
        _place(model, surface, x),
        _finite(logits),
        _logits(logits),
        _gradient(model, surface, x, y),
    ]
    with exact():
        for _ in range(REPEATS):
            model(pad(x))
    same = state_hash(model) == start
    found.append(
        Indicator(
            "defense_changes",
            not same,
            evidence="" if same else f"queries alone changed {changed_parts(model, before)}",
            remedy="" if same else "make forward in eval mode free of side effects, then play again",
            fatal=not same,
        )
    )
    return logits.shape[1], [*found, *_unread(model, surface, x, logits.shape[1])]


def _first(model: nn.Module, x: Tensor, n_classes: int) -> Tensor:
    with exact():
        try:
            out = model(pad(x))
        except Exception as e:  # a defense's code: named in the one line that the user gets
            message = str(e).strip().splitlines()
            said = f"{type(e).__name__}: {message[0] if message else ''}"
            raise ArenaError(f"the model cannot be called on images {tuple(x.shape[1:])}: {said}") from e
    if not isinstance(out, Tensor) or out.ndim != 2 or not out.is_floating_point():
        got = f"{out.dtype} {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ArenaError(f"the model returns {got}, expected float logits (N, {n_classes})")
    if out.shape[1] < n_classes:
        raise ArenaError(f"the model returns {out.shape[1]} logits, the data set has {n_classes} classes")
    return out[: len(x)]


def _read_alike(surface: Surface, logits: Tensor, seen: Tensor) -> None:
    """Refuse a readout whose logits are not the model's: attacks would search on another model than is judged."""
    if surface.readout is None or surface.random:
        return
    if seen.shape != logits.shape:
        raise ArenaError(f"surface: readout gives logits {tuple(seen.shape)}, the model {tuple(logits.shape)}")
    gap = float(((seen - logits).abs().amax(1) / _spread(logits)).max())
    if gap > NEIGHBOUR_TOLERANCE:
        raise ArenaError(f"surface: readout gives other logits than the model does, by {gap:.3g} of their spread")


def _spread(logits: Tensor) -> Tensor:
    return (logits.amax(1) - logits.amin(1)).clamp_min(1e-12)


def _determinism(model: nn.Module, surface: Surface, x: Tensor, logits: Tensor) -> list[Indicator]:
    """Random models are declared, and declared ones are random: they are attacked shorter and looked at less."""
    with exact():
        others = [model(pad(x))[: len(x)] for _ in range(REPEATS)]
    gap = float(torch.stack([((z - logits).abs().amax(1) / _spread(logits)).max() for z in others]).max())
    flag = not gap <= DRIFT and not surface.random
    undeclared = Indicator(
        "undeclared_randomness",
        flag,
        gap,
        DRIFT,
        f"the same images gave logits that differ by {gap:.3g} of their spread" if flag else "",
        "declare random = true on the surface, so that outcomes are majorities and attacks average" if flag else "",
        fatal=flag,
    )
    idle = surface.random and gap <= DRIFT
    return [
        undeclared,
        Indicator(
            "idle_randomness",
            idle,
            gap,
            DRIFT,
            f"declared random, but the same images gave the same logits {REPEATS + 1} times" if idle else "",
            "leave random out of the surface: random models are attacked shorter and looked at less" if idle else "",
        ),
    ]


def _neighbours(model: nn.Module, surface: Surface, x: Tensor) -> Indicator:
    """Same shape, same row, other neighbours."""
    if surface.random:
        return Indicator("depends_on_neighbours", False, evidence="not checked: the model is random")
    rows = pad(x)
    others = torch.rand(rows.shape, generator=torch.Generator().manual_seed(SPLIT_SEED)).to(rows.device)
    gap = 0.0
    with exact():
        usual = model(rows)
        for k in range(0, len(x), max(1, len(x) // 4)):
            mixed = others.clone()
            mixed[k] = rows[k]
            seen = float((model(mixed)[k] - usual[k]).abs().max() / _spread(usual[k : k + 1])[0])
            gap = seen if not seen <= gap else gap  # NaN stays
    flag = not gap <= NEIGHBOUR_TOLERANCE
    return Indicator(
        "depends_on_neighbours",
        flag,
        gap,
        NEIGHBOUR_TOLERANCE,
        f"other images in the batch moved a row's logits by {gap:.3g} of their spread" if flag else "",
        "score each image by itself (batch statistics at test time are the usual cause)" if flag else "",
        fatal=flag,
    )


def _place(model: nn.Module, surface: Surface, x: Tensor) -> Indicator:
    """Tell whether a row's last bits depend on its place in the batch: no flag, but outcomes may then move a little.

    Linear layers whose input width is no multiple of 4 do so on some CPUs.
    """
    gap = 0.0
    if not surface.random:
        with exact():
            rows = pad(x)
            gap = float((model(rows.flip(0)).flip(0) - model(rows)).abs().max())
    return Indicator(
        "depends_on_place",
        False,
        gap,
        None,
        "the last bits of a row's logits depend on its place in the batch: outcomes of points near the boundary may "
        "change with the batch size"
        if gap > 0
        else "",
    )


def _finite(logits: Tensor) -> Indicator:
    flag = not bool(torch.isfinite(logits).all())
    return Indicator(
        "nonfinite_logits",
        flag,
        evidence="the logits of clean images are not finite" if flag else "",
        remedy="make forward finite on the whole box [0, 1]" if flag else "",
        fatal=flag,
    )


def _logits(logits: Tensor) -> Indicator:
    total = logits.sum(1)
    flag = bool((logits >= 0).all()) and bool(((total - 1).abs() < 1e-3).all()) and logits.shape[1] > 1
    return Indicator(
        "probabilities",
        flag,
        evidence="the rows of the output are non-negative and sum to 1: probabilities, not logits" if flag else "",
        remedy="return the scores before the softmax: it flattens the gradients of every loss" if flag else "",
    )


def _gradient(model: nn.Module, surface: Surface, x: Tensor, y: Tensor) -> Indicator:
    leaf = pad(x).detach().requires_grad_(True)
    why = ""
    share = 1.0
    try:
        out = model(leaf)
        if not out.requires_grad:
            why, share = "the logits carry no gradient with respect to the image", 1.0
        else:
            labels = pad(y)
            lead = (best_other(out, labels) - out.gather(1, labels.view(-1, 1)).squeeze(1)).sum()
            grad = torch.autograd.grad(lead, leaf, allow_unused=True)[0]
            if grad is None:
                why = "the logits do not depend on the image through differentiable operations"
            else:
                share = float((grad[: len(x)].flatten(1).abs().amax(1) == 0).float().mean())
                if share > 0.5:
                    why = f"{share:.0%} of the probe's gradients are exactly zero"
                elif not bool(torch.isfinite(grad).all()):
                    why = "the probe's gradients are not finite"
    except Exception as e:  # a defense's code: what it raised is the finding
        why = f"the gradient raised {type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}"
    return Indicator(
        "no_gradient",
        bool(why),
        share if why else None,
        0.5,
        why,
        "gradient attacks are blind here: play black-box ones too (square), or attack a differentiable stand-in"
        if why
        else "",
    )


def _unread(model: nn.Module, surface: Surface, x: Tensor, n_classes: int) -> list[Indicator]:
    """Name learned parts that the surface leaves out.

    Undeclared scores and choices are a flag: attacks cannot use them. Parameters on which nothing depends at test time
    are none: they give an attacker nothing either.
    """
    try:
        found = unread(model, surface, x, n_classes)
    except Exception as e:  # no reason to stop, but what cannot be looked at is a doubt
        said = f"not checked: {type(e).__name__}: {(str(e).splitlines() or [''])[0]}"
        return [
            Indicator(
                "undeclared_parts",
                True,
                evidence=said,
                remedy="give the model as plain modules that take forward hooks",
            ),
            Indicator("unread_parameters", False, evidence=said),
        ]
    hidden = [f for f in found if f.kind != "parameters"]
    idle = [f for f in found if f.kind == "parameters"]
    numbers = sum(f.numbers for f in idle)
    return [
        Indicator(
            "undeclared_parts",
            bool(hidden),
            len(hidden),
            0,
            _list([_told(f) for f in hidden]),
            DECLARE if hidden else "",
        ),
        Indicator(
            "unread_parameters",
            False,
            numbers,
            None,
            f"{numbers} parameters change no logits and nothing that is declared: {_list([f.path for f in idle])}"
            if idle
            else "",
        ),
    ]


def _told(finding: Finding) -> str:
    if finding.kind == "selection":
        return f"'{finding.path}' is a Select and no declared selection"
    call = f" (call {finding.call})" if finding.call else ""
    part = "" if finding.output is None else f" (output {finding.output!r})"
    return (
        f"'{finding.path}'{call}{part} gives learned scores of the classes and is no declared head: on "
        f"{finding.agrees:.0%} of the probe they name the class that the logits do"
    )


def _list(texts: list[str]) -> str:
    return ", ".join(texts[:3]) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
