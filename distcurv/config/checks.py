"""What settings are checked with: one form of error message, and what counts as a number."""

from __future__ import annotations

import math

from distcurv.errors import ConfigError


def require(ok: bool, owner: object, field: str, want: str) -> None:
    """Raise `ConfigError` naming ``owner``'s ``field`` and its value unless ``ok``."""
    if not ok:
        value = getattr(owner, field)
        raise ConfigError(f"{type(owner).__name__}.{field} is {value!r}: {want}")


def is_int(value: object) -> bool:
    """Whether a setting is a whole number (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a setting is a finite real number."""
    return (is_int(value) or isinstance(value, float)) and math.isfinite(value)  # type: ignore[arg-type]


def is_positive(value: object) -> bool:
    """Whether a setting is a finite real number > 0."""
    return is_number(value) and value > 0  # type: ignore[operator]


def is_count(value: object) -> bool:
    """Whether a setting is a whole number >= 1."""
    return is_int(value) and value >= 1  # type: ignore[operator]
