"""Cells and settings of the ensembles' benchmark as nobody measured them."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from ensemble import games

SETTINGS = {
    "cases": ("cnn", "sharp"),
    "seeds": (0, 1),
    "n": 8,
    "cifar": None,
    "cifar_n": 4,
    "fast": "staged",
    "full": "autoattack",
    "bf16": False,
    "compile": False,
    "devices": (),
    "frontier": ("apgd_ce(steps=10)",),
    "pairs": 2,
    "threads": (1,),
    "members": ("cnn",),
    "overhead": ("cnn",),
    "overhead_n": (6, 7),
    "steps": 100,
    "queries": 5000,
    "parts": ("runs", "members", "overhead", "frontier"),
}


def cell(broken=(), forwards=80, backwards=40, seconds=2.0, n=8, wrong=()):
    natural, fallen = torch.ones(n, dtype=torch.bool), torch.zeros(n, dtype=torch.bool)
    natural[list(wrong)] = False
    fallen[list(broken)] = True
    more = {"bare": seconds / 2, "whole": seconds + 1, "cpu": seconds, "threads": 1, "batch_size": 8}
    known = {"load": 0.0, "date": "2026-11-20", "arena": "0", "torch": "1", "violations": {}}
    passes = {"forwards": forwards, "backwards": backwards, "seconds": seconds}
    return {**games.masks(natural, fallen), **passes, **more, **known}
