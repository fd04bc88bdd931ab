"""The active test: an adversarial example is planted at a secret place, and gradient steps must find it.

After the binarization test of Zimmermann et al. 2022 (arXiv 2206.13991): on the features of the model a new linear
readout is fitted for each point, which says 0 for many random points well inside the ball and 1 at one secret point on
its rim. So an adversarial example exists for certain; an attack that cannot find it says nothing by finding none.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from arena.auditing import thresholds as t
from arena.auditing.probing import Probe, direction
from arena.batches import pad
from arena.specs import Indicator

#: Random points inside the ball that the readout calls 0.
INNER = 96
#: They lie in a ball of this share of the radius.
DEPTH = 0.75
#: Ridge of the discriminant, as a share of the mean variance. Smaller ones lean on features that are constant inside
#: the ball, such as units that are dead there and have no gradient: at 0.001 a climb finds 28 % on `sat`, at 10 all.
RIDGE = 10.0
#: Gradient steps, and their size as a share of the radius.
STEPS, STEP = 40, 0.1


def planted(probe: Probe) -> Indicator:
    """Plant one example for each point and look how many gradient steps find.

    Points whose secret cannot be told from the inner ones by a linear readout of the features are left out.
    """
    features = Features(probe.target.model)
    s = probe.sample
    shape = tuple(s.x.shape[1:])
    readouts, thresholds, kept = [], [], []
    with torch.no_grad():
        secret = probe.noise(s, 400)
        for k in range(len(s)):
            x = s.x[k : k + 1].expand(INNER, *shape)
            rows = s.index[k].expand(INNER)
            draw = torch.arange(INNER, device=x.device)
            inner = _inside(probe, x, probe.stream.uniform(rows, 500 + draw, shape, 3))
            h = features(torch.cat((s.x[k : k + 1], inner, secret[k : k + 1])))
            _count(probe, len(h))
            readout = _separate(h[:-1], h[-1])
            highest, wanted = (h[:-1] @ readout).max(), h[-1] @ readout
            if not bool(torch.isfinite(wanted)) or not float(wanted - highest) > 1e-4 * float(h[-1].norm() + 1e-30):
                continue
            readouts.append(readout)
            thresholds.append((highest + wanted) / 2)
            kept.append(k)
    features.close()
    if len(kept) < max(1, len(s) // 4):
        return Indicator(
            "planted", False, None, t.PLANTED, f"not looked at: only {len(kept)} of {len(s)} points could be planted"
        )
    w, level, rows = torch.stack(readouts), torch.stack(thresholds), torch.tensor(kept, device=s.x.device)
    x = s.x[rows]
    found = _search(probe, x, w, level)
    lucky = _luck(probe, rows, w, level)
    value = float(found.float().mean())
    flag = value < t.PLANTED and len(kept) - int(found.sum()) >= t.FEWEST
    return Indicator(
        "planted",
        flag,
        value,
        t.PLANTED,
        f"{STEPS} gradient steps find {int(found.sum())} of {len(kept)} planted examples (as many random points find "
        f"{lucky}): gradients through this model do not lead to what is there"
        if flag
        else "",
        "attacks by gradient prove nothing here; attack without gradients: " + probe.command("square(queries=20000)")
        if flag
        else "",
    )


def _inside(probe: Probe, x: Tensor, uniform: Tensor) -> Tensor:
    """Return random points of a ball of ``DEPTH`` times the radius."""
    radius = DEPTH * probe.threat.radius
    if probe.threat.norm == "Linf":
        return (x + radius * (2 * uniform - 1)).clamp(0, 1)
    return (x + radius * direction(uniform - 0.5, probe.threat.norm)).clamp(0, 1)


def _separate(inner: Tensor, secret: Tensor) -> Tensor:
    """Return the direction (D,) of Fisher's discriminant between inner features (M, D) and the secret's (D,).

    (C'C / M + r I)^-1 d by Woodbury's identity: M is a hundred, D may be thousands.
    """
    inner, secret = inner.double(), secret.double()
    mean = inner.mean(0)
    centred, way = inner - mean, secret - mean
    m = len(inner)
    ridge = RIDGE * centred.square().mean().clamp_min(1e-30)
    gram = centred @ centred.T + m * ridge * torch.eye(m, dtype=torch.float64, device=mean.device)
    way = way - centred.T @ torch.linalg.solve(gram, centred @ way)
    return (way / way.norm().clamp_min(1e-30)).to(torch.float32)


def _score(features: Features, x: Tensor, w: Tensor, level: Tensor) -> Tensor:
    return (features(x) * w).sum(1) - level


def _search(probe: Probe, x: Tensor, w: Tensor, level: Tensor) -> Tensor:
    """Climb the planted readout; (N,) bool, found."""
    features = Features(probe.target.model)
    point, found = x, torch.zeros(len(x), dtype=torch.bool, device=x.device)
    try:
        for _ in range(STEPS + 1):
            total = torch.zeros_like(x)
            score = torch.zeros(len(x), device=x.device)
            for _ in range(probe.draws):
                with torch.enable_grad():
                    leaf = point.detach().requires_grad_()
                    value = _score(features, leaf, w, level)
                    if value.requires_grad:
                        (grad,) = torch.autograd.grad(value.sum(), leaf, allow_unused=True)
                        total += torch.zeros_like(x) if grad is None else torch.nan_to_num(grad)
                score += value.detach() / probe.draws
            _count(probe, probe.draws * len(x), probe.draws * len(x))
            found |= score > 0
            point = probe.threat.project(x, point + direction(total, probe.threat.norm) * STEP * probe.threat.radius)
    finally:
        features.close()
    return found


def _luck(probe: Probe, rows: Tensor, w: Tensor, level: Tensor) -> int:
    """Count planted examples that as many random points find."""
    features = Features(probe.target.model)
    hit = torch.zeros(len(rows), dtype=torch.bool, device=w.device)
    with torch.no_grad():
        for k in range(STEPS + 1):
            hit |= _score(features, probe.noise(probe.sample, 600 + k)[rows], w, level) > 0
            _count(probe, len(rows))
    features.close()
    return int(hit.sum())


def _count(probe: Probe, forwards: int, backwards: int = 0) -> None:
    probe.target.meter.forwards += forwards
    probe.target.meter.backwards += backwards


class Features:
    """Reads what goes into the last linear layer that a forward calls, (N, D); the logits where there is none."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._seen: Tensor | None = None
        self._handles = [m.register_forward_hook(self._hook) for m in model.modules() if isinstance(m, nn.Linear)]

    def _hook(self, _module: nn.Module, inputs: tuple[Tensor, ...], _out: Tensor) -> None:
        self._seen = inputs[0]

    def __call__(self, x: Tensor) -> Tensor:
        """Return features of images (N, C, H, W)."""
        self._seen = None
        logits: Tensor = self.model(pad(x))
        seen = self._seen
        fits = seen is not None and seen.shape[0] == logits.shape[0]
        return (seen if fits and seen is not None else logits)[: len(x)].flatten(1)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
