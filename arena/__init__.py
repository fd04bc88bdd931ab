"""Where defenses against adversarial examples are put to the test."""

from __future__ import annotations

__version__ = "0.1.0"
