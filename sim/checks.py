"""Checks of configs: one line that names the field, the value and what is allowed, before any work starts."""

from __future__ import annotations

import math
from collections.abc import Collection


def require(allowed: bool, name: str, value: object, condition: str) -> None:
    """Raise a ValueError of one line unless `allowed`: the field, its value, what it must be."""
    if not allowed:
        raise ValueError(f"{name}: {value!r} is not allowed; it must be {condition}")


def require_number(name: str, value: object) -> None:
    """Require a finite real number."""
    number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    require(number, name, value, "a finite number")


def require_one_of(name: str, value: object, allowed: Collection[object]) -> None:
    """Require one of the values listed."""
    require(value in allowed, name, value, "one of " + ", ".join(map(repr, allowed)))
