"""Intervals over members: the independent units of a sweep, as heads of one network are not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student

CONFIDENCE = 0.9


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean of members' values and its 90% Student-t interval over members; NaN limits below two members."""
    array = np.asarray([value for value in values if np.isfinite(value)], dtype=float)
    if array.size == 0:
        return math.nan, math.nan, math.nan
    if array.size == 1:
        return float(array[0]), math.nan, math.nan
    reach = student.ppf((1 + CONFIDENCE) / 2, array.size - 1) * array.std(ddof=1) / math.sqrt(array.size)
    return float(array.mean()), float(array.mean() - reach), float(array.mean() + reach)


def log_mean_interval(times: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of members' times and its 90% interval, Student t over members in log time."""
    low_mid_high = mean_interval([math.log(time) for time in times if time > 0])
    return tuple(math.exp(value) for value in low_mid_high)  # type: ignore[return-value]
