"""What matches with several workers share in tests: how they run, and what of their records may not differ."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "packages" / "cheats"))
from asking import GO

TWO = dataclasses.replace(GO, devices=("cpu", "cpu"))


def same(record: dict) -> dict:
    """Return what of a record may not depend on the workers."""
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "trace")} for row in record["attacks"]]
    rosters = [{k: v for k, v in row.items() if k not in ("seconds", "bare")} for row in record["rosters"]]
    whole = {k: record[k] for k in ("worst_case", "natural", "sweeps", "diagnosis", "cost", "notes", "stopped")}
    return {**whole, "attacks": rows, "rosters": rosters, "examples": record["examples"]["sha256"]}
