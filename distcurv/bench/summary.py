"""What is said of a list of measured numbers: the middle, the tail and the spread."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

Summary = dict[str, float | int]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least ``share`` (0..1) of all values do not exceed."""
    ordered = sorted(values)
    index = min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))
    return ordered[index]


def times(values: Sequence[float]) -> Summary:
    """Mean, median, 99th percentile, extremes and number of single times."""
    return {
        "mean": fmean(values),
        "median": median(values),
        "p99": percentile(values, 0.99),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }


def spread(values: Sequence[float]) -> Summary:
    """The median over repetitions, between their extremes."""
    return {
        "median": median(values),
        "min": min(values),
        "max": max(values),
        "n": len(values),
    }
