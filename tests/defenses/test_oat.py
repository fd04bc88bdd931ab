"""OAT: norms and FiLM by hand; lambda as a knob; the loss by hand; any draw of lambdas trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from arena_defenses import oat
from arena_defenses.backbones import resnet_small
from torch import nn

from arena.errors import ArenaError
from arena.inner import start_point
from arena.plugins import registry
from arena.specs import Preset, complete
from arena.surface import submodule

sys.path.insert(0, str(Path(__file__).parent))
from conditional import THREAT, batch, context, scrambled, small


def film_by_hand() -> tuple[oat.Conditioned, oat.Condition]:
    """BN_c is x, BN_a is 10 x; FiLM's second layer gives scale 3 and shift -1, before the LeakyReLU."""
    condition = oat.Condition()
    module = oat.Conditioned(nn.BatchNorm2d(1, eps=0.0), condition, film=True).eval()
    nn.init.constant_(module.attacked.weight, 10.0)
    assert module.film is not None
    nn.init.zeros_(module.film[2].weight)
    module.film[2].bias.data = torch.tensor([3.0, -1.0])
    condition.code = torch.zeros(1, oat.CODE)
    return module, condition


def test_film_and_the_two_norms_by_hand():
    module, condition = film_by_hand()
    a = torch.tensor([2.0, 2.0]).view(2, 1, 1, 1)
    for clean, expected in ((0, [59.99, 59.99]), (1, [5.99, 59.99]), (2, [5.99, 5.99])):
        condition.clean = clean
        torch.testing.assert_close(module(a).flatten(), torch.tensor(expected))
    bare = oat.Conditioned(nn.BatchNorm2d(1, eps=0.0), condition, film=False).eval()
    assert torch.equal(bare(a), a)
    assert bare.film is None


def test_film_uses_each_rows_own_code():
    module, condition = film_by_hand()
    assert module.film is not None
    nn.init.normal_(module.film[2].weight)
    condition.code, condition.clean = torch.randn(2, oat.CODE), 0
    a = torch.ones(2, 1, 1, 1)
    both = module(a)
    for row in (0, 1):
        condition.code, code = condition.code[row : row + 1], condition.code
        torch.testing.assert_close(module(a[row : row + 1]), both[row : row + 1])
        condition.code = code
    assert not torch.allclose(both[0], both[1])


def test_shortcuts_have_no_film_and_the_matrix_is_saved():
    model = small(oat, resnet_small)
    film = {p: m.film is not None for p, m in model.named_modules() if isinstance(m, oat.Conditioned)}
    assert len(film) > 4
    assert all(has == ("shortcut" not in p) for p, has in film.items())
    assert not all(film.values())
    matrix = model.state_dict()["encoding"]
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(128), atol=1e-5, rtol=0)


def test_lambda_is_a_knob_at_test_time():
    model = scrambled(small(oat)).eval()
    x, _ = batch()
    seen = []
    with torch.no_grad():
        for lam in oat.LAMBDAS:
            oat.apply(model, lam=f"{lam:g}")
            seen.append(model(x))
            with oat.conditioned(model, torch.full((12,), len(seen) - 1)):
                torch.testing.assert_close(model(x), seen[-1])
    for i, a in enumerate(seen):
        assert all(not torch.allclose(a, b) for b in seen[:i])
    declared = oat.surface(model)
    assert getattr(submodule(model, declared.knobs["lam"].path), "lam") == 1.0  # noqa: B009
    assert declared.knobs["lam"].values == oat.LAMBDAS
    spec = registry().get("defense", "oat_sat").spec
    assert complete("oat_sat", spec.eval_options, {"lam": 0.2}) == {"lam": "0.2"}
    with pytest.raises(ArenaError, match=r"'lam': expected 0 or 0.1 or 0.2 or 0.3 or 0.4 or 1, got '0.5'"):
        complete("oat_sat", spec.eval_options, {"lam": 0.5})


def test_only_lambda_zero_uses_the_clean_norm():
    model = scrambled(small(oat)).eval()
    x, _ = batch()
    logits = {lam: model(x) for model.lam in oat.LAMBDAS for lam in (model.lam,)}
    for m in model.modules():
        if isinstance(m, oat.Conditioned):
            m.clean.running_mean.add_(1.0)
    for lam, old in logits.items():
        model.lam = lam
        assert torch.allclose(model(x), old) == (lam != 0)


def test_rows_must_be_sorted():
    model = small(oat)
    with pytest.raises(ValueError, match="come first"), oat.conditioned(model, torch.tensor([1, 0])):
        pass


def test_the_loss_by_hand():
    """In eval mode rows do not meet, so each row's loss can be worked out alone; no steps: the start is the attack."""
    model = scrambled(small(oat)).eval()
    preset = Preset(1, steps=0)
    x, y = batch(6)
    rows = torch.tensor([3, 0, 5, 0, 1, 2])
    order = [1, 3, 0, 2, 4, 5]
    got, log = oat.OnceForAll().given(model, x, y, context(model, preset), rows)
    x_adv = x.clone()
    x_adv[order[2:]] = start_point(x[order[2:]], THREAT, "uniform", torch.Generator().manual_seed(2))
    total = torch.zeros(())
    for i in range(6):
        lam = model.lam = oat.LAMBDAS[rows[i]]
        clean, attacked = (F.cross_entropy(model(p[i : i + 1]), y[i : i + 1]) for p in (x, x_adv))
        total = total + (1 - lam) * clean + lam * attacked
    torch.testing.assert_close(got, total / 6)
    assert set(log) == {"clean", "attacked"}


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 0, 0], [5, 5, 4, 5], [0, 0, 5, 0]])
def test_any_draw_trains(rows):
    model = small(oat).train()
    x, y = batch(4)
    loss, _ = oat.OnceForAll().given(model, x, y, context(model), torch.tensor(rows))
    loss.backward()
    assert torch.isfinite(loss)
    norm = model.body.block1.norm
    zeros = rows.count(0)
    assert (norm.clean.weight.grad is not None) == (zeros > 1)
    assert (norm.attacked.weight.grad is not None) == (zeros < 4)
    assert norm.film[0].weight.grad.abs().sum() > 0
    assert all(m.training for m in model.modules())
    assert model.rows is None
